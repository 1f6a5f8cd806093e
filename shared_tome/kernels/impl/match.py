"""All that becomes a plan in three launches: the nearest dst, the src that stay, everybody's group, sizes and chains.

The specification is matching.match and groups.group_counts. The third launch goes by the tally of the similarities
that the second (nearest.py) makes as it writes them (docs/kernels.md).
"""

from __future__ import annotations

import torch
from torch import Tensor

from .compiler import power_of_two, tl, triton
from .mean import LANES, chains_like, join
from .nearest import COARSE, TALLY, Config, launch_nearest, ordered
from .select import empty_plan

# src of a program, dst of a program, src that it counts at a time, warps. On an H100 at 4,096, 16,384, 65,536 tokens:
# 6.1, 7.2 and 23.7 us; (1024, 1024, 4096, 4) takes 7.4, 19.2 and 68.1, (256, 256, 8192, 8) 4.9, 9.0 and 35.7.
Tiles = tuple[int, int, int, int]
_TILES = (512, 512, 16384, 16)
_COARSE, _TALLY = tl.constexpr(COARSE), tl.constexpr(TALLY)


@triton.jit
def _bin(count, goal):
    """Of counts [256]: (the first place through which there are at least `goal`, how many are before it)."""
    through = tl.cumsum(count, 0)
    place = tl.sum((through < goal).to(tl.int32), 0)
    return place, tl.sum(tl.where(tl.arange(0, _COARSE) < place, count, 0), 0)


@triton.jit
def _seat(place, stay, SECOND: tl.constexpr):
    """Where a merged token stands. SECOND: the first dst comes right after the first src that stays."""
    if SECOND:
        place = tl.where(place == stay, 1, tl.where((place > 0) & (place < stay), place + 1, place))
    return place


@triton.jit(do_not_specialize=["src_count", "dst_count", "stay"])
def _match_kernel(
    similarity, target, src, dst, tally, index, groups, sizes, chains, following, src_count, dst_count, stay, list_rows,
    SECOND: tl.constexpr, LANES: tl.constexpr, SRC: tl.constexpr, DST: tl.constexpr, READ: tl.constexpr,
):  # fmt: skip
    """The first programs of a row: SRC of its src each; the others: DST of its dst each.

    sizes, chains, following: see mean.join; the former two zero before.
    """
    row = tl.program_id(1).to(tl.int64)
    tokens, kept = src_count + dst_count, stay + dst_count
    index += row * kept
    sizes += row * (kept + dst_count * LANES)
    chains += row * (kept + dst_count * LANES)
    groups += row * tokens
    following += row * tokens
    src += (row % list_rows) * src_count
    dst += (row % list_rows) * dst_count
    src_tiles = tl.cdiv(src_count, SRC)
    if tl.program_id(0) >= src_tiles:
        # Names of its own: Triton wants what both branches name to be of one shape.
        taker = (tl.program_id(0) - src_tiles) * DST + tl.arange(0, DST)
        held = taker < dst_count
        taken = tl.load(dst + taker, mask=held, other=0)
        seat = _seat(stay + taker, stay, SECOND)
        tl.store(index + seat, taken, mask=held)
        tl.store(groups + taken, seat.to(tl.int64), mask=held)
        # Sums of ones are exact in any order.
        tl.atomic_add(sizes + seat, held.to(tl.float32), mask=held, sem="relaxed")
    else:
        similarity += row * src_count
        tally += row * _TALLY
        begin = tl.program_id(0) * SRC
        own = begin + tl.arange(0, SRC)
        valid = own < src_count
        code = ordered(tl.load(similarity + own, mask=valid, other=0.0), 16)
        token = tl.load(src + own, mask=valid, other=0)
        partner = tl.load(target + row * src_count + own, mask=valid, other=0).to(tl.int32)
        # The edge is the stay-th smallest: all below it stay, and the first of those at it.
        one_of = tl.arange(0, _COARSE)
        upper, below_upper = _bin(tl.load(tally + one_of), stay)
        lower, below_edge = _bin(tl.load(tally + _COARSE + upper * 256 + one_of), stay - below_upper)
        edge = upper * 256 + lower
        ties_stay = stay - below_upper - below_edge
        earlier_below = tl.zeros((READ,), tl.int32)
        earlier_equal = tl.zeros((READ,), tl.int32)
        for start in range(0, begin, READ):
            at = start + tl.arange(0, READ)
            earlier = ordered(tl.load(similarity + at, mask=at < begin, other=0.0), 16)
            earlier_below += ((at < begin) & (earlier < edge)).to(tl.int32)
            earlier_equal += ((at < begin) & (earlier == edge)).to(tl.int32)
        below = (valid & (code < edge)).to(tl.int32)
        equal = (valid & (code == edge)).to(tl.int32)
        both = tl.cumsum(below + (equal << 16), 0)  # two counts in one scan; neither reaches 2**15
        ties = tl.sum(earlier_equal, 0) + (both >> 16)
        place = tl.sum(earlier_below, 0) + (both & 0xFFFF) + tl.minimum(ties, ties_stay) - 1
        stays = (below > 0) | ((equal > 0) & (ties <= ties_stay))
        joins = valid & (stays == 0)
        place = _seat(tl.where(stays, place, stay + partner), stay, SECOND)
        tl.store(index + place, token, mask=stays)
        tl.store(groups + token, place.to(tl.int64), mask=valid)
        join(sizes, chains, following, place, token, joins, valid, kept, dst_count, LANES)


