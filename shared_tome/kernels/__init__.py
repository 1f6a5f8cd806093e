"""Optional Triton kernels for what merging does between the matrix products. Plain torch is the specification.

Importing this package imports no triton; the first tensor on a CUDA device does. Every function here returns None
where no kernel serves (no CUDA device, no triton, gradients asked for, TOME_KERNELS=0), and the caller goes on in
plain torch. A kernel that does not compile for a device says so once in the log and plain torch takes over for good
on that device.
Under torch.compile each is one custom operator, so it breaks no graph and no new seed or step needs another one.
"""

from __future__ import annotations

import functools
import logging
import os
import re

import torch
from torch import Tensor

from ..core.curve import is_compiling
from ..core.failures import is_out_of_memory
from ..core.grid import Grid, split_frames

log = logging.getLogger("ToMe")

# 0 turns all kernels off.
SWITCH = "TOME_KERNELS"
# One for each copy of the package in a process: hosts load it under names of their own.
NAMESPACE = re.sub(r"\W", "_", __name__)
# Triton's interpreter runs kernels on the CPU, for the tests alone; it must be asked for before triton is imported.
_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
# Cells in a row of the grid that one program of `split` takes.
_WIDEST = 4096
# Bytes of a copy up to which a step is bound by its launches.
_WAITS_FOR_CPU = 2**22
# Heads that `attend` takes; programs on a grid's second axis; offsets within a head.
_FULL_HEADS = (64, 128)
_MOST_PROGRAMS, _FARTHEST = 65535, 2**31
# Keys up to which it costs little that they do not lie together: 18.6 us against 17.3 and 3.2 for `turns` at 256 keys,
# 58 against 54 and 4.5 at 576, 145 against 130 and 6.0 at 1,024.
_LISTED = 640
# src of a row that `select` holds in one program.
SELECTED = 8192


def ready() -> bool:
    """Whether kernels can run in this process: triton is there and torch is new enough. Loads them the first time."""
    return _load() is not None


# What torch.compiler.assume_constant_result sets; calling that would import all of dynamo along with the core.
ready._dynamo_marked_constant = True


@functools.lru_cache(maxsize=1)
def _load():
    if os.environ.get(SWITCH, "1") == "0" or not hasattr(torch.library, "custom_op"):  # torch 2.4
        return None
    try:
        from .impl import ops
    except Exception as error:  # a broken triton raises what it likes
        if is_out_of_memory(error):
            raise
        log.info("no Triton kernels (%s: %s); plain torch does the work", type(error).__name__, error)
        return None
    return ops


def version() -> str | None:
    """Triton's version where kernels can run in this process, else None."""
    return None if _load() is None else _load().VERSION


def serves(*tensors: Tensor) -> bool:
    """Whether kernels may be used on these tensors."""
    first = tensors[0]
    if not (first.is_cuda or (_INTERPRETED and first.device.type == "cpu")):
        return False
    if torch.is_grad_enabled() and any(x.requires_grad for x in tensors):
        return False
    return all(x.device == first.device for x in tensors) and ready()


def _op(name: str):
    """The operator: direct where nothing is traced, since torch's dispatcher costs more than a launch."""
    return getattr(getattr(torch.ops, NAMESPACE), name) if is_compiling() else _load().DIRECT[name]


def _step(step: int | Tensor, device: torch.device) -> tuple[Tensor | None, int] | None:
    """A step as (tensor, 0) or (None, number); None where it is of another kind or elsewhere."""
    if not isinstance(step, Tensor):
        return None, step
    fits = step.numel() == 1 and step.device == device and not step.is_floating_point()
    return (step, 0) if fits else None


def draw(order: Tensor, kept: int, seed: Tensor, step: int | Tensor, layer: int, count: int) -> Tensor | None:
    """sampling.walk_table and walk_rows, equal bit for bit, in one launch: the choices [count, b, M] of the layers
    `layer` to `layer + count - 1`. order: [N]; seed: [] or [b], int64; step: number or 0-d."""
    at = _step(step, seed.device)
    if at is None or not serves(seed, order):
        return None
    return _op("draw")(order, seed, *at, kept, layer, count)


def split(
    grid: Grid, cell: tuple[int, int], random: bool, seed: Tensor, step: int | Tensor, layer: int, count: int
) -> tuple[Tensor, Tensor] | None:
    """partition.partition of a grid by cells (height, width) with the key of match_tokens, equal bit for bit, in one
    launch: src [count, b, N - D] and dst [count, b, D] of the layers `layer` to `layer + count - 1`. random: a random
    token of each cell, otherwise the top-left one."""
    at = _step(step, seed.device)
    if at is None or grid[-1] // cell[1] > _WIDEST or not serves(seed):
        return None
    return _op("split")(seed, *at, layer, *split_frames(grid), *cell, random, count)


