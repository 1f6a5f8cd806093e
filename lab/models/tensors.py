"""Bytes to pictures, the precision in which models are trained, and files of weights."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor


def as_pictures(pixels: Tensor) -> Tensor:
    """Bytes [B, H, W, 3] -> pictures [B, 3, H, W], -1 to 1, channels last in memory."""
    return pixels.permute(0, 3, 1, 2).float() / 127.5 - 1


def autocast(device: torch.device) -> AbstractContextManager:
    return torch.autocast("cuda", torch.bfloat16) if device.type == "cuda" else nullcontext()


def save_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: dict[str, str]) -> None:
    """Write them as they are; a run that is stopped while writing leaves the last whole file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".part")
    save_file({k: v.detach().cpu().contiguous() for k, v in tensors.items()}, partial, metadata=metadata)
    partial.replace(path)


def load_tensors(path: Path | str) -> tuple[dict[str, Tensor], dict[str, str]]:
    """(tensors by name, metadata)."""
    with safe_open(str(path), framework="pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}
