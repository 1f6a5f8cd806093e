"""What could be gained by looking at the tokens after all.

`sample` where restless cells keep more tokens than calm ones, and similar queries merged on top of sampled keys and
values.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from shared_tome import ModelCall, Plan, ToMeConfig
from shared_tome.core.curve import curve_order
from shared_tome.core.grid import Grid
from shared_tome.core.groups import spread_rows, take
from shared_tome.core.sampling import kept_count, walk_table
from shared_tome.merging.call import MergedAttention
from shared_tome.merging.match import match_tokens

# Of two runs' tokens, how many the restless half of the pairs keeps and how many the calm one.
_KEEPS = (3, 1)


class WeighedPlan(Plan):
    """Some tokens, index [B, M], that stand for sizes [B, M], which need not be whole numbers."""

    is_identity = False

    def __init__(self, tokens: int, index: Tensor, sizes: Tensor):
        super().__init__(index.shape[0], tokens, index.shape[1], index.device)
        self._index, self._sizes = index, sizes

    @property
    def index(self) -> Tensor:
        return self._index

    @property
    def choice(self) -> Tensor:
        return self._index

    @property
    def sizes(self) -> Tensor:
        return self._sizes

    def merge(self, x: Tensor, weights: Tensor | None = None) -> Tensor:
        return take(x, self._index)

    def key_bias(self) -> Tensor:
        return self._sizes.log()


class GuidedCells(ModelCall):
    """Runs are taken in pairs. The half of them whose tokens differ most keeps three tokens each, the other one, so as
    many are left as `sample` leaves; each weighs what it stands for. For ratios whose runs are of equal length."""

    def plan(self, metric: Tensor, grid: Grid) -> Plan | None:
        if not self.serves(grid):
            return None
        layer = self._layers.get(grid, 0)
        self._layers[grid] = layer + 1
        tokens = math.prod(grid)
        pairs = kept_count(tokens, int(tokens * self.config.ratio)) // 2
        length, order = tokens // pairs, curve_order(grid, metric.device)
        if pairs * length != tokens:
            raise ValueError(f"pairs of runs must be of equal length, got {tokens} tokens in {pairs}")
        cells = metric.detach().float()[:, order].unflatten(1, (pairs, length))  # (B, P, L, C)
        calm_first = cells.var(dim=2).sum(-1).argsort(dim=1, stable=True)  # (B, P)
        walk = walk_table(grid, pairs, self.seed, order).roll(-(self.step + layer), 2)  # (b, P, L)
        walk = spread_rows(walk, metric.shape[0])
        parts, sizes = [], []
        for half, keeps in zip(calm_first.chunk(2, dim=1), reversed(_KEEPS), strict=True):
            chosen = walk[..., :keeps].gather(1, half[..., None].expand(-1, -1, keeps)).flatten(1)
            parts.append(chosen)
            sizes.append(torch.full(chosen.shape, length / keeps, device=metric.device))
        return WeighedPlan(tokens, torch.cat(parts, 1), torch.cat(sizes, 1))


class MergedOnTop(ModelCall):
    """Keys and values as `sample` has them; similar queries are merged as well and brought back. share: of the queries
    that go."""

    def __init__(self, config, full, device, seed, step, share: float):
        super().__init__(config, full, device, seed, step)
        self._merging = ToMeConfig(method="merge_queries", ratio=share, min_tokens=0, levels=config.levels)

    def attention(
        self, q: Tensor, k: Tensor, v: Tensor, grid: Grid, metric: Tensor | None = None, own: bool = False
    ) -> MergedAttention | None:
        layer = self._layers.get(grid, 0)
        made = super().attention(q, k, v, grid, metric, own)
        if made is None:
            return None
        plan = match_tokens(q, grid, self._merging, seed=self.seed, step=self.step, layer=layer)
        return MergedAttention(plan, plan.merge(q), made.k, made.v, made.bias, merges_queries=True)


def guided_cells(
    config: ToMeConfig, full: Grid, device: torch.device, seed: Tensor, step: int, memory: dict
) -> ModelCall:
    """A Make of lab/fidelity/methods.py."""
    return GuidedCells(config, full, device, seed, step)


def merged_on_top(share: float):
    """The same, of MergedOnTop."""

    def make(config: ToMeConfig, full: Grid, device: torch.device, seed: Tensor, step: int, memory: dict) -> ModelCall:
        return MergedOnTop(config, full, device, seed, step, share)

    return make
