"""Queries, keys and values whose keys weigh differently, and what attention to them is in float64."""

from __future__ import annotations

import torch


def drawn(batch, heads, queries, keys, d, dtype, device="cpu"):
    """q [batch, heads, queries, d], k and v [batch, heads, keys, d], tokens first in memory."""
    generator = torch.Generator(device).manual_seed(0)
    return [
        torch.randn(batch, n, heads, d, generator=generator, device=device).to(dtype).transpose(1, 2)
        for n in (queries, keys, keys)
    ]


def truth(q, k, v, bias, scale):
    """bias: [b, M], row i of the batch has its row i % b."""
    bias = bias.repeat(q.shape[0] // bias.shape[0], 1).double()[:, None, None]
    return ((q.double() @ k.double().transpose(-1, -2) * scale + bias).softmax(-1)) @ v.double()
