"""The kernels as operators of torch: each with a fake for tracing and with plain torch to fall back on."""

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
from .by_head import launch_take_by_head
from .compiler import VERSION as VERSION
from .draw import launch_draw
from .gather import launch_gather
from .match import launch_match
from .mean import chains_like, launch_links, launch_mean
from .multires import launch_multires
from .multires_choose import launch_choose
from .nearest import launch_nearest
from .select import launch_select
from .self_token import launch_self_token
from .split import launch_split
from .widen import KEY, QUERY, launch_widen, launch_widen_one

# Called where nothing is traced; each runs what stands in LAUNCH, or plain torch.
DIRECT: dict[str, Callable[..., Any]] = {}
LAUNCH: dict[str, Callable[..., Any]] = {}
# (kernel, device) of those that failed: a GPU with less shared memory than others says nothing about these.
_broken: set[tuple[str, torch.device]] = set()


def _operator(schema: str, launch: Callable, plain: Callable, fake: Callable, name: str = "") -> Callable:
    """Define one: `launch` runs the kernel, `plain` is the specification, `fake`, _fake_NAME as a rule, gives shapes
    alone."""
    name = name or fake.__name__.removeprefix("_fake_")

    def run(*given):
        first = next(x for x in given if isinstance(x, Tensor))
        if runs(name, first.device):
            try:
                with _on_device_of(first):
                    return LAUNCH[name](*given)
            except Exception as error:  # what a compiler raises is not for us to list
                if is_out_of_memory(error):
                    raise
                _broken.add((name, first.device))
                reason = f"{type(error).__name__}: {error}".strip().partition("\n")[0]
                log.warning(
                    "the %s kernel does not run on %s, plain torch takes over there (%s)", name, first.device, reason
                )
        return plain(*given)

    DIRECT[name], LAUNCH[name] = run, launch
    torch.library.custom_op(f"{NAMESPACE}::{name}", run, mutates_args=(), schema=schema).register_fake(fake)
    return fake


def runs(name: str, device: torch.device) -> bool:
    """Whether the kernel has not failed on this device in this process."""
    return (name, device) not in _broken


def _on_device_of(x: Tensor):
    """Triton launches on the current device."""
    elsewhere = x.is_cuda and x.device.index != torch.cuda.current_device()
    return torch.cuda.device(x.device) if elsewhere else contextlib.nullcontext()


def _plain_draw(order, seed, step, number, kept, layer, count):
    return sampling.draw(order, kept, seed, number if step is None else step, layer, count)


@partial(
    _operator,
    "(Tensor order, Tensor seed, Tensor? step, SymInt number, SymInt kept, SymInt layer, SymInt count) -> Tensor",
    launch_draw,
    _plain_draw,
)
def _fake_draw(order, seed, step, number, kept, layer, count):
    return order.new_empty((count, seed.numel(), kept))


def _plain_split(seed, step, number, layer, frames, height, width, cell_height, cell_width, random, count):
    config = ToMeConfig(
        method="merge", stride=(cell_width, cell_height), partition="random_2d" if random else "fixed_2d"
    )
    grid, at = (frames, height, width), number if step is None else step
    parts = [partition(grid, config, key(seed, at, place, 1)) for place in range(layer, layer + count)]
    src, dst = (torch.stack(lists).expand(count, seed.numel(), -1).contiguous() for lists in zip(*parts, strict=True))
    return src, dst


