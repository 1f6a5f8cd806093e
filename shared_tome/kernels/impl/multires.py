"""Attention to keys at three resolutions: two launches choose, one attends. Keys are read where they lie.

The specification is multires.py. Softmax over blocks of keys as in attend.py; a block's keys are found through the list
of the query tile's tiles and the table of the step's drawn tokens.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ...multires import LEVELS, STEPS, Counts, Drawn, Tiles
from ...plan import check_rows
from .attend import LOG2_E
from .compiler import power_of_two, shared_memory, tl, triton


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
# Tiles that a program holds while it chooses; channels of a head; offsets within a head; programs on a second axis.
MOST_TILES, MOST_CHANNELS, _FARTHEST, _MOST_PROGRAMS = 8192, 256, 2**31, 65535


def config_for(d: int, device: torch.device) -> Config:
    """The settings for heads of d channels."""
    if d <= 128:
        return _CONFIG if d > 64 else _SMALL
    return _WIDE if shared_memory(device) >= _ROOM else _NARROW


@triton.jit
def _pool_kernel(
    k,
    rows,
    pooled,
    heads,
    cells,
    k0,
    k1,
    k2,
    HEAD: tl.constexpr,
    BLOCK: tl.constexpr,
    CELL: tl.constexpr,
    CELLS: tl.constexpr,
):
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
    q,
    pooled,
    rows,
    lists,
    heads,
    tokens,
    query_tiles,
    image,
    count,
    whole,
    half,
    beside_whole,
    beside_half,
    scale,
    q0,
    q1,
    q2,
    HEAD: tl.constexpr,
    BLOCK: tl.constexpr,
    SIZE: tl.constexpr,
    QUERIES: tl.constexpr,
    TOGETHER: tl.constexpr,
    KEYS: tl.constexpr,
    HELD: tl.constexpr,
    AT_ONCE: tl.constexpr,
    STEPS: tl.constexpr,
    LEVELS: tl.constexpr,
    WIDEN: tl.constexpr,
):
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
    if WIDEN:
        asking = asking.to(tl.float32)
    asked = pooled + tl.program_id(1).to(tl.int64) * image * 4 * HEAD
    channel = tl.arange(0, BLOCK)
    tile = tl.program_id(0) * TOGETHER + tl.arange(0, TOGETHER)
    lists += tl.program_id(1).to(tl.int64) * query_tiles * count
    for first in range(0, image * 4, KEYS):
        at = first + tl.arange(0, KEYS)
        mask = (at < image * 4)[:, None] & (channel < HEAD)[None, :]
        mean = tl.load(asked + at[:, None] * HEAD + channel[None, :], mask=mask, other=0.0)
        if WIDEN:
            mean = mean.to(tl.float32)
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


@triton.jit
def _add_keys(
    query,
    total,
    top,
    mass,
    key,
    value,
    token,
    bias,
    k2,
    v2,
    scale,
    HEAD: tl.constexpr,
    BLOCK: tl.constexpr,
    SAME: tl.constexpr,
    WEIGHED: tl.constexpr,
    WIDEN: tl.constexpr,
):
    """The keys `token` [KEYS]. bias: their weights' logarithm, to the base of two: one for all, or WEIGHED [KEYS]."""
    channel = tl.arange(0, BLOCK)
    place = token[:, None] * k2 + channel[None, :]
    at_key = key + place
    at_value = value + (place if SAME else token[:, None] * v2 + channel[None, :])
    if HEAD == BLOCK:
        k, v = tl.load(at_key), tl.load(at_value)
    else:
        mask = (channel < HEAD)[None, :]
        k, v = tl.load(at_key, mask=mask, other=0.0), tl.load(at_value, mask=mask, other=0.0)
    if WIDEN:
        query, k, v = query.to(tl.float32), k.to(tl.float32), v.to(tl.float32)
    logits = tl.dot(query, tl.trans(k))
    if WEIGHED:
        logits = logits * scale + bias[None, :]
        higher = tl.maximum(top, tl.max(logits, 1))
        share = tl.exp2(logits - higher[:, None])
    else:
        higher = tl.maximum(top, tl.max(logits, 1) * scale + bias)
        share = tl.exp2(logits * scale - (higher - bias)[:, None])
    shrink = tl.exp2(top - higher)
    mass = mass * shrink + tl.sum(share, 1)
    total = tl.dot(share.to(v.dtype), v, total * shrink[:, None])
    return total, higher, mass


@triton.jit
def _pick(at, one, two, a, b, c):
    """a, b or c, by where `at` stands between the ends of two sections."""
    return tl.where(at < one, a, tl.where(at < two, b, c))


