"""Masks of attentions to text and image, as models and nodes make them: an image's tokens see each other."""

from __future__ import annotations

import torch
from torch import Tensor

KINDS = ("keys, numbers", "keys, seen or not", "each query, numbers", "each query, seen or not", "one a head, nothing")


def mask_of(kind: str, rows: int, heads: int, length: int, start: int, end: int, dtype=torch.float32) -> Tensor:
    """[B or 1, H or 1, L or 1, L]; the image is from `start` to `end`.

    Numbers: the logarithm of strengths, no strength, and the least number (padding). In the last kind a query sees no
    key at all.
    """
    draw = torch.Generator().manual_seed(1)
    beside = torch.ones(length, dtype=torch.bool)
    beside[start:end] = False
    shape = (rows, 1, 1, length) if kind.startswith("keys") else (1, 1, length, length)
    if kind.startswith("one"):
        shape = (rows, heads, length, length)
    chance = torch.rand(shape, generator=draw)
    concerned = beside | (False if shape[2] == 1 else beside[:, None])
    if kind.endswith("not"):
        return (chance > 0.4) | ~concerned
    added = (chance * 4 - 2).masked_fill(chance < 0.3, -torch.inf)
    added = added.masked_fill(chance > 0.8, torch.finfo(dtype).min).masked_fill(~concerned, 0.0)
    if kind.endswith("nothing") and beside.any():
        added[:, :, int(beside.nonzero()[0])] = -torch.inf
    return added.to(dtype)
