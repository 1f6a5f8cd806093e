"""Sampled keys by head, other ones for other heads, and each query's own token put in among them; in one launch each.

The specifications are self_token.take_by_head and add_self_token, which is about twenty launches.
"""

from __future__ import annotations

from torch import Tensor

from ...core.groups import check_rows
from .compiler import heads_like, power_of_two, strides, tl, together, triton

# Elements of a program, warps. Not tuned.
_CONFIG = (2048, 4)


@triton.jit
def _self_token_kernel(
    q, k, v, out, lse, drawn, runs, made, heads, tokens, kept, scale, weight, rows, head_draws,
    q0, q1, q2, k0, k1, k2, v0, v1, v2, out0, out1, out2, lse0, lse1, lse2,
    HEAD: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """ROWS tokens of one head of one batch row."""
    batch = (tl.program_id(0) // heads).to(tl.int64)
    head = (tl.program_id(0) % heads).to(tl.int64)
    token = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    valid = token < tokens
    token = token.to(tl.int64)
    channel = tl.arange(0, BLOCK)
    mask = valid[:, None] & (channel < HEAD)[None, :]
    drawn += ((head % head_draws) * rows + batch % rows) * kept
    drawn = tl.load(drawn + tl.load(runs + token, mask=valid, other=0), mask=valid, other=0).to(tl.int64)
    key, value = k + batch * k0 + head * k1, v + batch * v0 + head * v1
    at = q + batch * q0 + head * q1 + token * q2
    query = tl.load(at[:, None] + channel[None, :], mask=mask, other=0.0).to(tl.float32) * scale
    key_self = tl.load(key + (token * k2)[:, None] + channel[None, :], mask=mask, other=0.0).to(tl.float32)
    key_drawn = tl.load(key + (drawn * k2)[:, None] + channel[None, :], mask=mask, other=0.0).to(tl.float32)
    total = tl.load(lse + batch * lse0 + head * lse1 + token * lse2, mask=valid, other=0.0).to(tl.float32) + weight
    own = tl.sum(query * key_self, 1) - total
    other = tl.sum(query * key_drawn, 1) - total
    top = tl.maximum(own, 0.0)
    rest, own, other = tl.exp(-top), tl.exp(own - top), tl.exp(other - top)
    value_self = tl.load(value + (token * v2)[:, None] + channel[None, :], mask=mask, other=0.0).to(tl.float32)
    value_drawn = tl.load(value + (drawn * v2)[:, None] + channel[None, :], mask=mask, other=0.0).to(tl.float32)
    at = out + batch * out0 + head * out1 + token * out2
    before = tl.load(at[:, None] + channel[None, :], mask=mask, other=0.0).to(tl.float32)
    mixed = rest[:, None] * before + own[:, None] * value_self - other[:, None] * value_drawn
    mixed = tl.where((drawn == token)[:, None], before, mixed / (rest + own - other)[:, None])
    target = made + ((batch * tokens + token) * heads + head) * HEAD
    tl.store(target[:, None] + channel[None, :], mixed, mask=mask)


def launch_self_token(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    head_draws: Tensor,
    runs: Tensor,
    scale: float,
    weight: float = 0.0,
    config: tuple[int, int] = _CONFIG,
) -> Tensor:
    """As self_token.add_self_token; the result lies in memory as [B, N, H, d]."""
    q, k, v, out = together(q, k, v, out)
    batch, heads, tokens, d = q.shape
    check_rows(head_draws.shape[1], batch)
    made, block = heads_like(out), power_of_two(d)
    tile = max(1, config[0] // block)
    _self_token_kernel[(batch * heads, -(-tokens // tile))](
        q, k, v, out, lse, head_draws.contiguous(), runs, made, heads, tokens, head_draws.shape[2], scale, weight,
        head_draws.shape[1], head_draws.shape[0],
        *strides(q, k, v, out, lse),
        HEAD=d, BLOCK=block, ROWS=tile,
        num_warps=config[1],
    )  # fmt: skip
    return made


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
