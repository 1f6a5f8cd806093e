"""Proportional attention without a mask.

Weights of keys go in by further channels of the heads (core/channels.py), which any attention takes. Where these would
double a head, as the kernels compute it, a kernel of ours adds the bias itself (kernels.attend).
"""

from __future__ import annotations

import inspect
from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor

from .. import kernels
from ..core.channels import extra_channels


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
    return kernels.attend(q, k, v, bias, q.shape[-1] ** -0.5 if scale is None else scale)


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
    root = d**-0.5
    scale = root if scale is None else scale
    q, k, v = (x.reshape(batch, -1, heads, d) for x in (q, k, v))  # (B, N, H, d)
    heads_first = [x.transpose(1, 2) for x in (q, k, v)]
    if is_torchs and kernels.can_attend(*heads_first, bias):
        return kernels.attend(*heads_first, bias, scale).transpose(1, 2).flatten(2)
    if minds:
        bias, rest = bias if scale == root else bias * (root / scale), (scale,)
    else:
        wide = d + extra_channels(d)
        q = q * (scale * wide**0.5)
        bias, rest = bias * (wide / d) ** 0.5, ()
    q, k, v = kernels.extend_heads(q, k, v, bias[:, :, None])
    q, k, v = (x.flatten(2) for x in (q, k, v))  # (B, N, H * (d + p))
    out = attention(q, k, v, *rest)
    return out.reshape(batch, tokens, heads, -1)[..., :d].reshape(batch, tokens, channels)
