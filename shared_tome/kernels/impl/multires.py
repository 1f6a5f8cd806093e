"""Attention to keys at three resolutions: two launches choose (multires_choose.py), one attends. Keys are read where
they lie.

The specification is multires.py of the core. A block's keys are found through the list of the query tile's tiles and
the table of the step's drawn tokens.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...core.groups import check_rows
from ...core.multires import LEAST, Counts, Drawn, Tiles, is_of_keys
from .attend import LOG2_E, softmax_step
from .compiler import heads_like, power_of_two, strides, tl, together, triton
from .multires_choose import Config, config_for, launch_choose


@triton.jit
def _add_keys(
    query, total, top, mass, key, value, token, bias,
    k2, v2, scale,
    HEAD: tl.constexpr, BLOCK: tl.constexpr, SAME: tl.constexpr, WEIGHED: tl.constexpr,
):  # fmt: skip
    """The keys `token` [KEYS]. bias: as softmax_step has it, WEIGHED [1 or ROWS, KEYS]."""
    channel = tl.arange(0, BLOCK)
    place = token[:, None] * k2 + channel[None, :]
    at_key = key + place
    at_value = value + (place if SAME else token[:, None] * v2 + channel[None, :])
    if HEAD == BLOCK:
        k, v = tl.load(at_key), tl.load(at_value)
    else:
        mask = (channel < HEAD)[None, :]
        k, v = tl.load(at_key, mask=mask, other=0.0), tl.load(at_value, mask=mask, other=0.0)
    return softmax_step(total, top, mass, tl.dot(query, tl.trans(k)), v, scale, bias, WEIGHED)


@triton.jit
def _pick(at, one, two, a, b, c):
    """a, b or c, by where `at` stands between the ends of two sections."""
    return tl.where(at < one, a, tl.where(at < two, b, c))


@triton.jit
def _add_mask(
    bias, seen, token, valid, CHECKED: tl.constexpr, OF_KEYS: tl.constexpr, LEAST: tl.constexpr, LOG2_E: tl.constexpr
):
    """bias [KEYS], to the base of two, and what a mask adds to it: [1, KEYS] OF_KEYS, else [ROWS, KEYS].

    seen: where the mask of these queries begins, for all of them or [ROWS]; of bytes, where other than 0 is seen, or
    of numbers that are added. valid [KEYS]: which are there, where that is to be CHECKED.
    """
    at = (seen if OF_KEYS else seen[:, None]) + token[None, :]
    found = tl.load(at, mask=valid[None, :], other=0) if CHECKED else tl.load(at)
    if seen.dtype.scalar.element_ty == tl.uint8:
        found = tl.where(found != 0, 0.0, LEAST)
    else:
        found = tl.maximum(found.to(tl.float32), LEAST) * LOG2_E
    return bias[None, :] + found


@triton.jit(do_not_specialize=["image", "whole", "half", "beside_whole", "beside_half", "draws", "layer"])
def _attend_kernel(
    q, k, v, out, lists, table, seen, heads, tokens, image, whole, half, beside_whole, beside_half, draws, layer, scale,
    q0, q1, q2, k0, k1, k2, v0, v1, v2, m0, m1, m2,
    HEAD: tl.constexpr, BLOCK: tl.constexpr, SIZE: tl.constexpr, QUERIES: tl.constexpr, ROWS: tl.constexpr,
    KEYS: tl.constexpr, SAME: tl.constexpr, MASKED: tl.constexpr, OF_KEYS: tl.constexpr,
    LEAST: tl.constexpr, LOG2_E: tl.constexpr,
):  # fmt: skip
    """ROWS queries of one head of one batch row. out: [B, L, H, d] in memory. draws: rows of the step's draws.

    seen: where MASKED a mask [B, H, L, L] by its strides; OF_KEYS: alike for all queries.
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
    if MASKED:
        seen += batch * m0 + head * m1
        if not OF_KEYS:
            seen += own * m2
    total = tl.zeros((ROWS, BLOCK), tl.float32)
    top = tl.full((ROWS,), LEAST * 3 if MASKED else -1e30, tl.float32)
    mass = tl.zeros((ROWS,), tl.float32)
    lane = tl.arange(0, KEYS)
    for block in range(end2):
        shift = _pick(block, end0, end1, 0, 2, 4)  # a tile has SIZE >> shift keys
        begin = _pick(block, end0, end1, 0, tile1, tile2) + (block * KEYS << shift) // SIZE
        base = _pick(block, end0, end1, 0, halves, quarters)
        tile = tl.load(lists + begin + (lane << shift) // SIZE).to(tl.int32)
        token = tl.load(table + base + tile * (SIZE >> shift) + (lane & ((SIZE >> shift) - 1)))
        bias = shift.to(tl.float32)  # a key at this resolution stands for 2 to the power of it
        if MASKED:
            bias = _add_mask(tl.full((KEYS,), 0.0, tl.float32) + bias, seen, token, lane, False, OF_KEYS, LEAST, LOG2_E)
        total, top, mass = _add_keys(
            query, total, top, mass, key, value, token, bias, k2, v2, scale, HEAD, BLOCK, SAME, MASKED
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
        if MASKED:
            bias = _add_mask(bias, seen, token, valid, True, OF_KEYS, LEAST, LOG2_E)
        else:
            bias = bias[None, :]
        total, top, mass = _add_keys(
            query, total, top, mass, key, value, token, bias, k2, v2, scale, HEAD, BLOCK, SAME, True
        )
    tl.store(target[:, None] + channel[None, :], (total / mass[:, None]).to(out.dtype.element_ty), mask=mask)


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
    mask: Tensor | None = None,
    config: Config | None = None,
) -> Tensor:
    """As multires.attend; the result lies in memory as [B, L, H, d]. q, k, v, mask: the last axis together."""
    batch, heads, tokens, d = q.shape
    config = config or config_for(d, q.device)
    of_keys, mask_strides = mask is None or is_of_keys(mask), (0, 0, 0)
    if mask is not None:
        mask = (mask.view(torch.uint8) if mask.dtype == torch.bool else mask).expand(batch, heads, tokens, tokens)
        mask_strides = mask.stride()[:3]
    draws = drawn.half.shape[1]
    check_rows(draws, batch)
    out, rows = heads_like(q), min(config.rows, tiles.queries)
    _attend_kernel[(-(-tokens // rows) * batch * heads,)](
        q, k, v, out, lists, drawn.table, mask, heads, tokens, tiles.image, *counts, draws, layer, scale * LOG2_E,
        *strides(q, k, v), *mask_strides,
        HEAD=d, BLOCK=max(16, power_of_two(d)), SIZE=tiles.size, QUERIES=tiles.queries, ROWS=rows, KEYS=config.keys,
        SAME=k.stride(2) == v.stride(2), MASKED=mask is not None, OF_KEYS=of_keys, LEAST=LEAST,
        LOG2_E=LOG2_E,
        num_warps=config.warps, num_stages=config.stages,
        maxnreg=config.registers if of_keys else None,  # a mask of queries and keys is held in registers too
    )  # fmt: skip
    return out


def launch_multires(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    tiles: Tiles,
    drawn: Drawn,
    counts: Counts,
    layer: int,
    scale: float,
    mask: Tensor | None = None,
    config: Config | None = None,
) -> Tensor:
    """As multires.attend_multires; the result lies in memory as [B, L, H, d]."""
    q, k, v = together(q, k, v)
    if mask is not None and mask.stride(-1) != 1:
        mask = mask.contiguous()
    lists = launch_choose(q, k, tiles, counts, scale, config)
    return launch_attend(q, k, v, tiles, drawn, lists, counts, layer, scale, mask, config)
