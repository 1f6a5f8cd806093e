"""A small DiT for tests, every weight of which counts: the trainable one starts with zeros."""

from __future__ import annotations

from pathlib import Path

import torch

from lab.models.data import DEMO, PictureSet
from lab.models.dit import DiTConfig
from lab.models.model import ClassModel, save_model
from lab.models.samplers import flow_sigmas

SMALL = DiTConfig(patch=2, width=32, heads=2, double=1, single=2, context_dim=8)
SIZE, TEXT = 16, 5
GRID = (8, 8)
PICTURES = PictureSet("small", SIZE, {name: DEMO.painters[name] for name in ("spheres", "planet")})


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def with_weights(network: torch.nn.Module) -> torch.nn.Module:
    for seed, parameter in enumerate(network.parameters()):
        scale = 0.7 / max(1, parameter[0].numel()) ** 0.5
        parameter.data = normal(*parameter.shape, seed=seed) * scale
    return network.eval().requires_grad_(False)


def save_small(path: Path) -> Path:
    save_model(path, with_weights(ClassModel(SMALL, 2, TEXT, "flow")), flow_sigmas(), {}, PICTURES)
    return path
