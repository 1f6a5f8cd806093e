"""What the core's tests share: inputs, and what is promised, said in other words than the core's."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from shared_tome import METHODS, ToMeConfig

MATCHING = tuple(name for name, method in METHODS.items() if method.matches)
PARTITIONS = ("random_2d", "fixed_2d", "random", "alternate")


def tokens(batch: int, grid: tuple[int, ...], channels: int, seed: int = 0, dtype=torch.float32) -> Tensor:
    """Random tokens [B, N, C]."""
    generator = torch.Generator().manual_seed(seed)
    shape = (batch, math.prod(grid), channels)
    return torch.randn(shape, generator=generator, dtype=torch.float32).to(dtype)


def config(**options) -> ToMeConfig:
    """A config for layers of any size."""
    return ToMeConfig(**{"min_tokens": 0, "method": "merge", "ratio": 0.5, **options})


def promised_count(config: ToMeConfig, grid: tuple[int, ...]) -> int:
    """How many tokens stay: N less the ratio's share, capped by what the method can take away."""
    frames, height, width = (1, *grid)[-3:]
    count = frames * height * width
    cell_height, cell_width = min(config.stride[1], height), min(config.stride[0], width)
    if config.samples:
        least = count - int(count * 15 / 16) if config.method == "multires" else -(-count // 64)
    elif config.method != "downsample" and config.partition == "alternate":
        least = max(1, count // 2)
    elif config.method != "downsample" and config.partition == "random":
        least = max(1, count // (cell_height * cell_width))
    else:
        least = frames * (height // cell_height) * (width // cell_width)
    return count - min(int(count * config.ratio), count - least)
