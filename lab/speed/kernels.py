"""The Triton kernels beside plain torch and their floors: `python -m lab.speed.kernels --out kernels.csv`.

Checks each kernel on real shapes first (three ways: kernel, the same dtype in torch, float64), then times it in a
captured CUDA graph. `--variants` times the settings that were tried as well; `--warm 0/8` compiles a part of them and
stops, for several processes side by side. docs/kernels.md says what the numbers mean.
"""

from __future__ import annotations

import argparse
import contextlib
import math
import sys
from collections.abc import Callable, Iterator
from typing import Any

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

from .common import DTYPES, Budget, Store, add_output_options, machine, microseconds, show
from .kernel_case import Case, Reached, check_links, check_mean, check_select

KEYS = ("tokens", "channels", "batch", "dtype", "kernel", "variant")

# (grid, channels): SD1.5 level 0 at 512, 1024 and 2048 pixels, SDXL levels 1 and 2 at 1024 and 2048.
SHAPES = [
    ((64, 64), 320),
    ((128, 128), 320),
    ((256, 256), 320),
    ((64, 64), 640),
    ((32, 32), 1280),
    ((128, 128), 640),
    ((64, 64), 1280),
]
LAYERS = 16
# Of the kernel behind `match`: src of a program, dst of a program, src that it counts at a time, warps.
MATCH_TILES = [
    (1024, 1024, 4096, 4),
    (1024, 1024, 8192, 8),
    (512, 512, 4096, 4),
    (512, 512, 8192, 8),
    (512, 512, 16384, 16),
    (256, 512, 4096, 4),
    (256, 256, 8192, 8),
    (256, 256, 16384, 8),
]
# Calls in one captured graph, since a replay costs about as much as a small kernel; fewer where a call is long.
CALLS = 10
LONG_CALLS = 2


# (kernel, variant, call of the kernel, call of plain torch or None, check or None)
Job = tuple[str, str, Callable[[], Any], Callable[[], Any] | None, Callable[[Any], str] | None]


