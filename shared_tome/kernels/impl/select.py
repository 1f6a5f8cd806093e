"""The src that stay and everybody's group, in one launch and without a sort: a bisection of the bits, a compaction.

The specification is matching.grouped with in_order. One program a batch row holds all its src in registers and
selects; others write the dst.
"""

from __future__ import annotations

from torch import Tensor

from .compiler import power_of_two, tl, triton
from .nearest import ordered

# dst of a program that writes them.
_DST = 1024


@triton.jit(do_not_specialize=["src_count", "dst_count", "stay"])
def _select_kernel(
    similarity, target, src, dst, index, groups, src_count, dst_count, stay, list_rows,
    BITS: tl.constexpr, SRC: tl.constexpr, DST: tl.constexpr,
):  # fmt: skip
    """Program 0 of a row: all its src, at most SRC; the others: DST of its dst each."""
    row = tl.program_id(1).to(tl.int64)
    index += row * (stay + dst_count)
    groups += row * (src_count + dst_count)
    src += (row % list_rows) * src_count
    dst += (row % list_rows) * dst_count
    if tl.program_id(0) > 0:
        own = (tl.program_id(0) - 1) * DST + tl.arange(0, DST)
        dst_token = tl.load(dst + own, mask=own < dst_count, other=0)
        tl.store(index + stay + own, dst_token, mask=own < dst_count)
        tl.store(groups + dst_token, (stay + own).to(tl.int64), mask=own < dst_count)
    else:
        lane = tl.arange(0, SRC)
        valid = lane < src_count
        value = tl.load(similarity + row * src_count + lane, mask=valid, other=0.0)
        code = ordered(value, BITS).to(tl.uint32)
        # The stay-th smallest, bit by bit from the top: a bit is set where no more than stay - 1 are below it.
        edge = tl.zeros((), tl.uint32)
        for bit in tl.static_range(BITS):
            higher = edge | tl.full((), 1 << (BITS - 1 - bit), tl.uint32)
            edge = tl.where(tl.sum((valid & (code < higher)).to(tl.int32), 0) < stay, higher, edge)
        # All below it stay, and the first of those at it.
        below = (valid & (code < edge)).to(tl.int32)
        equal = (valid & (code == edge)).to(tl.int32)
        both = tl.cumsum(below + (equal << 16), 0)  # two counts in one scan; neither reaches 2**15
        ties_stay = stay - tl.sum(below, 0)
        ties = both >> 16
        place = (both & 0xFFFF) + tl.minimum(ties, ties_stay) - 1
        token = tl.load(src + lane, mask=valid, other=0)
        partner = tl.load(target + row * src_count + lane, mask=valid, other=0)
        stays = (below > 0) | ((equal > 0) & (ties <= ties_stay))
        tl.store(index + place, token, mask=stays)
        tl.store(groups + token, tl.where(stays, place.to(tl.int64), partner + stay), mask=valid)


def empty_plan(rows: int, src: Tensor, dst: Tensor, goes: int) -> tuple[Tensor, Tensor]:
    """A plan's index [rows, M] and groups [rows, N], to be written into. src: [b, S], dst: [b, D]."""
    tokens = src.shape[1] + dst.shape[1]
    return src.new_empty((rows, tokens - goes)), src.new_empty((rows, tokens))


def launch_select(similarity: Tensor, target: Tensor, src: Tensor, dst: Tensor, goes: int) -> tuple[Tensor, Tensor]:
    """As matching.grouped, in order."""
    rows, src_count = similarity.shape
    dst_count = dst.shape[1]
    index, groups = empty_plan(rows, src, dst, goes)
    held = power_of_two(src_count)
    _select_kernel[(1 + -(-dst_count // _DST), rows)](
        similarity.contiguous(), target.contiguous(), src.contiguous(), dst.contiguous(), index, groups, src_count,
        dst_count, src_count - goes, src.shape[0],
        BITS=8 * similarity.element_size(), SRC=held, DST=_DST,
        num_warps=max(4, min(32, held // 256)),
    )  # fmt: skip
    return index, groups
