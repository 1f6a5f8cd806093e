"""Rows by a list of indexes, unmerging and picking, in one launch whatever the number of the lists' rows.

The specification is groups.take.
"""

from __future__ import annotations

from torch import Tensor

from ...core.groups import check_rows
from .compiler import power_of_two, tl, triton

# (rows of a program, most channels at a time, warps). On an H200, 1,024 x 1280 tokens: 3.6 us, with 64 channels 5.5;
# 8 to 64 rows and 2 to 8 warps are within 5% of each other elsewhere.
_ROWS, _WIDEST, _WARPS = 32, 256, 4


@triton.jit(do_not_specialize=["count"])
def _gather_kernel(
    x, index, out, count, channels, batch_stride, token_stride, channel_stride, index_rows,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, STEPS: tl.constexpr,
):  # fmt: skip
    """One program: ROWS rows of one batch row, all channels."""
    batch = tl.program_id(1).to(tl.int64)
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    valid = row < count
    token = tl.load(index + (batch % index_rows) * count + row, mask=valid, other=0).to(tl.int64)
    source = x + batch * batch_stride + token * token_stride  # (ROWS,)
    target = out + (batch * count + row) * channels
    for part in tl.static_range(STEPS):
        channel = part * BLOCK + tl.arange(0, BLOCK)
        mask = valid[:, None] & (channel < channels)[None, :]
        value = tl.load(source[:, None] + channel[None, :] * channel_stride, mask=mask, other=0.0)
        tl.store(target[:, None] + channel[None, :], value, mask=mask)


def launch_gather(x: Tensor, index: Tensor) -> Tensor:
    """As groups.take."""
    batch, _, channels = x.shape
    check_rows(index.shape[0], batch)
    count = index.shape[1]
    rows = min(_ROWS, power_of_two(count))
    divisor = channels & -channels  # the greatest power of two in it
    block = min(_WIDEST, divisor if divisor >= 32 else power_of_two(channels))
    out = x.new_empty((batch, count, channels))
    _gather_kernel[(-(-count // rows), batch)](
        x, index.contiguous(), out, count, channels, *x.stride(), index.shape[0],
        ROWS=rows, BLOCK=block, STEPS=-(-channels // block),
        num_warps=_WARPS,
    )  # fmt: skip
    return out
