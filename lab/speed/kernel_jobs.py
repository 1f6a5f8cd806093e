"""What kernels.py runs on one shape: each kernel, the plain torch beside it, and whether the outcome is right."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor

from shared_tome import ModelCall, ToMeConfig, kernels
from shared_tome.attention.bias import bias as attention
from shared_tome.attention.bias import self_token as own
from shared_tome.core import matching
from shared_tome.core.curve import curve_order
from shared_tome.core.groups import group_counts, group_sum, take
from shared_tome.core.noise import key
from shared_tome.core.partition import partition
from shared_tome.core.sampling import walk_rows, walk_table
from shared_tome.merging import call as call_module

from .growth import kernels_off
from .kernel_case import Case, Reached, check_links, check_mean, check_select

LAYERS = 16


class Work(NamedTuple):
    """A kernel's call; plain: the same by plain torch, where that is timed beside it. check: says what is wrong."""

    kernel: str
    variant: str
    call: Callable[[], Any]
    plain: Callable[[], Any] | None = None
    check: Callable[[Any], str] | None = None


def jobs(case: Case) -> Iterator[Work]:
    """The kernels of one shape."""
    from shared_tome.kernels.impl import gather, widen

    x, heads = case.x, 8 if case.channels == 320 else case.channels // 64
    yield Work("copy", "", x.clone)
    if case.channels in (320, 1280):
        yield from choosing_jobs(case)
    yield from matching_jobs(case)
    y = take(x, case.index)
    yield _alike("gather", "", lambda: gather.launch_gather(y, case.groups), lambda: take(y, case.groups))
    yield from own_jobs(case, heads)
    if case.channels // heads == 64:
        yield attend_job(y, case.sizes.log(), heads)
    # As attend_tokens hands them over: 8 heads in SD1.5, heads of 64 in SDXL.
    q, k, v = (y.unflatten(-1, (heads, -1)),) * 3
    bias, room = case.sizes.log()[:, :, None], attention.extra_channels(q.shape[-1])

    def in_torch() -> tuple[Tensor, ...]:
        return attention.query_in_torch(q), attention.key_in_torch(k, bias), attention.value_in_torch(v)

    yield _alike("widen", "", lambda: widen.launch_widen(q, k, v, bias, room), in_torch)


def _alike(kernel: str, variant: str, launch: Callable[[], Any], plain: Callable[[], Any]) -> Work:
    """A kernel that gives what plain torch gives, bit for bit."""

    def check(got: Any) -> str:
        with kernels_off():
            wanted = plain()
        pairs = ((got, wanted),) if isinstance(got, Tensor) else zip(got, wanted, strict=True)
        return "" if all(torch.equal(a, b) for a, b in pairs) else "NOT EQUAL"

    return Work(kernel, variant, launch, plain, check)


def choosing_jobs(case: Case) -> Iterator[Work]:
    """What looks at no token: `draw` and `split`."""
    from shared_tome.kernels.impl import draw, split

    order = curve_order(case.grid, case.x.device)
    for ratio in (0.75, 0.9375):
        kept = case.tokens - int(case.tokens * ratio)

        def drawn(kept: int = kept) -> Tensor:
            return walk_rows(walk_table(case.grid, kept, case.seed, order), case.tokens, case.step, 0, LAYERS)

        def launch(kept: int = kept) -> Tensor:
            return draw.launch_draw(order, case.seed, case.step, 0, kept, 0, LAYERS, 256)

        yield _alike("draw", f"{ratio}", launch, drawn)
    for layers in (1, LAYERS):

        def parts(layers: int = layers) -> Any:
            return [partition(case.grid, case.config, key(case.seed, case.step, layer, 1)) for layer in range(layers)]

        yield Work(
            "split",
            "" if layers == 1 else f"{layers} layers",
            lambda layers=layers: split.launch_split(case.seed, case.step, 0, 0, 1, *case.grid, 2, 2, True, layers),
            parts,
            lambda got: "" if torch.equal(got[0][0], case.src) and torch.equal(got[1][0], case.dst) else "NOT EQUAL",
        )


