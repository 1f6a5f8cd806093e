"""For each src its most similar dst, no score written: the running maximum stays in registers (docs/kernels.md).

The specification is matching.nearest. Two launches: one writes the dst at unit length, padded with copies of the last
one (a copy never beats it), so that the other needs no mask. For `match` the first also clears what the later ones
count in.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .compiler import power_of_two, shared_memory, tl, triton

# A row's tally of 16-bit similarities: how many by their upper byte, then how many by all 16 bits.
COARSE = 256
TALLY = COARSE + 2**16
_COARSE, _TALLY = tl.constexpr(COARSE), tl.constexpr(TALLY)
# Counters that a program clears at a time.
_CLEARED = tl.constexpr(1024)


@dataclass(frozen=True)
class Config:
    """How the match runs.

    src, dst, channels: the tile that a program multiplies at a time. splits: how many programs share the dst of the
    same src; 0: as many as fill the GPU evenly.
    """

    src: int
    dst: int
    channels: int
    warps: int
    stages: int
    splits: int = 0


# On an H200 (4,096, 16,384 and 65,536 x 320 tokens, batch 2, float16): 16.6, 127.6 and 1,789 us.
# 64 x 256 takes 23.7, 155 and 2,583; docs/kernels.md has the others.
_LARGE = Config(128, 256, 64, 8, 4)
# For GPUs whose programs get 48 KiB of shared memory or more. Not tuned.
_SMALL = Config(64, 64, 64, 4, 3)
# A program of _LARGE takes 192 KiB; Hopper has 227 for it.
_LARGE_SHARED = 200 * 1024
# What one more program for the same src costs, as a share of a whole pass over the dst.
_SPLIT_COST = 0.05


def config_for(metric: Tensor) -> Config:
    """The settings for a device."""
    return _LARGE if metric.is_cuda and shared_memory(metric.device) >= _LARGE_SHARED else _SMALL


def splits_for(metric: Tensor, programs: int, tiles: int) -> int:
    """How many programs share the dst tiles of the same src: a multiprocessor runs one program at a time.

    On an H200, 16,384 x 320 tokens: 192 programs on 132 multiprocessors take 154 us, twice as many 127, 4 times 144.
    """
    if not metric.is_cuda:
        return min(2, tiles)
    width = torch.cuda.get_device_properties(metric.device).multi_processor_count
    able = [splits for splits in (1, 2, 4) if splits <= tiles]
    return min(able, key=lambda splits: -(-programs * splits // width) / splits + _SPLIT_COST * splits)


@triton.jit
def _clear(counts, size):
    """Set counts [size], int32, to zero; all programs share the work."""
    program = tl.program_id(1) * tl.num_programs(0) + tl.program_id(0)
    programs = tl.num_programs(0) * tl.num_programs(1)
    for begin in range(program * _CLEARED, size, programs * _CLEARED):
        at = begin + tl.arange(0, _CLEARED)
        tl.store(counts + at, tl.zeros((_CLEARED,), tl.int32), mask=at < size)


@triton.jit(do_not_specialize=["dst_count", "arrived_size", "tally_size", "heads_size"])
def _unit_kernel(
    metric, dst, unit, dst_count, padded, channels,
    batch_stride, token_stride, dst_rows, first, smallest, arrived, arrived_size, tally, tally_size, heads, heads_size,
    WIDTH: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Unit vectors of the dst, [B, padded, WIDTH]: one program ROWS of them. Also clears what others count in."""
    _clear(arrived, arrived_size)
    _clear(tally, tally_size)
    _clear(heads, heads_size)
    batch = tl.program_id(1).to(tl.int64)
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    place = tl.minimum(tl.maximum(row, first), dst_count - 1)
    token = tl.load(dst + (batch % dst_rows) * dst_count + place).to(tl.int64)
    channel = tl.arange(0, BLOCK)
    source = metric + batch * batch_stride + token[:, None] * token_stride + channel[None, :]
    value = tl.load(source, mask=(token >= 0)[:, None] & (channel < channels)[None, :], other=0.0).to(tl.float32)
    norm = tl.sqrt(tl.sum(value * value, axis=1))
    value = value / tl.maximum(norm, smallest)[:, None]
    goal = unit + (batch * padded + row)[:, None] * WIDTH + channel[None, :]
    tl.store(goal, value.to(unit.dtype.element_ty), mask=(row < padded)[:, None] & (channel < WIDTH)[None, :])