def launch_match(
    metric: Tensor,
    src: Tensor,
    dst: Tensor,
    goes: int,
    alone: int = 0,
    first: int = 0,
    config: Config | None = None,
    tiles: Tiles = _TILES,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """index [B, M], groups [B, N] and what mean.launch_links makes of them: heads, where the dst alone
    may stand for others, and following [B, N].

    Args:
        metric: [B, N, C] in 16 bits, src: [b, S], dst: [b, D]; goes: how many src go.
        alone: 1: the first src goes to nobody. first: 1: the first dst takes nobody, and comes second of all.
    """
    rows, kept = metric.shape[0], src.shape[1] - goes + dst.shape[1]
    tally = torch.empty((rows, TALLY), dtype=torch.int32, device=metric.device)
    chains = torch.empty(chains_like(rows, kept, dst.shape[1]), dtype=torch.int32, device=metric.device)
    similarity, target = launch_nearest(metric, src, dst, first, config, alone=alone, tally=tally, chains=chains)
    index, groups, following = launch_grouped(similarity, target, src, dst, goes, tally, chains, first, tiles)
    return index, groups, chains, following


def launch_grouped(
    similarity: Tensor,
    target: Tensor,
    src: Tensor,
    dst: Tensor,
    goes: int,
    tally: Tensor,
    chains: Tensor,
    first: int = 0,
    tiles: Tiles = _TILES,
) -> tuple[Tensor, Tensor, Tensor]:
    """index [B, M], groups [B, N], following [B, N] and, into heads (mean.chains_like) of zeros, sizes and chains.

    similarity, target: [B, S] and tally: [B, TALLY], from launch_nearest.
    """
    rows, src_count = similarity.shape
    dst_count = dst.shape[1]
    index, groups = empty_plan(rows, src, dst, goes)
    following = torch.empty(groups.shape, dtype=torch.int32, device=src.device)
    src_tile = min(tiles[0], power_of_two(src_count))
    dst_tile = min(tiles[1], power_of_two(dst_count))
    _match_kernel[(-(-src_count // src_tile) + -(-dst_count // dst_tile), rows)](
        similarity, target, src.contiguous(), dst.contiguous(), tally, index, groups, chains.view(torch.float32),
        chains, following, src_count, dst_count, src_count - goes, src.shape[0],
        SECOND=bool(first), LANES=LANES, SRC=src_tile, DST=dst_tile, READ=tiles[2],
        num_warps=tiles[3],
    )  # fmt: skip
    return index, groups, following