def matching_jobs(case: Case) -> Iterator[Work]:
    """From the nearest dst to the merged tokens."""
    from shared_tome.kernels.impl import match, mean, nearest, select

    x, src, dst, goes, rows = case.x, case.src, case.dst, case.goes, case.x.shape[0]
    reached = Reached(case)

    def in_torch() -> Any:
        return matching.grouped(case.similarity, case.target, src, dst, goes, False)

    yield Work(
        "nearest",
        "",
        lambda: nearest.launch_nearest(x, src, dst, 0, None),
        lambda: matching.nearest(x, src, dst),
        reached.check,
    )
    if x.dtype != torch.float32:
        # What match does: the same similarities, tallied, then the groups by the tally. What it counts in is not
        # cleared between calls, which index and groups do not show.
        tally = torch.empty((rows, nearest.TALLY), dtype=torch.int32, device=x.device)
        heads = torch.zeros(mean.heads_like(rows, case.kept, dst.shape[1]), dtype=torch.int32, device=x.device)

        def tallied() -> tuple[Tensor, Tensor]:
            return nearest.launch_nearest(x, src, dst, tally=tally, heads=heads)

        found = tallied()
        yield Work("nearest", "tallied", tallied, None, reached.check)
        yield Work(
            "match",
            "",
            lambda: match.launch_match(x, src, dst, goes),
            lambda: matching.match(x, src, dst, goes, False, False),
            lambda got: check_select(case, got[:2], found[0]) + check_links(got[0], got[1], got[2:]),
        )
        yield Work(
            "select",
            "tallied",
            lambda: match.launch_grouped(*found, src, dst, goes, tally, heads, 0, match._TILES),
            in_torch,
            lambda got: check_select(case, got[:2], found[0]),
        )
    if case.channels in (320, 1280):
        if src.shape[1] <= 2 * kernels.SELECTED:
            yield Work(
                "select",
                "",
                lambda: select.launch_select(case.similarity, case.target, src, dst, goes, None),
                in_torch,
                lambda got: check_select(case, got),
            )
        yield Work(
            "links",
            "",
            lambda: mean.launch_links(case.index, case.groups, case.kept),
            lambda: group_counts(case.groups, case.kept),
            lambda got: check_links(case.index, case.groups, got),
        )
    chain = mean.launch_links(case.index, case.groups, dst.shape[1])
    yield Work(
        "mean",
        "",
        lambda: mean.launch_mean(x, case.index, case.groups, *chain, mean._BLOCKS),
        lambda: ((group_sum(x, case.groups, case.kept) / case.sizes[..., None]).to(x.dtype), case.sizes.log()),
        lambda got: check_mean(case, *got),
    )


def beside_torch(exact: Tensor, got: Tensor, plain: Tensor) -> str:
    """How far a kernel's outcome and plain torch's are from the exact one."""
    here, there = (float((made.double() - exact).abs().max()) for made in (got, plain))
    return ("" if here <= 1.5 * there else "WORSE THAN TORCH ") + f"{here:.1e} (torch {there:.1e})"


def attend_job(y: Tensor, bias: Tensor, heads: int) -> Work:
    """Merged tokens attend to each other, each weighing as many as it stands for; plain: by further channels."""
    from shared_tome.kernels.impl.attend import launch_attend

    q, k, v = (y.roll(turn, 2).unflatten(-1, (heads, -1)).transpose(1, 2) for turn in range(3))
    scale = q.shape[-1] ** -0.5

    def plain() -> Tensor:
        return attention.attend_wider(q, k, v, bias, scale)

    def check(got: Tensor) -> str:
        wide = [x.double() for x in (q[:, :1, :256], k[:, :1], v[:, :1])]
        exact = (wide[0] @ wide[1].mT * scale + bias[:, None, None].double()).softmax(-1) @ wide[2]
        return beside_torch(exact, got[:, :1, :256], plain()[:, :1, :256])

    return Work("attend", "", lambda: launch_attend(q, k, v, bias, scale), plain, check)


