"""Padded inputs of vision transformers: tokens that a mask hides from all others.

Such a token weighs nothing: merged with a patch it leaves the patch as it is, and its key's logits are as low as
the mask makes them. Padding is alike to padding and to nothing else, so it goes first.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..attention.sdpa import HostAttention

# What a hidden token weighs in a mean: nothing beside a patch in float32, and means of hidden ones alone are finite.
_NOTHING = 2.0**-40
# Added to the logits of its key: far below what exp tells from 0, and finite in half precision's further channels.
_HIDDEN = -1000.0
_MASKED = "ToMe does not work with masked attention: merged tokens have no place in a mask of more than padding"


class Padding:
    """What the mask of a call hides.

    Args:
        attention: the first that is merged. is_first: whether it has all of the first block's tokens.
        restore: see vit.apply_patch.
    Raises:
        ValueError: a mask that says something else of each patch or head, or that weighs keys; or merged tokens are to
            leave the tower, where the host's mask is one of all tokens.
    """

    def __init__(self, attention: HostAttention, is_first: bool, restore: str):
        mask = attention.mask
        if mask is None or mask.dim() != 4 or mask.shape[1] != 1 or not is_first:
            raise ValueError(_MASKED)
        seen = mask[:, 0] if mask.dtype is torch.bool else mask[:, 0] == 0  # (B, 1 or N, N)
        valid = seen.any(1)  # (B, N); what hidden queries see does not matter
        alike = (seen == valid[:, None]) | ~valid[:, : seen.shape[1], None]
        weighs = mask.dtype is not torch.bool and not bool((seen | (mask[:, 0] <= _HIDDEN)).all())
        if weighs or not bool(alike.all()):
            raise ValueError(_MASKED)
        if restore == "none":
            raise ValueError("padded inputs need restore 'last' or 'all', where the host's mask fits, got 'none'")
        self.sizes = torch.where(valid, 1.0, _NOTHING).float()  # [B, N], of the first tokens

    @staticmethod
    def hide(bias: Tensor, sizes: Tensor) -> Tensor:
        """bias [B, M] of keys, with those of hidden tokens alone out of sight."""
        return bias.masked_fill(sizes < 0.5, _HIDDEN)

    @staticmethod
    def set_apart(metric: Tensor, sizes: Tensor) -> Tensor:
        """metric [B, M, d], the same for all hidden tokens of an image, and far from its patches'."""
        hidden = (sizes < 0.5)[..., None]
        seen = metric.masked_fill(hidden, 0.0).sum(1, keepdim=True)
        return torch.where(hidden, -seen, metric)
