"""Attention with a bias for each key, in one launch and at the heads' own size.

Softmax over blocks of keys with a running maximum (Dao et al., FlashAttention, arXiv 2205.14135, algorithm 1); the bias
comes to the logits as they leave the matrix product. Specification: channels.attend_wider. attend_drawn.py has its
blocks without a bias.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...core.groups import check_rows
from .compiler import heads_like, power_of_two, shared_memory, strides, tl, together, triton

Config = tuple[int, int, int, int]
# By channels of a program's head: queries, keys of a block, warps, stages of the pipeline.
_CONFIG: dict[int, Config] = {64: (128, 64, 4, 3), 128: (128, 64, 8, 3)}
# The same where there are so few programs that a large GPU would wait for its last ones, and (heads of 64) some more.
_SMALL, _MEDIUM = (64, 64, 4, 3), (64, 128, 4, 3)
_FEW, _SOME = 400, 1000
# Heads of 128 take 129 KiB of shared memory on Hopper and 97 elsewhere (Triton 3.7). Cards with 99 KiB (RTX) have one
# that leaves them room; none was at hand to be timed.
_ROOM = 136 * 1024
NARROW = (64, 64, 4, 2)
LOG2_E = 1.4426950408889634


@triton.jit
def softmax_step(total, top, mass, logits, values, scale, bias, WEIGHED: tl.constexpr):
    """One more block of keys, by its logits [ROWS, KEYS] and values [KEYS, BLOCK]; exp2 is the GPU's own.

    total [ROWS, BLOCK], top and mass [ROWS]: the sum of the values, the greatest exponent of two and the sum of what
    the values weigh, so far. bias: the keys' weights' logarithm, to the base of two. WEIGHED: of each key; else one
    for all: the greatest logit is then looked for before it is scaled, an instruction less for each. scale: above 0.
    """
    if WEIGHED:
        logits = logits * scale + bias
        higher = tl.maximum(top, tl.max(logits, 1))
        share = tl.exp2(logits - higher[:, None])
    else:
        higher = tl.maximum(top, tl.max(logits, 1) * scale + bias)
        share = tl.exp2(logits * scale - (higher - bias)[:, None])
    shrink = tl.exp2(top - higher)
    mass = mass * shrink + tl.sum(share, 1)
    return tl.dot(share.to(values.dtype), values, total * shrink[:, None]), higher, mass


@triton.jit
def _add_keys(
    query, total, top, mass, key, value, bias, listed,
    k2, v2, first, keys, scale,
    HEAD: tl.constexpr, BLOCK: tl.constexpr, KEYS: tl.constexpr, WHOLE: tl.constexpr, WEIGHED: tl.constexpr,
    LISTED: tl.constexpr,
):  # fmt: skip
    """KEYS keys from `first` on. bias: see softmax_step; WEIGHED: where each key's lies, natural logarithms.

    WHOLE: all of these keys are there. LISTED: they are the tokens that `listed` has at these places.
    """
    at = first + tl.arange(0, KEYS)
    channel = tl.arange(0, BLOCK)
    if LISTED:
        token = tl.load(listed + at) if WHOLE else tl.load(listed + at, mask=at < keys, other=0)
    else:
        token = at
    at_key = key + token[None, :] * k2 + channel[:, None]
    at_value = value + token[:, None] * v2 + channel[None, :]
    if WHOLE and HEAD == BLOCK:
        k, v = tl.load(at_key), tl.load(at_value)
    else:
        there = at < keys
        k = tl.load(at_key, mask=(channel < HEAD)[:, None] & there[None, :], other=0.0)
        v = tl.load(at_value, mask=there[:, None] & (channel < HEAD)[None, :], other=0.0)
    # Keys that are not there weigh nothing.
    logits = tl.dot(query, k)
    if WEIGHED:
        weights = tl.load(bias + at, mask=at < keys, other=float("-inf")) * 1.4426950408889634
        return softmax_step(total, top, mass, logits, v, scale, weights[None, :], True)
    else:
        if not WHOLE:
            logits = tl.where((at < keys)[None, :], logits, float("-inf"))
        return softmax_step(total, top, mass, logits, v, scale, bias, False)


@triton.jit
def add_all_keys(
    query, total, top, mass, key, value, bias, listed,
    k2, v2, begin, end, scale,
    HEAD: tl.constexpr, BLOCK: tl.constexpr, KEYS: tl.constexpr, WEIGHED: tl.constexpr, LISTED: tl.constexpr,
):  # fmt: skip
    """Keys from `begin` to `end`, as _add_keys has them. query: [ROWS, BLOCK]."""
    whole = begin + (end - begin) // KEYS * KEYS
    for first in range(begin, whole, KEYS):
        total, top, mass = _add_keys(
            query, total, top, mass, key, value, bias, listed, k2, v2, first, end, scale,
            HEAD, BLOCK, KEYS, True, WEIGHED, LISTED,
        )  # fmt: skip
    if whole < end:
        total, top, mass = _add_keys(
            query, total, top, mass, key, value, bias, listed, k2, v2, whole, end, scale,
            HEAD, BLOCK, KEYS, False, WEIGHED, LISTED,
        )  # fmt: skip
    return total, top, mass


@triton.jit
def _attend_kernel(
    q, k, v, bias, out, heads, tokens, keys, bias_rows, scale,
    q0, q1, q2, k0, k1, k2, v0, v1, v2,
    HEAD: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    """ROWS queries of one head of one batch row. out: [B, N, H, d] in memory."""
    batch = (tl.program_id(1) // heads).to(tl.int64)
    head = (tl.program_id(1) % heads).to(tl.int64)
    token = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    channel = tl.arange(0, BLOCK)
    mask = (token < tokens)[:, None] & (channel < HEAD)[None, :]
    query = tl.load(
        q + batch * q0 + head * q1 + token.to(tl.int64)[:, None] * q2 + channel[None, :], mask=mask, other=0.0
    )
    key, value, weight = k + batch * k0 + head * k1, v + batch * v0 + head * v1, bias + (batch % bias_rows) * keys
    total = tl.zeros((ROWS, BLOCK), tl.float32)
    top = tl.full((ROWS,), -1e30, tl.float32)
    mass = tl.zeros((ROWS,), tl.float32)
    total, top, mass = add_all_keys(
        query, total, top, mass, key, value, weight, weight, k2, v2, 0, keys, scale,
        HEAD, BLOCK, KEYS, True, False,
    )  # fmt: skip
    target = out + ((batch * tokens + token.to(tl.int64)) * heads + head) * HEAD
    tl.store(target[:, None] + channel[None, :], (total / mass[:, None]).to(out.dtype.element_ty), mask=mask)


def block_of(d: int) -> int:
    """Channels of a program's head, for heads of d."""
    return max(min(_CONFIG), power_of_two(d))


