"""The first launch of a match (nearest.py): the dst at unit length, and cleared counters for the launches behind it."""

from __future__ import annotations

from .compiler import tl, triton

_CLEARED = tl.constexpr(1024)


@triton.jit
def _clear(counts, size):
    """Set counts [size], int32, to zero; all programs share the work."""
    program = tl.program_id(1) * tl.num_programs(0) + tl.program_id(0)
    programs = tl.num_programs(0) * tl.num_programs(1)
    for begin in range(program * _CLEARED, size, programs * _CLEARED):
        at = begin + tl.arange(0, _CLEARED)
        tl.store(counts + at, tl.zeros((_CLEARED,), tl.int32), mask=at < size)


@triton.jit(do_not_specialize=["dst_count", "arrived_size", "tally_size", "heads_size"])
def unit_kernel(
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