def match(
    metric: Tensor, src: Tensor, dst: Tensor, goes: int, class_token: bool = False, distill_token: bool = False
) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor]] | None:
    """What nearest, select and links below do one after the other, in three launches and for any number of tokens:
    a plan's index [B, M] and groups [B, N], the src that stay in their own order, and its chain (see links).

    metric: [B, N, C] in half precision, src: [b, S], dst: [b, D]. Protected tokens as in match_tokens.
    """
    metric = metric.detach()  # nobody asks for a choice's gradient
    known = metric.dtype in (torch.float16, torch.bfloat16) and 0 < goes <= src.shape[1]
    if not known or not serves(metric, src, dst):
        return None
    index, groups, *chain = _op("match")(metric, src, dst, goes, int(class_token), int(distill_token))
    return index, groups, tuple(chain)


def nearest(metric: Tensor, src: Tensor, dst: Tensor, distill_token: bool = False) -> tuple[Tensor, Tensor] | None:
    """matching.nearest in two launches that write no score: similarity [B, S] in metric's dtype and target [B, S].

    metric: [B, N, C], src: [b, S], dst: [b, D]. Equal up to rounding; of equals the first as a rule.
    """
    metric = metric.detach()
    # On a GPU float32 stays with cuBLAS: without matrix units the kernel has nothing on it, and nobody has timed it.
    known = metric.dtype in _DTYPES and not (metric.is_cuda and metric.dtype == torch.float32)
    if not known or src.shape[1] == 0 or not serves(metric, src, dst):
        return None
    return _op("nearest")(metric, src, dst, int(distill_token))


def select(similarity: Tensor, target: Tensor, src: Tensor, dst: Tensor, goes: int) -> tuple[Tensor, Tensor] | None:
    """matching._grouped with in_order, in one launch: index [B, M] and groups [B, N].

    similarity, target: [B, S], src: [b, S], dst: [b, D]. Of equal similarities at the edge the first stay.
    """
    similarity = similarity.detach()
    able = similarity.dtype in _DTYPES and goes < src.shape[1] <= SELECTED
    if not able or not serves(similarity, target, src, dst):
        return None
    return _op("select")(similarity, target, src, dst, goes)


def links(index: Tensor, groups: Tensor) -> tuple[Tensor, Tensor] | None:
    """What `mean` needs of a plan, and its sizes: see sizes_of. index: [b, M], groups: [b, N].

    Its order changes from run to run; no result depends on it.
    """
    return _op("links")(index, groups, index.shape[1]) if serves(groups, index) else None


def sizes_of(chain: tuple[Tensor, Tensor], kept: int) -> Tensor:
    """The groups' sizes [b, M] float32, from `links` or `match`."""
    return chain[0][:, :kept].view(torch.float32)


def means(x: Tensor) -> bool:
    """Whether `mean` takes x. Not float64: its sums are finer than what the kernel adds up in."""
    return x.dtype in _DTYPES and serves(x)


def mean(x: Tensor, index: Tensor, groups: Tensor, chain: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor] | None:
    """The mean of each group, x [B, N, C] -> [B, M, C], bit-equal on repeat, and log(sizes) [b, M] float32, in one
    launch; chain: from `match` or `links`."""
    return _op("mean")(x, index, groups, *chain) if means(x) and serves(groups) else None


def pays_to_gather(x: Tensor, index: Tensor) -> bool:
    """Whether `gather` is faster than index_select all told, for x [B, N, C] and index [1, K].

    Its launch takes the CPU longer (28 us against 11 on an H200's host), the copy takes the GPU less (3 us against 10
    at 1,024 of 4,096 tokens). Where little is copied the step is short and waits for the CPU; a captured graph never.
    """
    if is_compiling() or not x.is_cuda:  # gather itself knows what to do there
        return True
    copied = x.shape[0] * index.shape[1] * x.shape[2] * x.element_size()
    return copied > _WAITS_FOR_CPU or torch.cuda.is_current_stream_capturing()


def gather(x: Tensor, index: Tensor) -> Tensor | None:
    """plan.take: x [B, N, C] and index [b, K] -> [B, K, C] in one launch. Not under torch.compile, which fuses it."""
    if is_compiling() or x.dtype not in _DTYPES or index.numel() == 0 or not serves(x, index):
        return None
    return _op("gather")(x, index)


