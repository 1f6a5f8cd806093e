"""A U-Net or DiT with the tokens of its classes, in pixels or in an autoencoder's latents; its file; its pictures."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from .autoencoder import FACTOR, Autoencoder, AutoencoderConfig
from .data import PictureSet
from .data_moving import SETS
from .dit import DiT, DiTConfig
from .optimize import autocast, load_tensors, save_tensors
from .samplers import PREDICTIONS, sample
from .unet import UNet, UNetConfig

NETWORK_PREFIX, AUTOENCODER_PREFIX = "model.diffusion_model.", "first_stage_model."  # as the hosts have them
TOKENS_KEY, SIGMAS_KEY = "class_tokens", "sigmas"
KINDS = {"unet": (UNet, UNetConfig), "dit": (DiT, DiTConfig)}
"""Network and configuration by the name under which a file's metadata has the configuration."""


class ClassModel(nn.Module):
    """A network and the tokens of its classes; the last row of the tokens is "any class", for guidance.

    prediction: one of PREDICTIONS. autoencoder: None for a network that paints pixels.
    """

    def __init__(
        self, config: UNetConfig | DiTConfig, classes: int, tokens: int, prediction: str = "v",
        autoencoder: AutoencoderConfig | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        if prediction not in PREDICTIONS:
            raise ValueError(f"prediction must be one of {', '.join(PREDICTIONS)}, got {prediction!r}")
        self.kind = next(kind for kind, (_, sizes) in KINDS.items() if isinstance(config, sizes))
        self.network = KINDS[self.kind][0](config)
        self.class_tokens = nn.Parameter(torch.randn(classes + 1, tokens, config.context_dim))
        self.prediction = prediction
        self.autoencoder = Autoencoder(autoencoder).requires_grad_(False) if autoencoder else None

    def context(self, classes: Tensor) -> Tensor:
        """Tokens [B, M, D] of class numbers [B]."""
        return self.class_tokens[classes]

    def painted_shape(self, size: int) -> tuple[int, int, int]:
        """(channels, height of all frames, width) of what the network paints for ``size`` pixels a side."""
        side = size // FACTOR if self.autoencoder else size
        frames = getattr(self.network.config, "frames", 1)
        return self.network.config.in_channels, frames * side, side

    @torch.no_grad()
    def encode(self, pictures: Tensor, chunk: int = 66) -> Tensor:
        """Pictures [B, 3, H, W], -1 to 1, -> what the network paints [B, C, h, w], in float32."""
        if self.autoencoder is None:
            return pictures
        return torch.cat([self.autoencoder.encode(part) for part in pictures.split(chunk)])

    @torch.no_grad()
    def decode(self, painted: Tensor, chunk: int = 66) -> Tensor:
        """What the network paints [B, C, h, w] -> pictures [B, 3, H, W] of about -1 to 1, in float32."""
        if self.autoencoder is None:
            return painted
        return torch.cat([self.autoencoder.decode(part).float() for part in painted.split(chunk)])


def save_model(path: Path, model: ClassModel, sigmas: Tensor, training: dict, pictures: PictureSet) -> None:
    """Write weights (float16), tokens and schedule, with what they mean in the metadata."""
    state = {NETWORK_PREFIX + k: v for k, v in model.network.state_dict().items()}
    state[TOKENS_KEY] = model.class_tokens.detach()
    metadata = {
        "format": "pt",
        "classes": json.dumps(list(pictures.classes)),
        model.kind: json.dumps(asdict(model.network.config)),
        "prediction": model.prediction,
        "data": pictures.name,
        "size": str(pictures.size),
        "training": json.dumps(training),
    }
    if model.autoencoder is not None:
        state |= {AUTOENCODER_PREFIX + k: v for k, v in model.autoencoder.state_dict().items()}
        metadata["autoencoder"] = json.dumps(asdict(model.autoencoder.config))
        metadata["latent"] = json.dumps(model.painted_shape(pictures.size))
    tensors = {k: v.half() for k, v in state.items()}
    save_tensors(path, {**tensors, SIGMAS_KEY: sigmas}, metadata)


def load_model(path: Path | str) -> tuple[ClassModel, Tensor, dict[str, str]]:
    """A trained model in float32 on the CPU, its sigmas [1000] and its metadata, with what an older file lacks."""
    tensors, metadata = load_tensors(path)
    metadata = {"prediction": "v", "data": "demo"} | metadata
    sigmas, tokens = tensors.pop(SIGMAS_KEY), tensors.pop(TOKENS_KEY).float()
    autoencoder = AutoencoderConfig(**json.loads(metadata["autoencoder"])) if "autoencoder" in metadata else None
    kind = next((kind for kind in KINDS if kind in metadata), None)
    if kind is None:
        raise ValueError(f"{path} is no model of the lab: its metadata has none of {', '.join(KINDS)}")
    # JSON turns tuples into lists.
    values = {k: tuple(v) if isinstance(v, list) else v for k, v in json.loads(metadata[kind]).items()}
    config = KINDS[kind][1](**values)
    model = ClassModel(config, tokens.shape[0] - 1, tokens.shape[1], metadata["prediction"], autoencoder)
    parts = [(NETWORK_PREFIX, model.network)]
    if model.autoencoder is not None:
        parts.append((AUTOENCODER_PREFIX, model.autoencoder))
    for prefix, part in parts:
        part.load_state_dict({k.removeprefix(prefix): v.float() for k, v in tensors.items() if k.startswith(prefix)})
    model.class_tokens.data.copy_(tokens)
    return model.eval(), sigmas, metadata


def picture_set(metadata: dict[str, str]) -> PictureSet:
    if metadata["data"] not in SETS:
        raise ValueError(f"data must be one of {', '.join(SETS)}, got {metadata['data']!r}")
    return SETS[metadata["data"]]


@torch.no_grad()
def sample_grid(
    model: ClassModel, sigmas: Tensor, pictures: PictureSet, columns: int = 8, steps: int = 30, seed: int = 0
) -> Image.Image:
    """A picture with a row for each class; the same noise for the same seed on every device."""
    device, size, count = sigmas.device, pictures.size, len(pictures.classes)
    classes = torch.arange(count, device=device).repeat_interleave(columns)
    shape = (len(classes), *model.painted_shape(size))
    noise = torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(device)
    with autocast(device):
        context, free = model.context(classes), model.class_tokens[-1:]
        painted = sample(model.network, noise, context, free, sigmas, steps, prediction=model.prediction)
        found = model.decode(painted)
    pixels = ((found.clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1)  # (B, height, size, 3)
    height = pixels.shape[1]
    rows = pixels.cpu().numpy().reshape(count, columns, height, size, 3)
    padded = np.pad(rows, ((0, 0), (0, 0), (0, 2), (0, 2), (0, 0)), constant_values=255)
    return Image.fromarray(padded.transpose(0, 2, 1, 3, 4).reshape(count * (height + 2), columns * (size + 2), 3))
