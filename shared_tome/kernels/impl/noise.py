"""shared_tome/core/noise.py for kernels: the same hash in 32-bit arithmetic, where only the low 32 bits ever count."""

from __future__ import annotations

from ...core import noise
from .compiler import tl, triton

GOLDEN = tl.constexpr(noise._GOLDEN)
# The odd factors of the first three words of noise.key: powers of the golden one.
FIRST = tl.constexpr(noise._GOLDEN**2 & noise._MASK)
SECOND = tl.constexpr(noise._GOLDEN**3 & noise._MASK)
THIRD = tl.constexpr(noise._GOLDEN**4 & noise._MASK)


@triton.jit
def mix(x):
    """noise.mix: a hash of each element of a uint32 block."""
    x = (x ^ (x >> 16)) * tl.full((), 0x7FEB352D, tl.uint32)
    x = (x ^ (x >> 15)) * tl.full((), 0x846CA68B, tl.uint32)
    return x ^ (x >> 16)


@triton.jit
def times(x, factor: tl.constexpr):
    """The low 32 bits of x times a factor."""
    return x.to(tl.uint32) * tl.full((), factor, tl.uint32)


@triton.jit
def fold(seed):
    """An int64 seed as 32 bits: noise.fold_seed."""
    return seed.to(tl.uint32) + times(seed >> 32, GOLDEN)
