"""What a query saw at three resolutions (multires.py), small enough to be kept: two bits for each pair of tiles."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .curve import curve_order
from .grid import Grid
from .multires import Counts, Tiles, tile_sizes

WHOLE, HALVED, QUARTERED = range(3)
_TOGETHER = 4  # pairs of tiles in a byte


def packed(lists: Tensor, tiles: Tiles, counts: Counts) -> Tensor:
    """[B, H, query tiles, ceil(image / 4)] uint8 from multires.choose's lists: each image tile's resolution, WHOLE to
    QUARTERED, for the query tiles that hold tokens of the image's tiles."""
    asks = math.ceil(tiles.image * tiles.size / tiles.queries)
    beside = (torch.arange(asks, device=lists.device) >= tiles.image_query_tiles)[:, None]
    whole = torch.where(beside, counts.beside_whole, counts.whole)
    half = torch.where(beside, counts.beside_half, counts.half)
    rank = lists[:, :, :asks].argsort(-1)[..., : tiles.image]  # a list has each tile once
    found = (rank >= whole).to(torch.uint8) + (rank >= whole + half).to(torch.uint8)
    found = torch.nn.functional.pad(found, (0, -tiles.image % _TOGETHER)).unflatten(-1, (-1, _TOGETHER))
    shift = 2 * torch.arange(_TOGETHER, device=lists.device, dtype=torch.uint8)
    return (found << shift).sum(-1, dtype=torch.uint8)


def resolution_of_tokens(kept: Tensor, grid: Grid, token: int) -> Tensor:
    """[H, N] uint8: at which resolution each token of the grid was for a query token. kept: [H, query tiles, .], of
    `packed`; token: its place in the grid, row by row.

    Tokens behind the last full tile are whole for everybody, and such a token sees all of them.
    """
    tokens = math.prod(grid)
    size, queries = tile_sizes(tokens)
    order = curve_order(grid, torch.device("cpu"))
    place = int((order == token).nonzero())
    out = torch.full((kept.shape[0], tokens), WHOLE, dtype=torch.uint8)
    image = tokens // size
    if place < image * size:
        shift = 2 * torch.arange(_TOGETHER, dtype=torch.uint8)
        found = (kept[:, place // queries, :, None] >> shift & 3).flatten(1)[:, :image]  # (H, image)
        out[:, order[: image * size]] = found.repeat_interleave(size, 1)
    return out