def jobs(case: Case, variants: bool) -> Iterator[Job]:
    """What is run on one shape."""
    from shared_tome.kernels.impl import draw, gather, match, mean, nearest, select, split, widen

    x, src, dst = case.x, case.src, case.dst
    yield "copy", "", x.clone, None, None
    if case.channels in (320, 1280):
        order = curve_order(case.grid, x.device)
        for ratio in (0.75, 0.9375):
            kept = case.tokens - int(case.tokens * ratio)

            def plain(kept=kept):
                walk = walk_table(case.grid, kept, case.seed, order)
                return walk_rows(walk, case.tokens, case.step, 0, LAYERS)

            for elements in (256, 128) if variants else (256,):
                yield (
                    "draw",
                    f"{ratio} {elements if variants else ''}".strip(),
                    lambda kept=kept, elements=elements: draw.launch_draw(
                        order, case.seed, case.step, 0, kept, 0, LAYERS, elements
                    ),
                    plain if elements == 256 else None,
                    lambda got, plain=plain: "" if torch.equal(got, plain()) else "NOT EQUAL",
                )
        for layers in (1, LAYERS):
            yield (
                "split",
                "" if layers == 1 else f"{layers} layers",
                lambda layers=layers: split.launch_split(case.seed, case.step, 0, 0, 1, *case.grid, 2, 2, True, layers),
                lambda layers=layers: [
                    partition(case.grid, case.config, key(case.seed, case.step, layer, 1)) for layer in range(layers)
                ],
                lambda got: "" if torch.equal(got[0][0], src) and torch.equal(got[1][0], dst) else "NOT EQUAL",
            )
    reached = Reached(case)
    settings = nearest_variants() if variants else [None]
    for setting in settings:
        name = "" if setting is None else "/".join(str(value) for value in vars(setting).values())
        yield (
            "nearest",
            name,
            lambda setting=setting: nearest.launch_nearest(x, src, dst, 0, setting),
            (lambda: matching.nearest(x, src, dst)) if setting == settings[0] else None,
            reached.check,
        )
    # What match does: the same similarities, tallied, then the groups by the tally.
    rows = x.shape[0]
    tally = torch.empty((rows, nearest.TALLY), dtype=torch.int32, device=x.device)
    heads = torch.zeros(mean.heads_like(rows, case.kept, dst.shape[1]), dtype=torch.int32, device=x.device)
    if x.dtype != torch.float32:
        yield (
            "nearest",
            "tallied",
            lambda: nearest.launch_nearest(x, src, dst, tally=tally, heads=heads),
            None,
            reached.check,
        )
        found = nearest.launch_nearest(x, src, dst, tally=tally, heads=heads)
        yield (
            "match",
            "",
            lambda: match.launch_match(x, src, dst, case.goes),
            lambda: matching.match(x, src, dst, case.goes),
            lambda got: check_select(case, got[:2], found[0]) + check_links(got[0], got[1], got[2:]),
        )
        tried = [match._TILES, *(tiles for tiles in MATCH_TILES if tiles != match._TILES)]
        for tiles in tried if variants else tried[:1]:
            yield (
                "select",
                f"tallied {tiles if variants else ''}".strip(),
                # What it counts in is not cleared between calls, which index and groups do not show.
                lambda tiles=tiles: match.launch_grouped(*found, src, dst, case.goes, tally, heads, 0, tiles),
                (lambda: matching.grouped(case.similarity, case.target, src, dst, case.goes, False))
                if tiles == tried[0]
                else None,
                lambda got: check_select(case, got[:2], found[0]),
            )
    if case.channels in (320, 1280):
        for warps in (None, 32) if variants else (None,):
            if src.shape[1] > 2 * kernels.SELECTED:
                break
            yield (
                "select",
                str(warps) if variants else "",
                lambda warps=warps: select.launch_select(case.similarity, case.target, src, dst, case.goes, warps),
                (lambda: matching.grouped(case.similarity, case.target, src, dst, case.goes, False))
                if warps is None
                else None,
                lambda got: check_select(case, got),
            )
        yield (
            "links",
            "",
            lambda: mean.launch_links(case.index, case.groups, case.kept),
            lambda: group_counts(case.groups, case.kept),
            lambda got: check_links(case.index, case.groups, got),
        )
    chain = mean.launch_links(case.index, case.groups, case.dst.shape[1])
    for blocks in (mean._BLOCKS, (512,), (256,), (128,)) if variants else (mean._BLOCKS,):
        yield (
            "mean",
            str(blocks) if variants else "",
            lambda blocks=blocks: mean.launch_mean(x, case.index, case.groups, *chain, blocks),
            (lambda: ((group_sum(x, case.groups, case.kept) / case.sizes[..., None]).to(x.dtype), case.sizes.log()))
            if blocks == mean._BLOCKS
            else None,
            lambda got: check_mean(case, *got),
        )
    y = take(x, case.index)
    yield (
        "gather",
        "",
        lambda: gather.launch_gather(y, case.groups),
        lambda: take(y, case.groups),
        lambda got: "" if torch.equal(got, without_kernels(lambda: take(y, case.groups))()) else "NOT EQUAL",
    )

    heads = 8 if case.channels == 320 else case.channels // 64
    yield from own_jobs(case, heads)

    if case.channels // heads == 64:
        yield attend_job(y, case.sizes.log(), heads)

    # As attend_tokens hands them over: 8 heads in SD1.5, heads of 64 in SDXL.
    parts = (y.unflatten(-1, (heads, -1)),) * 3
    bias, room = case.sizes.log()[:, :, None], attention.extra_channels(parts[0].shape[-1])

    def in_torch():
        q, k, v = parts
        return attention.query_in_torch(q), attention.key_in_torch(k, bias), attention.value_in_torch(v)

    yield (
        "widen",
        "",
        lambda: widen.launch_widen(*parts, bias, room),
        in_torch,
        lambda got: "" if all(torch.equal(a, b) for a, b in zip(got, in_torch(), strict=True)) else "NOT EQUAL",
    )


