"""Attention in float64, written out: what every kernel and every host is compared with."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def drawn(
    batch: int, heads: int, queries: int, keys: int, d: int, dtype: torch.dtype, device: str = "cpu"
) -> list[Tensor]:
    """q [batch, heads, queries, d], k and v [batch, heads, keys, d], tokens first in memory."""
    generator = torch.Generator(device).manual_seed(0)
    return [
        torch.randn(batch, n, heads, d, generator=generator, device=device).to(dtype).transpose(1, 2)
        for n in (queries, keys, keys)
    ]


def attention(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | float = 0.0, scale: float | None = None) -> Tensor:
    """softmax(q k * scale + bias) v, [B, H, N, d] float64. scale: d ** -0.5 where it is None.

    q: [B, H, N, d], k and v: [B, H, M, d], bias: of the logits [B, H, N, M], as far as it broadcasts.
    """
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    return (q.double() @ k.double().mT * scale + bias).softmax(-1) @ v.double()


def attention_in_parts(q: Tensor, parts: Sequence[tuple[Tensor, Tensor, float]], scale: float | None = None) -> Tensor:
    """The attention to the keys of all parts, [B, N, H, d] float64. parts: k, v and what is added to their logits."""
    k, v = (torch.cat([part[at] for part in parts], 2) for at in (0, 1))
    bias = [torch.full(part[0].shape[2:3], part[2], dtype=torch.float64, device=q.device) for part in parts]
    return attention(q, k, v, torch.cat(bias), scale).transpose(1, 2)


def weighed(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, scale: float | None = None) -> Tensor:
    """The attention to keys of these weights, [B, H, N, d] float64. bias: [b, M], row i of the batch has its i % b."""
    return attention(q, k, v, bias.double().repeat(q.shape[0] // len(bias), 1)[:, None, None], scale)
