"""Random numbers without a generator's state: a hash of what they are for.

A counter-based generator (Salmon et al., Parallel random numbers: as easy as 1, 2, 3, SC 2011): the number
for (seed, words) is a hash of them. So it is the same on every device and in any order of calls, costs no
synchronisation, is captured in a CUDA graph and traced by torch.compile, and leaves torch's global generator
untouched. The mixing function is the 32-bit one of C. Wellons' hash prospector ("lowbias32"), in int64
arithmetic because torch has no unsigned multiplication everywhere.
"""

from __future__ import annotations

import torch
from torch import Tensor

_MASK = 0xFFFFFFFF
_GOLDEN = 0x9E3779B9


def fold_seed(seed: int) -> int:
    """A 64-bit seed as 32 bits; both halves count, a seed below 2**32 stays what it is."""
    return ((seed & _MASK) + ((seed >> 32) & _MASK) * _GOLDEN) & _MASK


def mix(x: Tensor) -> Tensor:
    """A hash of each element, int64 in 0 to 2**32 - 1, shape kept."""
    x = x & _MASK
    x = ((x ^ (x >> 16)) * 0x7FEB352D) & _MASK
    x = ((x ^ (x >> 15)) * 0x846CA68B) & _MASK
    return x ^ (x >> 16)


def key(seed: Tensor, *words: int | Tensor) -> Tensor:
    """One 32-bit key for a seed [] or [B] and some words (step, layer, purpose), the shape of seed.

    The seed is folded as fold_seed does: an int64 tensor with a 64-bit seed's bits, or with its fold, gives the same.
    Each word has an odd factor of its own and all are hashed once: a hash for each would cost a dozen launches more.
    """
    total, factor = seed + ((seed >> 32) & _MASK) * _GOLDEN, _GOLDEN
    for word in words:
        factor = (factor * _GOLDEN) & _MASK
        total = total + (word + 1) * factor
    return mix(total)


def bits(key: Tensor, count: int) -> Tensor:
    """`count` random numbers in 0 to 2**32 - 1 for each key: [] gives [count], [B] gives [B, count]."""
    return mix(key[..., None] + torch.arange(count, device=key.device, dtype=torch.int64) * _GOLDEN)
