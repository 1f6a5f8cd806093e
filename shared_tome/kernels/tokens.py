"""The front door for tokens: draws, splits, matches, means and gathers, by a kernel where one serves, else by the
specification in core/."""

from __future__ import annotations

import torch
from torch import Tensor

from ..config import ToMeConfig
from ..core import groups as grouping
from ..core import matching, sampling
from ..core.curve import is_compiling
from ..core.grid import Grid, split_frames
from ..core.noise import key
from ..core.partition import cells_of, partition
from .names import DTYPES, HALF, SELECTED
from .switch import operator, serves

# Cells in a row of the grid that one program of `split` takes.
_WIDEST = 4096
# Bytes of a copy up to which a step is bound by its launches.
_WAITS_FOR_CPU = 2**22
# What a mean's kernel wants of a plan's groups. Its order changes from run to run; no result depends on it.
Chain = tuple[Tensor, Tensor]


def draw(order: Tensor, kept: int, seed: Tensor, step: int | Tensor, layer: int, count: int) -> Tensor:
    """sampling.draw, equal bit for bit, in one launch.

    order: [N]; seed: [] or [b], int64; step: number or 0-d -> the choices [count, b, M] of the layers `layer` to
    `layer + count - 1`.
    """
    at = _step(step, seed.device)
    if at is None or not serves(seed, order):
        return sampling.draw(order, kept, seed, step, layer, count)
    return operator("draw")(order, seed, *at, kept, layer, count)


def can_split(grid: Grid, config: ToMeConfig, seed: Tensor, step: int | Tensor) -> bool:
    """Whether `split` takes one launch for many layers, so that splitting ahead gains something."""
    if config.partition not in ("random_2d", "fixed_2d") or grid[-1] // cells_of(grid, config.stride)[3] > _WIDEST:
        return False
    return _step(step, seed.device) is not None and serves(seed)


def split(
    grid: Grid, config: ToMeConfig, seed: Tensor, step: int | Tensor, layer: int, count: int
) -> list[tuple[Tensor, Tensor]]:
    """partition.partition with the key of match_tokens, equal bit for bit: the (src [b, N - D], dst [b, D]) of the
    layers `layer` to `layer + count - 1`. seed: [] or [b], int64; step: number or 0-d."""
    if not can_split(grid, config, seed, step):
        return [partition(grid, config, key(seed, step, place, 1)) for place in range(layer, layer + count)]
    random, cell = config.partition == "random_2d", cells_of(grid, config.stride)[2:]
    given = (seed, *_step(step, seed.device), layer, *split_frames(grid), *cell, random, count if random else 1)
    parts = list(zip(*(x.unbind() for x in operator("split")(*given)), strict=True))
    return parts if random else parts * count


def match(
    metric: Tensor, src: Tensor, dst: Tensor, goes: int, class_token: bool = False, distill_token: bool = False
) -> tuple[Tensor, Tensor, Chain | None]:
    """matching.match: a plan's index [B, M] and groups [B, N], and their chain where the kernels make it by the way.

    metric: [B, N, C], src: [b, S], dst: [b, D]; protected tokens as in match_tokens. The src that stay: most similar
    first by the specification, in their own order by a kernel. Nearest tokens are equal up to rounding, and of equals
    the first is taken as a rule. In half precision three launches, for any number of tokens.
    """
    metric = metric.detach()  # nobody asks for a choice's gradient
    if metric.dtype in HALF and 0 < goes <= src.shape[1] and serves(metric, src, dst):
        index, groups, *chain = operator("match")(metric, src, dst, goes, int(class_token), int(distill_token))
        return index, groups, tuple(chain)
    # In float32 a kernel would have nothing on cuBLAS, which finds the nearest: no matrix unit has its precision.
    return *matching.match(metric, src, dst, goes, class_token, distill_token, group=_grouped), None


def _grouped(
    similarity: Tensor, target: Tensor, src: Tensor, dst: Tensor, goes: int, in_order: bool
) -> tuple[Tensor, Tensor]:
    """matching.grouped in one launch, there always in_order. Of equal similarities at the edge the first stay."""
    able = similarity.dtype in DTYPES and goes < src.shape[1] <= SELECTED
    if not able or not serves(similarity, target, src, dst):
        return matching.grouped(similarity, target, src, dst, goes, in_order)
    return operator("select")(similarity, target, src, dst, goes)


def links(index: Tensor, groups: Tensor) -> Chain | None:
    """What `mean` is to be given of a plan's index [b, M] and groups [b, N]; None: the specification needs nothing."""
    return operator("links")(index, groups, index.shape[1]) if serves(groups, index) else None


def group_sizes(groups: Tensor, kept: int, chain: Chain | None) -> Tensor:
    """The groups' sizes [b, M] float32."""
    return grouping.group_counts(groups, kept) if chain is None else chain[0][:, :kept].view(torch.float32)


def has_mean(x: Tensor, chain: Chain | None) -> bool:
    """Whether a mean of x goes through a kernel. Not in float64: its sums are finer than what the kernel adds up in."""
    return chain is not None and x.dtype in DTYPES and serves(x, chain[0])


def mean(x: Tensor, index: Tensor, groups: Tensor, sizes: Tensor, chain: Chain | None) -> tuple[Tensor, Tensor | None]:
    """The mean of each group, x [B, N, C] -> [B, M, C], bit-equal on repeat, and log(sizes) [b, M] float32 where the
    kernel gives it by the way. index: [b, M], groups: [b, N], sizes: [b, M], chain: from `match` or `links`."""
    if has_mean(x, chain):
        return operator("mean")(x, index, groups, *chain)
    return grouping.group_mean(x, groups, sizes), None


def take(x: Tensor, index: Tensor) -> Tensor:
    """groups.take: x [B, N, C] and index [b, K] -> [B, K, C] in one launch."""
    able = not is_compiling() and x.dtype in DTYPES and index.numel() > 0  # compiled, torch fuses it
    if able and (index.shape[0] > 1 or pays_to_gather(x, index)) and serves(x, index):
        return operator("gather")(x, index)
    return grouping.take(x, index)


def pays_to_gather(x: Tensor, index: Tensor) -> bool:
    """Whether the kernel is faster than index_select all told, for x [B, N, C] and index [1, K].

    Its launch takes the CPU longer (28 us against 11 on an H200's host), the copy takes the GPU less (3 us against 10
    at 1,024 of 4,096 tokens). Where little is copied the step is short and waits for the CPU; a captured graph never.
    """
    if not x.is_cuda:
        return True
    copied = x.shape[0] * index.shape[1] * x.shape[2] * x.element_size()
    return copied > _WAITS_FOR_CPU or torch.cuda.is_current_stream_capturing()


def _step(step: int | Tensor, device: torch.device) -> tuple[Tensor | None, int] | None:
    """A step as (tensor, 0) or (None, number); None where it is of another kind or elsewhere."""
    if not isinstance(step, Tensor):
        return None, step
    fits = step.numel() == 1 and step.device == device and not step.is_floating_point()
    return (step, 0) if fits else None
