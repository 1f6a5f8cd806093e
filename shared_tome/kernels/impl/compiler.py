"""The one place where triton is imported, and what launchers share.

Loaded with the first kernel, never with the package. By name, since the core's own imports are torch and Python alone.
"""

from __future__ import annotations

import functools
from importlib import import_module

import torch
from torch import Tensor

triton = import_module("triton")
tl = import_module("triton.language")
VERSION = getattr(triton, "__version__", "unknown")


@functools.lru_cache(maxsize=8)
def shared_memory(device: torch.device) -> int:
    """Bytes of shared memory that a program may take on a device; no bound where none is a GPU."""
    if device.type != "cuda":
        return 2**31
    return getattr(torch.cuda.get_device_properties(device), "shared_memory_per_block_optin", 48 * 1024)


def power_of_two(number: int) -> int:
    """The smallest power of two that is no less, at least 1."""
    return 1 << max(0, number - 1).bit_length()


def together(*heads: Tensor) -> list[Tensor]:
    """Heads [B, H, N, d], copied where their channels do not lie together in memory."""
    return [x if x.stride(-1) == 1 else x.contiguous() for x in heads]


def strides(*heads: Tensor) -> list[int]:
    """From row to row, head to head and token to token, of each of these."""
    return [step for x in heads for step in x.stride()[:3]]


def heads_like(x: Tensor) -> Tensor:
    """What an attention writes into, of x's shape [B, H, N, d] and dtype. It lies as [B, N, H, d], as the output
    projection takes it."""
    batch, heads, tokens, d = x.shape
    return x.new_empty((batch, tokens, heads, d)).transpose(1, 2)
