"""Which patches became one token, as a picture (arXiv 2210.09461, figure 4): of images, video and sound alike."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from ..core.grid import Grid, split_frames
from ..core.groups import group_counts, group_mean

# Hues of neighbouring group numbers lie far apart.
_GOLDEN = (5**0.5 - 1) / 2


def draw_groups(picture: Tensor, sources: Tensor, grid: Grid, edge: int = 1) -> Tensor:
    """Each patch in the mean colour of its group, the group's outer edge in a colour of its own.

    Args:
        picture: [3, H, W], or [3, frames, H, W] for a grid with frames; 0 to 1. H and W are multiples of the grid's.
        sources: [N], the group of each patch (a row of Trace.sources without the prefix tokens, or of plan.groups).
        grid: (height, width) or (frames, height, width) of the patches; for sound (frequency, time) as drawn.
        edge: width of the edges in pixels; 0 draws none.
    Returns:
        as picture.
    Raises:
        ValueError: sizes that do not go together.
    """
    frames, rows, columns = split_frames(grid)
    film = picture[:, None] if picture.dim() == 3 and len(grid) == 2 else picture
    if film.dim() != 4 or film.shape[0] != 3 or film.shape[1] != frames:
        raise ValueError(
            f"picture must be [3, H, W], or [3, frames, H, W] for a grid {grid}, got {tuple(picture.shape)}"
        )
    height, width = film.shape[-2:]
    if height % rows or width % columns:
        raise ValueError(f"a picture of {height}x{width} pixels has no {rows}x{columns} patches of one size")
    if sources.shape != (math.prod(grid),):
        raise ValueError(
            f"sources must have one number for each of {math.prod(grid)} patches, got {tuple(sources.shape)}"
        )
    tall, wide = height // rows, width // columns
    patches = F.avg_pool2d(film.transpose(0, 1).float(), (tall, wide)).permute(0, 2, 3, 1).reshape(-1, 3)  # (N, 3)
    numbers, groups = sources.unique(return_inverse=True)
    means = group_mean(patches[None], groups[None], group_counts(groups[None], len(numbers)))[0]
    groups = groups.reshape(frames, rows, columns)
    groups = groups.repeat_interleave(tall, dim=1).repeat_interleave(wide, dim=2)  # (frames, H, W)
    painted = means[groups]  # (frames, H, W, 3)
    if edge > 0:
        lines = (means + _hues(numbers)) / 2
        painted = torch.where(_edges(groups, edge)[..., None], lines[groups], painted)
    return painted.permute(3, 0, 1, 2).reshape(picture.shape)


def _hues(numbers: Tensor) -> Tensor:
    """A bright colour for each number [K]: [K, 3]."""
    wheel = (numbers.float()[:, None] * _GOLDEN * 6 + torch.tensor([0.0, 4.0, 2.0], device=numbers.device)) % 6
    return ((wheel - 3).abs() - 1).clamp(0, 1)


def _edges(groups: Tensor, width: int) -> Tensor:
    """Which pixels of groups [frames, H, W] lie within `width` of another group, beside, above or below."""
    near = torch.zeros_like(groups, dtype=torch.bool)
    for dim in (1, 2):
        for step in range(1, width + 1):
            length = groups.shape[dim] - step
            if length > 0:
                differs = groups.narrow(dim, step, length) != groups.narrow(dim, 0, length)
                near.narrow(dim, step, length).logical_or_(differs)
                near.narrow(dim, 0, length).logical_or_(differs)
    return near