def own_jobs(case: Case, heads: int) -> Iterator[Work]:
    """A layer's keys are drawn by head, a quarter, and its queries take their own tokens among them, as
    joint.attend_joined has it."""
    from shared_tome.attention.combine import TORCHS, attend_with_lse, choose_kernel
    from shared_tome.kernels.impl import own as own_kernel
    from shared_tome.kernels.impl.attend_drawn import launch_attend_drawn
    from shared_tome.kernels.impl.turns import launch_turns

    config = ToMeConfig(ratio=0.75, min_tokens=0, own_token=True)
    plan = ModelCall(config, case.grid, case.x.device, seed=case.seed, step=case.step).plan(case.x, case.grid)
    q, k, v = (case.x.roll(turn, 2).unflatten(-1, (heads, -1)).transpose(1, 2) for turn in range(3))

    def taken() -> list[Tensor]:
        return [own._take_turns(x, plan.turns) for x in (k, v)]

    yield _alike("turns", "", lambda: launch_turns(k, v, plan.turns), taken)
    kernel, scale = choose_kernel(TORCHS, q.device, q.dtype, q.shape[-1]), q.shape[-1] ** -0.5
    drawn, weight = own.take_turns(k, v, plan.turns), math.log(plan.tokens / plan.kept)
    given = (q, k, v, *attend_with_lse(q, *drawn, kernel), plan.turns, plan.runs, scale, weight)

    def check(got: Tensor) -> str:
        exact = own._keep_own(*(x.double() for x in given[:5]), *given[5:])
        return beside_torch(exact, got, own._keep_own(*given))

    yield Work("own", "", lambda: own_kernel.launch_own(*given), lambda: own._keep_own(*given), check)
    if case.channels // heads != 64:
        return

    def plain() -> Tensor:
        """Torch's own attention, and behind it what `own` does."""
        return own._keep_own(q, k, v, *attend_with_lse(q, *drawn, kernel), plan.turns, plan.runs, scale, weight)

    def check_drawn(got: Tensor) -> str:
        one = [x[:, :1].double() for x in (q, k, v)]
        exact = own._attend_drawn(*one, None, plan.turns[:1], plan.runs, 0, scale, weight)
        return beside_torch(exact, got[:, :1], plain()[:, :1])

    for variant, keys in (("", drawn), ("listed", None)):
        yield Work(
            "attend_drawn",
            variant,
            lambda keys=keys: launch_attend_drawn(q, k, v, keys, plan.turns, plan.runs, 0, scale, weight),
            None if variant else plain,
            check_drawn,
        )


def layer_jobs(case: Case) -> Iterator[Work]:
    """All that merging adds to a layer, and a layer's share of what sampling draws.

    The variants leave one of the joined kernels away, so that each shows what it saves.
    """
    sampling = ToMeConfig(ratio=0.75, min_tokens=0, own_token=False)
    heads = 8 if case.channels == 320 else case.channels // 64

    def merged(layers: int = 1, widens: bool = False):
        model = ModelCall(case.config, case.grid, case.x.device, seed=case.seed, step=case.step)
        for _ in range(layers):
            made = model.attention(case.x, case.x, case.x, case.grid)
            if widens:
                q, k, v = (x.unflatten(-1, (heads, -1)) for x in (made.q, made.k, made.v))
                attention.extend_heads(q, k, v, made.bias[:, :, None])
            out = made.unmerge(made.q)
        return out, made.bias

    def sampled():
        model = ModelCall(sampling, case.grid, case.x.device, seed=case.seed, step=case.step)
        for _ in range(4):
            made = model.attention(case.x, case.x, case.x, case.grid)
        return made.k

    for name, variant, call in (
        ("whole merge", "", merged),
        ("whole merge", "match apart", without(kernels, "match", merged)),
        ("4 x merge", "", lambda: merged(4)),
        ("4 x merge", "split by layer", without(call_module, "split_layers", lambda: merged(4))),
        ("4 x merge", "with heads", lambda: merged(4, True)),
        ("4 x merge", "with heads in torch", without(kernels, "widen", lambda: merged(4, True))),
        ("4 x sample", "", sampled),
    ):
        yield Work(name, variant, call, None if variant else call)


def without(module: Any, name: str, call: Callable[[], Any]) -> Callable[[], Any]:
    """The call with a function that gives None instead of its kernel's result."""

    def run():
        with replaced(module, name, lambda *given: None):
            return call()

    return run


@contextmanager
def replaced(module: Any, name: str, value: Any) -> Iterator[None]:
    """A module's attribute for a while."""
    before = getattr(module, name)
    setattr(module, name, value)
    try:
        yield
    finally:
        setattr(module, name, before)
