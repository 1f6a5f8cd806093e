"""Heads with the further channels of proportional attention, queries, keys and values in one launch.

The specification is channels.extend_heads and extend_one, about a dozen launches.
"""

from __future__ import annotations

from torch import Tensor

from ...core.channels import KEY, VALUE, extra_channels
from .compiler import power_of_two, tl, triton

# Elements of a program, warps. Not tuned.
_ELEMENTS, _WARPS = 4096, 4
_KEY, _VALUE = tl.constexpr(KEY), tl.constexpr(VALUE)


@triton.jit
def _widen(
    x, out, bias, outer, inner,
    first_stride, outer_stride, inner_stride, channel_stride, bias_first, bias_outer, bias_inner, root,
    KIND: tl.constexpr, HEAD: tl.constexpr, WIDE: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """ROWS heads of x [., outer, inner, HEAD] into out [., outer, inner, WIDE]."""
    first = tl.program_id(1).to(tl.int64)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    valid = row < outer * inner
    at_outer, at_inner = (row // inner).to(tl.int64), (row % inner).to(tl.int64)
    channel = tl.arange(0, BLOCK)
    source = x + first * first_stride + at_outer * outer_stride + at_inner * inner_stride  # (ROWS,)
    value = tl.load(
        source[:, None] + channel[None, :] * channel_stride,
        mask=valid[:, None] & (channel < HEAD)[None, :],
        other=0.0,
    )
    if KIND == _KEY:
        weight = bias + first * bias_first + at_outer * bias_outer + at_inner * bias_inner
        scaled = tl.load(weight, mask=valid, other=0.0) * root
        high = scaled.to(value.dtype)
        low = (scaled - high.to(tl.float32)).to(value.dtype)
        value = tl.where((channel == HEAD)[None, :], high[:, None], value)
        value = tl.where((channel == HEAD + 1)[None, :], low[:, None], value)
    elif KIND != _VALUE:
        ones = (channel == HEAD) | (channel == HEAD + 1)
        value = tl.where(ones[None, :], tl.full((ROWS, BLOCK), 1.0, tl.float32).to(value.dtype), value)
    target = out + (first * outer * inner + row)[:, None] * WIDE + channel[None, :]
    tl.store(target, value, mask=valid[:, None] & (channel < WIDE)[None, :])


@triton.jit(do_not_specialize=["q_outer", "k_outer", "q_inner", "k_inner"])
def _widen_kernel(
    q, k, v, q_out, k_out, v_out, bias, q_outer, q_inner, k_outer, k_inner,
    q0, q1, q2, q3, k0, k1, k2, k3, v0, v1, v2, v3, b0, b1, b2, root,
    FROM: tl.constexpr, HEAD: tl.constexpr, WIDE: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The third number of a program says whose heads it widens; FROM: where that begins, for one alone."""
    part = tl.program_id(2) + FROM
    if part == 0:
        _widen(q, q_out, bias, q_outer, q_inner, q0, q1, q2, q3, b0, b1, b2, root, 0, HEAD, WIDE, ROWS, BLOCK)
    elif part == 1:
        _widen(k, k_out, bias, k_outer, k_inner, k0, k1, k2, k3, b0, b1, b2, root, 1, HEAD, WIDE, ROWS, BLOCK)
    else:
        _widen(v, v_out, bias, k_outer, k_inner, v0, v1, v2, v3, b0, b1, b2, root, 2, HEAD, WIDE, ROWS, BLOCK)


def launch_widen(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """As channels.extend_heads, for heads of four dimensions whatever their order."""
    return tuple(_launch((q, k, v), bias, 0))


def launch_widen_one(x: Tensor, kind: int, bias: Tensor | None = None) -> Tensor:
    """As channels.extend_one."""
    return _launch((x,), bias, kind)[0]


def _launch(parts: tuple[Tensor, ...], bias: Tensor | None, kind: int) -> list[Tensor]:
    d = parts[0].shape[-1]
    wide = d + extra_channels(d)
    made = [x.new_empty((*x.shape[:-1], wide)) for x in parts]
    # One alone stands in every place; only its own is taken.
    q, k, v = parts * (3 // len(parts))
    if bias is None:
        weight, strides = q, (0, 0, 0)
    else:
        weight = bias.float().expand(k.shape[:-1])
        strides = weight.stride()
    block = power_of_two(wide)
    rows = max(1, _ELEMENTS // block)
    heads = max(x.shape[1] * x.shape[2] for x in parts)
    _widen_kernel[(-(-heads // rows), parts[0].shape[0], len(parts))](
        q, k, v, *made * (3 // len(parts)), weight, q.shape[1], q.shape[2], k.shape[1], k.shape[2],
        *q.stride(), *k.stride(), *v.stride(), *strides, d**0.5,
        FROM=kind, HEAD=d, WIDE=wide, ROWS=rows, BLOCK=block,
        num_warps=_WARPS,
        enable_fp_fusion=False,  # the rounding error is that of the rounded product, as in plain torch
    )  # fmt: skip
    return made
