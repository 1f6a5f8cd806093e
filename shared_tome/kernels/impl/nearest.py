"""For each src its most similar dst, no score written: the running maximum stays in registers.

The specification is matching.nearest. Two launches: one writes the dst at unit length, padded so that the other needs
no mask (with copies of the last dst: a copy never beats it). What is compared is a float32 score whose low mantissa
bits are overwritten with its place: one maximum then keeps both the score and the place, at two instructions a score
instead of four. 7 bits for 128 places leave 16 of the mantissa; a half precision score as torch makes them has 10.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .compiler import power_of_two, tl, triton


@dataclass(frozen=True)
class Config:
    """How the match runs.

    src, dst: rows of a tile. channels: how many at a time, or 0: the src stay in shared memory with all their
    channels. wide: a running maximum for each column, reduced once at the end; otherwise for each row.
    """

    src: int
    dst: int
    channels: int
    wide: bool
    warps: int
    stages: int
    nest: int = 0
    splits: int = 0  # programs that share a tile's dst; 0: as many as fill the GPU evenly


# Any device, any dtype; float32 has no matrix unit at its precision.
_PLAIN = Config(64, 64, 16, False, 8, 3)
# Shared memory of a multiprocessor from which the settings for Hopper hold (it has 227 KiB a program).
_LARGE = 200 * 1024


def config_for(metric: Tensor, src_count: int) -> Config:
    """The settings measured best for a shape."""
    if metric.dtype == torch.float32 or not metric.is_cuda:
        return _PLAIN
    about = torch.cuda.get_device_properties(metric.device)
    if getattr(about, "shared_memory_per_block_optin", 0) < _LARGE:
        return Config(64, 64, 64, False, 4, 3)
    if metric.shape[2] <= 320:
        return Config(128, 64, 0, True, 8, 3)
    few = metric.shape[0] * -(-src_count // 128) < about.multi_processor_count  # programs of 128 src
    return Config(64, 256, 64, False, 4, 4) if few else Config(128, 256, 64, False, 8, 4)


def splits_for(metric: Tensor, programs: int, tiles: int) -> int:
    """How many programs share the dst tiles of the same src: the GPU runs one program a multiprocessor at a time."""
    if not metric.is_cuda:
        return min(2, tiles)
    width = torch.cuda.get_device_properties(metric.device).multi_processor_count
    able = [splits for splits in (1, 2, 4) if splits <= tiles]
    return min(able, key=lambda splits: -(-programs * splits // width) / splits + 0.05 * splits)


@triton.jit
def _unit_kernel(
    metric,
    dst,
    unit,
    dst_count,
    padded,
    channels,
    batch_stride,
    token_stride,
    dst_rows,
    first,
    smallest,
    arrived,
    tiles,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Unit vectors of the dst, [B, padded, WIDTH]: one program ROWS of them. Also sets arrived [B, tiles] to zero."""
    batch = tl.program_id(1).to(tl.int64)
    if tl.program_id(0) == 0:
        for begin in range(0, tiles, 256):
            tile = begin + tl.arange(0, 256)
            tl.store(arrived + batch * tiles + tile, tl.zeros((256,), tl.int32), mask=tile < tiles)
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    place = tl.minimum(tl.maximum(row, first), dst_count - 1)
    token = tl.load(dst + (batch % dst_rows) * dst_count + place).to(tl.int64)
    channel = tl.arange(0, BLOCK)
    mask = (token >= 0)[:, None] & (channel < channels)[None, :]
    value = tl.load(
        metric + batch * batch_stride + token[:, None] * token_stride + channel[None, :], mask=mask, other=0.0
    )
    value = value.to(tl.float32)
    norm = tl.sqrt(tl.sum(value * value, axis=1))
    value = value / tl.maximum(norm, smallest)[:, None]
    target = unit + (batch * padded + row)[:, None] * WIDTH + channel[None, :]
    tl.store(target, value.to(unit.dtype.element_ty), mask=(row < padded)[:, None] & (channel < WIDTH)[None, :])


@triton.jit
def _with_place(score, place, low):
    """The scores with their low bits replaced by a place."""
    return ((score.to(tl.int32, bitcast=True) & ~low) | place).to(tl.float32, bitcast=True)


@triton.jit
def _dot(a, b, acc, WIDEN: tl.constexpr):
    """a @ b + acc in float32. WIDEN: for the interpreter, which cannot multiply bfloat16."""
    if WIDEN:
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision="ieee")


@triton.jit
def _write(best, place, norm, similarity, target, out, mask, smallest):
    """Write scores [SRC] of src of that squared norm against unit dst, and the places of those dst."""
    best = best / tl.maximum(tl.sqrt(norm), smallest)
    tl.store(similarity + out, best.to(similarity.dtype.element_ty), mask=mask)
    tl.store(target + out, place.to(tl.int64), mask=mask)


