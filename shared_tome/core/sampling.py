"""`sample`: keys and values from one random real token of each cell, another one in each layer and step.

The tokens are ordered along a space-filling curve and cut into runs of near equal length, so any ratio and any
grid is served; a run of four on an even grid is a 2x2 cell. Each run has a random permutation of its tokens, and
each layer and step takes the next one: layers that follow each other see different tokens, and over a few steps
a layer sees them all (a low-discrepancy walk). Nothing is matched, nothing is unmerged.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..methods import MAX_RUN
from .curve import curve_order, is_traced, remembered
from .grid import Grid
from .noise import bits, key


def kept_count(tokens: int, goes: int) -> int:
    """How many tokens stay when `goes` are asked to go."""
    return min(tokens, max(-(-tokens // MAX_RUN), tokens - max(0, goes)))


def run_lengths(tokens: int, kept: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """(start, length) [M] of the runs: as equal as whole numbers allow."""
    edges = torch.arange(kept + 1, device=device) * tokens // kept
    return edges[:-1], edges[1:] - edges[:-1]


def run_of_token(grid: Grid, kept: int, order: Tensor) -> Tensor:
    """The number of each token's run, [N] int64; do not write to it. order: curve_order of the grid."""
    return _run_of_token(order, kept) if is_traced() else _remembered_runs(grid, kept, order.device)


@remembered
def _remembered_runs(grid: Grid, kept: int, device: torch.device) -> Tensor:
    return _run_of_token(curve_order(grid, device), kept)


def _run_of_token(order: Tensor, kept: int) -> Tensor:
    tokens = order.shape[0]
    _, length = run_lengths(tokens, kept, order.device)
    run = torch.repeat_interleave(torch.arange(kept, device=order.device), length, output_size=tokens)
    return torch.empty_like(run).scatter(0, order, run)


def draw(order: Tensor, kept: int, seed: Tensor, step: int | Tensor, layer: int, count: int) -> Tensor:
    """The choices [count, b, M] of the layers `layer` to `layer + count - 1`.

    Args:
        order: curve_order of the grid, [N]. kept: M, see kept_count.
        seed: [] or [b], int64. step: number or 0-d tensor. layer: the layer's place among those of its grid.
    """
    tokens, longest = order.shape[0], -(-order.shape[0] // kept)
    start, length = run_lengths(tokens, kept, seed.device)
    # Each run's tokens in a random order that depends on the seed alone, [b, M, L], L the longest run's length.
    slot = torch.arange(longest, device=seed.device)  # (L,)
    noise = bits(key(seed.reshape(-1), tokens, kept), kept * longest).reshape(-1, kept, longest)  # (b, M, L)
    # Slots beyond a shorter run's end sort last, where no turn comes to. In 31 bits: not every backend sorts
    # int64; stable, so that equal numbers fall the same way everywhere.
    noise = ((noise >> 2) + ((slot >= length[:, None]).long() << 30)).to(torch.int32)
    slot = noise.argsort(dim=-1, stable=True)  # (b, M, L)
    walk = order[(start[:, None] + slot).clamp_max(tokens - 1)]
    turn = (torch.arange(layer, layer + count, device=walk.device) + step)[:, None] % length  # (count, M)
    chosen = walk.gather(2, turn.t()[None].expand(len(walk), -1, -1))  # (b, M, count)
    return chosen.permute(2, 0, 1).contiguous()  # (count, b, M)
