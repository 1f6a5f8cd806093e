"""All random choices of a step's `sample` layers in one launch.

The specification is sampling.draw, about 25 launches; equal bit for bit.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .compiler import power_of_two, tl, triton
from .noise import FIRST, GOLDEN, SECOND, fold, mix, times

# Runs times slots that a program of 4 warps holds. On an H200, 16 layers at ratio 0.75 of 4,096, 16,384 and 65,536
# tokens: 2.3, 3.8 and 10.2 us, with 128 2.4, 4.7 and 13.9.
_ELEMENTS = 256


@triton.jit(do_not_specialize=["number", "layer", "tokens", "kept", "longest"])
def _draw_kernel(
    order, seed, step, number, out, tokens, kept, longest, layer, rows,
    HAS_STEP: tl.constexpr, WIDE: tl.constexpr, RUNS: tl.constexpr, SLOTS: tl.constexpr,
):  # fmt: skip
    """One program: RUNS runs of one layer and one row."""
    place, row = tl.program_id(1), tl.program_id(2)
    run = tl.program_id(0) * RUNS + tl.arange(0, RUNS)  # (RUNS,)
    # run * tokens // kept without 64-bit divisions, which were most of this kernel's time.
    share, rest = tokens // kept, tokens % kept
    wide = run.to(tl.int64) if WIDE else run
    start = run * share + (wide * rest // kept).to(tl.int32)
    length = share + ((wide + 1) * rest // kept - wide * rest // kept).to(tl.int32)
    key = mix(fold(tl.load(seed + row)) + times(tokens + 1, FIRST) + times(kept + 1, SECOND))
    slot = tl.arange(0, SLOTS)  # (SLOTS,)
    own = mix(key + times(run[:, None] * longest + slot[None, :], GOLDEN)) >> 2  # (RUNS, SLOTS)
    # A slot's place in the run's permutation is how many slots sort before it; of equals the first one does.
    rank = tl.zeros((RUNS, SLOTS), tl.int32)
    for other in range(longest):
        noise = (mix(key + times(run * longest + other, GOLDEN)) >> 2)[:, None]  # (RUNS, 1)
        before = (noise < own) | ((noise == own) & (other < slot)[None, :])
        rank += (before & (other < length)[:, None]).to(tl.int32)
    at = number.to(tl.int64) + layer + place
    if HAS_STEP:
        at += tl.load(step).to(tl.int64)
    # Runs have one of two lengths. As torch's remainder, which takes the divisor's sign.
    shorter = tl.maximum(longest - 1, 1)
    long_turn, short_turn = at % longest, at % shorter
    long_turn = tl.where(long_turn < 0, long_turn + longest, long_turn).to(tl.int32)
    short_turn = tl.where(short_turn < 0, short_turn + shorter, short_turn).to(tl.int32)
    turn = tl.where(length == longest, long_turn, short_turn)
    hit = (rank == turn[:, None]) & (slot[None, :] < length[:, None])
    chosen = tl.sum(tl.where(hit, slot[None, :], 0), axis=1)  # (RUNS,)
    valid = run < kept
    token = tl.load(order + start + chosen, mask=valid, other=0)
    tl.store(out + (place * rows + row).to(tl.int64) * kept + run, token, mask=valid)


def launch_draw(
    order: Tensor, seed: Tensor, step: Tensor | None, number: int, kept: int, layer: int, count: int
) -> Tensor:
    """As sampling.draw. step: 0-d or None (then number holds)."""
    tokens, seed = order.shape[0], seed.reshape(-1).contiguous()
    rows = seed.shape[0]
    longest = -(-tokens // kept)
    slots = power_of_two(longest)
    runs = max(1, min(_ELEMENTS // slots, power_of_two(kept)))
    out = torch.empty((count, rows, kept), dtype=torch.int64, device=seed.device)
    _draw_kernel[(-(-kept // runs), count, rows)](
        order.contiguous(), seed, seed if step is None else step, number, out, tokens, kept, longest, layer, rows,
        HAS_STEP=step is not None, WIDE=(kept + 1) * kept >= 2**31, RUNS=runs, SLOTS=slots,
        num_warps=4,
    )  # fmt: skip
    return out
