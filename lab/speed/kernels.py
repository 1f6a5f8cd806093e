"""The Triton kernels beside plain torch and their floors: `python -m lab.speed.kernels --out kernels.csv`.

Each in a captured CUDA graph. Whether the kernels are right is a matter of tests/gpu. docs/kernels.md says what the
numbers mean.
"""

from __future__ import annotations

import math
import sys
from argparse import Namespace
from collections.abc import Callable, Iterator
from typing import Any

import torch

from shared_tome import kernels

from ..timing import columns
from .common import DTYPES, Arguments, Job, microseconds, run_jobs
from .kernel_jobs import Case, jobs, layer_jobs

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


def measure(case: Case, args: Namespace, count: bool) -> Iterator[dict[str, Any]]:
    """The rows of one shape. count: whether launches are counted."""
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
    parser.one_of("--dtype", DTYPES, ["float16"], dest="dtypes")
    parser.add_argument("--batch", type=int, default=2, help="2 is one image with guidance")
    parser.add_argument("--launches", action="store_true", help="count the first shape's launches, by torch's profiler")
    parser.add_argument("--seconds", type=float, default=0.05, help="time spent on each number")
    args = parser.parsed()
    if not args.on_gpu or not kernels.ready():
        sys.exit("the kernels need a CUDA device and Triton")
    todo: list[tuple[Job, list[Any]]] = []
    for dtype in args.dtypes:
        for grid, channels in SHAPES:
            if dtype != "float32" or math.prod(grid) <= 4096:  # without matrix units a large shape takes seconds
                job = {"tokens": math.prod(grid), "channels": channels, "batch": args.batch, "dtype": dtype}
                todo.append((job, [("4 x sample", "")]))  # the last of a shape's rows

    def rows(job: Job, _: Any) -> Iterator[dict[str, Any]]:
        side = math.isqrt(job["tokens"])
        case = Case((side, side), job["channels"], args.batch, DTYPES[job["dtype"]])
        return measure(case, args, args.launches and job == todo[0][0])

    run_jobs(args, todo, rows, by=("kernel", "variant"))


if __name__ == "__main__":
    main()
