"""Some tokens of each head, other ones for other heads, in one launch.

The specification is own.take_turns.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...plan import check_rows
from .compiler import power_of_two, tl, triton

# Elements of a program, warps. Not tuned.
_CONFIG = (2048, 4)


@triton.jit(do_not_specialize=["count"])
def _turns_kernel(
    x,
    index,
    out,
    heads,
    count,
    turns,
    index_rows,
    x0,
    x1,
    x2,
    HEAD: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
):
    """ROWS of the tokens of one head of one batch row."""
    batch = (tl.program_id(1) // heads).to(tl.int64)
    head = (tl.program_id(1) % heads).to(tl.int64)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    valid = row < count
    drawn = index + ((head % turns) * index_rows + batch % index_rows) * count
    token = tl.load(drawn + row, mask=valid, other=0).to(tl.int64)
    channel = tl.arange(0, BLOCK)
    mask = valid[:, None] & (channel < HEAD)[None, :]
    source = x + batch * x0 + head * x1 + token * x2  # (ROWS,)
    value = tl.load(source[:, None] + channel[None, :], mask=mask, other=0.0)
    target = out + ((batch * heads + head) * count + row.to(tl.int64)) * HEAD
    tl.store(target[:, None] + channel[None, :], value, mask=mask)


def launch_turns(x: Tensor, index: Tensor, config: tuple[int, int] = _CONFIG) -> Tensor:
    """x [B, H, L, d] and index [T, b, K] -> [B, H, K, d]: head h by the lists h % T, row i by the list i % b."""
    x = x if x.stride(-1) == 1 else x.contiguous()
    batch, heads, _, d = x.shape
    turns, rows, count = index.shape
    check_rows(rows, batch)
    out = torch.empty((batch, heads, count, d), dtype=x.dtype, device=x.device)
    block = power_of_two(d)
    tile = max(1, config[0] // block)
    _turns_kernel[(-(-count // tile), batch * heads)](
        x,
        index.contiguous(),
        out,
        heads,
        count,
        turns,
        rows,
        *x.stride()[:3],
        HEAD=d,
        BLOCK=block,
        ROWS=tile,
        num_warps=config[1],
    )
    return out