@triton.jit
def ordered(value, BITS: tl.constexpr):
    """Floats as integers from 0 to 2**BITS - 1 in the same order."""
    if BITS == 16:
        code = value.to(tl.int16, bitcast=True).to(tl.int32) & 0xFFFF
        return tl.where(code >= 0x8000, 0xFFFF - code, code + 0x8000)
    else:
        code = value.to(tl.uint32, bitcast=True)
        top = tl.full((), 0x80000000, tl.uint32)
        return tl.where(code >= top, code ^ tl.full((), 0xFFFFFFFF, tl.uint32), code + top)


@triton.jit
def _write(best, place, norm, similarity, target, out, mask, smallest, row, alone, tally, COUNTS: tl.constexpr):
    """Write scores [SRC] of src of that squared norm against unit dst, and the places of those dst.

    The first `alone` src of a row are similar to nothing, not even by 0. COUNTS: into tally as well.
    """
    best = best / tl.maximum(tl.sqrt(norm), smallest)
    value = tl.where(row < alone, float("-inf"), best).to(similarity.dtype.element_ty)
    tl.store(similarity + out, value, mask=mask)
    tl.store(target + out, place.to(tl.int64), mask=mask)
    if COUNTS:
        code = ordered(value, 16)
        tl.atomic_add(tally + (code >> 8), mask.to(tl.int32), mask=mask, sem="relaxed")
        tl.atomic_add(tally + _COARSE + code, mask.to(tl.int32), mask=mask, sem="relaxed")


@triton.jit(do_not_specialize=["src_count", "dst_count", "alone"])
def _nearest_kernel(
    metric, src, unit, similarity, target, scores, places, arrived, tally, src_count, dst_count, padded, channels,
    batch_stride, token_stride, src_rows, first, smallest, alone,
    WIDTH: tl.constexpr, EVEN: tl.constexpr, SRC: tl.constexpr, DST: tl.constexpr, BLOCK: tl.constexpr,
    SPLITS: tl.constexpr, STAGES: tl.constexpr, COUNTS: tl.constexpr,
):  # fmt: skip
    """One program: SRC src of a batch row against one of SPLITS shares of the dst.

    unit: [B, padded, WIDTH]. scores, places: [SPLITS, B, S], what each program found; arrived: [B, tiles], how many
    of a tile's programs are done. tally: [B, TALLY], counted in where COUNTS. WIDTH: a multiple of BLOCK; EVEN:
    channels is WIDTH.
    """
    batch = tl.program_id(1).to(tl.int64)
    tally += batch * _TALLY
    row = tl.program_id(0) * SRC + tl.arange(0, SRC)
    mask = row < src_count
    token = tl.load(src + (batch % src_rows) * src_count + row, mask=mask, other=0).to(tl.int64)
    channel = tl.arange(0, BLOCK)
    sources = metric + batch * batch_stride + token[:, None] * token_stride + channel[None, :]  # (SRC, BLOCK)
    column = tl.arange(0, DST)
    units = unit + batch * padded * WIDTH + column[None, :] * WIDTH + channel[:, None]  # (BLOCK, DST)
    steps: tl.constexpr = WIDTH // BLOCK
    tiles = padded // DST
    share = tl.cdiv(tiles, SPLITS)
    begin = tl.program_id(2) * share
    end = tl.minimum(begin + share, tiles)
    best = tl.full((SRC,), -3.0e38, tl.float32)
    at = tl.zeros((SRC,), tl.int32)  # the tile; the column is in best's low bits
    acc = tl.zeros((SRC, DST), tl.float32)
    # One loop over tiles and channels, so that loads run ahead over both. Its addresses come from its own counter:
    # with variables carried from turn to turn Triton loads nothing ahead, which takes twice the time.
    for turn in tl.range(begin * steps, end * steps, num_stages=STAGES):
        step = turn % steps
        tile = turn // steps
        if EVEN:
            a = tl.load(sources + step * BLOCK)
        else:
            a = tl.load(sources + step * BLOCK, mask=(step * BLOCK + channel < channels)[None, :], other=0.0)
        b = tl.load(units + tile * (DST * WIDTH) + step * BLOCK)
        acc = tl.dot(a, b, acc, input_precision="ieee")
        if step == steps - 1:
            code = (acc.to(tl.int32, bitcast=True) & ~(DST - 1)) | (DST - 1 - column)[None, :]
            here = tl.max(code.to(tl.float32, bitcast=True), 1)
            better = here > best
            at = tl.where(better, tile, at)
            best = tl.where(better, here, best)
            acc = tl.zeros((SRC, DST), tl.float32)
    bits = best.to(tl.int32, bitcast=True)
    at = at * DST + DST - 1 - (bits & (DST - 1))
    best = (bits & ~(DST - 1)).to(tl.float32, bitcast=True)
    at = tl.minimum(tl.maximum(at, first), dst_count - 1)
    norm = tl.zeros((SRC,), tl.float32)
    for step in range(steps):
        a = tl.load(sources + step * BLOCK, mask=(step * BLOCK + channel < channels)[None, :], other=0.0).to(tl.float32)
        norm += tl.sum(a * a, 1)
    out = batch * src_count + row
    if SPLITS == 1:
        _write(best, at, norm, similarity, target, out, mask, smallest, row, alone, tally, COUNTS)
    else:
        size = tl.num_programs(1).to(tl.int64) * src_count
        tl.store(scores + tl.program_id(2) * size + out, best, mask=mask)
        tl.store(places + tl.program_id(2) * size + out, at, mask=mask)
        tl.debug_barrier()  # all of a program's stores come before its count
        if tl.atomic_add(arrived + batch * tl.num_programs(0) + tl.program_id(0), 1) == SPLITS - 1:
            # The last to arrive writes. It reads past the first cache, which may hold what was there before; in
            # order, so that of equals the first wins whoever comes last.
            found = tl.load(scores + out, mask=mask, other=0.0, cache_modifier=".cg")
            place = tl.load(places + out, mask=mask, other=0, cache_modifier=".cg")
            for split in tl.static_range(1, SPLITS):
                score = tl.load(scores + split * size + out, mask=mask, other=0.0, cache_modifier=".cg")
                there = tl.load(places + split * size + out, mask=mask, other=0, cache_modifier=".cg")
                place = tl.where(score > found, there, place)
                found = tl.maximum(score, found)
            _write(found, place, norm, similarity, target, out, mask, smallest, row, alone, tally, COUNTS)


