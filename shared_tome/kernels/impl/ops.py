"""The kernels as the front door calls them: each with plain torch to fall back on, and as an operator of torch where
code that torch traces meets it. What torch fuses itself while it traces (gathers, further channels, self tokens behind
an attention) needs no operator."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ...config import ToMeConfig
from ...core import channels, groups, matching, multires, sampling, self_token
from ...core.failures import is_out_of_memory
from ...core.noise import key
from ...core.partition import partition
from ..names import NAMESPACE, SELECTED, log
from .attend import launch_attend
from .attend_drawn import launch_attend_drawn
from .compiler import VERSION as VERSION
from .compiler import heads_like, together
from .draw import launch_draw
from .gather import launch_gather
from .match import launch_match
from .mean import chains_like, launch_links, launch_mean
from .multires import launch_multires
from .multires_choose import launch_choose
from .nearest import launch_nearest
from .select import empty_plan, launch_select
from .self_token import launch_self_token, launch_take_by_head
from .split import launch_split
from .widen import launch_widen, launch_widen_one

# Called where nothing is traced; each runs what stands in LAUNCH, or plain torch.
DIRECT: dict[str, Callable[..., Any]] = {}
LAUNCH: dict[str, Callable[..., Any]] = {}
# (kernel, device) of those that failed: a GPU with less shared memory than others says nothing about these.
_broken: set[tuple[str, torch.device]] = set()


def runs(name: str, device: torch.device) -> bool:
    """Whether the kernel has not failed on this device in this process."""
    return (name, device) not in _broken


def _kernel(schema: str, launch: Callable, plain: Callable, fake: Callable | None = None) -> None:
    """Define one: `launch` runs it, `plain` is the specification. Both take the same, a tensor first.

    schema: begins with its name. fake: gives shapes alone, for an operator of that schema; None: traced code never
    meets the kernel.
    """
    name = schema.partition("(")[0]

    def run(first: Tensor, *given):
        if runs(name, first.device):
            try:
                with _on_device_of(first):
                    return LAUNCH[name](first, *given)
            except Exception as error:  # what a compiler raises is not for us to list
                if is_out_of_memory(error):
                    raise
                _broken.add((name, first.device))
                reason = f"{type(error).__name__}: {error}".strip().partition("\n")[0]
                log.warning(
                    "the %s kernel does not run on %s, plain torch takes over there (%s)", name, first.device, reason
                )
        return plain(first, *given)

    DIRECT[name], LAUNCH[name] = run, launch
    if fake is not None:
        _operator(schema, run, fake)


def _operator(schema: str, run: Callable, fake: Callable) -> None:
    name, _, rest = schema.partition("(")
    torch.library.custom_op(f"{NAMESPACE}::{name}", run, mutates_args=(), schema=f"({rest}").register_fake(fake)


def _on_device_of(x: Tensor):
    """Triton launches on the current device."""
    elsewhere = x.is_cuda and x.device.index != torch.cuda.current_device()
    return torch.cuda.device(x.device) if elsewhere else contextlib.nullcontext()


def _tokens_first(plain: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """An attention whose outcome [B, H, N, d] lies as [B, N, H, d], as the kernels leave it."""
    return lambda *given: plain(*given).transpose(1, 2).contiguous().transpose(1, 2)


def _plain_draw(order, seed, step, number, kept, layer, count):
    return sampling.draw(order, kept, seed, number if step is None else step, layer, count)


def _plain_split(seed, step, number, layer, frames, height, width, cell_height, cell_width, random, count):
    config = ToMeConfig(
        method="merge", stride=(cell_width, cell_height), partition="random_2d" if random else "fixed_2d"
    )
    grid, at = (frames, height, width), number if step is None else step
    parts = [partition(grid, config, key(seed, at, place, 1)) for place in range(layer, layer + count)]
    src, dst = (torch.stack(lists).expand(count, seed.numel(), -1).contiguous() for lists in zip(*parts, strict=True))
    return src, dst


_plain_select = partial(matching.grouped, in_order=True)


def _select(similarity, target, src, dst, goes, in_order):
    """In order in any case, as `match` has it."""
    select = DIRECT["select"] if goes < src.shape[1] <= SELECTED else _plain_select
    return select(similarity, target, src, dst, goes)


def _plain_match(metric, src, dst, goes, alone, first):
    """The kernels that match joins; each that does not run either falls back by itself."""
    index, grouped = matching.match(metric, src, dst, goes, alone, first, DIRECT["nearest"], _select)
    return index, grouped, *DIRECT["links"](index, grouped, dst.shape[1])


def _plain_links(index, grouped, taking):
    _broken.add(("mean", index.device))  # without chains there is no mean by them
    chains, following = _fake_links(index, grouped, taking)
    chains[:, : index.shape[1]] = groups.group_counts(grouped, index.shape[1]).view(torch.int32)
    return chains, following


def _plain_mean(x, index, grouped, chains, following):
    sizes = chains[:, : index.shape[1]].view(torch.float32)
    return groups.group_mean(x, grouped, sizes), sizes.log()


def _plain_attend_drawn(q, k, v, drawn_k, drawn_v, *given):
    return self_token.attend_drawn(q, k, v, *given)


def _fake_draw(order, seed, step, number, kept, layer, count):
    return order.new_empty((count, seed.numel(), kept))


def _fake_split(seed, step, number, layer, frames, height, width, cell_height, cell_width, random, count):
    kept = frames * (height // cell_height) * (width // cell_width)
    rows = seed.numel()
    return seed.new_empty((count, rows, frames * height * width - kept)), seed.new_empty((count, rows, kept))


def _fake_select(similarity, target, src, dst, goes):
    return empty_plan(similarity.shape[0], src, dst, goes)


def _fake_match(metric, src, dst, goes, alone, first):
    index, groups = empty_plan(metric.shape[0], src, dst, goes)
    return index, groups, *_fake_links(index, groups, dst.shape[1])


def _fake_links(index, grouped, taking):
    chains = index.new_empty(chains_like(*index.shape, taking), dtype=torch.int32)
    return chains, index.new_empty(grouped.shape, dtype=torch.int32)


def _fake_mean(x, index, grouped, chains, following):
    out = x.new_empty((x.shape[0], index.shape[1], x.shape[2]))
    return out, index.new_empty(index.shape, dtype=torch.float32)


def _fake_attend(q, *given):
    return heads_like(q)


def _multires(q, k, v, mask, rows, table, image, size, queries, draws, *counts_layer_scale):
    """By single tensors and numbers, which an operator's arguments are."""
    *counts, layer, scale = counts_layer_scale
    tiles = multires.Tiles(rows, image, size, queries)
    drawn = multires.drawn_in(table, tiles, draws)
    return DIRECT["multires"](q, k, v, tiles, drawn, multires.Counts(*counts), layer, scale, mask)


