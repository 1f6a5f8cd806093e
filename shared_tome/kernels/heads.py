"""The front door for heads: attention with weights, self tokens, further channels, by a kernel where one serves, else
by the specification in core/."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from ..core import channels, multires, self_token
from ..core.curve import is_compiling
from ..core.multires import Counts, Drawn, Tiles
from .names import DTYPES, HALF
from .switch import load, operator, serves

# Heads that `attend` takes; programs on a grid's second axis; offsets within a head.
_FULL_HEADS = (64, 128)
_MOST_PROGRAMS, _FARTHEST = 65535, 2**31
# Tiles that a program of `multires` holds while it chooses; channels of its heads.
_MOST_TILES, _MOST_CHANNELS = 8192, 256
# Drawn keys up to which `attend_drawn` looks them up in their list. That takes the processor half: 36 us against as
# much and 46 for `take_by_head` before it, on an H100's host. But keys that do not lie together take the GPU longer:
# 18.6 us against 17.3 and 3.2 for `take_by_head` at 256 keys, 58 against 54 and 4.5 at 576, 145 against 130 and 6.0 at
# 1,024.
_LISTED = 640


def extend_heads(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """channels.extend_heads in one launch, for q, k and v of four dimensions."""
    fits = q.dim() == k.dim() == 4 and k.shape == v.shape and q.shape[0] == k.shape[0] and q.shape[3] == k.shape[3]
    if fits and _widens((q, k, v), bias):
        return operator("widen")(q, k, v, bias)
    return channels.extend_heads(q, k, v, bias)


def extend_one(x: Tensor, kind: int, bias: Tensor | None = None) -> Tensor:
    """channels.extend_one in one launch, for hosts that project queries, keys and values one at a time."""
    extend = operator("widen_one") if x.dim() == 4 and _widens((x,), bias) else channels.extend_one
    return extend(x, kind, bias)


def attends(d: int, dtype: torch.dtype) -> bool:
    """Whether `attend` is meant for heads of d channels: those that fill a size which the attention kernels have, so
    that further channels would double them."""
    return d in _FULL_HEADS and dtype in HALF


def can_attend(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None) -> bool:
    """Whether `attend` goes through a kernel for these."""
    able = k.shape == v.shape and q.shape[:2] == k.shape[:2] and k.shape[2] > 0
    return able and _fits(q, k, v) and serves(q, k, v, *([] if bias is None else [bias]))


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor,
    scale: float,
    attention: Callable[..., Tensor] = F.scaled_dot_product_attention,
    is_torchs: bool = True,
) -> Tensor:
    """channels.attend_wider in one launch and without further channels; by a kernel the result lies as [B, N, H, d].

    is_torchs: whether `attention` is torch's own, in whose place a kernel may go.
    """
    if is_torchs and can_attend(q, k, v, bias):
        return operator("attend")(q, k, v, bias, scale)
    return channels.attend_wider(q, k, v, bias, scale, attention, extend_heads)


def attends_drawn(q: Tensor, k: Tensor, v: Tensor, scale: float) -> bool:
    """Whether `attend_drawn` goes through a kernel for q, k, v [B, H, L, d] and logits of this scale."""
    able = q.shape == k.shape == v.shape and q.numel() > 0 and scale > 0.0
    return able and _fits(q, k, v) and _runs("attend_drawn", q, k, v)


def attend_drawn(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    head_draws: Tensor,
    runs: Tensor,
    start: int,
    scale: float,
    weight: float,
) -> Tensor:
    """self_token.attend_drawn in one launch, or in two where many keys are drawn; by a kernel the result lies as
    [B, L, H, d]."""
    if not attends_drawn(q, k, v, scale):
        return self_token.attend_drawn(q, k, v, head_draws, runs, start, scale, weight)
    drawn = None, None
    if head_draws.shape[2] > _LISTED:
        drawn = take_by_head(*(self_token.image_of(x, start, runs.shape[0]) for x in (k, v)), head_draws)
    return operator("attend_drawn")(q, k, v, *drawn, head_draws, runs, start, scale, weight)


def take_by_head(k: Tensor, v: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
    """self_token.take_by_head in one launch."""
    able = k.shape == v.shape and k.dtype == v.dtype and k.dtype in DTYPES and index.numel() > 0
    if able and not is_compiling() and serves(k, v, index):  # compiled, torch fuses it
        return operator("take_by_head")(k, v, index)
    return self_token.take_by_head(k, v, index)


def add_self_token(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    head_draws: Tensor,
    runs: Tensor,
    scale: float,
    weight: float = 0.0,
) -> Tensor:
    """self_token.add_self_token in one launch."""
    able = q.shape == k.shape == v.shape == out.shape and q.dtype == k.dtype == v.dtype == out.dtype
    able = able and q.dtype in DTYPES and q.numel() > 0 and not is_compiling()  # compiled, torch fuses it
    run = operator("self_token") if able and serves(q, k, v, out, head_draws, runs) else self_token.add_self_token
    return run(q, k, v, out, lse, head_draws, runs, scale, weight)


def takes_multires(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> bool:
    """Whether `attend_multires` may go through a kernel for heads q, k, v [B, H, L, d], whatever the tiles are."""
    able = q.shape == k.shape == v.shape and q.dtype == k.dtype == v.dtype
    able = able and q.dtype in HALF and q.numel() > 0 and q.shape[3] <= _MOST_CHANNELS and _reaches(q, k, v)
    able = able and (mask is None or (mask.dtype in (*DTYPES, torch.bool) and serves(mask)))
    return able and _runs("multires", q, k, v)


def attends_multires(q: Tensor, k: Tensor, v: Tensor, tiles: Tiles, mask: Tensor | None = None) -> bool:
    """Whether `attend_multires` goes through a kernel for heads q, k, v [B, H, L, d] of these tiles."""
    return holds_tiles(q, tiles) and takes_multires(q, k, v, mask)


def holds_tiles(q: Tensor, tiles: Tiles) -> bool:
    """The part of attends_multires that is not takes_multires."""
    return q.shape[2] == len(tiles.rows) and tiles.image > 0 and tiles.count <= _MOST_TILES


def attend_multires(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    tiles: Tiles,
    drawn: Drawn,
    counts: Counts,
    layer: int,
    scale: float,
    mask: Tensor | None = None,
) -> Tensor:
    """multires.attend_multires in three launches; by a kernel the result lies as [B, L, H, d]."""
    if not attends_multires(q, k, v, tiles, mask):
        return multires.attend_multires(q, k, v, tiles, drawn, counts, layer, scale, mask)
    if not is_compiling():
        return operator("multires")(q, k, v, tiles, drawn, counts, layer, scale, mask)
    cut = (tiles.rows, drawn.table, tiles.image, tiles.size, tiles.queries, drawn.half.shape[1])
    return operator("multires")(q, k, v, mask, *cut, *counts, layer, scale)


def choose_multires(q: Tensor, k: Tensor, tiles: Tiles, counts: Counts, scale: float) -> Tensor:
    """multires.choose_lists in two launches; never to be traced."""
    choose = operator("choose_multires") if attends_multires(q, k, k, tiles) else multires.choose_lists
    return choose(q, k, tiles, counts, scale)


def _fits(q: Tensor, k: Tensor, v: Tensor) -> bool:
    """Whether the kernels that attend take heads q, k, v of such channels and so many tokens."""
    return attends(q.shape[-1], q.dtype) and q.dtype == k.dtype == v.dtype and _reaches(k, v)


def _reaches(*heads: Tensor) -> bool:
    """Whether a GPU's grid has room for a program a head, and 32 bits for the places of a head's tokens."""
    batch, count = heads[0].shape[:2]
    return batch * count <= _MOST_PROGRAMS and all(x.shape[2] * x.stride(2) < _FARTHEST for x in heads)


def _runs(name: str, *tensors: Tensor) -> bool:
    """Whether a kernel may be used and has not failed here. Where it failed, another way is faster than plain torch."""
    return serves(*tensors) and (is_compiling() or load().runs(name, tensors[0].device))


def _widens(heads: tuple[Tensor, ...], bias: Tensor | None) -> bool:
    dtype, given = heads[0].dtype, heads if bias is None else (*heads, bias)
    # Compiled, torch fuses it.
    if is_compiling() or dtype not in DTYPES or not all(x.numel() and x.dtype == dtype for x in heads):
        return False
    return serves(*given)
