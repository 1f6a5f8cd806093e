"""Means of groups, bit-equal on repeat without a sort: chains of members, summed in whole numbers.

The specification is plan.group_sum over the sizes. `links` chains the members of each group by an atomic exchange, so
their order changes from run to run. `mean` walks the chains and adds in 64-bit integers, where order does not
matter: float16 in units of 2**-24, exactly; other dtypes in units of 2**-40 of the largest member, finer than a
float32 sum. It has read the sizes then, so it writes their logarithms for proportional attention too.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...plan import check_rows
from .compiler import channel_block, power_of_two, tl, triton

# (rows of a program, most channels of a program, warps). On an H200, 4,096, 16,384 and 65,536 x 320 tokens, float16:
# 11.0, 20.1 and 79 us; 2 rows 12.1, 30.8, 114; 16 rows and 2 warps 18.1, 26.0, 101; all channels in a program 15.4,
# 24.7, 100; 8 rows, 2 warps and at most 48 registers 13.3, 21.5, 79.
_CONFIG = (4, 64, 1)
# Tokens of a program of `links`: 3.8, 4.4 and 6.3 us, with 256 5.0, 5.2 and 6.4.
_TOKENS = 128


@triton.jit(do_not_specialize=["tokens", "kept"])
def _links_kernel(index, groups, sizes, head, following, tokens, kept, BLOCK: tl.constexpr):
    """One program: BLOCK tokens of one row."""
    row = tl.program_id(1).to(tl.int64)
    token = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    valid = token < tokens
    group = tl.load(groups + row * tokens + token, mask=valid, other=0)
    own = tl.load(index + row * kept + group, mask=valid, other=0)
    joins = valid & (own != token)
    before = tl.atomic_xchg(head + row * kept + group, token + 1, mask=joins)
    tl.store(following + row * tokens + token, before, mask=joins)
    # Sums of ones are exact in any order.
    tl.atomic_add(sizes + row * kept + group, tl.full((BLOCK,), 1.0, tl.float32), mask=valid)


@triton.jit(do_not_specialize=["tokens", "kept"])
def _mean_kernel(
    x,
    index,
    sizes,
    head,
    following,
    out,
    bias,
    tokens,
    kept,
    channels,
    batch_stride,
    token_stride,
    channel_stride,
    index_rows,
    FIXED: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program: ROWS merged tokens of one batch row, BLOCK channels.

    FIXED: float16, whose values are whole multiples of 2**-24.
    """
    batch = tl.program_id(2).to(tl.int64)
    row = batch % index_rows
    place = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    channel = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    valid = place < kept
    fits = (channel < channels)[None, :]
    own = tl.load(index + row * kept + place, mask=valid, other=0)
    first = tl.load(head + row * kept + place, mask=valid, other=0)
    source = x + batch * batch_stride + channel[None, :] * channel_stride  # (1, BLOCK)
    target = out + (batch * kept + place)[:, None] * channels + channel[None, :]
    mask = valid[:, None] & fits
    # The first programs of a row of the plan write its logarithms.
    writes = valid & (tl.program_id(1) == 0) & (batch < index_rows)
    raw = tl.load(source + own[:, None] * token_stride, mask=mask, other=0.0)
    if tl.max(first, 0) == 0:  # all stand for themselves alone
        tl.store(target, raw, mask=mask)
        tl.store(bias + row * kept + place, tl.zeros((ROWS,), tl.float32), mask=writes)
    else:
        value = raw.to(tl.float32)
        spoilt = value - value  # not a number where something is infinite, as a sum would be
        if FIXED:
            scale = tl.full((ROWS, BLOCK), 16777216.0, tl.float32)
            back = tl.full((ROWS, BLOCK), 1.0 / 16777216.0, tl.float32)
        else:
            largest = tl.abs(value)
            member = first
            while tl.max(member, 0) > 0:
                here = member > 0
                token = (member - 1).to(tl.int64)
                other = tl.load(source + token[:, None] * token_stride, mask=here[:, None] & fits, other=0.0)
                largest = tl.maximum(largest, tl.abs(other.to(tl.float32)))
                member = tl.load(following + row * tokens + token, mask=here, other=0)
            # 2**(40 - exponent of the largest), and its inverse, by their exponent bits.
            exponent = (largest.to(tl.int32, bitcast=True) >> 23) & 0xFF
            field = tl.minimum(294 - exponent, 253)
            scale = (field << 23).to(tl.float32, bitcast=True)
            back = ((254 - field) << 23).to(tl.float32, bitcast=True)
        total = (value * scale).to(tl.int64)
        member = first
        while tl.max(member, 0) > 0:
            here = member > 0
            token = (member - 1).to(tl.int64)
            other = tl.load(source + token[:, None] * token_stride, mask=here[:, None] & fits, other=0.0)
            other = other.to(tl.float32)
            member = tl.load(following + row * tokens + token, mask=here, other=0)
            spoilt += other - other
            total += (other * scale).to(tl.int64)
        size = tl.load(sizes + row * kept + place, mask=valid, other=1.0)
        result = total.to(tl.float32) * back / size[:, None] + spoilt
        tl.store(target, result.to(out.dtype.element_ty), mask=mask)
        tl.store(bias + row * kept + place, tl.log(size), mask=writes)


def launch_links(index: Tensor, groups: Tensor) -> tuple[Tensor, Tensor]:
    """heads [2, b, M] int32 (the bits of the float32 sizes, the chains' heads) and following [b, N] int32.

    index: [b, M], groups: [b, N]. A chain holds a group's tokens other than its own one, each as its number plus one.
    """
    rows, tokens = groups.shape
    kept = index.shape[1]
    # One allocation and one launch for both: a float32 zero has the bits of an int32 zero.
    heads = torch.zeros((2, rows, kept), dtype=torch.int32, device=groups.device)
    following = torch.empty((rows, tokens), dtype=torch.int32, device=groups.device)
    block = min(_TOKENS, power_of_two(tokens))
    _links_kernel[(-(-tokens // block), rows)](
        index.contiguous(),
        groups.contiguous(),
        heads[0].view(torch.float32),
        heads[1],
        following,
        tokens,
        kept,
        BLOCK=block,
        num_warps=4,
    )
    return heads, following


def launch_mean(
    x: Tensor,
    index: Tensor,
    groups: Tensor,
    heads: Tensor,
    following: Tensor,
    config: tuple[int, int, int] = _CONFIG,
) -> tuple[Tensor, Tensor]:
    """x [B, N, C] -> [B, M, C] in its dtype, and log(sizes) [b, M] float32.

    index, groups and what `launch_links` or `launch_match` made of them have b rows.
    """
    rows, widest, warps = config
    batch, tokens, channels = x.shape
    check_rows(index.shape[0], batch)
    kept = index.shape[1]
    rows = min(rows, power_of_two(kept))
    block = channel_block(channels, widest)
    out = torch.empty((batch, kept, channels), dtype=x.dtype, device=x.device)
    bias = torch.empty(index.shape, dtype=torch.float32, device=x.device)
    _mean_kernel[(-(-kept // rows), -(-channels // block), batch)](
        x,
        index.contiguous(),
        heads[0].view(torch.float32),
        heads[1],
        following,
        out,
        bias,
        tokens,
        kept,
        channels,
        *x.stride(),
        index.shape[0],
        FIXED=x.dtype == torch.float16,
        ROWS=rows,
        BLOCK=block,
        num_warps=warps,
    )
    return out, bias
