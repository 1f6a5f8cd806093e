"""The trained model of this folder as a MODEL of ComfyUI.

Everything that runs is ComfyUI's own: its U-Net class, transformer blocks, v-prediction and samplers. Only the
weights and the noise schedule are ours. The model paints pixels (3 channels, -1 to 1, trained at 64x64), so the
"latent" is the picture and ComfyUI's pixel-space VAE only shifts the range.
"""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import comfy.latent_formats
import comfy.model_base
import comfy.model_management
import comfy.model_patcher
import comfy.sd
import comfy.supported_models
import torch
from safetensors import safe_open
from safetensors.torch import load_file

MODEL_FILE = Path(__file__).with_name("model.safetensors")
UNET_PREFIX = "model.diffusion_model."
SIZE = 64  # pixels a side the model was trained at
SIZE_RANGE = (32, 256)
SIZE_STEP = 8


class PixelLatent(comfy.latent_formats.LatentFormat):
    """The picture itself: 3 channels from -1 to 1, not made smaller."""

    scale_factor = 1.0
    latent_channels = 3
    spacial_downscale_ratio = 1
    latent_rgb_factors = [[1.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.0, 0.0, 1.0]]  # for live previews


class DemoConfig(comfy.supported_models.SD15):
    """Stable Diffusion 1.5 with the demo's sizes (given to the constructor) and v-prediction."""

    unet_extra_config = {}  # SD15 forces eight heads here
    latent_format = PixelLatent

    def model_type(self, state_dict: dict, prefix: str = "") -> comfy.model_base.ModelType:
        return comfy.model_base.ModelType.V_PREDICTION


def host_unet_config(unet: dict[str, Any]) -> dict[str, Any]:
    """Arguments of ComfyUI's UNetModel from the file's metadata: the fields of UNetConfig, lab/models/unet.py."""
    levels = list(zip(unet["transformer_depth"], unet["num_res_blocks"], strict=True))
    return {
        "image_size": 32,  # required, used by nothing
        "in_channels": unet["in_channels"],
        "out_channels": unet["out_channels"],
        "model_channels": unet["model_channels"],
        "channel_mult": list(unet["channel_mult"]),
        "num_res_blocks": list(unet["num_res_blocks"]),
        "transformer_depth": [depth for depth, blocks in levels for _ in range(blocks)],
        "transformer_depth_output": [depth for depth, blocks in levels for _ in range(blocks + 1)],
        "transformer_depth_middle": unet["transformer_depth_middle"],
        "num_heads": -1,
        "num_head_channels": unet["head_channels"],
        "context_dim": unet["context_dim"],
        "use_spatial_transformer": True,
        "use_linear_in_transformer": False,
        "adm_in_channels": None,
        "use_temporal_attention": False,
        "legacy": False,
    }


def read_metadata() -> dict[str, str]:
    """The file's metadata; reads the header alone."""
    if not MODEL_FILE.is_file():
        raise FileNotFoundError(f"the demo model is missing: {MODEL_FILE} (train one: python -m lab.models.train)")
    with safe_open(str(MODEL_FILE), framework="pt") as file:
        return file.metadata()


def class_names() -> list[str]:
    """What the model can paint."""
    return json.loads(read_metadata()["classes"])


@cache
def _read() -> dict[str, torch.Tensor]:
    return load_file(MODEL_FILE)


@cache
def _build() -> comfy.model_patcher.ModelPatcher:
    weights = {k: v for k, v in _read().items() if k.startswith(UNET_PREFIX)}
    config = DemoConfig(host_unet_config(json.loads(read_metadata()["unet"])))
    load_device = comfy.model_management.get_torch_device()
    supported = config.supported_inference_dtypes
    weight_dtype = comfy.model_management.unet_dtype(
        device=load_device,
        model_params=sum(v.numel() for v in weights.values()),
        supported_dtypes=list(supported),
        weight_dtype=torch.float16,
    )
    cast = comfy.model_management.unet_manual_cast(weight_dtype, load_device, list(supported))
    config.set_inference_dtype(weight_dtype, cast)
    model = config.get_model({}, "")
    model.diffusion_model.to(weight_dtype).load_state_dict(
        {k.removeprefix(UNET_PREFIX): v.to(weight_dtype) for k, v in weights.items()}, strict=True
    )
    model.model_sampling.set_sigmas(_read()["sigmas"])
    model.eval().to(comfy.model_management.unet_offload_device())
    return comfy.model_patcher.ModelPatcher(
        model, load_device=load_device, offload_device=comfy.model_management.unet_offload_device()
    )


def load_model() -> comfy.model_patcher.ModelPatcher:
    """The model, ready for KSampler. Each call gives a fresh clone; the weights are loaded once."""
    return _build().clone()


def conditioning(name: str | None) -> list:
    """CONDITIONING of a class: its tokens [1, M, D]. None is "any class", the negative for guidance."""
    names = class_names()
    if name is not None and name not in names:
        raise ValueError(f"the demo model cannot paint {name!r}; it paints {', '.join(names)}")
    index = len(names) if name is None else names.index(name)
    return [[_read()["class_tokens"][index : index + 1].float(), {}]]  # (1, M, D)


def load_vae() -> comfy.sd.VAE:
    """ComfyUI's pixel-space VAE: -1 to 1 in the latent, 0 to 1 in the picture."""
    return comfy.sd.VAE(sd={"pixel_space_vae": torch.tensor(1.0)})


def empty_latent(size: int, batch_size: int = 1) -> dict[str, Any]:
    """LATENT of zeros, samples [batch_size, 3, size, size]; size in pixels within SIZE_RANGE."""
    if not SIZE_RANGE[0] <= size <= SIZE_RANGE[1]:
        raise ValueError(f"size {size} is not from {SIZE_RANGE[0]} to {SIZE_RANGE[1]}")
    device = comfy.model_management.intermediate_device()
    return {"samples": torch.zeros(batch_size, 3, size, size, device=device), "downscale_ratio_spacial": 1}
