"""The Triton kernels beside plain torch and their floors: `python -m lab.speed.kernels --out kernels.csv`.

Each in a captured CUDA graph. Whether the kernels are right is a matter of tests/gpu. docs/kernels.md says what the
numbers mean.
"""

from __future__ import annotations

import math
import sys
from argparse import Namespace
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from shared_tome import ModelCall, ToMeConfig, kernels
from shared_tome.core import channels, matching, sampling
from shared_tome.core import self_token as own
from shared_tome.core.curve import curve_order
from shared_tome.core.groups import group_counts, group_sum, take
from shared_tome.core.noise import key
from shared_tome.core.partition import partition

from ..timing import columns
from .common import DTYPES, Arguments, Job, microseconds, run_jobs

LAYERS = 16


class Work(NamedTuple):
    """A kernel's call; plain: the same by plain torch, where that is timed beside it."""

    kernel: str
    call: Callable[[], Any]
    plain: Callable[[], Any] | None = None
    variant: str = ""


def both(kernel: str, launch: Callable[..., Any], plain: Callable[..., Any], *given: Any) -> Work:
    return Work(kernel, partial(launch, *given), partial(plain, *given))


class Case:
    """One shape's inputs, made in plain torch: tokens [B, N, C] that resemble their neighbours, as a picture's do."""

    def __init__(self, grid: tuple[int, int], channels: int, batch: int, dtype: torch.dtype):
        self.grid, self.channels, self.tokens = grid, channels, math.prod(grid)
        self.heads = 8 if channels == 320 else channels // 64
        torch.manual_seed(0)
        coarse = torch.randn(batch, channels, max(1, grid[0] // 8), max(1, grid[1] // 8), device="cuda")
        x = F.interpolate(coarse, size=grid, mode="bilinear") + 0.5 * torch.randn(batch, channels, *grid, device="cuda")
        self.x = x.flatten(2).transpose(1, 2).to(dtype).contiguous()
        self.seed = torch.full((), 5, dtype=torch.int64, device="cuda")
        self.step = torch.full((), 3, dtype=torch.int64, device="cuda")
        self.config = ToMeConfig(ratio=0.5, method="merge", min_tokens=0)
        self.src, self.dst = partition(grid, self.config, key(self.seed, self.step, 0, 1))
        self.goes = self.tokens // 2
        self.similarity, self.target = matching.nearest(self.x, self.src, self.dst)
        given = (self.similarity, self.target, self.src, self.dst, self.goes, True)
        self.index, self.groups = matching.grouped(*given)
        self.kept = self.index.shape[1]
        self.sizes = group_counts(self.groups, self.kept)

    def call(self, config: ToMeConfig) -> ModelCall:
        return ModelCall(config, self.grid, self.x.device, seed=self.seed, step=self.step)

    def split_heads(self, x: Tensor) -> list[Tensor]:
        """Three that differ, as queries, keys and values: [B, H, N, d] each."""
        return [x.roll(turn, 2).unflatten(-1, (self.heads, -1)).transpose(1, 2) for turn in range(3)]


def jobs(case: Case) -> Iterator[Work]:
    from shared_tome.kernels.impl import gather, widen
    from shared_tome.kernels.impl.attend import launch_attend

    yield Work("copy", case.x.clone)
    if case.channels in (320, 1280):
        yield from choosing_jobs(case)
    yield from matching_jobs(case)
    y = take(case.x, case.index)
    yield both("gather", gather.launch_gather, take, y, case.groups)
    yield from self_token_jobs(case)
    bias, d = case.sizes.log(), case.channels // case.heads
    if d == 64:
        # Merged tokens attend to each other, each weighing as many as it stands for; plain: by further channels.
        yield both("attend", launch_attend, channels.attend_wider, *case.split_heads(y), bias, d**-0.5)
    # As attend_tokens hands them over: 8 heads in SD1.5, heads of 64 in SDXL.
    q, k, v = (y.unflatten(-1, (case.heads, -1)),) * 3
    given = (q, k, v, bias[:, :, None])
    widened = partial(widen.launch_widen, *given)
    yield Work("widen", widened, partial(channels.extend_heads, *given))


def choosing_jobs(case: Case) -> Iterator[Work]:
    """What looks at no token: `draw` and `split`."""
    from shared_tome.kernels.impl import draw, split

    order = curve_order(case.grid, case.x.device)

    def walked(kept: int) -> Tensor:
        return sampling.draw(order, kept, case.seed, case.step, 0, LAYERS)

    def parts(layers: int) -> list[Any]:
        return [partition(case.grid, case.config, key(case.seed, case.step, layer, 1)) for layer in range(layers)]

    for ratio in (0.75, 0.9375):
        kept = case.tokens - int(case.tokens * ratio)
        launch = partial(draw.launch_draw, order, case.seed, case.step, 0, kept, 0, LAYERS)
        yield Work("draw", launch, partial(walked, kept), f"{ratio}")
    for layers in (1, LAYERS):
        launch = partial(split.launch_split, case.seed, case.step, 0, 0, 1, *case.grid, 2, 2, True, layers)
        yield Work("split", launch, partial(parts, layers), "" if layers == 1 else f"{layers} layers")


def matching_jobs(case: Case) -> Iterator[Work]:
    """From the nearest dst to the merged tokens."""
    from shared_tome.kernels.impl import match, mean, nearest, select

    x, src, dst, goes, rows = case.x, case.src, case.dst, case.goes, case.x.shape[0]

    grouped = partial(matching.grouped, case.similarity, case.target, src, dst, goes, False)
    if x.dtype != torch.float32:
        yield both("nearest", nearest.launch_nearest, matching.nearest, x, src, dst)
        # What match does: the same similarities, tallied, then the groups by the tally. What it counts in is not
        # cleared between calls, which index and groups do not show.
        tally = torch.empty((rows, nearest.TALLY), dtype=torch.int32, device=x.device)
        heads = torch.zeros(mean.chains_like(rows, case.kept, dst.shape[1]), dtype=torch.int32, device=x.device)
        tallied = partial(nearest.launch_nearest, x, src, dst, tally=tally, chains=heads)
        found = tallied()
        yield Work("nearest", tallied, variant="tallied")
        yield both("match", match.launch_match, matching.match, x, src, dst, goes)
        by_tally = (*found, src, dst, goes, tally, heads, 0, match._TILES)
        yield Work("select", partial(match.launch_grouped, *by_tally), grouped, "tallied")
    if case.channels in (320, 1280):
        if src.shape[1] <= 2 * kernels.names.SELECTED:
            given = (case.similarity, case.target, src, dst, goes)
            yield Work("select", partial(select.launch_select, *given), grouped)
        linked = partial(mean.launch_links, case.index, case.groups, case.kept)
        yield Work("links", linked, partial(group_counts, case.groups, case.kept))
    chain = mean.launch_links(case.index, case.groups, dst.shape[1])
    yield Work(
        "mean",
        lambda: mean.launch_mean(x, case.index, case.groups, *chain, mean._BLOCKS),
        lambda: ((group_sum(x, case.groups, case.kept) / case.sizes[..., None]).to(x.dtype), case.sizes.log()),
    )


def self_token_jobs(case: Case) -> Iterator[Work]:
    """A layer's keys are drawn by head, a quarter, and its queries take their own tokens among them, as
    joint.attend_combined has it."""
    from shared_tome.attention.combine import TORCHS, attend_with_lse, choose_kernel
    from shared_tome.kernels.impl.attend_drawn import launch_attend_drawn
    from shared_tome.kernels.impl.self_token import launch_self_token, launch_take_by_head

    plan = case.call(ToMeConfig(ratio=0.75, min_tokens=0, own_token=True)).plan(case.x, case.grid)
    q, k, v = case.split_heads(case.x)
    yield both("take_by_head", launch_take_by_head, own.take_by_head, k, v, plan.head_draws)
    kernel, scale = choose_kernel(TORCHS, q.device, q.dtype, q.shape[-1]), q.shape[-1] ** -0.5
    drawn, weight = own.take_by_head(k, v, plan.head_draws), math.log(plan.tokens / plan.kept)
    rest = (plan.head_draws, plan.runs, scale, weight)
    given = (q, k, v, *attend_with_lse(q, *drawn, kernel), *rest)
    yield both("self_token", launch_self_token, own.add_self_token, *given)
    if q.shape[-1] != 64:
        return

    def behind() -> Tensor:
        """Torch's own attention, and behind it what `self_token` does."""
        return own.add_self_token(q, k, v, *attend_with_lse(q, *drawn, kernel), *rest)

    for variant, keys in (("", drawn), ("listed", (None, None))):
        launch = partial(launch_attend_drawn, q, k, v, *keys, plan.head_draws, plan.runs, 0, scale, weight)
        yield Work("attend_drawn", launch, None if variant else behind, variant)


def layer_jobs(case: Case) -> Iterator[Work]:
    """All that merging adds to a layer, and a layer's share of what sampling draws."""

    def merged(layers: int = 1, widens: bool = False):
        model = case.call(case.config)
        for _ in range(layers):
            made = model.attention(case.x, case.x, case.x, case.grid)
            if widens:
                q, k, v = (x.unflatten(-1, (case.heads, -1)) for x in (made.q, made.k, made.v))
                kernels.extend_heads(q, k, v, made.bias[:, :, None])
            out = made.unmerge(made.q)
        return out, made.bias

    def sampled():
        model = case.call(ToMeConfig(ratio=0.75, min_tokens=0, own_token=False))
        for _ in range(4):
            made = model.attention(case.x, case.x, case.x, case.grid)
        return made.k

    for name, variant, call in (
        ("whole merge", "", merged),
        ("4 x merge", "", lambda: merged(4)),
        ("4 x merge", "with heads", lambda: merged(4, True)),
        ("4 x sample", "", sampled),
    ):
        yield Work(name, call, None if variant else call, variant)


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


def launches(call: Callable[[], Any]) -> int:
    """How many kernels and memory operations one call starts."""
    call()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        call()
        torch.cuda.synchronize()
    return sum(event.count for event in profile.key_averages() if event.device_type.name == "CUDA")


def measure(job: Job, _: Any, args: Namespace) -> Iterator[dict[str, Any]]:
    """The rows of one shape."""
    side, count = math.isqrt(job["tokens"]), job == args.counted
    case = Case((side, side), job["channels"], args.batch, DTYPES[job["dtype"]])
    together = 2 if case.tokens > 2**15 else 10
    copy = 0.0

    def time(call: Callable[[], Any]) -> dict[str, float]:
        return microseconds(call, graph=True, min_time=args.seconds, together=together)

    for work in (*jobs(case), *layer_jobs(case)):
        whole = " " in work.kernel
        counted: dict[str, Any] = {"launches": "", "torch_launches": ""}
        try:
            found = time(work.call)
            if count and whole:
                counted["launches"] = launches(work.call)
            with kernels.use("reference"):
                torch_us = time(work.plain)["median"] if work.plain else ""
                if count and whole and work.plain:
                    counted["torch_launches"] = launches(work.plain)
        except Exception as error:  # a setting that does not fit this GPU
            print(f"{work.kernel} {work.variant}: {type(error).__name__} {str(error)[:90]}", file=sys.stderr)
            continue
        copy = found["median"] if work.kernel == "copy" else copy
        row = {"kernel": work.kernel, "variant": work.variant, **columns(found, "us")}
        yield {**row, "torch_us": torch_us, "copy_us": copy, **counted}


def main() -> None:
    parser = Arguments(__doc__)
    parser.some_of("--dtype", DTYPES, ["float16"], dest="dtypes")
    parser.add_argument("--batch", type=int, default=2, help="2 is one image with guidance")
    parser.add_argument("--launches", action="store_true", help="count the first shape's launches, by torch's profiler")
    parser.add_argument("--seconds", type=float, default=0.05, help="time spent on each number")
    args = parser.parsed()
    if not args.on_gpu or not kernels.ready():
        sys.exit("the kernels need a CUDA device and Triton")
    todo = [
        {"tokens": math.prod(grid), "channels": width, "batch": args.batch, "dtype": dtype}
        for dtype in args.dtypes
        for grid, width in SHAPES
        if dtype != "float32" or math.prod(grid) <= 4096  # without matrix units a large shape takes seconds
    ]
    args.counted, last = todo[0] if args.launches else None, [("4 x sample", "")]  # the last of a shape's rows
    run_jobs(args, todo, measure, lambda _: last, by="kernel variant", first=())


if __name__ == "__main__":
    main()
