"""Some tokens' keys and values of each head, other ones for other heads, in one launch.

The specification is self_token.take_by_head.
"""

from __future__ import annotations

from torch import Tensor

from ...core.groups import check_rows
from .compiler import power_of_two, strides, tl, together, triton

# Elements of a program, warps. Not tuned.
_CONFIG = (2048, 4)


@triton.jit(do_not_specialize=["count"])
def _take_by_head_kernel(
    k, v, index, key, value, heads, count, head_draws, index_rows,
    k0, k1, k2, v0, v1, v2,
    HEAD: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """ROWS of the tokens of one head of one batch row."""
    batch = (tl.program_id(0) // heads).to(tl.int64)
    head = (tl.program_id(0) % heads).to(tl.int64)
    row = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    valid = row < count
    drawn = index + ((head % head_draws) * index_rows + batch % index_rows) * count
    token = tl.load(drawn + row, mask=valid, other=0).to(tl.int64)
    channel = tl.arange(0, BLOCK)
    mask = valid[:, None] & (channel < HEAD)[None, :]
    source = k + batch * k0 + head * k1 + token * k2  # (ROWS,)
    of_key = tl.load(source[:, None] + channel[None, :], mask=mask, other=0.0)
    source = v + batch * v0 + head * v1 + token * v2
    of_value = tl.load(source[:, None] + channel[None, :], mask=mask, other=0.0)
    target = (((batch * heads + head) * count + row.to(tl.int64)) * HEAD)[:, None] + channel[None, :]
    tl.store(key + target, of_key, mask=mask)
    tl.store(value + target, of_value, mask=mask)


def launch_take_by_head(
    k: Tensor, v: Tensor, index: Tensor, config: tuple[int, int] = _CONFIG
) -> tuple[Tensor, Tensor]:
    """As self_token.take_by_head."""
    k, v = together(k, v)
    batch, heads, _, d = k.shape
    head_draws, rows, count = index.shape
    check_rows(rows, batch)
    key, value = k.new_empty((batch, heads, count, d)), v.new_empty((batch, heads, count, d))
    block = power_of_two(d)
    tile = max(1, config[0] // block)
    _take_by_head_kernel[(batch * heads, -(-count // tile))](
        k, v, index.contiguous(), key, value, heads, count, head_draws, rows,
        *strides(k, v),
        HEAD=d, BLOCK=block, ROWS=tile,
        num_warps=config[1],
    )  # fmt: skip
    return key, value
