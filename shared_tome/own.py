"""Each query keeps its own token among sampled keys, without leaving the fast attention kernels.

What a token looks like is for the most part in itself: where its own key is not among those that were drawn, the finest
texture blurs (docs/quality.md). A kernel's output o and the logarithm s of its sum of exponentials are all that is
needed to put one more key in for each query, and to let the token that stands for its run count once less:

    (exp(s) o + exp(q k_own) v_own - exp(q k_drawn) v_drawn) / (exp(s) + exp(q k_own) - exp(q k_drawn))

A query whose own token is the drawn one gets o, bit for bit.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import kernels
from .plan import spread_rows


def keep_own(q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, owner: Tensor, scale: float) -> Tensor:
    """The attention with each query's own token among its keys.

    Args:
        q, k, v: [B, H, N, d] of all tokens. out: [B, H, N, d] and lse: [B, H, N], natural logarithm, of the attention
            to those that were drawn, each weighing as many as it stands for, and to whatever else shares the softmax.
        owner: [b, N] int64, the token that stands for each. scale: of the logits.
    Returns:
        [B, H, N, d] in out's dtype.
    """
    made = kernels.own(q, k, v, out, lse, owner, scale)
    return _keep_own(q, k, v, out, lse, owner, scale) if made is None else made


def _keep_own(q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, owner: Tensor, scale: float) -> Tensor:
    """The same in plain torch, the specification."""
    owner = spread_rows(owner, q.shape[0])[:, None, :, None]  # (B, 1, N, 1)
    index = owner.expand(k.shape)
    q, lse = q.float() * scale, lse.float()
    own = (q * k.float()).sum(-1) - lse  # (B, H, N)
    drawn = (q * k.gather(2, index).float()).sum(-1) - lse
    top = own.clamp_min(0.0)  # the drawn one is among those that lse has summed
    rest, own, drawn = (x.exp()[..., None] for x in (-top, own - top, drawn - top))
    mixed = rest * out.float() + own * v.float() - drawn * v.gather(2, index).float()
    stands = owner == torch.arange(q.shape[2], device=q.device)[:, None]  # for itself; what cancels leaves its rounding
    return torch.where(stands, out, (mixed / (rest + own - drawn)).to(out.dtype))
