"""The peak of memory that merging adds to a self-attention layer: `python -m lab.speed.memory --out memory.csv`.

`layer_mb` is what the unmerged layer needs at its peak beyond its input, `merged_mb` what it needs with merging, and
`added` the difference, also in units of the token tensor (below zero where the smaller attention saves more than
merging costs). `alone` is the peak of choosing or matching, merging and unmerging without the attention in between.
On a GPU it is torch's own count, on the CPU the profiler's; both count what is allocated through torch.
"""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from shared_tome import METHODS, ModelCall

from .common import Arguments, Job, run_jobs
from .layer import Layer, config_of, layer_and_tokens, merged_step, tomesd_layer, tomesd_match

SIDES = (64, 128, 256)
CHANNELS = {320: 8, 640: 10}  # and heads
RATIOS = {"sample": (0.75, 0.9375), "downsample": (0.75,)}


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


def calls(
    layer: Layer, x: Tensor, grid: tuple[int, int], method: str, ratio: float
) -> tuple[Callable[[], Tensor], Callable[[], Tensor]]:
    """(the merged layer, the same without attention). Raises ImportError for tomesd where it is not installed."""
    if method == "tomesd":
        match, _ = tomesd_match(x, grid, ratio)

        def apart() -> Tensor:
            merge, unmerge = match()
            return unmerge(merge(x))

        return lambda: tomesd_layer(layer, x, match), apart
    config = config_of(method, ratio)
    step = torch.zeros((), dtype=torch.int64, device=x.device)

    def alone() -> Tensor:
        merged = ModelCall(config, grid, x.device, step=step).attention(x, x, x, grid)
        return merged.unmerge(merged.q) if merged.merges_queries else merged.k

    return merged_step(layer, x, grid, config, 1), alone


def measure(job: Job, names: list[tuple[str, float]], args: Namespace) -> Iterator[dict[str, Any]]:
    tokens, channels, side = job["tokens"], job["channels"], round(job["tokens"] ** 0.5)
    layer, x = layer_and_tokens(channels, CHANNELS[channels], tokens, args)
    tensor, full = x.numel() * x.element_size(), peak_bytes(lambda: layer(x, x, x), args.device)
    for method, ratio in names:
        merged = alone = None
        remark = ""
        try:
            merged, alone = (peak_bytes(call, args.device) for call in calls(layer, x, (side, side), method, ratio))
        except (ImportError, torch.OutOfMemoryError) as error:
            remark = str(error).splitlines()[0]
        added = None if merged is None else merged - full
        megabytes = {"token_tensor": tensor, "layer": full, "merged": merged, "added": added, "alone": alone}
        yield {
            "batch": args.batch, "method": method, "ratio": ratio,
            **{f"{name}_mb": "" if value is None else value / 2**20 for name, value in megabytes.items()},
            "added_tensors": "" if added is None else added / tensor,
            "alone_tensors": "" if alone is None else alone / tensor,
            "remark": remark,
        }  # fmt: skip


def main() -> None:
    parser = Arguments(__doc__, "float16")
    parser.add_argument("--batch", type=int, default=2, help="2 is one image with guidance")
    parser.some_of("--sides", None, SIDES, SIDES[:1], type=int, help="of square grids, in tokens")
    parser.some_of("--channels", CHANNELS, CHANNELS, type=int)
    args = parser.parsed()
    names = [(method, ratio) for method in (*METHODS, "tomesd") for ratio in RATIOS.get(method, (0.5,))]
    jobs = [
        {"tokens": side**2, "channels": channels, "dtype": args.dtype, "device": args.device}
        for side in args.sides
        for channels in args.channels
    ]
    run_jobs(args, jobs, measure, lambda _: names, by="method ratio", first=(), packages=("tomesd", "triton"))


if __name__ == "__main__":
    main()
