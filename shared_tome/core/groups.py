"""Tokens by groups, the specification: gathers, sums and means in plain torch, on any device.

Index tensors have b rows: 1 where one choice serves the whole batch, the batch, or a divisor of it (row i takes row
i % b).
"""

from __future__ import annotations

import torch
from torch import Tensor

# Devices that have float64; Apple's GPUs, for one, do not.
WITH_FLOAT64 = ("cpu", "cuda", "meta")


def check_rows(rows: int, batch: int) -> None:
    """Raises ValueError where lists of so many rows do not divide the batch."""
    if batch % rows:
        raise ValueError(f"a plan for {rows} rows does not fit a batch of {batch}")


def spread_rows(rows: Tensor, batch: int) -> Tensor:
    """[b, ...] -> [batch, ...], row i from row i % b. Raises ValueError where b does not divide the batch."""
    if rows.shape[0] == batch:
        return rows
    if rows.shape[0] == 1:
        return rows.expand(batch, *rows.shape[1:])
    check_rows(rows.shape[0], batch)
    return rows.repeat(batch // rows.shape[0], *(1,) * (rows.dim() - 1))


def take(x: Tensor, index: Tensor) -> Tensor:
    """x [B, N, C] and index [b, K] -> [B, K, C] in one gather."""
    if index.shape[0] == 1:
        return x.index_select(1, index[0])
    flat = _flat(spread_rows(index, x.shape[0]), x.shape[1])  # (B * K,)
    taken = x.reshape(-1, x.shape[-1]).index_select(0, flat)
    return taken.reshape(x.shape[0], index.shape[1], x.shape[-1])  # (B, K, C)


def sum_dtype(x: Tensor) -> torch.dtype:
    """What x's tokens are added up in: float64 where some tokens of x's dtype overflow float32, or are finer.

    Where the device has no float64, sums of float32 and bfloat16 stay in float32.
    """
    if x.dtype == torch.float64:
        return torch.float64
    able = x.device.type in WITH_FLOAT64
    return torch.float64 if able and x.dtype in (torch.float32, torch.bfloat16) else torch.float32


def group_sum(x: Tensor, groups: Tensor, kept: int) -> Tensor:
    """x [B, N, C] summed by groups [b, N] -> [B, M, C] in float32 or float64, see sum_dtype."""
    batch, _, channels = x.shape
    out = x.new_zeros((batch * kept, channels), dtype=sum_dtype(x))
    index = _flat(spread_rows(groups, batch), kept)  # (B * N,)
    rows = x.reshape(-1, channels).to(out.dtype)  # (B * N, C)
    if x.device.type == "cuda":
        # index_add adds in an order that changes from run to run there; index_put sorts first.
        out = out.index_put((index,), rows, accumulate=True)
    else:
        out = out.index_add(0, index, rows)
    return out.reshape(batch, kept, channels)  # (B, M, C)


def group_counts(groups: Tensor, kept: int) -> Tensor:
    """groups [b, N] -> how many tokens each of the M has, [b, M] float32."""
    return sum_sizes(torch.ones(groups.shape, dtype=torch.float32, device=groups.device), groups, kept)


def sum_sizes(sizes: Tensor, groups: Tensor, kept: int) -> Tensor:
    """What each of the M groups stands for where token i stands for sizes[i] already: [b, N] twice -> [b, M], at
    least float32."""
    # Sums of whole numbers are exact in any order, so the unordered add is as good as another.
    total = sizes.new_zeros((groups.shape[0], kept), dtype=torch.promote_types(sizes.dtype, torch.float32))
    return total.scatter_add(1, groups, sizes.to(total.dtype))


def group_mean(x: Tensor, groups: Tensor, sizes: Tensor) -> Tensor:
    """The mean of each group: x [B, N, C], groups [b, N] and their sizes [b, M] -> [B, M, C] in x's dtype."""
    return (group_sum(x, groups, sizes.shape[1]) / spread_rows(sizes, x.shape[0])[..., None]).to(x.dtype)


def weighted_mean(x: Tensor, weights: Tensor, groups: Tensor, total: Tensor) -> Tensor:
    """The same with weights [B, N] of the tokens and their sums [B, M] by group."""
    wide = sum_dtype(x)
    summed = group_sum(x.to(wide) * weights[..., None].to(wide), groups, total.shape[1])
    return (summed / total[..., None]).to(x.dtype)


def _flat(index: Tensor, size: int) -> Tensor:
    """index [B, K] into rows of `size` -> [B * K] into the flattened rows."""
    offset = torch.arange(index.shape[0], device=index.device)[:, None] * size
    return (index + offset).reshape(-1)
