"""Means of groups, bit-equal on repeat without a sort: chains of members, summed in whole numbers (docs/kernels.md).

The specification is groups.group_mean.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...core.groups import check_rows
from .compiler import power_of_two, tl, triton

# Chains of a group: how many of its members are read at once.
LANES = 4
# Merged tokens of a program that stand for themselves alone.
_COPIES = 8
# Channels of a program, the most first, and of a warp. On an H200, 4,096, 16,384 and 65,536 x 320 tokens, float16: 7.1,
# 13.9 and 53 us, by blocks of 256 7.5, 15.0 and 57; at 640 channels blocks of 256 take 8.8 and those of 512 9.4. Eight
# chains a group: 7.7, 16.7 and 67. What a program costs is its launch, about a nanosecond, and the walk through the
# longest chain (docs/kernels.md).
_BLOCKS, _OF_WARP = (512, 256), 256
# Tokens of a program of `links`: 3.8, 4.4 and 6.3 us, with 256 5.0, 5.2 and 6.4.
_TOKENS = 128


@triton.jit
def join(sizes, chains, following, place, token, joins, valid, kept, taking, LANES: tl.constexpr):
    """Count tokens in their groups' sizes, and put those that join into one of their groups' chains.

    sizes, chains, following: a row of them, see chains_like. place: the tokens' groups.
    """
    # Sums of ones are exact in any order.
    count = tl.atomic_add(sizes + place, valid.to(tl.float32), mask=valid, sem="relaxed")
    lane = kept + (place - (kept - taking)) * LANES + tl.where(valid, count, 0.0).to(tl.int32) % LANES
    before = tl.atomic_xchg(chains + lane, (token + 1).to(tl.int32), mask=joins, sem="relaxed")
    tl.store(following + token, before, mask=joins)


@triton.jit(do_not_specialize=["tokens", "kept", "taking"])
def _links_kernel(
    index, groups, sizes, chains, following, tokens, kept, taking, LANES: tl.constexpr, BLOCK: tl.constexpr
):
    """One program: BLOCK tokens of one row."""
    row = tl.program_id(1).to(tl.int64)
    token = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    valid = token < tokens
    group = tl.load(groups + row * tokens + token, mask=valid, other=0)
    own = tl.load(index + row * kept + group, mask=valid, other=0)
    joins = valid & (own != token)
    at = row * (kept + taking * LANES)
    join(sizes + at, chains + at, following + row * tokens, group, token, joins, valid, kept, taking, LANES)


@triton.jit(do_not_specialize=["tokens", "kept", "taking"])
def _mean_kernel(
    x, index, sizes, chains, following, out, bias, tokens, kept, taking, channels,
    batch_stride, token_stride, channel_stride, index_rows,
    FIXED: tl.constexpr, LANES: tl.constexpr, COPIES: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The first programs: BLOCK channels of one merged token that may stand for others; the rest: of COPIES others.

    FIXED: float16, whose values are whole multiples of 2**-24.
    """
    batch = tl.program_id(2).to(tl.int64)
    row = batch % index_rows
    channel = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    fits = channel < channels
    # The first programs of a row of the plan write its logarithms.
    writes = (tl.program_id(1) == 0) & (batch < index_rows)
    alone = kept - taking
    source = x + batch * batch_stride + channel * channel_stride  # (BLOCK,)
    out += batch * kept * channels
    index += row * kept
    bias += row * kept
    if tl.program_id(0) >= taking:
        place = (tl.program_id(0) - taking) * COPIES + tl.arange(0, COPIES)
        valid = place < alone
        token = tl.load(index + place, mask=valid, other=0)
        mask = valid[:, None] & fits[None, :]
        value = tl.load(source[None, :] + token[:, None] * token_stride, mask=mask, other=0.0)
        tl.store(out + place.to(tl.int64)[:, None] * channels + channel[None, :], value, mask=mask)
        tl.store(bias + place, tl.zeros((COPIES,), tl.float32), mask=valid & writes)
    else:
        at = alone + tl.program_id(0)
        width = kept + taking.to(tl.int64) * LANES
        # Lanes come first, so that a thread has all of a channel's and adds them up by itself.
        member = tl.load(chains + row * width + kept + tl.program_id(0) * LANES + tl.arange(0, LANES))
        size = tl.load(sizes + row * width + at)
        raw = tl.load(source + tl.load(index + at) * token_stride, mask=fits, other=0.0)
        target = out + at.to(tl.int64) * channels + channel
        if size == 1.0:
            tl.store(target, raw, mask=fits)
        else:
            following += row * tokens
            own = raw.to(tl.float32)
            spoilt = own - own  # not a number where something is infinite, as a sum would be
            if FIXED:
                scale = tl.full((BLOCK,), 16777216.0, tl.float32)
                back = tl.full((BLOCK,), 1.0 / 16777216.0, tl.float32)
            else:
                largest = tl.abs(own)
                walked = member
                while tl.max(walked, 0) > 0:
                    others, walked = _members(source, following, walked, token_stride, fits)
                    largest = tl.maximum(largest, tl.max(tl.abs(others), 0))
                # 2**(40 - exponent of the largest), and its inverse, by their exponent bits.
                exponent = (largest.to(tl.int32, bitcast=True) >> 23) & 0xFF
                field = tl.minimum(294 - exponent, 253)
                scale = (field << 23).to(tl.float32, bitcast=True)
                back = ((254 - field) << 23).to(tl.float32, bitcast=True)
            total = (own * scale).to(tl.int64)
            while tl.max(member, 0) > 0:
                others, member = _members(source, following, member, token_stride, fits)
                spoilt += tl.sum(others - others, 0)
                total += tl.sum((others * scale[None, :]).to(tl.int64), 0)
            # Divided before it is scaled back: the sum itself may be more than float32 holds.
            result = total.to(tl.float32) / size
            if not FIXED:
                edge = largest * scale  # a division that is not exact may go past the farthest member
                result = tl.minimum(tl.maximum(result, -edge), edge)
            result = result * back + spoilt
            tl.store(target, result.to(out.dtype.element_ty), mask=fits)
        tl.store(bias + at, tl.log(size), mask=writes)


