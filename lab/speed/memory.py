"""The peak of memory that merging adds to a self-attention layer: `python -m lab.speed.memory --out memory.csv`.

`layer_mb` is what the unmerged layer needs at its peak beyond its input, `merged_mb` what it needs with merging, and
`added` the difference, also in units of the token tensor (below zero where the smaller attention saves more than
merging costs). `alone` is the peak of choosing or matching, merging and unmerging without the attention in between.
On a GPU it is torch's own count, on the CPU the profiler's; both count what is allocated through torch.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from shared_tome import METHODS, ModelCall, ToMeConfig

from .common import DTYPES, Budget, Store, add_output_options, machine, show, versions
from .layer import Layer

KEYS = ("tokens", "channels", "dtype", "device", "method", "ratio")
SIDES = (64, 128, 256)
CHANNELS = {320: 8, 640: 10}  # and heads
RATIOS = {"sample": (0.75, 0.9375), "downsample": (0.75,), "tomesd": (0.5,)}


def peak_bytes(call: Callable[[], Any], device: str) -> int:
    """The most that one call has allocated at a time, what it returns included. Warms up first."""
    call()
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        out = call()
        torch.cuda.synchronize()
        del out
        return torch.cuda.max_memory_allocated() - before
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        out = call()
    del out
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    now = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    return peak


# (the merged layer, the same without attention)
Calls = tuple[Callable[[], Tensor], Callable[[], Tensor]]


def ours(layer: Layer, x: Tensor, grid: tuple[int, int], method: str, ratio: float) -> Calls:
    config = ToMeConfig(ratio=ratio, method=method, min_tokens=0, levels="auto", own_token=False)
    step = torch.zeros((), dtype=torch.int64, device=x.device)

    def whole() -> Tensor:
        merged = ModelCall(config, grid, x.device, step=step).attention(x, x, x, grid)
        return merged.unmerge(layer(merged.q, merged.k, merged.v, merged.bias))

    def alone() -> Tensor:
        merged = ModelCall(config, grid, x.device, step=step).attention(x, x, x, grid)
        return merged.unmerge(merged.q) if merged.merges_queries else merged.k

    return whole, alone


def tomesd(layer: Layer, x: Tensor, grid: tuple[int, int], ratio: float) -> Calls:
    """Raises ImportError where it is not installed."""
    from tomesd.merge import bipartite_soft_matching_random2d

    generator = torch.Generator(x.device)

    def match() -> tuple[Callable, Callable]:
        return bipartite_soft_matching_random2d(
            x, grid[1], grid[0], 2, 2, int(x.shape[1] * ratio), no_rand=False, generator=generator
        )

    def whole() -> Tensor:
        merge, unmerge = match()
        y = merge(x)
        return unmerge(layer(y, y, y))

    def alone() -> Tensor:
        merge, unmerge = match()
        return unmerge(merge(x))

    return whole, alone


def measure(side: int, channels: int, args: argparse.Namespace, has: Callable[..., bool]) -> Iterator[dict[str, Any]]:
    """The rows of one shape."""
    grid, dtype = (side, side), DTYPES[args.dtype]
    key = {"tokens": math.prod(grid), "channels": channels, "dtype": args.dtype, "device": args.device}
    methods = [(method, ratio) for method in (*METHODS, "tomesd") for ratio in RATIOS.get(method, (0.5,))]
    wanted = [(method, ratio) for method, ratio in methods if not has(**key, method=method, ratio=ratio)]
    if not wanted:
        return
    torch.manual_seed(0)
    layer = Layer(channels, CHANNELS[channels]).to(args.device, dtype)
    x = torch.randn(args.batch, math.prod(grid), channels, device=args.device, dtype=dtype)
    tensor, full = x.numel() * x.element_size(), peak_bytes(lambda: layer(x, x, x), args.device)
    for method, ratio in wanted:
        row: dict[str, Any] = {**key, "batch": args.batch, "method": method, "ratio": ratio}
        try:
            made = tomesd(layer, x, grid, ratio) if method == "tomesd" else ours(layer, x, grid, method, ratio)
            merged, alone = (peak_bytes(call, args.device) for call in made)
        except (ImportError, torch.OutOfMemoryError) as error:
            merged, alone = None, None
            remark = str(error).splitlines()[0]
        else:
            remark = ""
        megabytes = {
            "token_tensor_mb": tensor, "layer_mb": full, "merged_mb": merged,
            "added_mb": None if merged is None else merged - full, "alone_mb": alone,
        }  # fmt: skip
        row |= {name: "" if value is None else value / 2**20 for name, value in megabytes.items()}
        row["added_tensors"] = "" if merged is None else (merged - full) / tensor
        row["alone_tensors"] = "" if alone is None else alone / tensor
        yield {**row, "remark": remark}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    on_gpu = torch.cuda.is_available()
    parser.add_argument("--device", default="cuda" if on_gpu else "cpu", choices=["cpu", "cuda"])
    parser.add_argument("--dtype", default=None, choices=list(DTYPES), help="float16 on a GPU, float32 on the CPU")
    parser.add_argument("--batch", type=int, default=2, help="2 is one image with guidance")
    parser.add_argument("--sides", type=int, nargs="+", default=None, help="of square grids, in tokens")
    parser.add_argument("--channels", type=int, nargs="+", default=list(CHANNELS), choices=list(CHANNELS))
    add_output_options(parser)
    args = parser.parse_args()
    args.dtype = args.dtype or ("float16" if args.device == "cuda" else "float32")
    sides = args.sides or (SIDES if args.device == "cuda" else SIDES[:1])
    store, budget = Store(args.out, KEYS), Budget(args.minutes)
    about = {**machine(args.device, args.commit), "versions": versions("tomesd", "triton")}
    jobs = [(side, channels) for side in sides for channels in args.channels]
    with torch.no_grad():
        for side, channels in tqdm(jobs, file=sys.stderr):
            if budget.spent:
                print("stopped by --minutes; the same command goes on", file=sys.stderr)
                break
            for row in measure(side, channels, args, store.has):
                store.add({**row, **about})
    show(store.rows, args.json)


if __name__ == "__main__":
    main()
