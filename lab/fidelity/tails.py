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
    for row in range(q.shape[0]):  # one at a time: scores are large
        logits = q[row, :, :full].float() @ k[row].float().transpose(-1, -2) * d**-0.5  # (H, full, L)
        see = whole[row].repeat_interleave(SIZE, 1).repeat_interleave(SIZE, 2)
        logits[:, :, :full].masked_fill_(~see, -torch.inf)
        values = v[row].float()
        if mode == "mean":
            tail = q[row, :, :full].float() @ means[1][row].transpose(-1, -2) * d**-0.5 + math.log(SIZE)
            tail.masked_fill_(whole[row].repeat_interleave(SIZE, 1), -torch.inf)
            logits, values = torch.cat((logits, tail), -1), torch.cat((values, means[2][row]), 1)
        out[row, :, :full] = (logits.softmax(-1) @ values).to(out.dtype)
    return torch.empty_like(out).index_copy_(2, rows, out)
