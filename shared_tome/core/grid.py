"""From token counts to grids and levels. The host tells the grid wherever it knows it."""

from __future__ import annotations

import math

# (height, width); video, frame after frame, is (frames, height, width); sound is one row, (1, length).
Grid = tuple[int, ...]


def split_frames(grid: Grid) -> tuple[int, int, int]:
    """(frames, height, width) of any grid."""
    return (1, *grid) if len(grid) == 2 else grid


def halve(size: int, times: int) -> int:
    """The size after `times` stride-2 convolutions with padding 1: (n + 1) // 2 each."""
    for _ in range(times):
        size = (size + 1) // 2
    return size


def grid_at(full: Grid, level: int) -> Grid:
    """The grid at a level: 0 is the latent's own, each further one is half as high and wide, with as many frames."""
    return (*full[:-2], halve(full[-2], level), halve(full[-1], level))


def level_of(grid: Grid, full: Grid) -> int:
    """The level nearest to a grid by its area, as a ratio (Deep Shrink and its kind make grids between two levels)."""
    area, here = max(1, math.prod(grid)), math.prod(full)
    for level in range(7):
        below = math.prod(grid_at(full, level + 1))
        if area * area >= here * below or below == here:  # no nearer to the next one
            return level
        here = below
    return 7


def grid_of(tokens: int, full: Grid, levels: int = 8) -> Grid | None:
    """The grid of a layer with that many tokens, or None where no level has as many.

    For hosts that tell only the latent's size (AUTOMATIC1111, diffusers).
    """
    for level in range(levels):
        height, width = grid_at(full, level)
        if height * width == tokens:
            return height, width
        if height * width < tokens:
            return None
    return None
