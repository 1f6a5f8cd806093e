"""How the cost of merging grows with the tokens: `python -m lab.speed.growth --out growth.csv`.

1,024 to 262,144 tokens of 320 channels. `draw` is what `sample` draws for the 16 layers of a step, `gather` takes one
layer's tokens, `match`, `merge` and `unmerge` are those of the method "merge" at ratio 0.5, and `attention` is the
unmerged layer's, for comparison. Each with the Triton kernels, without them, and as PyPI's tomesd does it; on a GPU in
a captured CUDA graph.
"""

from __future__ import annotations

import math
import statistics
from argparse import Namespace
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from shared_tome import ModelCall, ToMeConfig, kernels, match_tokens

from ..timing import columns
from .common import DTYPES, Arguments, Job, attention_by, microseconds, run_jobs
from .layer import tomesd_match

CHANNELS, HEADS = 320, 8
SIZES = [2**octave for octave in range(10, 19)]
MERGING = ("match", "merge", "unmerge")
WHO = {
    "kernels": ("draw", "gather", *MERGING),
    "torch": ("draw", "gather", *MERGING),
    "tomesd": MERGING,
    "attention": ("attention",),
}


def grid_of_octave(tokens: int) -> tuple[int, int]:
    """Square, or half as high as wide."""
    height = 2 ** (int(math.log2(tokens)) // 2)
    return height, tokens // height


def exponent(tokens: list[int], times: list[float]) -> float:
    """The slope of log(time) against log(tokens) over the last three octaves. Raises ValueError for one point."""
    points = sorted(zip(tokens, times, strict=True))[-4:]
    if len(points) < 2:
        raise ValueError(f"a slope needs two points or more, got {len(points)}")
    x, y = ([math.log2(value) for value in axis] for axis in zip(*points, strict=True))
    return statistics.linear_regression(x, y).slope


# What is timed: its name, the call, what it draws from.
Calls = Iterator[tuple[str, Callable[[], Any], list[torch.Generator]]]


def ours(x: Tensor, grid: tuple[int, int]) -> Calls:
    """What is timed of this project."""
    step = torch.zeros((), dtype=torch.int64, device=x.device)
    sampling = ToMeConfig(ratio=0.75, min_tokens=0, own_token=False)
    merging = ToMeConfig(ratio=0.5, method="merge", min_tokens=0)
    yield "draw", (lambda: ModelCall(sampling, grid, x.device, step=step).plan(x, grid)), []
    chosen = ModelCall(sampling, grid, x.device, step=step).plan(x, grid)
    yield "gather", (lambda: chosen.merge(x)), []
    yield "match", (lambda: match_tokens(x, grid, merging, step=step)), []
    plan = match_tokens(x, grid, merging, step=step)
    yield "merge", (lambda: plan.merge(x)), []
    y = plan.merge(x)
    yield "unmerge", (lambda: plan.unmerge(y)), []


def tomesd(x: Tensor, grid: tuple[int, int]) -> Calls:
    """The same of PyPI's tomesd. Raises ImportError where it is not installed."""
    match, generator = tomesd_match(x, grid, 0.5)
    yield "match", match, [generator]
    merge, unmerge = match()
    yield "merge", (lambda: merge(x)), []
    y = merge(x)
    yield "unmerge", (lambda: unmerge(y)), []


def attention(x: Tensor, grid: tuple[int, int]) -> Calls:
    heads = x.unflatten(-1, (HEADS, -1)).transpose(1, 2)  # (B, H, N, d)
    yield "attention", (lambda: F.scaled_dot_product_attention(heads, heads, heads)), []


def measure(job: Job, _: Any, args: Namespace) -> Iterator[dict[str, Any]]:
    tokens, who = job["tokens"], job["who"]
    torch.manual_seed(0)
    x = torch.randn(args.batch, tokens, CHANNELS, device=args.device, dtype=DTYPES[args.dtype])
    made = {"tomesd": tomesd, "attention": attention}.get(who, ours)
    try:
        with (
            kernels.use("reference" if who == "torch" else "auto"),
            attention_by("cudnn" if args.on_gpu else "default"),
        ):
            for what, call, generators in made(x, grid_of_octave(tokens)):
                together = (10 if tokens <= 2**15 else 2) if args.on_gpu else 1
                time = microseconds(
                    call, graph=args.on_gpu, min_time=args.seconds, generators=generators, together=together
                )
                yield {"batch": args.batch, "what": what, **columns(time, "us"), "remark": ""}
    except (ImportError, RuntimeError) as error:  # not installed, or it does not fit, or does not capture
        remark = str(error).splitlines()[0][:80]
        yield {"batch": args.batch, "what": "all that is left", **columns(None, "us"), "remark": remark}


def main() -> None:
    parser = Arguments(__doc__, "float16")
    parser.add_argument("--batch", type=int, default=2, help="2 is one image with guidance")
    parser.some_of("--tokens", SIZES, SIZES, SIZES[:5], type=int)
    parser.add_argument("--seconds", type=float, default=0.05, help="time spent on each number")
    args = parser.parsed()
    with_kernels = args.on_gpu and kernels.ready()
    jobs = [
        {"tokens": tokens, "channels": CHANNELS, "dtype": args.dtype, "device": args.device, "who": who}
        for tokens in args.tokens
        for who in WHO
        # Attention at the largest size takes most of a second.
        if (with_kernels or who != "kernels") and (who != "attention" or tokens < SIZES[-1])
    ]
    run_jobs(args, jobs, measure, lambda job: WHO[job["who"]], by="what", first=(), packages=("tomesd", "triton"))


if __name__ == "__main__":
    main()
