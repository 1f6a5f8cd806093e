"""Attention codes of our own in the ways in which A1111's optimizations differ: where the head size comes from,
what scales the logits, how to_out is called. Each is a forward for CrossAttention.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F


def _split(x, heads):
    return x.unflatten(-1, (heads, -1)).transpose(1, 2).flatten(0, 1)  # (B * H, N, d)


def _join(x, heads):
    return x.unflatten(0, (-1, heads)).transpose(1, 2).flatten(2)


def own_scale(self, x, context=None, mask=None, **kwargs):
    """As "none" and V1: the logits by self.scale; to_out as a whole."""
    q, k, v = self.to_q(x), self.to_k(x if context is None else context), self.to_v(x if context is None else context)
    q, k, v = (_split(t, self.heads) for t in (q, k, v))
    logits = torch.einsum("bid,bjd->bij", q, k) * self.scale
    return self.to_out(_join(logits.softmax(-1) @ v, self.heads))


def scaled_keys(self, x, context=None, mask=None, **kwargs):
    """As Doggettx and InvokeAI: the keys by self.scale before the heads part; in slices."""
    context = x if context is None else context
    q, k, v = self.to_q(x), self.to_k(context) * self.scale, self.to_v(context)
    q, k, v = (_split(t, self.heads) for t in (q, k, v))
    out = torch.cat([(part @ k.transpose(1, 2)).softmax(-1) @ v for part in q.split(50, dim=1)], dim=1)
    return self.to_out(_join(out, self.heads))


def sdp(self, x, context=None, mask=None, **kwargs):
    """As sdp and sdp-no-mem: the head size from x's channels; the parts of to_out one by one."""
    batch, _, inner = x.shape
    context = x if context is None else context
    size = inner // self.heads
    q, k, v = (
        t.view(batch, -1, self.heads, size).transpose(1, 2)
        for t in (self.to_q(x), self.to_k(context), self.to_v(context))
    )
    out = F.scaled_dot_product_attention(q, k, v)
    out = out.transpose(1, 2).reshape(batch, -1, self.heads * size)
    return self.to_out[1](self.to_out[0](out))


def given_size(self, x, context=None, mask=None, **kwargs):
    """As sub-quadratic and xformers: the head size from the projections; to_out taken apart."""
    context = x if context is None else context
    q, k, v = (_split(t, self.heads) for t in (self.to_q(x), self.to_k(context), self.to_v(context)))
    out = (q @ k.transpose(1, 2) * q.shape[-1] ** -0.5).softmax(-1) @ v
    project, dropout = self.to_out
    return dropout(project(_join(out, self.heads)))


def fixed_size(self, x, context=None, mask=None, **kwargs):
    """One that widened heads cannot go through."""
    context = x if context is None else context
    q, k, v = (
        t.reshape(x.shape[0], -1, self.heads, round(self.scale**-2))
        for t in (self.to_q(x), self.to_k(context), self.to_v(context))
    )
    out = F.scaled_dot_product_attention(*(t.transpose(1, 2) for t in (q, k, v)))
    return self.to_out(out.transpose(1, 2).flatten(2))


SERVED = {"own_scale": own_scale, "scaled_keys": scaled_keys, "sdp": sdp, "given_size": given_size}