@triton.jit
def _finish(
    best,
    place,
    norm,
    similarity,
    target,
    scores,
    places,
    arrived,
    batch,
    row,
    src_count,
    dst_count,
    first,
    smallest,
    SPLITS: tl.constexpr,
):
    """Write what was found, best [SRC] at place; of several programs for the same src the last one to arrive does.

    scores, places: [SPLITS, B, S], what each found. arrived: [B, tiles], how many of a tile's programs are done.
    """
    place = tl.minimum(tl.maximum(place, first), dst_count - 1)
    out = batch * src_count + row
    mask = row < src_count
    if SPLITS == 1:
        _write(best, place, norm, similarity, target, out, mask, smallest)
    else:
        size = tl.num_programs(1).to(tl.int64) * src_count
        tl.store(scores + tl.program_id(2) * size + out, best, mask=mask)
        tl.store(places + tl.program_id(2) * size + out, place, mask=mask)
        tl.debug_barrier()  # all of the program's stores come before its count
        if tl.atomic_add(arrived + batch * tl.num_programs(0) + tl.program_id(0), 1) == SPLITS - 1:
            # Past the first cache, which may hold what was there before. In order, so that of equals the first wins.
            found = tl.load(scores + out, mask=mask, other=0.0, cache_modifier=".cg")
            at = tl.load(places + out, mask=mask, other=0, cache_modifier=".cg")
            for split in tl.static_range(1, SPLITS):
                score = tl.load(scores + split * size + out, mask=mask, other=0.0, cache_modifier=".cg")
                there = tl.load(places + split * size + out, mask=mask, other=0, cache_modifier=".cg")
                at = tl.where(score > found, there, at)
                found = tl.maximum(score, found)
            _write(found, at, norm, similarity, target, out, mask, smallest)


@triton.jit
def _stream_kernel(
    metric,
    src,
    unit,
    similarity,
    target,
    src_count,
    dst_count,
    padded,
    channels,
    batch_stride,
    token_stride,
    src_rows,
    first,
    smallest,
    low,
    scores,
    places,
    arrived,
    SPLITS: tl.constexpr,
    WIDTH: tl.constexpr,
    EVEN: tl.constexpr,
    SRC: tl.constexpr,
    DST: tl.constexpr,
    BLOCK: tl.constexpr,
    WIDE: tl.constexpr,
    EXACT: tl.constexpr,
    STAGES: tl.constexpr,
    WIDEN: tl.constexpr,
    NEST: tl.constexpr,
):
    """Both tiles come BLOCK channels at a time, one loop over tiles and channels, so that loads run ahead over both.

    WIDTH: channels of a unit vector, a multiple of BLOCK. EVEN: channels is WIDTH. EXACT: no bits are given up.
    """
    batch = tl.program_id(1).to(tl.int64)
    row = tl.program_id(0) * SRC + tl.arange(0, SRC)
    token = tl.load(src + (batch % src_rows) * src_count + row, mask=row < src_count, other=0).to(tl.int64)
    channel = tl.arange(0, BLOCK)
    sources = metric + batch * batch_stride + token[:, None] * token_stride + channel[None, :]  # (SRC, BLOCK)
    unit += batch * padded * WIDTH
    column = tl.arange(0, DST)
    units = column[None, :] * WIDTH + channel[:, None]  # (BLOCK, DST)
    steps: tl.constexpr = WIDTH // BLOCK
    tiles = padded // DST
    share = tl.cdiv(tiles, SPLITS)
    begin = tl.program_id(2) * share
    end = tl.minimum(begin + share, tiles)
    if WIDE:
        best = tl.full((SRC, DST), -3.0e38, tl.float32)
    else:
        best = tl.full((SRC,), -3.0e38, tl.float32)
    at = tl.zeros((SRC,), tl.int32)
    acc = tl.zeros((SRC, DST), tl.float32)
    if NEST == 0:
        # Addresses come from the loop's own counter: from carried variables Triton does not run loads ahead.
        for at_step in tl.range(begin * steps, end * steps, num_stages=STAGES):
            step = at_step % steps
            tile = at_step // steps
            if EVEN:
                a = tl.load(sources + step * BLOCK)
            else:
                a = tl.load(sources + step * BLOCK, mask=(step * BLOCK + channel < channels)[None, :], other=0.0)
            b = tl.load(unit + tile * (DST * WIDTH) + units + step * BLOCK)
            acc = _dot(a, b, acc, WIDEN)
            if step == steps - 1:
                if EXACT:
                    here, where = tl.max(acc, 1, return_indices=True)
                    better = here > best
                    best = tl.where(better, here, best)
                    at = tl.where(better, tile * DST + where, at)
                elif WIDE:
                    best = tl.maximum(best, _with_place(acc, tiles - 1 - tile, low))
                else:
                    here = tl.max(_with_place(acc, (DST - 1 - column)[None, :], low), 1)
                    better = here > best
                    best = tl.where(better, here, best)
                    at = tl.where(better, tile, at)
                acc = tl.zeros((SRC, DST), tl.float32)
    else:
        for tile in tl.range(begin, end):
            acc = tl.zeros((SRC, DST), tl.float32)
            for step in tl.range(steps, num_stages=STAGES):
                if EVEN:
                    a = tl.load(sources + step * BLOCK)
                else:
                    a = tl.load(sources + step * BLOCK, mask=(step * BLOCK + channel < channels)[None, :], other=0.0)
                b = tl.load(unit + tile * (DST * WIDTH) + units + step * BLOCK)
                acc = _dot(a, b, acc, WIDEN)
            if EXACT:
                here, where = tl.max(acc, 1, return_indices=True)
                better = here > best
                best = tl.where(better, here, best)
                at = tl.where(better, tile * DST + where, at)
            elif WIDE:
                best = tl.maximum(best, _with_place(acc, tiles - 1 - tile, low))
            else:
                here = tl.max(_with_place(acc, (DST - 1 - column)[None, :], low), 1)
                better = here > best
                best = tl.where(better, here, best)
                at = tl.where(better, tile, at)
    norm = tl.zeros((SRC,), tl.float32)
    for part in range(steps):
        a = tl.load(sources + part * BLOCK, mask=(part * BLOCK + channel < channels)[None, :], other=0.0).to(tl.float32)
        norm += tl.sum(a * a, 1)
    if EXACT:
        found, where = at // DST, at % DST
    elif WIDE:
        best, where = tl.max(best, 1, return_indices=True)
        code = best.to(tl.int32, bitcast=True)
        found = tiles - 1 - (code & low)
        best = (code & ~low).to(tl.float32, bitcast=True)
    else:
        code = best.to(tl.int32, bitcast=True)
        found, where = at, DST - 1 - (code & low)
        best = (code & ~low).to(tl.float32, bitcast=True)
    _finish(
        best,
        found * DST + where,
        norm,
        similarity,
        target,
        scores,
        places,
        arrived,
        batch,
        row,
        src_count,
        dst_count,
        first,
        smallest,
        SPLITS,
    )


