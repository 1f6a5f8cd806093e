"""A bias for each key by further channels of the heads, the specification.

A key that stands for s tokens should weigh s times as much: softmax(q k / sqrt(d) + log s) (Bolya et al.,
arXiv 2210.09461, section 3, "Tracking Token Size"). A mask would cost the fast kernels; a few more channels
of the head give the same logits: 1 in the query, log(s) * sqrt(d) in the key.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from .groups import spread_rows

# Fast attention kernels want a head size that divides by 8.
_ALIGN = 8
# What extend_one is given.
QUERY, KEY, VALUE = range(3)


def extra_channels(d: int) -> int:
    """How many channels (p) the functions here add to a head of d."""
    return -(-(d + 2) // _ALIGN) * _ALIGN - d


def extend_heads(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """q, k, v with channels that add `bias` to the logits of each key.

    Args:
        q: [..., N, d], k and v: [..., M, d].
        bias: the same for all heads, broadcastable to k's [..., M], float32.
    Returns:
        the three with d + p channels, p from 2 to 9, to be used with scale d ** -0.5; the result's first d
        channels are the attention's (v's further channels are zero).
    """
    return extend_one(q, QUERY), extend_one(k, KEY, bias), extend_one(v, VALUE)


def extend_one(x: Tensor, kind: int, bias: Tensor | None = None) -> Tensor:
    """One of the three alone. kind: QUERY, KEY (with its bias) or VALUE."""
    d, room = x.shape[-1], extra_channels(x.shape[-1])
    if kind == VALUE:
        return F.pad(x, (0, room))
    if kind == QUERY:
        extra = F.pad(x.new_ones(2), (0, room - 2)).expand(*x.shape[:-1], room)
    else:
        # Two channels, the second with the first one's rounding error: in bfloat16 one alone is off by 0.4%.
        scaled = bias.float() * d**0.5
        high = scaled.to(x.dtype)
        low = (scaled - high.float()).to(x.dtype)
        extra = F.pad(torch.stack((high, low), dim=-1).expand(*x.shape[:-1], 2), (0, room - 2))
    return torch.cat((x, extra), dim=-1)


def attend_wider(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor,
    scale: float,
    attention: Callable[..., Tensor] = F.scaled_dot_product_attention,
    extend: Callable[..., tuple[Tensor, Tensor, Tensor]] = extend_heads,
) -> Tensor:
    """Attention with a bias for each key, by further channels of the heads, whatever the kernel.

    Args:
        q: [B, H, N, d], k and v: [B, H, M, d], bias: [b, M]. scale: of the logits.
        attention: called as attention(q, k, v, scale=). extend: extend_heads, or a kernel in its place.
    Returns:
        [B, H, N, d].
    """
    d = q.shape[-1]
    q, k, v = extend(q, k, v, spread_rows(bias, q.shape[0])[:, None] * (d**-0.5 / scale))
    return attention(q, k, v, scale=scale)[..., :d]