@triton.jit
def _members(source, following, member, token_stride, fits):
    """The values (LANES, BLOCK) of members (LANES,), 0 where there are none, and the members after them."""
    here = member > 0
    token = (member - 1).to(tl.int64)
    mask = here[:, None] & fits[None, :]
    value = tl.load(source[None, :] + token[:, None] * token_stride, mask=mask, other=0.0)
    return value.to(tl.float32), tl.load(following + token, mask=here, other=0)


def chains_like(rows: int, kept: int, taking: int) -> tuple[int, int]:
    """The shape of a plan's `chains`, int32: a row has the sizes [M], as the bits of float32, and for each of its last
    `taking` merged tokens, which alone may stand for others, the heads of its chains [taking, LANES].

    A chain holds tokens other than the group's own, by their numbers plus one; after each comes that at its place in
    `following` [b, N]; 0 ends it.
    """
    return rows, kept + taking * LANES


def launch_links(index: Tensor, groups: Tensor, taking: int) -> tuple[Tensor, Tensor]:
    """heads and following [b, N] int32, see chains_like. index: [b, M], groups: [b, N]."""
    rows, tokens = groups.shape
    kept = index.shape[1]
    # One allocation and one launch for both: a float32 zero has the bits of an int32 zero.
    chains = torch.zeros(chains_like(rows, kept, taking), dtype=torch.int32, device=groups.device)
    following = torch.empty((rows, tokens), dtype=torch.int32, device=groups.device)
    block = min(_TOKENS, power_of_two(tokens))
    _links_kernel[(-(-tokens // block), rows)](
        index.contiguous(), groups.contiguous(), chains.view(torch.float32), chains, following, tokens, kept, taking,
        LANES=LANES, BLOCK=block,
        num_warps=4,
    )  # fmt: skip
    return chains, following


def launch_mean(
    x: Tensor, index: Tensor, groups: Tensor, chains: Tensor, following: Tensor, blocks: tuple[int, ...] = _BLOCKS
) -> tuple[Tensor, Tensor]:
    """As groups.group_mean, and log(sizes) [b, M] float32.

    index, groups and what `launch_links` or `launch_match` made of them have b rows.
    """
    batch, tokens, channels = x.shape
    check_rows(index.shape[0], batch)
    kept = index.shape[1]
    taking = (chains.shape[1] - kept) // LANES
    copies = min(_COPIES, power_of_two(kept))
    # Of the sizes of a block that with the fewest channels that are none.
    widest = power_of_two(channels)
    block = min((min(b, widest) for b in blocks), key=lambda b: -(-channels // b) * b)
    out = x.new_empty((batch, kept, channels))
    bias = torch.empty(index.shape, dtype=torch.float32, device=x.device)
    _mean_kernel[(taking - (taking - kept) // copies, -(-channels // block), batch)](
        x, index.contiguous(), chains.view(torch.float32), chains, following, out, bias, tokens, kept, taking, channels,
        *x.stride(), index.shape[0],
        FIXED=x.dtype == torch.float16, LANES=LANES, COPIES=copies, BLOCK=block,
        num_warps=max(1, block // _OF_WARP),
    )  # fmt: skip
    return out, bias
