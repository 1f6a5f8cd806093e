"""Which tiles of keys a query tile has whole, which at half resolution: two launches, for multires.py beside this.

The specification is scores and choose in multires.py of the core.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ...core.multires import LEVELS, STEPS, Counts, Tiles
from .compiler import power_of_two, shared_memory, strides, tl, triton


class Config(NamedTuple):
    """Queries of a program, keys of a block (no fewer than a tile has), warps, stages of the pipeline, registers of a
    thread (None: as many as it likes); of the programs that choose: query cells and keys' cells of one, tiles whose
    levels it holds at a time, warps, and cells that one of the first launch pools."""

    rows: int = 128
    keys: int = 64
    warps: int = 8
    stages: int = 3
    registers: int | None = 128
    asking: int = 16
    asked: int = 64
    held: int = 2048
    choosers: int = 4
    pool: int = 16


# 128 registers: two programs share a multiprocessor, one multiplies while the other one takes exponentials.
_CONFIG = Config()
_SMALL = Config(keys=128)  # heads of 64 channels or fewer
# Heads of more than 128 channels; on cards with 99 KiB of shared memory (RTX), which has not been timed.
_WIDE = Config(rows=64, registers=None)
_NARROW = Config(rows=32, warps=4, stages=2, registers=None)
_ROOM = 136 * 1024


def config_for(d: int, device: torch.device) -> Config:
    """The settings for heads of d channels."""
    if d <= 128:
        return _CONFIG if d > 64 else _SMALL
    return _WIDE if shared_memory(device) >= _ROOM else _NARROW


@triton.jit
def _pool_kernel(
    k, rows, pooled, heads, cells, k0, k1, k2,
    HEAD: tl.constexpr, BLOCK: tl.constexpr, CELL: tl.constexpr, CELLS: tl.constexpr,
):  # fmt: skip
    """CELLS means of CELL keys of one head. pooled: [B * H, cells, HEAD]."""
    batch = (tl.program_id(1) // heads).to(tl.int64)
    head = (tl.program_id(1) % heads).to(tl.int64)
    cell = tl.program_id(0) * CELLS + tl.arange(0, CELLS)
    channel = tl.arange(0, BLOCK)
    mask = (cell < cells)[:, None] & (channel < HEAD)[None, :]
    total = _sum_cells(k + batch * k0 + head * k1, rows, cell, cells * CELL, k2, HEAD, BLOCK, CELL, CELLS)
    target = pooled + (tl.program_id(1).to(tl.int64) * cells + cell[:, None]) * HEAD + channel[None, :]
    tl.store(target, (total / CELL).to(pooled.dtype.element_ty), mask=mask)


@triton.jit
def _sum_cells(
    x, rows, cell, tokens, x2, HEAD: tl.constexpr, BLOCK: tl.constexpr, CELL: tl.constexpr, CELLS: tl.constexpr
):
    """[CELLS, BLOCK] float32: the sum of each cell's tokens, of those before `tokens`."""
    channel = tl.arange(0, BLOCK)
    total = tl.zeros((CELLS, BLOCK), tl.float32)
    for first in range(0, CELL, 4):
        for at in tl.static_range(4):  # loads that wait for one another no longer than they must
            place = cell * CELL + first + at
            there = place < tokens
            row = tl.load(rows + place, mask=there, other=0)
            mask = there[:, None] & (channel < HEAD)[None, :]
            total += tl.load(x + row[:, None] * x2 + channel[None, :], mask=mask, other=0.0).to(tl.float32)
    return total


