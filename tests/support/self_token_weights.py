"""What own tokens are, written out: for the tests of every host."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

from .attention import attention


def counts(plan, heads: int, start: int = 0, length: int | None = None, own: bool = True) -> Tensor:
    """[B, H, L, L] float64: how often each query (third) counts each key (last).

    plan: of `sample`; each head draws for itself as it has turns. start, length: where the image begins among how many
    tokens, the others count once. own: whether each of the image's queries has its own token.
    """
    length = plan.tokens if length is None else length
    weight = torch.ones(plan.batch, heads, length, length, dtype=torch.float64)
    image = torch.arange(plan.tokens) + start
    weight[..., image] = 0.0
    for row, head in itertools.product(range(plan.batch), range(heads)):
        turn = plan.head_draws[head % len(plan.head_draws)]
        index = turn[row % len(turn)]
        weight[row, head, :, index + start] = plan.sizes[row].double()
        if own:
            weight[row, head, image, image] += 1.0
            weight[row, head, image, index[plan.groups[row]] + start] -= 1.0
    return weight


def attended(q: Tensor, k: Tensor, v: Tensor, plan, start: int = 0, scale: float | None = None) -> Tensor:
    """q, k, v [B, H, L, d] -> [B, H, L, d] float64, with each key as often as it counts for each query."""
    return attention(q, k, v, counts(plan, q.shape[1], start, q.shape[2]).log(), scale)
