"""What the small transformers share. Latents [B, 4, ..., H, W], prompts [B, T, 16], two heads of 16 channels."""

from __future__ import annotations

import torch.nn.functional as F
from torch import nn

WIDTH, HEADS, PROMPT = 32, 2, 16


def into_patches(x, side=2):
    """[B, C, H, W] -> [B, rows * columns, C * side * side], padded to whole patches."""
    x = F.pad(x, (0, -x.shape[-1] % side, 0, -x.shape[-2] % side))
    return F.pixel_unshuffle(x, side).flatten(2).transpose(1, 2)


def out_of_patches(x, size, side=2):
    """Back, [B, C, H, W]."""
    height, width = (-(-n // side) for n in size)
    return F.pixel_shuffle(x.transpose(1, 2).unflatten(2, (height, width)), side)[..., : size[0], : size[1]]


class Projections(nn.Module):
    """Queries, keys and values that tell tokens apart."""

    def __init__(self):
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.q, self.k, self.v, self.out = (nn.Linear(WIDTH, WIDTH) for _ in range(4))
        self.q.weight.data *= 4
        self.k.weight.data *= 4

    def of(self, x):
        x = self.norm(x)
        return self.q(x), self.k(x), self.v(x)


def by_head(x):
    return x.unflatten(-1, (HEADS, -1)).transpose(1, 2)
