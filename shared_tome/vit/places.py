"""Where merged tokens stand, in vision transformers that turn queries and keys by their place (RoPE)."""

from __future__ import annotations

import torch
from torch import Tensor


def mean_rotations(rotations: tuple[Tensor, Tensor], sources: Tensor, prefix: int, count: int) -> tuple[Tensor, Tensor]:
    """The mean turn of the patches that each merged token stands for.

    A turned key is linear in the cosine and the sine of its angles. So a merged token of equal patches gets the mean of
    their turned keys, which is what merging makes of tokens everywhere else.

    Args:
        rotations: cosines and sines [N, d] of the patches. sources: [B, prefix + N], which merged token each went into;
            the first `prefix` tokens stay in place and do not turn. count: M, how many merged patches there are.
    Returns:
        both [B, 1, M, d].
    """
    index = sources[:, prefix:] - prefix  # (B, N)
    sizes = torch.zeros(len(index), count, device=index.device)
    sizes = sizes.scatter_add(1, index, torch.ones_like(index, dtype=sizes.dtype))
    return tuple(_mean(x, index, sizes)[:, None] for x in rotations)


def _mean(x: Tensor, index: Tensor, sizes: Tensor) -> Tensor:
    """x [N, d] averaged by groups [B, N] of sizes [B, M]: [B, M, d] in x's dtype."""
    wide = torch.promote_types(x.dtype, torch.float32)
    total = x.new_zeros(*sizes.shape, x.shape[1], dtype=wide)
    total.scatter_add_(1, index[..., None].expand(-1, -1, x.shape[1]), x.to(wide).expand(len(index), -1, -1))
    return (total / sizes[..., None]).to(x.dtype)