@triton.jit
def _resident_kernel(
    metric,
    src,
    unit,
    similarity,
    target,
    src_count,
    dst_count,
    padded,
    channels,
    batch_stride,
    token_stride,
    src_rows,
    first,
    smallest,
    low,
    scores,
    places,
    arrived,
    SPLITS: tl.constexpr,
    WIDTH: tl.constexpr,
    EVEN: tl.constexpr,
    SRC: tl.constexpr,
    DST: tl.constexpr,
    FRONT: tl.constexpr,
    WIDE: tl.constexpr,
    STAGES: tl.constexpr,
    WIDEN: tl.constexpr,
):
    """The src stay in shared memory, in two pieces of powers of two: FRONT channels and the rest. Only dst are read."""
    batch = tl.program_id(1).to(tl.int64)
    row = tl.program_id(0) * SRC + tl.arange(0, SRC)
    token = tl.load(src + (batch % src_rows) * src_count + row, mask=row < src_count, other=0).to(tl.int64)
    sources = metric + batch * batch_stride + token[:, None] * token_stride  # (SRC, 1)
    back_width: tl.constexpr = WIDTH - FRONT
    front = tl.arange(0, FRONT)
    a = tl.load(sources + front[None, :], mask=(front < channels)[None, :], other=0.0)
    wide_a = a.to(tl.float32)
    norm = tl.sum(wide_a * wide_a, 1)
    if back_width > 0:
        back = FRONT + tl.arange(0, back_width)
        a_back = tl.load(sources + back[None, :], mask=(back < channels)[None, :], other=0.0)
        wide_back = a_back.to(tl.float32)
        norm += tl.sum(wide_back * wide_back, 1)
    unit += batch * padded * WIDTH
    column = tl.arange(0, DST)
    tiles = padded // DST
    share = tl.cdiv(tiles, SPLITS)
    begin = tl.program_id(2) * share
    end = tl.minimum(begin + share, tiles)
    if WIDE:
        best = tl.full((SRC, DST), -3.0e38, tl.float32)
    else:
        best = tl.full((SRC,), -3.0e38, tl.float32)
    at = tl.zeros((SRC,), tl.int32)
    for tile in tl.range(begin, end, num_stages=STAGES):
        units = unit + tile * (DST * WIDTH) + column[None, :] * WIDTH  # (1, DST)
        acc = _dot(a, tl.load(units + front[:, None]), tl.zeros((SRC, DST), tl.float32), WIDEN)
        if back_width > 0:
            acc = _dot(a_back, tl.load(units + back[:, None]), acc, WIDEN)
        if WIDE:
            best = tl.maximum(best, _with_place(acc, tiles - 1 - tile, low))
        else:
            here = tl.max(_with_place(acc, (DST - 1 - column)[None, :], low), 1)
            better = here > best
            best = tl.where(better, here, best)
            at = tl.where(better, tile, at)
    if WIDE:
        best, where = tl.max(best, 1, return_indices=True)
        code = best.to(tl.int32, bitcast=True)
        found = tiles - 1 - (code & low)
    else:
        code = best.to(tl.int32, bitcast=True)
        found, where = at, DST - 1 - (code & low)
    best = (code & ~low).to(tl.float32, bitcast=True)
    _finish(
        best,
        found * DST + where,
        norm,
        similarity,
        target,
        scores,
        places,
        arrived,
        batch,
        row,
        src_count,
        dst_count,
        first,
        smallest,
        SPLITS,
    )