def beside_torch(exact: Tensor, got: Tensor, plain: Tensor) -> str:
    """How far a kernel's outcome and plain torch's are from the exact one."""
    here, there = (float((made.double() - exact).abs().max()) for made in (got, plain))
    return ("" if here <= 1.5 * there else "WORSE THAN TORCH ") + f"{here:.1e} (torch {there:.1e})"


def attend_job(y: Tensor, bias: Tensor, heads: int) -> Job:
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

    return "attend", "", lambda: launch_attend(q, k, v, bias, scale), plain, check


def own_jobs(case: Case, heads: int) -> Iterator[Job]:
    """A layer's keys are drawn by head, a quarter, and its queries take their own tokens among them, as
    joint.attend_joined has it."""
    from shared_tome.attention.combine import TORCHS, attend_with_lse, choose_kernel
    from shared_tome.kernels.impl import own as own_kernel
    from shared_tome.kernels.impl.turns import launch_turns

    config = ToMeConfig(ratio=0.75, min_tokens=0, own_token=True)
    drawn = ModelCall(config, case.grid, case.x.device, seed=case.seed, step=case.step).plan(case.x, case.grid)
    q, k, v = (case.x.roll(turn, 2).unflatten(-1, (heads, -1)).transpose(1, 2) for turn in range(3))

    def taken() -> list[Tensor]:
        return [own._take_turns(x, drawn.turns) for x in (k, v)]

    yield (
        "turns",
        "",
        lambda: launch_turns(k, v, drawn.turns),
        taken,
        lambda got: "" if all(map(torch.equal, got, taken())) else "NOT EQUAL",
    )
    kernel = choose_kernel(TORCHS, q.device, q.dtype, q.shape[-1])
    out, lse = attend_with_lse(q, *own.take_turns(k, v, drawn.turns), kernel)
    weight = math.log(drawn.tokens / drawn.kept)
    given = (q, k, v, out, lse, drawn.turns, drawn.runs, q.shape[-1] ** -0.5, weight)

    def check(got: Tensor) -> str:
        exact = own._keep_own(*(x.double() for x in given[:5]), *given[5:])
        return beside_torch(exact, got, own._keep_own(*given))

    yield "own", "", lambda: own_kernel.launch_own(*given), lambda: own._keep_own(*given), check
    if case.channels // heads == 64:
        yield from attend_drawn_jobs(q, k, v, drawn, kernel, weight)


def attend_drawn_jobs(q: Tensor, k: Tensor, v: Tensor, plan: Any, kernel: str, weight: float) -> Iterator[Job]:
    """The attention with own tokens in it; plain: torch's own kernel, and behind it what `own` does."""
    from shared_tome.attention.combine import attend_with_lse
    from shared_tome.kernels.impl.attend_drawn import launch_attend_drawn

    drawn, scale = own.take_turns(k, v, plan.turns), q.shape[-1] ** -0.5

    def plain() -> Tensor:
        return own._keep_own(q, k, v, *attend_with_lse(q, *drawn, kernel), plan.turns, plan.runs, scale, weight)

    def check(got: Tensor) -> str:
        one = [x[:, :1].double() for x in (q, k, v)]
        exact = own._attend_drawn(*one, None, plan.turns[:1], plan.runs, 0, scale, weight)
        return beside_torch(exact, got[:, :1], plain()[:, :1])

    for variant, taken in (("", drawn), ("listed", None)):
        yield (
            "attend_drawn",
            variant,
            lambda taken=taken: launch_attend_drawn(q, k, v, taken, plan.turns, plan.runs, 0, scale, weight),
            None if variant else plain,
            check,
        )