def is_narrow(block: int, device: torch.device) -> bool:
    """Whether heads of `block` channels have to do with NARROW on a device."""
    return block > 64 and shared_memory(device) < _ROOM


def _config_for(block: int, queries: int, device: torch.device) -> Config:
    """The settings for heads of `block` channels; queries: of all rows and heads."""
    if is_narrow(block, device):
        return NARROW
    programs = queries / _CONFIG[block][0]
    if programs < _FEW:
        return _SMALL
    return _MEDIUM if block == 64 and programs < _SOME else _CONFIG[block]


def launch_attend(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, scale: float, config: Config | None = None) -> Tensor:
    """As channels.attend_wider with a bias; the result lies in memory as [B, N, H, d]."""
    q, k, v = together(q, k, v)
    batch, heads, tokens, d = q.shape
    check_rows(bias.shape[0], batch)
    bias, made, block = bias.float().contiguous(), heads_like(q), block_of(d)
    rows, keys, warps, stages = config or _config_for(block, batch * heads * tokens, q.device)
    _attend_kernel[(-(-tokens // rows), batch * heads)](
        q, k, v, bias, made, heads, tokens, k.shape[2], bias.shape[0], scale * LOG2_E,
        *strides(q, k, v),
        HEAD=d, BLOCK=block, ROWS=rows, KEYS=keys,
        num_warps=warps, num_stages=stages,
    )  # fmt: skip
    return made
