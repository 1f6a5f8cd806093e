"""Source and destination tokens of a grid cut into cells, of many layers in one launch, the random numbers included.

The specification is partition.partition with the key of match_tokens, about 30 launches a layer; equal bit for bit.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .compiler import power_of_two, tl, triton
from .noise import FIRST, GOLDEN, SECOND, THIRD, fold, mix, times


@triton.jit(do_not_specialize=["number", "layer", "columns"])
def _split_kernel(
    seed, step, number, layer, src, dst, frame_rows, columns, height, width, src_count, dst_count, rows,
    HAS_STEP: tl.constexpr, RANDOM: tl.constexpr, CELL_HEIGHT: tl.constexpr, CELL_WIDTH: tl.constexpr,
    COLUMNS: tl.constexpr,
):  # fmt: skip
    """One program: one row of cells in one batch row of one layer; the last of a frame takes the lines below it too.

    A token's place among the src is its number less the dst before it, and those can be counted within the row of
    cells: every earlier one has exactly `columns`.
    """
    band, row, place = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    frame, line = band // frame_rows, band % frame_rows
    column = tl.arange(0, COLUMNS)
    valid = column < columns
    at = number.to(tl.int64)
    if HAS_STEP:
        at += tl.load(step).to(tl.int64)
    key = mix(
        fold(tl.load(seed + row))
        + times(at + 1, FIRST)
        + times(layer + place + 1, SECOND)
        + times(tl.full((), 2, tl.uint32), THIRD)
    )
    offset = tl.zeros((COLUMNS,), tl.int32)
    if RANDOM:
        offset = (mix(key + times(band * columns + column, GOLDEN)) % (CELL_HEIGHT * CELL_WIDTH)).to(tl.int32)
    own_line, own_column = offset // CELL_WIDTH, offset % CELL_WIDTH
    src += (place * rows + row).to(tl.int64) * src_count
    dst += (place * rows + row).to(tl.int64) * dst_count
    tail = tl.arange(0, 8)  # columns beyond the last cell: fewer than a cell is wide
    before = band * columns
    lines = CELL_HEIGHT
    if line == frame_rows - 1:
        lines = height - line * CELL_HEIGHT
    for inner in range(lines):
        here = ((own_line == inner) & valid).to(tl.int32)
        through = before + tl.cumsum(here, 0)  # dst up to and with this cell's
        first = (frame * height + line * CELL_HEIGHT + inner) * width
        tl.store(dst + through - 1, (first + column * CELL_WIDTH + own_column).to(tl.int64), mask=here > 0)
        for inner_column in tl.static_range(CELL_WIDTH):
            token = first + column * CELL_WIDTH + inner_column
            earlier = through - here * (own_column >= inner_column).to(tl.int32)
            is_src = valid & ((here == 0) | (own_column != inner_column))
            tl.store(src + token - earlier, token.to(tl.int64), mask=is_src)
        before += tl.sum(here, 0)
        token = first + columns * CELL_WIDTH + tail
        tl.store(src + token - before, token.to(tl.int64), mask=columns * CELL_WIDTH + tail < width)


def launch_split(
    seed: Tensor,
    step: Tensor | None,
    number: int,
    layer: int,
    frames: int,
    height: int,
    width: int,
    cell_height: int,
    cell_width: int,
    random: bool,
    count: int,
) -> tuple[Tensor, Tensor]:
    """src [count, b, N - D] and dst [count, b, D] of the layers from `layer` on. seed, step: as in draw.launch_draw."""
    seed = seed.reshape(-1).contiguous()
    rows, columns = height // cell_height, width // cell_width
    dst_count = frames * rows * columns
    src_count = frames * height * width - dst_count
    src = torch.empty((count, seed.shape[0], src_count), dtype=torch.int64, device=seed.device)
    dst = torch.empty((count, seed.shape[0], dst_count), dtype=torch.int64, device=seed.device)
    _split_kernel[(frames * rows, seed.shape[0], count)](
        seed, seed if step is None else step, number, layer, src, dst, rows, columns, height, width, src_count,
        dst_count, seed.shape[0],
        HAS_STEP=step is not None, RANDOM=random, CELL_HEIGHT=cell_height, CELL_WIDTH=cell_width,
        COLUMNS=power_of_two(columns),
        num_warps=1 if columns <= 64 else 4,
    )  # fmt: skip
    return src, dst