_kernel(
    "draw(Tensor order, Tensor seed, Tensor? step, SymInt number, SymInt kept, SymInt layer, SymInt count) -> Tensor",
    launch_draw, _plain_draw, _fake_draw,
)  # fmt: skip
_kernel(
    "split(Tensor seed, Tensor? step, SymInt number, SymInt layer, SymInt frames, SymInt height, SymInt width, "
    "SymInt cell_height, SymInt cell_width, bool random, SymInt count) -> (Tensor, Tensor)",
    launch_split, _plain_split, _fake_split,
)  # fmt: skip
_kernel("nearest", launch_nearest, matching.nearest)
_kernel(
    "select(Tensor similarity, Tensor target, Tensor src, Tensor dst, SymInt goes) -> (Tensor, Tensor)",
    launch_select, _plain_select, _fake_select,
)  # fmt: skip
_kernel(
    "match(Tensor metric, Tensor src, Tensor dst, SymInt goes, SymInt alone, SymInt first) -> "
    "(Tensor, Tensor, Tensor, Tensor)",
    launch_match, _plain_match, _fake_match,
)  # fmt: skip
_kernel(
    "links(Tensor index, Tensor groups, int taking) -> (Tensor, Tensor)",
    launch_links, _plain_links, _fake_links,
)  # fmt: skip
_kernel(
    "mean(Tensor x, Tensor index, Tensor groups, Tensor chains, Tensor following) -> (Tensor, Tensor)",
    launch_mean, _plain_mean, _fake_mean,
)  # fmt: skip
_kernel("gather", launch_gather, groups.take)
_kernel("widen", launch_widen, channels.extend_heads)
_kernel("widen_one", launch_widen_one, channels.extend_one)
_kernel("take_by_head", launch_take_by_head, self_token.take_by_head)
_kernel("self_token", launch_self_token, self_token.add_self_token)
_kernel(
    "attend(Tensor q, Tensor k, Tensor v, Tensor bias, float scale) -> Tensor",
    launch_attend, _tokens_first(channels.attend_wider), _fake_attend,
)  # fmt: skip
_kernel(
    "attend_drawn(Tensor q, Tensor k, Tensor v, Tensor? drawn_k, Tensor? drawn_v, Tensor head_draws, Tensor runs, "
    "SymInt start, float scale, float weight) -> Tensor",
    launch_attend_drawn, _tokens_first(_plain_attend_drawn), _fake_attend,
)  # fmt: skip
_kernel("multires", launch_multires, _tokens_first(multires.attend_multires))
_operator(
    "multires(Tensor q, Tensor k, Tensor v, Tensor? mask, Tensor rows, Tensor table, SymInt image, int size, "
    "int queries, SymInt draws, SymInt whole, SymInt half, SymInt beside_whole, SymInt beside_half, SymInt layer, "
    "float scale) -> Tensor",
    _multires, _fake_attend,
)  # fmt: skip
_kernel("choose_multires", lambda q, k, *given: launch_choose(*together(q, k), *given), multires.choose_lists)
