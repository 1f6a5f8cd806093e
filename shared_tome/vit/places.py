"""Where merged tokens stand, in vision transformers that turn queries and keys by their place (RoPE)."""

from __future__ import annotations

from torch import Tensor

from ..core.groups import group_counts, group_mean


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
    sizes = group_counts(index, count)
    return tuple(group_mean(x.expand(len(index), -1, -1), index, sizes)[:, None] for x in rotations)