def widen(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, room: int) -> tuple[Tensor, Tensor, Tensor] | None:
    """attention.extend_heads in one launch, for q, k and v of four dimensions. Not under torch.compile, which fuses it.

    q: [B, ., ., d], k and v: [B, ., ., d], bias: broadcastable to k's first three; room: how many channels are added.
    """
    fits = q.dim() == k.dim() == 4 and k.shape == v.shape and q.shape[0] == k.shape[0] and q.shape[3] == k.shape[3]
    return _op("widen")(q, k, v, bias, room) if fits and _widens((q, k, v), bias) else None


def widen_one(x: Tensor, bias: Tensor | None, room: int, kind: int) -> Tensor | None:
    """The same for one of them. kind: 0 the query, 1 the key with its bias, 2 the value."""
    return _op("widen_one")(x, bias, room, kind) if x.dim() == 4 and _widens((x,), bias) else None


def attends(d: int, dtype: torch.dtype) -> bool:
    """Whether `attend` is meant for heads of d channels: those that fill a size which the attention kernels have, so
    that further channels would double them."""
    return d in _FULL_HEADS and dtype in (torch.float16, torch.bfloat16)


def attend(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, scale: float) -> Tensor | None:
    """attention.attend with a bias, in one launch and without further channels.

    q: [B, H, N, d], k and v: [B, H, M, d], bias: [b, M], scale: of the logits. The result lies as [B, N, H, d].
    """
    able = k.shape == v.shape and q.shape[:2] == k.shape[:2] and k.shape[2] > 0
    return _op("attend")(q, k, v, bias, scale) if able and _fits(q, k, v) and serves(q, k, v, bias) else None


def attends_drawn(q: Tensor, k: Tensor, v: Tensor, scale: float) -> bool:
    """Whether `attend_drawn` takes q, k, v [B, H, L, d] and logits of this scale."""
    able = q.shape == k.shape == v.shape and q.numel() > 0 and scale > 0.0
    # Where it failed once, the way without it is faster than plain torch.
    return able and _fits(q, k, v) and serves(q, k, v) and (is_compiling() or _load().runs("attend_drawn", q.device))


def attend_drawn(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    drawn: tuple[Tensor, Tensor] | None,
    turns: Tensor,
    runs: Tensor,
    start: int,
    scale: float,
    weight: float,
) -> Tensor:
    """own._attend_drawn in one launch, where attends_drawn allows it. The result lies as [B, L, H, d].

    drawn: `turns` of the image's keys and values, None where the kernel is to look them up itself: see pays_to_list.
    """
    return _op("attend_drawn")(q, k, v, *(drawn or (None, None)), turns, runs, start, scale, weight)


def pays_to_list(kept: int) -> bool:
    """Whether attend_drawn is faster, all told, if it looks the drawn keys up in their list, `kept` of them.

    It takes the processor half (36 us against as much and 46 for `turns` before it, on an H100's host), but keys that
    do not lie together take the GPU longer, up to a fifth of the attention.
    """
    return kept <= _LISTED


def turns(k: Tensor, v: Tensor, index: Tensor) -> tuple[Tensor, Tensor] | None:
    """own.take_turns: k and v [B, H, L, d] and index [T, b, K] -> [B, H, K, d] twice in one launch. Not under
    torch.compile."""
    able = k.shape == v.shape and k.dtype == v.dtype and k.dtype in _DTYPES
    if is_compiling() or not able or index.numel() == 0 or not serves(k, v, index):
        return None
    return _op("turns")(k, v, index)


def own(
    q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, turns: Tensor, runs: Tensor, scale: float, weight: float
) -> Tensor | None:
    """own.keep_own in one launch. Not under torch.compile, which fuses it."""
    able = q.shape == k.shape == v.shape == out.shape and all(x.dtype == q.dtype for x in (k, v, out))
    if is_compiling() or not able or q.dtype not in _DTYPES or q.numel() == 0 or not serves(q, k, v, out, turns, runs):
        return None
    return _op("own")(q, k, v, out, lse, turns, runs, scale, weight)


def _fits(q: Tensor, k: Tensor, v: Tensor) -> bool:
    """Whether the kernels that attend take heads q, k, v of such channels and so many tokens."""
    if not attends(q.shape[-1], q.dtype) or not q.dtype == k.dtype == v.dtype:
        return False
    near = all(x.shape[2] * x.stride(2) < _FARTHEST for x in (k, v))
    return near and q.shape[0] * q.shape[1] <= _MOST_PROGRAMS


def _widens(heads: tuple[Tensor, ...], bias: Tensor | None) -> bool:
    dtype, given = heads[0].dtype, heads if bias is None else (*heads, bias)
    if is_compiling() or dtype not in _DTYPES or not all(x.numel() and x.dtype == dtype for x in heads):
        return False
    return serves(*given)
