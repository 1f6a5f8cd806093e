"""`sample`: keys and values from one random real token of each cell, another one in each layer and step.

The tokens are ordered along a space-filling curve and cut into runs of near equal length, so any ratio and any
grid is served; a run of four on an even grid is a 2x2 cell. Each run has a random permutation of its tokens, and
each layer and step takes the next one: layers that follow each other see different tokens, and over a few steps
a layer sees them all (a low-discrepancy walk). Nothing is matched, nothing is unmerged.
"""

from __future__ import annotations

import functools
import math

import torch
from torch import Tensor

from .. import kernels
from ..config import MAX_RUN
from ..merging.plan import Plan, spread_rows, take
from .curve import curve_order, is_compiling
from .grid import Grid
from .noise import bits, key


class SamplePlan(Plan):
    """One token of each run; groups and sizes are worked out only when asked for.

    turns: [T, b, M], the choice and what comes after it in the walk, for heads that draw apart (own.py).
    """

    is_identity = False

    def __init__(self, batch: int, grid: Grid, turns: Tensor):
        super().__init__(batch, math.prod(grid), turns.shape[2], turns.device)
        self.grid, self.turns = grid, turns
        self.even = self.tokens % self.kept == 0

    @property
    def index(self) -> Tensor:
        return spread_rows(self.choice, self.batch)

    @property
    def groups(self) -> Tensor:
        return self.runs.expand(self.batch, -1)

    @property
    def choice(self) -> Tensor:
        """[b, M]: `index` with as many rows as there are choices."""
        return self.turns[0]

    @property
    def runs(self) -> Tensor:
        """[N]: the place in `choice`, and in each of `turns`, of the token that stands for each."""
        return run_of_token(self.grid, self.kept, self.device)

    @property
    def sizes(self) -> Tensor:
        return run_lengths(self.tokens, self.kept, self.device)[1].float().expand(self.batch, -1)

    def merge(self, x: Tensor, weights: Tensor | None = None) -> Tensor:
        return take(x, self.choice)

    def unmerge(self, y: Tensor) -> Tensor:
        return take(y, self.groups[:1])

    def merge_sizes(self, sizes: Tensor) -> Tensor:
        out = torch.zeros(sizes.shape[0], self.kept, dtype=torch.float32, device=sizes.device)
        return out.scatter_add(1, self.groups[:1].expand(sizes.shape[0], -1), sizes.float())

    def key_bias(self) -> Tensor | None:
        return None if self.even else self.sizes[:1].log()


def sample_plan(batch: int, grid: Grid, goes: int, seed: Tensor, step: int | Tensor, layer: int) -> Plan:
    """One layer's choice.

    Args:
        goes: how many of the N tokens go; capped so that one of MAX_RUN stays.
        seed: [] or [B], int64. step: number or 0-d tensor. layer: the layer's place among those of its grid.
    """
    tokens = math.prod(grid)
    kept = kept_count(tokens, goes)
    if kept == tokens:
        return Plan(batch, tokens, tokens, seed.device)
    order = curve_order(grid, seed.device)
    drawn = kernels.draw(order, kept, seed, step, layer, 1)
    if drawn is None:
        drawn = walk_rows(walk_table(grid, kept, seed, order), tokens, step, layer, 1)
    return SamplePlan(batch, grid, drawn)


def kept_count(tokens: int, goes: int) -> int:
    """How many tokens stay when `goes` are asked to go."""
    return min(tokens, max(-(-tokens // MAX_RUN), tokens - max(0, goes)))


def run_lengths(tokens: int, kept: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """(start, length) [M] of the runs: as equal as whole numbers allow."""
    edges = torch.arange(kept + 1, device=device) * tokens // kept
    return edges[:-1], edges[1:] - edges[:-1]


def run_of_token(grid: Grid, kept: int, device: torch.device) -> Tensor:
    """The number of each token's run, [N] int64. Remembered as curve_order is, so do not write to it."""
    return _run_of_token(grid, kept, device) if is_compiling() else _remembered_runs(grid, kept, device)


@functools.lru_cache(maxsize=64)
def _remembered_runs(grid: Grid, kept: int, device: torch.device) -> Tensor:
    with torch.inference_mode(False), torch.no_grad():
        return _run_of_token(grid, kept, device)


def _run_of_token(grid: Grid, kept: int, device: torch.device) -> Tensor:
    tokens = math.prod(grid)
    _, length = run_lengths(tokens, kept, device)
    run = torch.repeat_interleave(torch.arange(kept, device=device), length, output_size=tokens)
    return torch.empty_like(run).scatter(0, curve_order(grid, device), run)


def walk_table(grid: Grid, kept: int, seed: Tensor, order: Tensor) -> Tensor:
    """Each run's tokens in a random order, [b, M, L], L the longest run's length; shorter ones end in padding.

    It depends on the seed alone, so every step finds the same one. order: curve_order(grid).
    """
    tokens = math.prod(grid)
    start, length = run_lengths(tokens, kept, seed.device)
    longest = -(-tokens // kept)
    slot = torch.arange(longest, device=seed.device)  # (L,)
    noise = bits(key(seed.reshape(-1), tokens, kept), kept * longest).reshape(-1, kept, longest)  # (b, M, L)
    # Slots beyond a shorter run's end sort last, where walk_rows never looks. In 31 bits: not every backend sorts
    # int64; stable, so that equal numbers fall the same way everywhere.
    noise = ((noise >> 2) + ((slot >= length[:, None]).long() << 30)).to(torch.int32)
    slot = noise.argsort(dim=-1, stable=True)  # (b, M, L)
    return order[(start[:, None] + slot).clamp_max(tokens - 1)]


def walk_rows(walk: Tensor, tokens: int, step: int | Tensor, layer: int, count: int) -> Tensor:
    """The choices [count, b, M] of `count` layers from `layer` on, in one gather."""
    rows, kept, _ = walk.shape
    _, length = run_lengths(tokens, kept, walk.device)
    turn = (torch.arange(layer, layer + count, device=walk.device) + step)[:, None] % length  # (count, M)
    chosen = walk.gather(2, turn.t()[None].expand(rows, -1, -1))  # (b, M, count)
    return chosen.permute(2, 0, 1).contiguous()  # (count, b, M)
