"""Which tokens are destinations (dst) and which may go to one (src).

Sources: "alternate" is Bolya et al. (arXiv 2210.09461), section 3; the others are Bolya and Hoffman
(arXiv 2303.17604), section 4.1 and Table 2.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..config import ToMeConfig
from .grid import Grid, split_frames
from .noise import bits


def cells_of(grid: Grid, stride: tuple[int, int]) -> tuple[int, int, int, int]:
    """(rows, columns, cell height, cell width) of a frame's whole cells; a grid thinner than a cell clamps it."""
    height, width = grid[-2:]
    cell_height, cell_width = min(stride[1], height), min(stride[0], width)
    return height // cell_height, width // cell_width, cell_height, cell_width


def partition_of(config: ToMeConfig) -> str:
    """The partition that holds: downsample goes by cells, whatever the option says."""
    return "fixed_2d" if config.method == "downsample" else config.partition


def dst_count(grid: Grid, config: ToMeConfig) -> int:
    """How many tokens the partition keeps as destinations."""
    tokens, name = math.prod(grid), partition_of(config)
    if name == "alternate":
        return tokens // 2
    rows, columns, cell_height, cell_width = cells_of(grid, config.stride)
    if name == "random":
        return max(1, tokens // (cell_height * cell_width))
    return split_frames(grid)[0] * rows * columns


def partition(grid: Grid, config: ToMeConfig, key: Tensor) -> tuple[Tensor, Tensor]:
    """Split the tokens of a grid.

    Args:
        key: random key [] (one choice for the batch) or [B] (one for each row), see noise.key.
    Returns:
        src [b, N - D] and dst [b, D], token indexes in ascending order, b = 1 or B.
    """
    tokens, name = math.prod(grid), partition_of(config)
    key = key.reshape(-1)  # (b,)
    device = key.device
    if name == "alternate":
        index = torch.arange(tokens, device=device)
        return index[None, ::2], index[None, 1::2]
    count = dst_count(grid, config)
    if name == "random":
        dst = (bits(key, tokens) - 2**31).to(torch.int32).topk(count, dim=-1).indices  # (b, D)
        return split_off(dst, tokens)
    rows, columns, cell_height, cell_width = cells_of(grid, config.stride)
    frames, height, width = split_frames(grid)
    frame = torch.arange(frames, device=device)[:, None, None] * height * width  # (frames, 1, 1)
    row = torch.arange(rows, device=device)[:, None] * cell_height  # (rows, 1)
    column = torch.arange(columns, device=device)[None] * cell_width  # (1, columns)
    if name == "random_2d":
        offset = (bits(key, count) % (cell_height * cell_width)).reshape(-1, frames, rows, columns)
        row, column = row + offset // cell_width, column + offset % cell_width  # (b, frames, rows, columns)
    dst = (frame + row * width + column).reshape(-1, count)  # (b, D)
    return split_off(dst, tokens)


def split_off(dst: Tensor, tokens: int) -> tuple[Tensor, Tensor]:
    """(src, dst) in ascending order from dst [b, D] in any order, without a sort."""
    rows, count = dst.shape
    is_dst = torch.zeros(rows, tokens, dtype=torch.int64, device=dst.device).scatter_(1, dst, 1)
    rank = is_dst.cumsum(1)  # (b, N): destinations up to and with this token
    index = torch.arange(tokens, device=dst.device).expand(rows, -1)
    place = torch.where(is_dst.bool(), rank - 1, count + index - rank)
    order = torch.empty_like(place).scatter_(1, place, index)
    return order[:, count:], order[:, :count]