def nearest_variants() -> list:
    """Settings worth timing, those in use first."""
    from shared_tome.kernels.impl.nearest import Config

    tiles = ((128, 256, 64, 8, 4), (128, 256, 64, 8, 3), (64, 256, 64, 4, 4), (128, 128, 64, 8, 4), (64, 128, 64, 4, 4))
    splits = [Config(*tiles[0], splits) for splits in (1, 2, 4)]
    return [Config(*tiles[0]), *splits, *(Config(*tile) for tile in tiles[1:])]


def layer_jobs(case: Case) -> Iterator[tuple[str, str, Callable[[], Any]]]:
    """(name, variant, call): all that merging adds to a layer, and a layer's share of what sampling draws.

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

    yield "whole merge", "", merged
    yield "whole merge", "match apart", without((kernels, "match"), merged)
    yield "4 x merge", "", lambda: merged(4)
    yield "4 x merge", "split by layer", without((call_module, "split_layers"), lambda: merged(4))
    yield "4 x merge", "with heads", lambda: merged(4, True)
    yield "4 x merge", "with heads in torch", without((kernels, "widen"), lambda: merged(4, True))
    yield "4 x sample", "", sampled


def without(what: tuple[Any, str], call: Callable[[], Any]) -> Callable[[], Any]:
    """The call with a function that gives None instead of its kernel's result: (module, name)."""

    def run():
        with replaced(*what, lambda *given: None):
            return call()

    return run


@contextlib.contextmanager
def replaced(module: Any, name: str, value: Any) -> Iterator[None]:
    """A module's attribute for a while."""
    before = getattr(module, name)
    setattr(module, name, value)
    try:
        yield
    finally:
        setattr(module, name, before)


def timed(call: Callable[[], Any], seconds: float, calls: int = CALLS) -> dict[str, float]:
    """microseconds() of one call, several of them in one captured graph."""

    def several():
        for _ in range(calls):
            call()

    return {name: value / calls for name, value in microseconds(several, graph=True, min_time=seconds).items()}


def launches(call: Callable[[], Any]) -> int:
    """How many kernels and memory operations one call starts."""
    call()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        call()
        torch.cuda.synchronize()
    return sum(event.count for event in profile.key_averages() if event.device_type.name == "CUDA")


def without_kernels(call: Callable[[], Any]) -> Callable[[], Any]:
    def run():
        with replaced(kernels, "serves", lambda *tensors: False):
            return call()

    return run


def measure(grid: tuple[int, int], channels: int, args: argparse.Namespace, store: Store) -> Iterator[dict[str, Any]]:
    """The rows of one shape that the store does not have."""
    case = Case(grid, channels, args)
    about = {"tokens": case.tokens, "channels": channels, "batch": args.batch, "dtype": args.dtype}
    copy, calls = 0.0, LONG_CALLS if case.tokens > 2**15 else CALLS
    for name, variant, call, plain, check in jobs(case, args.variants):
        if args.only and name not in args.only and name != "copy":
            continue
        if store.has(**about, kernel=name, variant=variant) and name != "copy":  # the others' rows need the copy's time
            continue
        row = {**about, "kernel": name, "variant": variant}
        try:
            said = check(call()) if check else ""
            if (
                said
                and check
                and name in ("mean", "select", "match")
                and not torch.equal(_first(call()), _first(call()))
            ):
                said = "DIFFERS ON REPEAT " + said
            time = timed(call, args.seconds, calls)
        except Exception as error:  # a setting that does not fit this GPU
            print(f"{name} {variant} {case.tokens} x {channels}: {type(error).__name__} {str(error)[:90]}", flush=True)
            continue
        copy = time["median"] if name == "copy" else copy
        torch_us = timed(without_kernels(plain), args.seconds, calls)["median"] if plain else ""
        yield {
            **row,
            "us": time["median"],
            "p20": time["p20"],
            "p80": time["p80"],
            "torch_us": torch_us,
            "copy_us": copy,
            "launches": "",
            "torch_launches": "",
            "check": said,
        }
    if args.only:
        return
    for name, variant, call in layer_jobs(case):
        if store.has(**about, kernel=name, variant=variant):
            continue
        time = timed(call, args.seconds, calls)
        torch_us = timed(without_kernels(call), args.seconds, calls)["median"] if not variant else ""
        count = ["", ""]
        if args.launches and (grid, channels) == SHAPES[args.shapes[0]]:
            count = [launches(call), "" if variant else launches(without_kernels(call))]
        yield {
            **about,
            "kernel": name,
            "variant": variant,
            "us": time["median"],
            "p20": time["p20"],
            "p80": time["p80"],
            "torch_us": torch_us,
            "copy_us": copy,
            "launches": count[0],
            "torch_launches": count[1],
            "check": "",
        }


