"""The one place where triton is imported; loaded with the first kernel, never with the package.

By name, since the core's own imports are torch and Python alone.
"""

from __future__ import annotations

import functools
from importlib import import_module

import torch

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


def channel_block(channels: int, widest: int) -> int:
    """How many channels a program takes: a power of two that divides them where one of at least 32 does."""
    divisor = channels & -channels
    return min(widest, divisor if divisor >= 32 else power_of_two(channels))
