"""Sparse attention as others do it, for comparison: some tiles of keys whole, of the others one mean, or nothing.

Which tiles are whole: the greatest products of a query tile's mean and a key tile's mean, for each head. A mean key
weighs as its tile. That is what Sol-Attn (arXiv 2607.24027) and ComfyUI's sparse attention do; dropping the rest is
what most others do. Simulated with dense scores: the pictures are right, the time is not.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from shared_tome.core.grid import Grid
from shared_tome.core.multires import cut_tiles

# Tokens of a tile, of queries and of keys.
SIZE = 16
MODES = ("mean", "drop")


def whole_share(work: float, mode: str) -> float:
    """The share of the tiles that is whole where `work` of the keys is left. Raises ValueError for another mode."""
    if mode not in MODES:
        raise ValueError(f"mode must be one of {', '.join(MODES)}, got {mode!r}")
    return work if mode == "drop" else max(0.0, (work - 1 / SIZE) / (1 - 1 / SIZE))


def attend_tails(q: Tensor, k: Tensor, v: Tensor, start: int, grid: Grid, work: float, mode: str) -> Tensor:
    """The attention of a row whose image, of this grid, begins at `start`; tokens beside it are whole, and so is each
    query tile's own tile.

    Args:
        q, k, v: [B, H, L, d]. work: the share of the image's keys that is left. mode: of the others, "mean" or "drop".
    Returns:
        [B, H, L, d] in q's dtype.
    """
    length, d = q.shape[2:]
    tiles = cut_tiles(grid, q.device, start, length, SIZE, SIZE)
    full = tiles.image * SIZE
    rows = tiles.rows.long()
    q, k, v = (x.index_select(2, rows) for x in (q, k, v))
    out = torch.nn.functional.scaled_dot_product_attention(q, k, v)  # of the queries that see all
    means = [x[:, :, :full].unflatten(2, (-1, SIZE)).float().mean(3) for x in (q, k, v)]  # (B, H, tiles, d)
    score = means[0] @ means[1].transpose(-1, -2)
    own = torch.eye(tiles.image, dtype=torch.bool, device=q.device)
    kept = max(1, round(whole_share(work, mode) * tiles.image))
    chosen = score.masked_fill(own, torch.inf).topk(kept, -1).indices
    whole = torch.zeros_like(score, dtype=torch.bool).scatter(-1, chosen, True)  # (B, H, query tiles, tiles)
    see = q.new_full(whole.shape, -torch.inf).masked_fill_(whole, 0.0)
    parts = [see[..., None].expand(-1, -1, -1, -1, SIZE).flatten(3)]  # (B, H, query tiles, tokens)
    parts.append(parts[0].new_zeros(()).expand(*whole.shape[:3], length - full))
    keys, values = [k], [v]
    if mode == "mean":
        parts.append(q.new_full(whole.shape, math.log(SIZE)).masked_fill_(whole, -torch.inf))
        keys, values = [k, means[1].to(k.dtype)], [v, means[2].to(v.dtype)]
    bias = torch.cat(parts, -1).repeat_interleave(SIZE, 2)
    given = (torch.cat(x, 2) for x in (keys, values))
    out[:, :, :full] = torch.nn.functional.scaled_dot_product_attention(q[:, :, :full], *given, attn_mask=bias)
    return torch.empty_like(out).index_copy_(2, rows, out)
