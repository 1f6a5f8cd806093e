"""Proportional attention without a mask.

A key that stands for s tokens should weigh s times as much: softmax(q k / sqrt(d) + log s) (Bolya et al.,
arXiv 2210.09461, section 3, "Tracking Token Size"). A mask would cost the fast kernels; a few more channels
of the head give the same logits: 1 in the query, log(s) * sqrt(d) in the key. Where these would double a head, as the
kernels compute it, a kernel of ours adds the bias itself (kernels.attend).
"""

from __future__ import annotations

import inspect
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import kernels
from ..merging.plan import spread_rows

# Fast attention kernels want a head size that divides by 8.
_ALIGN = 8


def extend_heads(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """q, k, v with channels that add `bias` to the logits of each key.

    Args:
        q: [..., N, d], k and v: [..., M, d].
        bias: the same for all heads, broadcastable to k's [..., M], float32.
    Returns:
        the three with d + p channels, p from 2 to 9, to be used with scale d ** -0.5; the result's first d
        channels are the attention's (v's further channels are zero).
    """
    made = kernels.widen(q, k, v, bias, extra_channels(q.shape[-1]))
    return made or (query_in_torch(q), key_in_torch(k, bias), value_in_torch(v))


def extra_channels(d: int) -> int:
    """How many channels (p) the functions here add to a head of d."""
    return -(-(d + 2) // _ALIGN) * _ALIGN - d


def extend_query(q: Tensor) -> Tensor:
    """q [..., N, d] -> [..., N, d + p], the part of extend_heads for hosts that project one at a time."""
    made = kernels.widen_one(q, None, extra_channels(q.shape[-1]), 0)
    return query_in_torch(q) if made is None else made


def extend_key(k: Tensor, bias: Tensor) -> Tensor:
    """k [..., M, d] -> [..., M, d + p]; bias as in extend_heads."""
    made = kernels.widen_one(k, bias, extra_channels(k.shape[-1]), 1)
    return key_in_torch(k, bias) if made is None else made


def extend_value(v: Tensor) -> Tensor:
    """v [..., M, d] -> [..., M, d + p]."""
    made = kernels.widen_one(v, None, extra_channels(v.shape[-1]), 2)
    return value_in_torch(v) if made is None else made


def query_in_torch(q: Tensor) -> Tensor:
    """extend_query, the specification."""
    room = extra_channels(q.shape[-1])
    ones = F.pad(q.new_ones(2), (0, room - 2)).expand(*q.shape[:-1], room)
    return torch.cat((q, ones), dim=-1)


def key_in_torch(k: Tensor, bias: Tensor) -> Tensor:
    """extend_key, the specification."""
    d = k.shape[-1]
    # Two channels, the second with the first one's rounding error: in bfloat16 one alone is off by 0.4%.
    scaled = bias.float() * d**0.5
    high = scaled.to(k.dtype)
    low = (scaled - high.float()).to(k.dtype)
    extra = torch.stack((high, low), dim=-1).expand(*k.shape[:-1], 2)
    return torch.cat((k, F.pad(extra, (0, extra_channels(d) - 2))), dim=-1)


def value_in_torch(v: Tensor) -> Tensor:
    """extend_value, the specification."""
    return F.pad(v, (0, extra_channels(v.shape[-1])))


def attend(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None, scale: float | None = None) -> Tensor:
    """Attention over heads, with a bias for each key.

    Args:
        q: [B, H, N, d], k and v: [B, H, M, d], bias: [b, M] or None, row i of the batch has its row i % b.
        scale: of the logits; None: d ** -0.5.
    Returns:
        [B, H, N, d].
    """
    if bias is None:
        return F.scaled_dot_product_attention(q, k, v, scale=scale)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    made = kernels.attend(q, k, v, bias, scale)
    return attend_wider(q, k, v, bias, scale) if made is None else made


def attend_wider(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor,
    scale: float,
    attention: Callable[..., Tensor] | None = None,
) -> Tensor:
    """The same by further channels of the heads, whatever the kernel. attention: called as attention(q, k, v, scale=);
    None: torch's."""
    d = q.shape[-1]
    q, k, v = extend_heads(q, k, v, spread_rows(bias, q.shape[0])[:, None] * (d**-0.5 / scale))
    return (attention or F.scaled_dot_product_attention)(q, k, v, scale=scale)[..., :d]


def minds_scale(attention: Callable[..., Tensor]) -> bool:
    """Whether a host's attention function does something with a keyword `scale`: it has such a parameter, or reads it
    out of its **kwargs. One that does not scales by the size of the heads that it is given, and says nothing."""
    code = getattr(inspect.unwrap(getattr(attention, "func", attention)), "__code__", None)
    if code is None:
        return False
    named = code.co_varnames[: code.co_argcount + code.co_kwonlyargcount]
    constants = (part for one in code.co_consts for part in (one if isinstance(one, tuple) else (one,)))
    return "scale" in named or "scale" in constants


def attend_tokens(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    heads: int,
    bias: Tensor,
    attention: Callable[..., Tensor],
    is_torchs: bool = False,
    scale: float | None = None,
    minds: bool = True,
) -> Tensor:
    """The same for hosts that keep heads and channels together and bring their own kernel.

    Args:
        q: [B, N, H * d], k and v: [B, M, H * d], bias: [B or 1, M].
        attention: called as attention(q, k, v, scale) on [B, ., H * (d + p)], gives [B, N, H * (d + p)].
        is_torchs: whether it is torch's own, in whose place a kernel of ours may go.
        scale: of the logits; None: d ** -0.5.
        minds: whether it is known to mind `scale`. If not, it is called as attention(q, k, v), with queries for which
            the scale that it takes by itself, (d + p) ** -0.5, is right.
    Returns:
        [B, N, H * d].
    """
    batch, tokens, channels = q.shape
    d = channels // heads
    q, k, v = (x.reshape(batch, -1, heads, d) for x in (q, k, v))  # (B, N, H, d)
    made = None
    if is_torchs:
        made = kernels.attend(*(x.transpose(1, 2) for x in (q, k, v)), bias, d**-0.5 if scale is None else scale)
    if made is not None:
        return made.transpose(1, 2).flatten(2)
    if minds:
        bias = bias if scale is None else bias * (d**-0.5 / scale)
        rest = (d**-0.5 if scale is None else scale,)
    else:
        wide = d + extra_channels(d)
        q = q * ((d**-0.5 if scale is None else scale) * wide**0.5)
        bias, rest = bias * (wide / d) ** 0.5, ()
    q, k, v = extend_heads(q, k, v, bias[:, :, None])
    q, k, v = (x.flatten(2) for x in (q, k, v))  # (B, N, H * (d + p))
    out = attention(q, k, v, *rest)
    return out.reshape(batch, tokens, heads, -1)[..., :d].reshape(batch, tokens, channels)
