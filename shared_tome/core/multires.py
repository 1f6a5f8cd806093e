"""Attention to keys at three resolutions in one softmax: what a query looks at stays whole, the rest is drawn coarser.

Tokens are ordered along a space-filling curve and cut into tiles of equal length (64 tokens of a picture are 8x8, of a
video 2x4x8). For each head and each query tile every tile of keys is taken at one of three resolutions:

    whole     all its tokens
    half      one random token of each 2x2 cell, which weighs as 4
    quarter   one random token of each 4x4 cell, which weighs as 16

A score from pooled queries and keys says which tile is taken how. A query's own tile is always whole, and so is every
token beside the image (text, references) and what is left of the image behind its last full tile. So no tile is cut,
and the weights of all keys add up to the number of tokens. Queries beside the image have shares of their own. The
draws walk as those of `sample` do: each cell has a random permutation, and layer l of step s takes in head h number
l + s + h of it.

Keeping some tiles whole and the rest as means: Sol-Attn (arXiv 2607.24027), Multi-Resolution Analysis attention (arXiv
2207.10284). Drawn tokens in place of means, in three levels: this project (docs/quality.md). This file is the
specification in plain torch; kernels/impl/multires.py does the same in three launches.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ..config import ToMeConfig
from ..methods import QUARTER
from . import sampling
from .curve import curve_order
from .grid import Grid

# Tokens that one drawn key stands for.
HALF = 4
# (whole, half): shares of the tiles, the rest at quarter resolution; the best measured at their work, from 6% to all.
FRONTIER = (
    (0.0, 0.0), (0.03, 0.20), (0.06, 0.20), (0.10, 0.40), (0.12, 0.88), (0.25, 0.75), (0.33, 0.67), (1.0, 0.0),
)  # fmt: skip
# Tokens of an image below which tiles are small.
FINE_BELOW = 4096
# A score's distance to the greatest one counts in so many steps for each unit of a logit, up to so many in all.
STEPS, LEVELS = 64, 4094
# What a mask adds to the logit of a key that is not seen. Finite: a query that sees no key gets the mean of all.
LEAST = -1e38


@dataclass(frozen=True)
class Tiles:
    """How a row of L tokens is cut.

    rows: [L] int32, the tokens' places in the order of the tiles; behind the image's tiles come the tokens that are
    whole for every query. image: tiles of the image. size: tokens of a tile, 16 or 64. queries: tokens of a query
    tile, a multiple of size.
    """

    rows: Tensor
    image: int
    size: int
    queries: int

    @property
    def count(self) -> int:
        """All full tiles, those beside the image too."""
        return len(self.rows) // self.size

    @property
    def query_tiles(self) -> int:
        """Runs of `queries` in rows; the last one may be shorter."""
        return -(-len(self.rows) // self.queries)

    @property
    def image_query_tiles(self) -> int:
        """Those whose tokens are all in tiles of the image; they come first."""
        return self.image * self.size // self.queries


@dataclass(frozen=True)
class Drawn:
    """The drawn tokens of one step, for any layer and head. Places in the row of tokens, int32, in the order of tiles.

    half: [4, b, image * size / 4], quarter: [16, b, image * size / 16]. Head h of layer l takes number l + h, modulo 4
    and 16. Row i of a batch takes row i % b. table: the tiles' rows [L], half and quarter in one piece.
    """

    table: Tensor
    half: Tensor
    quarter: Tensor


def drawn_in(table: Tensor, tiles: Tiles, draws: int) -> Drawn:
    """The drawn tokens that a table holds behind the tiles' rows; draws: b."""
    length, image = len(tiles.rows), tiles.image * tiles.size
    half = table.narrow(0, length, draws * image).view(HALF, draws, image // HALF)
    quarter = table.narrow(0, length + draws * image, draws * image).view(QUARTER, draws, image // QUARTER)
    return Drawn(table, half, quarter)


def tile_sizes(tokens: int) -> tuple[int, int]:
    """(size, queries) for an image of so many tokens: where there are few, tiles of 64 tokens would be too coarse."""
    return (64, 128) if tokens >= FINE_BELOW else (16, 16)


def cut_tiles(
    grid: Grid, device: torch.device, start: int = 0, length: int | None = None, size: int = 64, queries: int = 128
) -> Tiles:
    """The tiles of a row of `length` tokens (None: the image's alone) whose image, of this grid, begins at `start`.

    Raises ValueError where the image does not fit into the row, or where size or queries are none of those served.
    """
    image = math.prod(grid)
    length = start + image if length is None else length
    if not 0 <= start <= length - image:
        raise ValueError(f"an image of {image} tokens from {start} on does not fit into a row of {length}")
    if size not in (16, 64):
        raise ValueError(f"a tile has 16 or 64 tokens, got {size}")
    if queries < size or queries % size:
        raise ValueError(f"a query tile must have a multiple of {size} tokens, got {queries}")
    beside = torch.arange(length - image, device=device)
    beside = torch.where(beside < start, beside, beside + image)
    rows = torch.cat((curve_order(grid, device) + start, beside)).to(torch.int32)
    return Tiles(rows, image // size, size, queries)


def shares(ratio: float) -> tuple[float, float]:
    """(whole, half): the shares of the tiles that leave 1 - ratio of the attention's work, from 0 to 15/16 of it gone.

    Work is linear in both shares, so between two rows of the table it is what was asked for. Raises ValueError for a
    ratio that is not from 0 to 1; above 15/16 nothing but the query's own tile is whole.
    """
    if not 0.0 <= ratio <= 1.0:
        raise ValueError(f"ratio must be from 0 to 1, got {ratio}")
    asked = max(1.0 - ratio, work(*FRONTIER[0]))
    at = next(at for at, row in enumerate(FRONTIER[1:], 1) if asked <= work(*row))
    low, high = FRONTIER[at - 1], FRONTIER[at]
    share = (asked - work(*low)) / (work(*high) - work(*low))
    whole, half = (a + (b - a) * share for a, b in zip(low, high, strict=True))
    return whole, half


def shares_of(config: ToMeConfig) -> tuple[float, float]:
    """(whole, half): by hand, or what the ratio sets. A share by hand leaves the other one room for no more than the
    rest."""
    whole, half = shares(config.ratio)
    if config.whole >= 0.0:
        whole = config.whole
        half = min(half, 1.0 - whole)
    if config.half >= 0.0:
        half = config.half
        whole = min(whole, 1.0 - half)
    return whole, half


def work(whole: float, half: float) -> float:
    """The share of the keys that is left."""
    return whole + half / HALF + (1.0 - whole - half) / QUARTER


class Counts(NamedTuple):
    """How many of all tiles a query tile has whole and at half resolution; and one with tokens beside the image."""

    whole: int
    half: int
    beside_whole: int
    beside_half: int


def tile_counts(tiles: Tiles, whole: float, half: float, beside: tuple[float, float] = (1.0, 0.0)) -> Counts:
    """The counts for shares of the image's tiles, (whole, half) of image queries and `beside` of the others.

    The tiles beside the image and a query tile's own are whole in any case. Raises ValueError for shares below 0 or
    above 1 together.
    """
    found: list[int] = []
    for share, fourth in ((whole, half), beside):
        if share < 0.0 or fourth < 0.0 or share + fourth > 1.0 + 1e-9:
            raise ValueError(f"whole and half must be shares that add up to 1 at most, got {share} and {fourth}")
        kept = min(tiles.image, max(tiles.queries // tiles.size, round(share * tiles.image)))
        found += [tiles.count - tiles.image + kept, min(tiles.image - kept, round(fourth * tiles.image))]
    return Counts(*found)


def draw_keys(tiles: Tiles, seed: Tensor, step: int | Tensor, draw: Callable[..., Tensor] = sampling.draw) -> Drawn:
    """The tokens that are drawn in a step. seed: [] or [b], int64; step: number or 0-d; draw: or a kernel in its place.

    They are the draws of `sample` at ratios 0.75 and 0.9375 on a grid of as many tokens in this order.
    """
    order = tiles.rows[: tiles.image * tiles.size].long()
    if tiles.image == 0:
        return drawn_in(tiles.rows, tiles, seed.numel())
    parts = [draw(order, len(order) // run, seed, step, 0, run) for run in (HALF, QUARTER)]
    table = torch.cat((tiles.rows, *(part.flatten().to(torch.int32) for part in parts)))
    return drawn_in(table, tiles, seed.numel())


def scores(q: Tensor, k: Tensor, tiles: Tiles, scale: float) -> Tensor:
    """How much each query tile looks at each tile of keys, [B, H, query tiles, count] float16.

    The greatest logit between a mean of half a tile's queries and one of a quarter of a tile's keys. Infinite for a
    query tile's own tiles and for those beside the image. q, k: [B, H, L, d]; scale: of the logits.
    """
    if tiles.image == 0:
        shape = (*q.shape[:2], tiles.query_tiles, tiles.count)
        return torch.full(shape, torch.inf, dtype=torch.float16, device=q.device)
    pad = tiles.query_tiles * tiles.queries - q.shape[2]  # the last query tile may be shorter
    asking = torch.nn.functional.pad(q.index_select(2, tiles.rows).float(), (0, 0, 0, pad))
    asking = asking.unflatten(2, (-1, tiles.size // 2)).sum(3)
    held = (torch.arange(q.shape[2] + pad, device=q.device) < q.shape[2]).unflatten(0, (-1, tiles.size // 2)).sum(1)
    asking = (asking / held.clamp_min(1)[:, None]).to(q.dtype).float()  # (B, H, query cells, d)
    asked = k.index_select(2, tiles.rows[: tiles.image * tiles.size]).float()
    asked = asked.unflatten(2, (-1, tiles.size // 4)).mean(3).to(k.dtype).float()  # (B, H, image * 4, d)
    together = tiles.queries // (tiles.size // 2)
    found = []
    for part, there in zip(asking.split(together, 2), held.split(together), strict=True):
        logits = (part @ asked.transpose(-1, -2) * scale).masked_fill((there == 0)[:, None], -torch.inf)
        found.append(logits.unflatten(3, (-1, 4)).amax((2, 4)))
    tile, asks = (torch.arange(n, device=q.device) for n in (tiles.count, tiles.query_tiles))
    own = tile * tiles.size // tiles.queries == asks[:, None]
    found = torch.nn.functional.pad(torch.stack(found, 2), (0, tiles.count - tiles.image))
    return found.masked_fill(own | (tile >= tiles.image), torch.inf).half()


def choose(scores: Tensor, tiles: Tiles, counts: Counts) -> Tensor:
    """[B, H, query tiles, count] int16: the tiles that are whole, then those at half resolution, then the rest.

    The greatest scores are whole. Scores count by their distance to the greatest finite one, in steps of 1/64 up to 64;
    of equal ones the first tile counts. Within a resolution tiles are in their own order.
    """
    asks, count = scores.shape[-2:]
    if count == 0:  # fewer tokens than a tile has
        return scores.to(torch.int16)
    tile = torch.arange(count, device=scores.device)
    wide = scores.float()
    level = wide.masked_fill(wide == torch.inf, -torch.inf).amax(-1, keepdim=True) - wide
    level = (level * STEPS).clamp(0, LEVELS).int() + 1
    level = level.masked_fill(wide == torch.inf, 0)
    rank = (level * count + tile).argsort(-1).argsort(-1)
    beside = (torch.arange(asks, device=scores.device) >= tiles.image_query_tiles)[:, None]
    whole = torch.where(beside, counts.beside_whole, counts.whole)  # (query tiles, 1)
    half = torch.where(beside, counts.beside_half, counts.half)
    resolution = (rank >= whole).int() + (rank >= whole + half).int()
    return (resolution * count + tile).argsort(-1).to(torch.int16)


def choose_lists(q: Tensor, k: Tensor, tiles: Tiles, counts: Counts, scale: float) -> Tensor:
    """The lists that `attend` goes by: what is chosen by the scores."""
    return choose(scores(q, k, tiles, scale), tiles, counts)


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    tiles: Tiles,
    drawn: Drawn,
    lists: Tensor,
    counts: Counts,
    layer: int,
    scale: float,
    mask: Tensor | None = None,
) -> Tensor:
    """The attention to the keys that were chosen, and to all that are whole for everyone.

    Args:
        q, k, v: [B, H, L, d]. lists: from `choose` by counts. layer: its place among those of its grid.
        mask: [B or 1, H or 1, L or 1, L], added to the logits of each key that is there; of bool: whether it is seen.
    Returns:
        [B, H, L, d] in q's dtype.
    """
    length, d = q.shape[2:]
    asking = torch.nn.functional.pad(tiles.rows, (0, tiles.query_tiles * tiles.queries - length)).long()
    asking = q.index_select(2, asking).float().unflatten(2, (-1, tiles.queries))  # (B, H, query tiles, queries, d)
    image, out = tiles.image_query_tiles, []
    for tile in range(tiles.query_tiles):
        whole, half = counts[:2] if tile < image else counts[2:]
        place = key_places(tiles, drawn, lists[:, :, tile], whole, half, layer)[..., None].expand(-1, -1, -1, d)
        keys, values = (x.gather(2, place).float() for x in (k, v))  # (B, H, M, d)
        logits = asking[:, :, tile] @ keys.transpose(-1, -2) * scale + key_weights(tiles, whole, half, q.device).log()
        if mask is not None:
            logits = logits + _mask_of(mask, tiles, tile, place[..., 0])
        out.append(logits.softmax(-1) @ values)
    out = torch.cat(out, 2)[:, :, :length].to(q.dtype)
    return torch.empty_like(out).index_copy_(2, tiles.rows.long(), out)


def key_places(tiles: Tiles, drawn: Drawn, lists: Tensor, whole: int, half: int, layer: int) -> Tensor:
    """Which tokens are the keys of a query tile, [B, H, M] int64, in the order of key_weights. lists: [B, H, count]."""
    batch, heads, count = lists.shape
    parts = lists.long().split((whole, half, count - whole - half), 2)
    full = tiles.rows[: count * tiles.size].view(1, 1, -1)
    found = []
    for part, table, run in zip(parts, (full, drawn.half, drawn.quarter), (1, HALF, QUARTER), strict=True):
        table = table.unflatten(2, (-1, tiles.size // run))  # (turns, b, tiles, keys of a tile)
        head = (torch.arange(heads, device=lists.device) + layer) % table.shape[0]
        row = torch.arange(batch, device=lists.device) % table.shape[1]
        found.append(table[head[None, :, None], row[:, None, None], part].flatten(2))
    beside = tiles.rows[count * tiles.size :].expand(batch, heads, -1)
    return torch.cat((*found, beside), 2).long()


def is_of_keys(mask: Tensor) -> bool:
    """Whether a mask [., ., L or 1, L] is the same for all queries."""
    return mask.shape[2] == 1 or mask.stride(2) == 0


def _mask_of(mask: Tensor, tiles: Tiles, tile: int, place: Tensor) -> Tensor:
    """What is added to the logits of one query tile, [B, H, queries or 1, M] float32. place: of its keys, [B, H, M]."""
    rows = torch.nn.functional.pad(tiles.rows, (0, tiles.query_tiles * tiles.queries - len(tiles.rows)))
    mask = mask[:, :, :1] if is_of_keys(mask) else mask.index_select(2, rows.split(tiles.queries)[tile])
    found = mask.expand(*place.shape[:2], -1, -1).gather(3, place[:, :, None].expand(-1, -1, mask.shape[2], -1))
    if found.dtype == torch.bool:
        return torch.where(found, 0.0, LEAST)
    return found.float().clamp_min(LEAST)


def key_weights(tiles: Tiles, whole: int, half: int, device: torch.device) -> Tensor:
    """How many tokens each key of a query tile stands for, [M] float32; they add up to L."""
    beside = len(tiles.rows) % tiles.size
    counts = (whole * tiles.size, half * tiles.size // HALF, (tiles.count - whole - half) * tiles.size // QUARTER)
    weights = torch.tensor((1.0, HALF, QUARTER, 1.0), device=device)
    return weights.repeat_interleave(torch.tensor((*counts, beside), device=device))


def attend_multires(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    tiles: Tiles,
    drawn: Drawn,
    counts: Counts,
    layer: int = 0,
    scale: float | None = None,
    mask: Tensor | None = None,
) -> Tensor:
    """All of it: [B, H, L, d] in q's dtype. scale: of the logits, 1 / sqrt(d) where it is None. mask: see attend; the
    choice of tiles takes no notice of it, since it is meant for tokens beside the image."""
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    return attend(q, k, v, tiles, drawn, choose_lists(q, k, tiles, counts, scale), counts, layer, scale, mask)
