"""The one place where triton is imported; loaded with the first kernel, never with the package.

By name, since the core's own imports are torch and Python alone.
"""

from __future__ import annotations

from importlib import import_module

triton = import_module("triton")
tl = import_module("triton.language")


def power_of_two(number: int) -> int:
    """The smallest power of two that is no less, at least 1."""
    return 1 << max(0, number - 1).bit_length()


def channel_block(channels: int, widest: int) -> int:
    """How many channels a program takes: a power of two that divides them where one of at least 32 does."""
    divisor = channels & -channels
    return min(widest, divisor if divisor >= 32 else power_of_two(channels))