@triton.jit(do_not_specialize=["image", "whole", "half", "beside_whole", "beside_half", "draws", "layer"])
def _attend_kernel(
    q,
    k,
    v,
    out,
    lists,
    table,
    heads,
    tokens,
    image,
    whole,
    half,
    beside_whole,
    beside_half,
    draws,
    layer,
    scale,
    q0,
    q1,
    q2,
    k0,
    k1,
    k2,
    v0,
    v1,
    v2,
    HEAD: tl.constexpr,
    BLOCK: tl.constexpr,
    SIZE: tl.constexpr,
    QUERIES: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
    SAME: tl.constexpr,
    WIDEN: tl.constexpr,
):
    """ROWS queries of one head of one batch row. out: [B, L, H, d] in memory. draws: rows of the step's draws.

    Three sections of keys: whole, half, quarter. Full blocks of one section come first; what is left of each follows,
    weighed key by key, and the tokens behind the last full tile.
    """
    # Queries beside the image may have the most keys: their programs come first, of all heads.
    each, ours = (tokens + ROWS - 1) // ROWS, image * SIZE // QUERIES * (QUERIES // ROWS)
    first = tl.num_programs(0) // each * (each - ours)
    number = tl.program_id(0)
    if number < first:
        both, program = number // (each - ours), ours + number % (each - ours)
    else:
        both, program = (number - first) // ours, (number - first) % ours
    batch, head = (both // heads).to(tl.int64), (both % heads).to(tl.int64)
    place = program * ROWS + tl.arange(0, ROWS)
    there = place < tokens
    channel = tl.arange(0, BLOCK)
    mask = there[:, None] & (channel < HEAD)[None, :]
    own = tl.load(table + place, mask=there, other=0).to(tl.int64)
    query = tl.load(q + batch * q0 + head * q1 + own[:, None] * q2 + channel[None, :], mask=mask, other=0.0)
    target = out + ((batch * tokens + own) * heads + head) * HEAD
    key, value = k + batch * k0 + head * k1, v + batch * v0 + head * v1
    mine = program * ROWS // QUERIES
    count = tokens // SIZE
    beside = mine >= image * SIZE // QUERIES
    whole = tl.where(beside, beside_whole, whole)
    half = tl.where(beside, beside_half, half)
    lists += (both.to(tl.int64) * ((tokens + QUERIES - 1) // QUERIES) + mine) * count
    # Where the drawn tokens begin in the table, how many keys each section has, and where its full blocks end.
    turn, row = both % heads + layer, both // heads % draws
    halves = tokens + (turn % 4 * draws + row) * (image * (SIZE // 4))
    quarters = tokens + draws * image * SIZE + (turn % 16 * draws + row) * (image * (SIZE // 16))
    keys0, keys1, keys2 = whole * SIZE, half * (SIZE // 4), (count - whole - half) * (SIZE // 16)
    end0 = keys0 // KEYS
    end1 = end0 + keys1 // KEYS
    end2 = end1 + keys2 // KEYS
    # The tile that a section's first block would have, were all blocks before it of this section too.
    tile1, tile2 = whole - end0 * (KEYS * 4) // SIZE, whole + half - end1 * (KEYS * 16) // SIZE
    total = tl.zeros((ROWS, BLOCK), tl.float32)
    top = tl.full((ROWS,), -1e30, tl.float32)
    mass = tl.zeros((ROWS,), tl.float32)
    lane = tl.arange(0, KEYS)
    for block in range(end2):
        shift = _pick(block, end0, end1, 0, 2, 4)  # a tile has SIZE >> shift keys
        begin = _pick(block, end0, end1, 0, tile1, tile2) + (block * KEYS << shift) // SIZE
        base = _pick(block, end0, end1, 0, halves, quarters)
        tile = tl.load(lists + begin + (lane << shift) // SIZE).to(tl.int32)
        token = tl.load(table + base + tile * (SIZE >> shift) + (lane & ((SIZE >> shift) - 1)))
        bias = shift.to(tl.float32)  # a key at this resolution stands for 2 to the power of it
        total, top, mass = _add_keys(
            query, total, top, mass, key, value, token, bias, k2, v2, scale, HEAD, BLOCK, SAME, False, WIDEN
        )
    left0 = keys0 % KEYS
    left1 = left0 + keys1 % KEYS
    left2 = left1 + keys2 % KEYS
    left3 = left2 + tokens % SIZE
    for start in range(0, left3, KEYS):
        at = start + lane
        valid, listed = at < left3, at < left2
        shift = tl.where(listed, _pick(at, left0, left1, 0, 2, 4), 0)
        begin = _pick(at, left0, left1, 0, whole, whole + half)
        base = tl.where(listed, _pick(at, left0, left1, 0, halves, quarters), count * SIZE)
        bias = tl.where(valid, shift.to(tl.float32), float("-inf"))
        at += tl.where(listed, _pick(at, left0, left1, keys0 - left0, keys1 - left1, keys2 - left2), -left2)
        tile = tl.load(lists + begin + (at << shift) // SIZE, mask=listed, other=0).to(tl.int32)
        at = tl.where(listed, tile * (SIZE >> shift) + (at & ((SIZE >> shift) - 1)), at)
        token = tl.load(table + base + at, mask=valid, other=0)
        total, top, mass = _add_keys(
            query, total, top, mass, key, value, token, bias, k2, v2, scale, HEAD, BLOCK, SAME, True, WIDEN
        )
    tl.store(target[:, None] + channel[None, :], (total / mass[:, None]).to(out.dtype.element_ty), mask=mask)


def serves(q: Tensor, k: Tensor, v: Tensor, tiles: Tiles) -> bool:
    """Whether the launches below take heads q, k, v [B, H, L, d] of these tiles, on a device that has kernels."""
    alike = q.shape == k.shape == v.shape and q.dtype == k.dtype == v.dtype and q.shape[2] == len(tiles.rows)
    half = q.dtype in (torch.float16, torch.bfloat16)
    near = all(x.shape[2] * x.stride(2) < _FARTHEST for x in (q, k, v))
    few = tiles.count <= MOST_TILES and q.shape[3] <= MOST_CHANNELS and q.shape[0] * q.shape[1] <= _MOST_PROGRAMS
    return alike and half and near and few and tiles.image > 0


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
            k,
            tiles.rows,
            pooled,
            heads,
            cells,
            *k.stride()[:3],
            HEAD=d,
            BLOCK=block,
            CELL=tiles.size // 4,
            CELLS=config.pool,
            num_warps=4,
        )
    together = max(1, config.asking // (tiles.queries // (tiles.size // 2)))
    held = power_of_two(tiles.count)
    _choose_kernel[(-(-tiles.query_tiles // together), batch * heads)](
        q,
        pooled,
        tiles.rows,
        lists,
        heads,
        tokens,
        tiles.query_tiles,
        tiles.image,
        tiles.count,
        *counts,
        scale,
        *q.stride()[:3],
        HEAD=d,
        BLOCK=block,
        SIZE=tiles.size,
        QUERIES=tiles.queries,
        TOGETHER=together,
        KEYS=config.asked,
        HELD=held,
        AT_ONCE=min(together, max(1, config.held // held)),
        STEPS=STEPS,
        LEVELS=LEVELS,
        WIDEN=q.dtype == torch.bfloat16 and not q.is_cuda,
        num_warps=config.choosers,
    )
    return lists


def launch_attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    tiles: Tiles,
    drawn: Drawn,
    lists: Tensor,
    counts: Counts,
    layer: int,
    scale: float,
    config: Config | None = None,
) -> Tensor:
    """As multires.attend; the result lies in memory as [B, L, H, d]. q, k, v: channels together."""
    batch, heads, tokens, d = q.shape
    config = config or config_for(d, q.device)
    draws = drawn.half.shape[1]
    check_rows(draws, batch)
    out = torch.empty((batch, tokens, heads, d), dtype=q.dtype, device=q.device)
    rows = min(config.rows, tiles.queries)
    _attend_kernel[(-(-tokens // rows) * batch * heads,)](
        q,
        k,
        v,
        out,
        lists,
        drawn.table,
        heads,
        tokens,
        tiles.image,
        *counts,
        draws,
        layer,
        scale * LOG2_E,
        *q.stride()[:3],
        *k.stride()[:3],
        *v.stride()[:3],
        HEAD=d,
        BLOCK=max(16, power_of_two(d)),
        SIZE=tiles.size,
        QUERIES=tiles.queries,
        ROWS=rows,
        KEYS=config.keys,
        SAME=k.stride(2) == v.stride(2),
        WIDEN=q.dtype == torch.bfloat16 and not q.is_cuda,
        num_warps=config.warps,
        num_stages=config.stages,
        maxnreg=config.registers,
    )
    return out.transpose(1, 2)


def launch_multires(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    tiles: Tiles,
    drawn: Drawn,
    counts: Counts,
    layer: int,
    scale: float,
    config: Config | None = None,
) -> Tensor:
    """As multires.attend_multires; the result lies in memory as [B, L, H, d]."""
    q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
    lists = launch_choose(q, k, tiles, counts, scale, config)
    return launch_attend(q, k, v, tiles, drawn, lists, counts, layer, scale, config)
