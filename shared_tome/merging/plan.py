"""The outcome of a match: how to merge tokens and how to bring them back.

`Plan` is the identity; `MergePlan` holds the groups that matching found; `SamplePlan` (sampling.py) the tokens
drawn. Index tensors have b rows: 1 where one choice serves the whole batch, the batch, or a divisor of it (row i
takes row i % b).
"""

from __future__ import annotations

import torch
from torch import Tensor

from .. import kernels

# Devices that have float64; Apple's GPUs, for one, do not.
WITH_FLOAT64 = ("cpu", "cuda", "meta")


class Plan:
    """Merges N tokens into M and back. This base class merges nothing: both return their argument.

    batch, tokens, kept: B, N and M.
    """

    is_identity = True

    def __init__(self, batch: int, tokens: int, kept: int, device: torch.device):
        self.batch, self.tokens, self.kept, self.device = batch, tokens, kept, device

    @property
    def ratio(self) -> float:
        """The share of the tokens that really goes (after the cap)."""
        return 1.0 - self.kept / self.tokens

    @property
    def index(self) -> Tensor:
        """[B, M]: the token that represents each group."""
        return torch.arange(self.tokens, device=self.device).expand(self.batch, -1)

    @property
    def choice(self) -> Tensor:
        """[b, M]: `index` with as many rows as there are choices: 1, the batch, or a divisor of it."""
        return self.index[:1]

    @property
    def groups(self) -> Tensor:
        """[B, N]: which merged token each token belongs to."""
        return torch.arange(self.tokens, device=self.device).expand(self.batch, -1)

    @property
    def sizes(self) -> Tensor:
        """[B, M] float32: how many tokens each stands for; they sum to N."""
        return torch.ones(self.batch, self.kept, dtype=torch.float32, device=self.device)

    def merge(self, x: Tensor, weights: Tensor | None = None) -> Tensor:
        """x [B, N, C] -> [B, M, C]; weights [B, N]: how much each token counts in a mean (None: all alike)."""
        return x

    def unmerge(self, y: Tensor) -> Tensor:
        """y [B, M, C] -> [B, N, C]: each token takes its group's value."""
        return y

    def merge_sizes(self, sizes: Tensor) -> Tensor:
        """Token sizes [B, N] -> [B, M], summed by group (for repeated merging)."""
        return sizes

    def key_bias(self) -> Tensor | None:
        """log(sizes) [1 or B, M] for proportional attention; None where it would change nothing."""
        return None