@triton.jit(do_not_specialize=["image", "count", "whole", "half", "beside_whole", "beside_half"])
def _choose_kernel(
    q, pooled, rows, lists, heads, tokens, query_tiles, image, count, whole, half, beside_whole, beside_half, scale,
    q0, q1, q2,
    HEAD: tl.constexpr, BLOCK: tl.constexpr, SIZE: tl.constexpr, QUERIES: tl.constexpr, TOGETHER: tl.constexpr,
    KEYS: tl.constexpr, HELD: tl.constexpr, AT_ONCE: tl.constexpr, STEPS: tl.constexpr, LEVELS: tl.constexpr,
):  # fmt: skip
    """The lists of TOGETHER query tiles of one head. lists: [B * H, query tiles, count] int16; first they hold scores.

    HELD: a power of two, count or more. Scores are float16.
    """
    CELL: tl.constexpr = SIZE // 2
    CELLS: tl.constexpr = QUERIES // CELL  # of a query tile
    ROWS: tl.constexpr = TOGETHER * CELLS
    batch = (tl.program_id(1) // heads).to(tl.int64)
    head = (tl.program_id(1) % heads).to(tl.int64)
    cell = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    asking = _sum_cells(q + batch * q0 + head * q1, rows, cell, tokens, q2, HEAD, BLOCK, CELL, ROWS)
    there = tl.minimum(tl.maximum(tokens - cell * CELL, 0), CELL)  # the last query tile may be shorter
    asking = (asking / tl.maximum(there, 1).to(tl.float32)[:, None]).to(q.dtype.element_ty)
    asked = pooled + tl.program_id(1).to(tl.int64) * image * 4 * HEAD
    channel = tl.arange(0, BLOCK)
    tile = tl.program_id(0) * TOGETHER + tl.arange(0, TOGETHER)
    lists += tl.program_id(1).to(tl.int64) * query_tiles * count
    for first in range(0, image * 4, KEYS):
        at = first + tl.arange(0, KEYS)
        mask = (at < image * 4)[:, None] & (channel < HEAD)[None, :]
        mean = tl.load(asked + at[:, None] * HEAD + channel[None, :], mask=mask, other=0.0)
        logits = tl.where((there > 0)[:, None], tl.dot(asking, tl.trans(mean)) * scale, float("-inf"))
        most = tl.max(tl.reshape(logits, (ROWS, KEYS // 4, 4)), 2)
        most = tl.max(tl.reshape(most, (TOGETHER, CELLS, KEYS // 4)), 1)
        score = most.to(tl.float16).to(tl.int16, bitcast=True)
        scored = first // 4 + tl.arange(0, KEYS // 4)
        mask = (tile < query_tiles)[:, None] & (scored < image)[None, :]
        tl.store(lists + tile[:, None] * count + scored[None, :], score, mask=mask)
    tl.debug_barrier()  # scores are read by other threads than wrote them
    other = tl.arange(0, HELD)[None, :]
    for at in range(0, TOGETHER, AT_ONCE):
        mine = tl.program_id(0) * TOGETHER + at + tl.arange(0, AT_ONCE)
        row = lists + mine[:, None] * count
        valid = (mine < query_tiles)[:, None] & (other < count)
        score = tl.load(row + other, mask=valid & (other < image), other=0).to(tl.float16, bitcast=True).to(tl.float32)
        free = (other < image) & (other * SIZE // QUERIES != mine[:, None])
        greatest = tl.maximum(tl.max(tl.where(free, score, float("-inf")), 1), -65504.0)
        steps = tl.minimum((greatest[:, None] - score) * STEPS, LEVELS)
        level = tl.where(free, steps.to(tl.int32) + 1, 0)
        level = tl.where(valid, level, LEVELS + 2)
        beside = mine >= image * SIZE // QUERIES
        wholes = tl.where(beside, beside_whole, whole)
        both = wholes + tl.where(beside, beside_half, half)
        # The levels of the last that are whole and at half resolution, bit by bit.
        last = tl.zeros((AT_ONCE,), tl.int32)
        lower = tl.zeros((AT_ONCE,), tl.int32)
        for bit in range(12):
            one, two = last | (2048 >> bit), lower | (2048 >> bit)
            below = tl.sum((level < one[:, None]).to(tl.int32) + ((level < two[:, None]).to(tl.int32) << 16), 1)
            last = tl.where((below & 0xFFFF) < wholes, one, last)
            lower = tl.where((below >> 16) < both, two, lower)
        # Of equal ones the first: as many as there is room for.
        below = tl.sum((level < last[:, None]).to(tl.int32) + ((level < lower[:, None]).to(tl.int32) << 16), 1)
        even = (level == last[:, None]).to(tl.int32) + ((level == lower[:, None]).to(tl.int32) << 16)
        seen = tl.cumsum(even, 1)
        in_whole = (level == last[:, None]) & ((seen & 0xFFFF) <= (wholes - (below & 0xFFFF))[:, None])
        in_whole = in_whole | (level < last[:, None])
        in_half = (level == lower[:, None]) & ((seen >> 16) <= (both - (below >> 16))[:, None])
        in_half = (in_half | (level < lower[:, None])) & (in_whole == 0)
        before = tl.cumsum(in_whole.to(tl.int32) + (in_half.to(tl.int32) << 16), 1)
        in_rest = both[:, None] + other - (before & 0xFFFF) - (before >> 16)
        place = tl.where(in_half, wholes[:, None] + (before >> 16) - 1, in_rest)
        place = tl.where(in_whole, (before & 0xFFFF) - 1, place)
        tl.debug_barrier()  # all scores of these tiles are read
        tl.store(row + place, tl.broadcast_to(other, (AT_ONCE, HELD)).to(tl.int16), mask=valid)


def launch_choose(
    q: Tensor, k: Tensor, tiles: Tiles, counts: Counts, scale: float, config: Config | None = None
) -> Tensor:
    """multires.choose of multires.scores: [B, H, query tiles, count] int16. q, k: [B, H, L, d], channels together."""
    batch, heads, tokens, d = q.shape
    config = config or config_for(d, q.device)
    block, cells = max(16, power_of_two(d)), tiles.image * 4
    pooled = torch.empty((batch * heads, cells, d), dtype=k.dtype, device=k.device)
    lists = torch.empty((batch, heads, tiles.query_tiles, tiles.count), dtype=torch.int16, device=q.device)
    if cells:
        _pool_kernel[(-(-cells // config.pool), batch * heads)](
            k, tiles.rows, pooled, heads, cells, *strides(k),
            HEAD=d, BLOCK=block, CELL=tiles.size // 4, CELLS=config.pool,
            num_warps=4,
        )  # fmt: skip
    together = max(1, config.asking // (tiles.queries // (tiles.size // 2)))
    held = power_of_two(tiles.count)
    _choose_kernel[(-(-tiles.query_tiles // together), batch * heads)](
        q, pooled, tiles.rows, lists, heads, tokens, tiles.query_tiles, tiles.image, tiles.count, *counts, scale,
        *strides(q),
        HEAD=d, BLOCK=block, SIZE=tiles.size, QUERIES=tiles.queries, TOGETHER=together, KEYS=config.asked, HELD=held,
        AT_ONCE=min(together, max(1, config.held // held)), STEPS=STEPS, LEVELS=LEVELS,
        num_warps=config.choosers,
    )  # fmt: skip
    return lists