@partial(
    _operator,
    "(Tensor seed, Tensor? step, SymInt number, SymInt layer, SymInt frames, SymInt height, SymInt width, "
    "SymInt cell_height, SymInt cell_width, bool random, SymInt count) -> (Tensor, Tensor)",
    launch_split,
    _plain_split,
)
def _fake_split(seed, step, number, layer, frames, height, width, cell_height, cell_width, random, count):
    kept = frames * (height // cell_height) * (width // cell_width)
    rows = seed.numel()
    return seed.new_empty((count, rows, frames * height * width - kept)), seed.new_empty((count, rows, kept))


def _plain_nearest(metric, src, dst, first):
    return matching.nearest(metric, src, dst, bool(first))


@partial(
    _operator,
    "(Tensor metric, Tensor src, Tensor dst, SymInt first) -> (Tensor, Tensor)",
    launch_nearest,
    _plain_nearest,
)
def _fake_nearest(metric, src, dst, first):
    shape = (metric.shape[0], src.shape[1])
    return metric.new_empty(shape), src.new_empty(shape)


def _plain_select(similarity, target, src, dst, goes):
    return matching.grouped(similarity, target, src, dst, goes, True)


@partial(
    _operator,
    "(Tensor similarity, Tensor target, Tensor src, Tensor dst, SymInt goes) -> (Tensor, Tensor)",
    launch_select,
    _plain_select,
)
def _fake_select(similarity, target, src, dst, goes):
    rows, tokens = similarity.shape[0], src.shape[1] + dst.shape[1]
    return src.new_empty((rows, tokens - goes)), src.new_empty((rows, tokens))


def _plain_match(metric, src, dst, goes, alone, first):
    """The kernels that match joins; each that does not run either falls back by itself."""
    similarity, target = DIRECT["nearest"](metric, src, dst, first)
    if alone:
        similarity = matching.keep_first(similarity)
    select = DIRECT["select"] if goes < src.shape[1] <= SELECTED else _plain_select
    index, grouped = select(similarity, target, src, dst, goes)
    if first:
        index, grouped = matching.distill_second(index, grouped, src.shape[1] - goes)
    return index, grouped, *DIRECT["links"](index, grouped, dst.shape[1])


@partial(
    _operator,
    "(Tensor metric, Tensor src, Tensor dst, SymInt goes, SymInt alone, SymInt first) -> (Tensor, Tensor, Tensor, "
    "Tensor)",
    launch_match,
    _plain_match,
)
def _fake_match(metric, src, dst, goes, alone, first):
    rows, tokens = metric.shape[0], src.shape[1] + dst.shape[1]
    index, groups = src.new_empty((rows, tokens - goes)), src.new_empty((rows, tokens))
    return index, groups, *_fake_links(index, groups, dst.shape[1])


def _plain_links(index, grouped, taking):
    _broken.add(("mean", index.device))  # without chains there is no mean by them
    chains, following = _fake_links(index, grouped, taking)
    chains[:, : index.shape[1]] = groups.group_counts(grouped, index.shape[1]).view(torch.int32)
    return chains, following


@partial(_operator, "(Tensor index, Tensor groups, int taking) -> (Tensor, Tensor)", launch_links, _plain_links)
def _fake_links(index, grouped, taking):
    chains = index.new_empty(chains_like(*index.shape, taking), dtype=torch.int32)
    return chains, index.new_empty(grouped.shape, dtype=torch.int32)


def _plain_mean(x, index, grouped, chains, following):
    sizes = chains[:, : index.shape[1]].view(torch.float32)
    return groups.group_mean(x, grouped, sizes), sizes.log()


@partial(
    _operator,
    "(Tensor x, Tensor index, Tensor groups, Tensor chains, Tensor following) -> (Tensor, Tensor)",
    launch_mean,
    _plain_mean,
)
def _fake_mean(x, index, grouped, chains, following):
    out = x.new_empty((x.shape[0], index.shape[1], x.shape[2]))
    return out, index.new_empty(index.shape, dtype=torch.float32)


def _plain_gather(x, index):
    return x.gather(1, groups.spread_rows(index, x.shape[0])[..., None].expand(-1, -1, x.shape[2]))


@partial(_operator, "(Tensor x, Tensor index) -> Tensor", launch_gather, _plain_gather)
def _fake_gather(x, index):
    return x.new_empty((x.shape[0], index.shape[1], x.shape[2]))


def _plain_widen(q, k, v, bias, room):
    return channels.extend_heads(q, k, v, bias)


def _plain_widen_one(x, bias, room, kind):
    if kind == KEY:
        return channels.extend_key(x, bias)
    return channels.extend_query(x) if kind == QUERY else channels.extend_value(x)


@partial(
    _operator,
    "(Tensor q, Tensor k, Tensor v, Tensor bias, SymInt room) -> (Tensor, Tensor, Tensor)",
    launch_widen,
    _plain_widen,
)
def _fake_widen(q, k, v, bias, room):
    return tuple(_fake_widen_one(x, bias, room, 0) for x in (q, k, v))


@partial(_operator, "(Tensor x, Tensor? bias, SymInt room, SymInt kind) -> Tensor", launch_widen_one, _plain_widen_one)
def _fake_widen_one(x, bias, room, kind):
    return x.new_empty((*x.shape[:-1], x.shape[-1] + room))


def _plain_attend(q, k, v, bias, scale):
    return _tokens_first(channels.attend_wider(q, k, v, bias, scale))


def _tokens_first(x):
    """x [B, H, N, d] that lies as [B, N, H, d], as the kernels that attend leave it."""
    return x.transpose(1, 2).contiguous().transpose(1, 2)


@partial(_operator, "(Tensor q, Tensor k, Tensor v, Tensor bias, float scale) -> Tensor", launch_attend, _plain_attend)
def _fake_attend(q, *given):
    return q.new_empty(q.transpose(1, 2).shape).transpose(1, 2)


def _both(drawn_k, drawn_v):
    """As attend_drawn takes them: an operator's arguments are single tensors."""
    return None if drawn_k is None else (drawn_k, drawn_v)


def _launch_attend_drawn(q, k, v, drawn_k, drawn_v, *given):
    return launch_attend_drawn(q, k, v, _both(drawn_k, drawn_v), *given)


def _plain_attend_drawn(q, k, v, drawn_k, drawn_v, *given):
    return _tokens_first(self_token.attend_drawn(q, k, v, _both(drawn_k, drawn_v), *given))


def _cut(rows, table, image, size, queries, draws, *counts):
    """Tiles, drawn tokens and counts: an operator's arguments are single tensors and numbers."""
    tiles = multires.Tiles(rows, image, size, queries)
    return tiles, multires.drawn_in(table, tiles, draws), multires.Counts(*counts)


def _launch_multires(q, k, v, mask, *given):
    return launch_multires(q, k, v, *_cut(*given[:-2]), *given[-2:], mask=mask)


def choose_multires(q, k, *given):
    """multires_choose.launch_choose, for who wants to see the choice: nothing that is traced."""
    with _on_device_of(q):
        return launch_choose(q, k, *given)


def _plain_multires(q, k, v, mask, *given):
    return _tokens_first(multires.attend_multires(q, k, v, *_cut(*given[:-2]), *given[-2:], mask))


@partial(
    _operator, "(Tensor k, Tensor v, Tensor index) -> (Tensor, Tensor)", launch_take_by_head, self_token.take_by_head
)
def _fake_take_by_head(k, v, index):
    return tuple(x.new_empty((*x.shape[:2], index.shape[2], x.shape[3])) for x in (k, v))


@partial(
    _operator,
    "(Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, Tensor head_draws, Tensor runs, float scale, "
    "float weight) -> Tensor",
    launch_self_token,
    self_token.add_self_token,
)
def _fake_self_token(q, k, v, out, *given):
    return _fake_attend(out)


_operator(
    "(Tensor q, Tensor k, Tensor v, Tensor? drawn_k, Tensor? drawn_v, Tensor head_draws, Tensor runs, SymInt start, "
    "float scale, float weight) -> Tensor",
    _launch_attend_drawn,
    _plain_attend_drawn,
    _fake_attend,
    "attend_drawn",
)
_operator(
    "(Tensor q, Tensor k, Tensor v, Tensor? mask, Tensor rows, Tensor table, SymInt image, int size, int queries, "
    "SymInt draws, SymInt whole, SymInt half, SymInt beside_whole, SymInt beside_half, SymInt layer, "
    "float scale) -> Tensor",
    _launch_multires,
    _plain_multires,
    _fake_attend,
    "multires",
)
