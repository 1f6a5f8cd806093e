"""Models for tests that are trained in a moment: further choices of `lab.models.train --config`."""

from __future__ import annotations

from lab.models.autoencoder import AutoencoderConfig
from lab.models.data_moving import FRAMES
from lab.models.dit import DiTConfig
from lab.models.train import CONFIGS, TrainConfig
from lab.models.unet import UNetConfig

FEW = {"batch": 4, "per_class": 2}
FLOW = {"prediction": "flow", "schedule": "flow", **FEW}
UNET = {"model_channels": 32, "channel_mult": (1, 1), "num_res_blocks": (1, 1)}
DIT = {"width": 32, "heads": 2, "double": 1, "single": 1, "context_dim": 16}

CONFIGS |= {
    "tiny": TrainConfig(UNetConfig(**UNET, transformer_depth=(0, 1)), **FEW),
    "tiny-lab": TrainConfig(
        UNetConfig(in_channels=4, out_channels=4, **UNET, transformer_depth=(1, 1)),
        data="fine",
        prediction="epsilon",
        schedule="scaled_linear",
        autoencoder=AutoencoderConfig(width=16, depth=1),
        autoencoder_batch=2,
        **FEW,
    ),
    "tiny-dit": TrainConfig(DiTConfig(patch=8, **DIT), **FLOW),
    "tiny-video": TrainConfig(DiTConfig(patch=16, frames=FRAMES, **DIT), data="moving", **FLOW),
}