class MergePlan(Plan):
    """Groups of similar tokens, each with a destination.

    Args:
        index: [b, M] the representative of each merged token, groups: [b, N].
        mean: merged tokens are means; otherwise the representative's own value.
        fills: tokens that went come back as zeros (prune). even: all groups are of one size.
        chain: what kernels.match made of the groups, None to find it here where it is needed.
    """

    is_identity = False

    def __init__(
        self,
        batch: int,
        index: Tensor,
        groups: Tensor,
        *,
        mean: bool = False,
        fills: bool = False,
        even: bool = False,
        chain: tuple[Tensor, Tensor] | None = None,
    ):
        super().__init__(batch, groups.shape[1], index.shape[1], index.device)
        self._index, self._groups = index, groups
        self._chain = kernels.links(index, groups) if mean and chain is None else chain
        self._bias: Tensor | None = None  # log(sizes) [b, M] once a mean has written it
        kept, chain = index.shape[1], self._chain
        self._sizes = group_counts(groups, kept) if chain is None else kernels.sizes_of(chain, kept)
        self.mean, self.fills, self.even = mean, fills, even

    @property
    def index(self) -> Tensor:
        return spread_rows(self._index, self.batch)

    @property
    def choice(self) -> Tensor:
        return self._index

    @property
    def groups(self) -> Tensor:
        return spread_rows(self._groups, self.batch)

    @property
    def sizes(self) -> Tensor:
        return spread_rows(self._sizes, self.batch)

    def has_kernel(self, x: Tensor) -> bool:
        """Whether a mean of x without weights goes through a kernel, which is faster than one with weights."""
        return self._chain is not None and kernels.means(x)

    def merge(self, x: Tensor, weights: Tensor | None = None) -> Tensor:
        if not self.mean:
            return take(x, self._index)
        if weights is None:
            made = None if self._chain is None else kernels.mean(x, self._index, self._groups, self._chain)
            if made is not None:
                merged, self._bias = made
                return merged
            total, summed = self._sizes, group_sum(x, self._groups, self.kept)
        else:
            total = self.merge_sizes(weights)
            wide = _sum_dtype(x)
            summed = group_sum(x.to(wide) * weights[..., None].to(wide), self._groups, self.kept)
        return (summed / spread_rows(total, x.shape[0])[..., None]).to(x.dtype)

    def unmerge(self, y: Tensor) -> Tensor:
        out = take(y, self._groups)
        if not self.fills:
            return out
        stays = torch.zeros(self._groups.shape, dtype=torch.bool, device=y.device).scatter(1, self._index, True)
        return torch.where(spread_rows(stays, y.shape[0])[..., None], out, 0.0)

    def merge_sizes(self, sizes: Tensor) -> Tensor:
        total = group_sum(sizes[..., None], self._groups, self.kept)[..., 0]
        return total.to(torch.promote_types(sizes.dtype, torch.float32))

    def key_bias(self) -> Tensor | None:
        if self.even:
            return None
        bias = self._sizes.log() if self._bias is None else self._bias
        return bias if bias.shape[0] == 1 else spread_rows(bias, self.batch)


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
    one = index.shape[0] == 1
    taken = kernels.gather(x, index) if not one or kernels.pays_to_gather(x, index) else None
    if taken is not None:
        return taken
    if one:
        return x.index_select(1, index[0])
    index = _flat(spread_rows(index, x.shape[0]), x.shape[1])  # (B * K,)
    return x.reshape(-1, x.shape[-1]).index_select(0, index).reshape(x.shape[0], -1, x.shape[-1])  # (B, K, C)


def group_sum(x: Tensor, groups: Tensor, kept: int) -> Tensor:
    """x [B, N, C] summed by groups [b, N] -> [B, M, C] in float32 or float64, see _sum_dtype."""
    batch, _, channels = x.shape
    out = x.new_zeros((batch * kept, channels), dtype=_sum_dtype(x))
    index = _flat(spread_rows(groups, batch), kept)  # (B * N,)
    rows = x.reshape(-1, channels).to(out.dtype)  # (B * N, C)
    if x.device.type == "cuda":
        # index_add adds in an order that changes from run to run there; index_put sorts first.
        out = out.index_put((index,), rows, accumulate=True)
    else:
        out = out.index_add(0, index, rows)
    return out.reshape(batch, kept, channels)  # (B, M, C)


def _sum_dtype(x: Tensor) -> torch.dtype:
    """What x's tokens are added up in: float64 where some tokens of x's dtype overflow float32, or are finer.

    Where the device has no float64, sums of float32 and bfloat16 stay in float32.
    """
    if x.dtype == torch.float64:
        return torch.float64
    able = x.device.type in WITH_FLOAT64
    return torch.float64 if able and x.dtype in (torch.float32, torch.bfloat16) else torch.float32


def group_counts(groups: Tensor, kept: int) -> Tensor:
    """groups [b, N] -> how many tokens each of the M has, [b, M] float32."""
    # Sums of ones are exact in any order, so the unordered add is as good as another.
    ones = torch.ones(groups.shape, dtype=torch.float32, device=groups.device)
    return torch.zeros(groups.shape[0], kept, dtype=torch.float32, device=groups.device).scatter_add(1, groups, ones)


def _flat(index: Tensor, size: int) -> Tensor:
    """index [B, K] into rows of `size` -> [B * K] into the flattened rows."""
    offset = torch.arange(index.shape[0], device=index.device)[:, None] * size
    return (index + offset).reshape(-1)
