"""Bytes to pictures, and the precision in which models are trained."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor


def as_pictures(pixels: Tensor) -> Tensor:
    """Bytes [B, H, W, 3] -> pictures [B, 3, H, W], -1 to 1, channels last in memory."""
    return pixels.permute(0, 3, 1, 2).float() / 127.5 - 1


def autocast(device: torch.device) -> AbstractContextManager:
    return torch.autocast("cuda", torch.bfloat16) if device.type == "cuda" else nullcontext()
