"""Attention to drawn keys, each query's own token among them, in one launch and at the heads' own size.

Specification: self_token.attend_drawn. Softmax over blocks of keys as in attend.py; it begins with the query's own key,
and with one less of the key that stands for its run, so the query, the output and their sums are read and written once.
"""

from __future__ import annotations

import math

from torch import Tensor

from ...core.groups import check_rows
from .attend import LOG2_E, NARROW, Config, add_all_keys, block_of, is_narrow
from .compiler import heads_like, strides, tl, together, triton

# Queries, keys of a block, warps, stages of the pipeline. Of eight settings the fastest on an H100, or within 4% of it,
# at heads of 64 from 1,024 to 16,384 tokens and of 128 from 4,608 to 32,760.
_CONFIG: Config = (64, 64, 4, 3)


@triton.jit
def _attend_drawn_kernel(
    q, k, v, drawn_k, drawn_v, drawn, runs, made, heads, tokens, start, image, kept, head_draws, rows, scale, share,
    beside,
    q0, q1, q2, k0, k1, k2, v0, v1, v2,
    HEAD: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr, ALONE: tl.constexpr,
    LISTED: tl.constexpr,
):  # fmt: skip
    """ROWS queries of one head of one batch row.

    ALONE: there are no tokens beside the image's. LISTED: drawn keys and values are read from k and v, else from
    drawn_k and drawn_v [B, H, kept, HEAD], contiguous. share: 1 / s where a drawn key counts s times, beside: its
    logarithm to the base of two; all is counted in units of s, so drawn keys have no weight.
    """
    batch = (tl.program_id(1) // heads).to(tl.int64)
    head = (tl.program_id(1) % heads).to(tl.int64)
    token = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    channel = tl.arange(0, BLOCK)
    mask = (token < tokens)[:, None] & (channel < HEAD)[None, :]
    far = token.to(tl.int64)[:, None]
    query = tl.load(q + batch * q0 + head * q1 + far * q2 + channel[None, :], mask=mask, other=0.0)
    k += batch * k0 + head * k1
    v += batch * v0 + head * v1
    drawn += ((head % head_draws) * rows + batch % rows) * kept
    image_k, image_v = k + start * k2, v + start * v2
    # Its own key, once, and once less the one that stands for its run; both are one where it stands for itself.
    place = token - start
    held = (place >= 0) & (place < image)
    other = tl.load(drawn + tl.load(runs + place, mask=held, other=0), mask=held, other=0)
    held = held & (other != place)
    there = held[:, None] & mask
    wide = query.to(tl.float32)
    key = tl.load(k + far * k2 + channel[None, :], mask=there, other=0.0).to(tl.float32)
    own = tl.where(held, tl.sum(wide * key, 1) * scale, -1e30)
    key = tl.load(image_k + other[:, None] * k2 + channel[None, :], mask=there, other=0.0).to(tl.float32)
    less = tl.where(held, tl.sum(wide * key, 1) * scale, -1e30)
    top = tl.maximum(own, less)
    own = tl.where(held, tl.exp2(own - top) * share, 0.0)
    less = tl.where(held, tl.exp2(less - top) * share, 0.0)
    mass = own - less
    value = tl.load(v + far * v2 + channel[None, :], mask=there, other=0.0).to(tl.float32)
    total = own[:, None] * value
    value = tl.load(image_v + other[:, None] * v2 + channel[None, :], mask=there, other=0.0).to(tl.float32)
    total -= less[:, None] * value
    if LISTED:
        total, top, mass = add_all_keys(
            query, total, top, mass, image_k, image_v, 0.0, drawn, k2, v2, 0, kept, scale,
            HEAD, BLOCK, KEYS, False, True,
        )  # fmt: skip
    else:
        first = (batch * heads + head) * kept * HEAD
        total, top, mass = add_all_keys(
            query, total, top, mass, drawn_k + first, drawn_v + first, 0.0, drawn, HEAD, HEAD, 0, kept, scale,
            HEAD, BLOCK, KEYS, False, False,
        )  # fmt: skip
    if not ALONE:
        total, top, mass = add_all_keys(
            query, total, top, mass, k, v, beside, drawn, k2, v2, 0, start, scale,
            HEAD, BLOCK, KEYS, False, False,
        )  # fmt: skip
        total, top, mass = add_all_keys(
            query, total, top, mass, k, v, beside, drawn, k2, v2, start + image, tokens, scale,
            HEAD, BLOCK, KEYS, False, False,
        )  # fmt: skip
    target = made + ((batch * tokens + far) * heads + head) * HEAD
    tl.store(target + channel[None, :], (total / mass[:, None]).to(made.dtype.element_ty), mask=mask)


def launch_attend_drawn(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    drawn_k: Tensor | None,
    drawn_v: Tensor | None,
    head_draws: Tensor,
    runs: Tensor,
    start: int,
    scale: float,
    weight: float,
    config: Config | None = None,
) -> Tensor:
    """As self_token.attend_drawn; the result lies in memory as [B, L, H, d].

    drawn_k, drawn_v: take_by_head of the image's keys and values by head_draws; None: looked up here, through the list.
    """
    q, k, v = together(q, k, v)
    batch, heads, tokens, d = q.shape
    check_rows(head_draws.shape[1], batch)
    made, block, listed = heads_like(q), block_of(d), drawn_k is None
    rows, keys, warps, stages = config or (NARROW if is_narrow(block, q.device) else _CONFIG)
    _attend_drawn_kernel[(-(-tokens // rows), batch * heads)](
        q, k, v, k if listed else drawn_k.contiguous(), v if listed else drawn_v.contiguous(), head_draws.contiguous(),
        runs, made, heads, tokens, start, runs.shape[0], head_draws.shape[2], head_draws.shape[0], head_draws.shape[1],
        scale * LOG2_E, math.exp(-weight), -weight * LOG2_E,
        *strides(q, k, v),
        HEAD=d, BLOCK=block, ROWS=rows, KEYS=keys, ALONE=tokens == runs.shape[0], LISTED=listed,
        num_warps=warps, num_stages=stages,
    )  # fmt: skip
    return made
