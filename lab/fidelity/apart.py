"""`sample` where not all queries of a layer see the same draw: other heads or other queries of a run, other tokens.

With one draw for a layer the error of all its outputs is one and the same; with several it is spread over heads or
over the tokens of a run, and what comes behind them can take its mean. The attention work is that of `sample`; keys
and values have to be projected whole. Only for ratios whose runs are of equal length.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from shared_tome import ModelCall, ToMeConfig
from shared_tome.attention.combine import TORCHS, attend_with_lse, choose_kernel
from shared_tome.core.curve import curve_order
from shared_tome.core.grid import Grid
from shared_tome.core.groups import spread_rows
from shared_tome.core.noise import key
from shared_tome.core.sampling import kept_count, run_of_token, walk_table
from shared_tome.merging.plan import SamplePlan

QUERIES = ("same", "apart", "own")


class ApartPlan(SamplePlan):
    """keys, labels: [L, b, M]: each run's tokens in the order in which keys are drawn and queries are numbered."""

    def __init__(self, batch: int, grid: Grid, keys: Tensor, labels: Tensor | None, heads: bool, own: bool):
        super().__init__(batch, grid, keys[:1])
        if not self.even:
            raise ValueError(f"runs must be of equal length, got {self.tokens} tokens in {self.kept} runs")
        self.keys, self.labels, self.heads, self.own = keys, labels, heads, own

    def attend(self, q: Tensor, k: Tensor, v: Tensor, start: int = 0) -> Tensor:
        """q, k, v: [B, H, L, d], the first `start` tokens a text's, which stay -> [B, H, L, d]."""
        (text_q, q), (text_k, k), (text_v, v) = (x.split((start, self.tokens), dim=2) for x in (q, k, v))
        out, lse = self._attend_image(q, k, v)
        if not start:
            return out.to(q.dtype)
        kernel = _kernel(q)
        image = _joined(out, lse, *attend_with_lse(q, text_k, text_v, kernel))
        drawn = self._drawn(q)[:, :1]  # a text's queries have the first draw of each head
        parts = (x.flatten(0, 1) for x in (_take(k, drawn), _take(v, drawn)))
        out, lse = attend_with_lse(text_q, *parts, kernel)
        text = _joined(out, lse + math.log(len(self.keys)), *attend_with_lse(text_q, text_k, text_v, kernel))
        return torch.cat((text, image), dim=2).to(q.dtype)

    def _drawn(self, q: Tensor) -> Tensor:
        """[B, G, H, M]: the keys of each group of queries and each head."""
        batch, heads = q.shape[:2]
        groups = 1 if self.labels is None else len(self.keys)
        turn = torch.arange(groups, device=q.device)[:, None] + torch.arange(heads, device=q.device) * self.heads
        return _rows(self.keys[turn % len(self.keys)], batch)

    def _attend_image(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """[B, H, N, d] and the logarithm of the weighed sum of exponentials [B, H, N], both float32."""
        batch, heads, tokens, d = q.shape
        drawn = self._drawn(q)
        if self.labels is None:
            own = torch.arange(tokens, device=q.device).expand(batch, 1, heads, -1)
            owner = drawn.index_select(3, run_of_token(self.grid, self.kept, q.device))  # (B, 1, H, N)
        else:
            own = _rows(self.labels[:, None].expand(-1, heads, -1, -1), batch)  # (B, G, H, M)
            owner = drawn  # a query of run m has key m drawn of its run
        queries = _take(q, own)
        out, lse = attend_with_lse(*(x.flatten(0, 1) for x in (queries, _take(k, drawn), _take(v, drawn))), _kernel(q))
        out, lse = (x.unflatten(0, (batch, -1)).float() for x in (out, lse))  # (B, G, H, ., d), (B, G, H, .)
        lse = lse + math.log(len(self.keys))
        if self.own:
            scaled = queries.float() * d**-0.5
            mine = (scaled * _take(k, own).float()).sum(-1) - lse
            other = (scaled * _take(k, owner).float()).sum(-1) - lse
            top = mine.clamp_min(0.0)
            rest, mine, other = (x.exp()[..., None] for x in (-top, mine - top, other - top))
            total = rest + mine - other
            mixed = (rest * out + mine * _take(v, own).float() - other * _take(v, owner).float()) / total
            stands = own == owner
            out = torch.where(stands[..., None], out, mixed)
            lse = torch.where(stands, lse, lse + top + total[..., 0].log())
        back = own.transpose(1, 2).flatten(2)  # (B, H, N)
        out, lse = out.transpose(1, 2).flatten(2, 3), lse.transpose(1, 2).flatten(2)
        ordered = torch.empty_like(out).scatter_(2, back[..., None].expand_as(out), out)
        return ordered, torch.empty_like(lse).scatter_(2, back, lse)


def _joined(a: Tensor, a_lse: Tensor, b: Tensor, b_lse: Tensor) -> Tensor:
    """One softmax over the keys of both: [B, H, ., d] and [B, H, .] each."""
    share = (b_lse.float() - a_lse.float()).sigmoid()[..., None]
    return torch.lerp(a.float(), b.float(), share)


def _rows(index: Tensor, batch: int) -> Tensor:
    """[G, H, b, M] -> [B, G, H, M]."""
    return spread_rows(index.permute(2, 0, 1, 3), batch)


def _take(x: Tensor, index: Tensor) -> Tensor:
    """x [B, H, N, d], index [B, G, H, K] -> [B, G, H, K, d]."""
    x = x[:, None].expand(-1, index.shape[1], -1, -1, -1)
    return x.gather(3, index[..., None].expand(*index.shape, x.shape[-1]))


def _kernel(q: Tensor) -> str:
    found = choose_kernel(TORCHS, q.device, q.dtype, q.shape[-1])
    if found is None:
        raise RuntimeError(f"no attention here tells its log-sum-exp for {q.dtype} on {q.device}")
    return found


class Apart(ModelCall):
    """queries: "same" (all see one draw), "apart" (those of a run see each another draw), "own" (the same, and each
    its own token among it, weighing as all of its run). heads: whether heads have draws of their own. own: whether
    each query has its own token besides."""

    def __init__(self, config, full, device, seed, step, queries: str, heads: bool, own: bool):
        super().__init__(config, full, device, seed, step)
        self.queries, self.heads, self.own = queries, heads, own

    def _sample(self, batch: int, grid: Grid, layer: int) -> ApartPlan:
        tokens = grid[0] * grid[1]
        kept = kept_count(tokens, int(tokens * self.config.ratio))
        order = curve_order(grid, self.seed.device)

        def turned(seed: Tensor, by: int) -> Tensor:
            return walk_table(grid, kept, seed, order).roll(-by, 2).permute(2, 0, 1)  # (L, b, M)

        keys = turned(self.seed, self.step + layer)
        if self.queries == "same":
            labels = None
        else:
            labels = keys if self.queries == "own" else turned(key(self.seed, self.step, layer, 7), 0)
        return ApartPlan(batch, grid, keys, labels, self.heads, self.own)


def apart(queries: str = "same", heads: bool = False, own: bool = False) -> Callable[..., ModelCall]:
    """A Make of lab/fidelity/methods.py. Raises ValueError for other `queries` than QUERIES."""
    if queries not in QUERIES:
        raise ValueError(f"queries must be one of {', '.join(QUERIES)}, got {queries!r}")

    def make(config: ToMeConfig, full: Grid, device: torch.device, seed: Tensor, step: int, memory: dict) -> ModelCall:
        return Apart(config, full, device, seed, step, queries, heads, own)

    return make