def launch_nearest(
    metric: Tensor,
    src: Tensor,
    dst: Tensor,
    first: int = 0,
    config: Config | None = None,
    *,
    alone: int = 0,
    tally: Tensor | None = None,
    chains: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """similarity [B, S] in metric's dtype and target [B, S], a position in dst.

    Args:
        metric: [B, N, C] in 16 bits, src: [b, S], dst: [b, D].
        first: how many dst at the front take nobody. alone: how many src at the front are similar to nothing (-inf).
        tally: [B, TALLY] int32, cleared and filled with the counts of the similarities.
        chains: an int32 tensor of any shape that is cleared, or None.
    """
    config = config or config_for(metric)
    if metric.stride(2) != 1:
        metric = metric.contiguous()
    src, dst = src.contiguous(), dst.contiguous()
    batch, _, channels = metric.shape
    src_count, dst_count = src.shape[1], dst.shape[1]
    width = -(-channels // config.channels) * config.channels
    padded = -(-dst_count // config.dst) * config.dst
    tiles = -(-src_count // config.src)
    splits = config.splits or splits_for(metric, batch * tiles, padded // config.dst)
    found = (splits if splits > 1 else 0, batch, src_count)
    unit = torch.empty((batch, padded, width), dtype=metric.dtype, device=metric.device)
    arrived, places = (torch.empty(shape, dtype=torch.int32, device=metric.device) for shape in ((batch, tiles), found))
    scores = torch.empty(found, dtype=torch.float32, device=metric.device)
    similarity = torch.empty((batch, src_count), dtype=metric.dtype, device=metric.device)
    target = torch.empty((batch, src_count), dtype=torch.int64, device=metric.device)
    smallest = torch.finfo(metric.dtype).tiny
    shared = (channels, metric.stride(0), metric.stride(1))
    block = power_of_two(width)
    rows = max(1, min(16, 4096 // block))
    _unit_kernel[(-(-padded // rows), batch)](
        metric, dst, unit, dst_count, padded, *shared, dst.shape[0], first, smallest, arrived, arrived.numel(),
        arrived if tally is None else tally, 0 if tally is None else tally.numel(),
        arrived if chains is None else chains, 0 if chains is None else chains.numel(),
        WIDTH=width, ROWS=rows, BLOCK=block,
        num_warps=4,
    )  # fmt: skip
    _nearest_kernel[(tiles, batch, splits)](
        metric, src, unit, similarity, target, scores, places, arrived, arrived if tally is None else tally, src_count,
        dst_count, padded, *shared, src.shape[0], first, smallest, alone,
        WIDTH=width, EVEN=width == channels, SRC=config.src, DST=config.dst, BLOCK=config.channels, SPLITS=splits,
        STAGES=config.stages, COUNTS=tally is not None,
        num_warps=config.warps, num_stages=config.stages,
    )  # fmt: skip
    return similarity, target