def launch_nearest(
    metric: Tensor, src: Tensor, dst: Tensor, first: int = 0, config: Config | None = None
) -> tuple[Tensor, Tensor]:
    """similarity [B, S] in metric's dtype and target [B, S], a position in dst.

    metric: [B, N, C], src: [b, S], dst: [b, D]. first: how many dst at the front take nobody.
    """
    batch, _, channels = metric.shape
    config = config or config_for(metric, src.shape[1])
    if metric.stride(2) != 1:
        metric = metric.contiguous()
    src, dst = src.contiguous(), dst.contiguous()
    src_count, dst_count = src.shape[1], dst.shape[1]
    if config.channels:
        width = -(-channels // config.channels) * config.channels
    else:
        front = power_of_two(channels) if power_of_two(channels) == channels else power_of_two(channels) // 2
        width = front + (max(16, power_of_two(channels - front)) if channels > front else 0)
    padded = -(-dst_count // config.dst) * config.dst
    unit = torch.empty((batch, padded, width), dtype=metric.dtype, device=metric.device)
    smallest = torch.finfo(metric.dtype).tiny
    shared = (channels, metric.stride(0), metric.stride(1))
    tiles = -(-src_count // config.src)
    splits = config.splits or splits_for(metric, batch * tiles, padded // config.dst)
    arrived = torch.empty((batch, tiles), dtype=torch.int32, device=metric.device)
    block = power_of_two(width)
    unit_rows = max(1, min(16, 4096 // block))
    _unit_kernel[(-(-padded // unit_rows), batch)](
        metric,
        dst,
        unit,
        dst_count,
        padded,
        *shared,
        dst.shape[0],
        first,
        smallest,
        arrived,
        tiles,
        WIDTH=width,
        ROWS=unit_rows,
        BLOCK=block,
        num_warps=4,
    )
    similarity = torch.empty((batch, src_count), dtype=metric.dtype, device=metric.device)
    target = torch.empty((batch, src_count), dtype=torch.int64, device=metric.device)
    found = (splits if splits > 1 else 0, batch, src_count)
    scores = torch.empty(found, dtype=torch.float32, device=metric.device)
    places = torch.empty(found, dtype=torch.int32, device=metric.device)
    codes = padded // config.dst if config.wide else config.dst
    arguments = (
        metric,
        src,
        unit,
        similarity,
        target,
        src_count,
        dst_count,
        padded,
        *shared,
        src.shape[0],
        first,
        smallest,
        power_of_two(codes) - 1,
        scores,
        places,
        arrived,
    )
    shape = {"WIDTH": width, "EVEN": width == channels, "SRC": config.src, "DST": config.dst, "STAGES": config.stages}
    shape["WIDEN"] = metric.dtype == torch.bfloat16 and not metric.is_cuda
    launch = {"num_warps": config.warps, "num_stages": config.stages}
    shape["SPLITS"] = splits
    grid = (tiles, batch, splits)
    if config.channels:
        exact = metric.dtype == torch.float32
        kind = {"BLOCK": config.channels, "WIDE": config.wide and not exact, "EXACT": exact, "NEST": config.nest}
        _stream_kernel[grid](*arguments, **shape, **kind, **launch)
    else:
        _resident_kernel[grid](*arguments, **shape, FRONT=front, WIDE=config.wide, **launch)
    return similarity, target