def _first(made: Any) -> Tensor:
    return made if isinstance(made, Tensor) else made[0]


def warm(part: str, args: argparse.Namespace) -> None:
    """Compile every n-th of all settings by running them once."""
    number, count = (int(value) for value in part.split("/"))
    every = 0
    for grid, channels in SHAPES:
        if (grid, channels) in (((256, 256), 320), ((128, 128), 640)):
            continue  # the same kernels as a smaller one's
        case = Case(grid, channels, args)
        for _, _, call, _, _ in jobs(case, args.variants):
            every += 1
            if every % count == number:
                try:
                    call()
                except Exception:  # said when it is timed
                    pass
    torch.cuda.synchronize()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtype", dest="dtypes", default=["float16"], nargs="+", choices=list(DTYPES))
    parser.add_argument("--batch", type=int, default=2, help="2 is one image with guidance")
    parser.add_argument("--shapes", type=int, nargs="+", default=range(len(SHAPES)), help="numbers of shapes")
    parser.add_argument("--only", nargs="+", help="names of kernels")
    parser.add_argument("--variants", action="store_true", help="time the settings that were tried too")
    parser.add_argument("--launches", action="store_true", help="count the first shape's launches, by torch's profiler")
    parser.add_argument("--warm", help="compile this part of all settings (for example 0/8) and stop")
    parser.add_argument("--seconds", type=float, default=0.05, help="time spent on each number")
    add_output_options(parser)
    args = parser.parse_args()
    if not torch.cuda.is_available() or not kernels.ready():
        sys.exit("the kernels need a CUDA device and Triton")
    with torch.no_grad():
        if args.warm:
            args.dtype = args.dtypes[0]
            return warm(args.warm, args)
        about = {**machine("cuda", args.commit), "triton": __import__("triton").__version__}
        store, budget = Store(args.out, KEYS), Budget(args.minutes)
        # Without matrix units a large shape takes seconds.
        jobs = [
            (dtype, SHAPES[number])
            for dtype in args.dtypes
            for number in args.shapes
            if dtype != "float32" or math.prod(SHAPES[number][0]) <= 4096
        ]
        every = args.variants
        for args.dtype, shape in jobs:
            if budget.spent:
                print("stopped by --minutes; the same command goes on", file=sys.stderr)
                break
            args.variants = every and args.dtype == args.dtypes[0]  # those are for half precision
            for row in measure(*shape, args, store):
                store.add({**row, **about})
                print(as_line(row), file=sys.stderr if args.json else sys.stdout, flush=True)
    if args.json:
        show(store.rows, True)


def as_line(row: dict[str, Any]) -> str:
    """A row for people."""
    plain = f"{row['torch_us']:8.1f}" if row["torch_us"] != "" else " " * 8
    counts = f" {row['launches']}/{row['torch_launches']} launches" if row["launches"] != "" else ""
    what = f"{row['tokens']:6} x {row['channels']:4} {row['dtype']:8} {row['kernel']:8} {row['variant']:24}"
    return f"{what} {row['us']:8.1f} us, torch {plain}{counts} {row['check']}"


if __name__ == "__main__":
    main()
