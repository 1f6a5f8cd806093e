"""How the cost of merging grows with the tokens: `python -m lab.speed.growth --out growth.csv`.

1,024 to 262,144 tokens of 320 channels. `draw` is what `sample` draws for the 16 layers of a step, `gather` takes one
layer's tokens, `match`, `merge` and `unmerge` are those of the method "merge" at ratio 0.5, and `attention` is the
unmerged layer's, for comparison. Each with the Triton kernels, without them, and as PyPI's tomesd does it; on a GPU in
a captured CUDA graph.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from shared_tome import ModelCall, ToMeConfig, kernels, match_tokens

from .common import DTYPES, Budget, Store, add_output_options, attention_by, machine, microseconds, show, versions

KEYS = ("tokens", "channels", "dtype", "device", "who", "what")
CHANNELS, HEADS = 320, 8
SIZES = [2**octave for octave in range(10, 19)]
WHO = ("kernels", "torch", "tomesd")


def grid_of_octave(tokens: int) -> tuple[int, int]:
    """Square, or half as high as wide."""
    height = 2 ** (int(math.log2(tokens)) // 2)
    return height, tokens // height


def exponent(tokens: list[int], times: list[float], octaves: int = 3) -> float:
    """The slope of log(time) against log(tokens), least squares over the last octaves.

    Raises ValueError for fewer than two points.
    """
    points = sorted(zip(tokens, times, strict=True))[-octaves - 1 :]
    if len(points) < 2:
        raise ValueError(f"a slope needs two points or more, got {len(points)}")
    x, y = [math.log2(point[0]) for point in points], [math.log2(point[1]) for point in points]
    mean_x, mean_y = sum(x) / len(x), sum(y) / len(y)
    above = sum((a - mean_x) * (b - mean_y) for a, b in zip(x, y, strict=True))
    return above / sum((a - mean_x) ** 2 for a in x)


@contextmanager
def kernels_off(off: bool) -> Iterator[None]:
    serves = kernels.serves
    if off:
        kernels.serves = lambda *tensors: False
    try:
        yield
    finally:
        kernels.serves = serves


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
    from tomesd.merge import bipartite_soft_matching_random2d

    generator = torch.Generator(x.device)

    def match() -> tuple[Callable, Callable]:
        return bipartite_soft_matching_random2d(
            x, grid[1], grid[0], 2, 2, x.shape[1] // 2, no_rand=False, generator=generator
        )

    yield "match", match, [generator]
    merge, unmerge = match()
    yield "merge", (lambda: merge(x)), []
    y = merge(x)
    yield "unmerge", (lambda: unmerge(y)), []


def attention(x: Tensor, grid: tuple[int, int]) -> Calls:
    heads = x.unflatten(-1, (HEADS, -1)).transpose(1, 2)  # (B, H, N, d)
    yield "attention", (lambda: F.scaled_dot_product_attention(heads, heads, heads)), []


def measure(tokens: int, who: str, args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """The rows of one number of tokens."""
    grid = grid_of_octave(tokens)
    torch.manual_seed(0)
    x = torch.randn(args.batch, tokens, CHANNELS, device=args.device, dtype=DTYPES[args.dtype])
    made = {"tomesd": tomesd, "attention": attention}.get(who, ours)
    row = {
        "tokens": tokens, "channels": CHANNELS, "batch": args.batch, "dtype": args.dtype, "device": args.device,
        "who": who,
    }  # fmt: skip
    try:
        with kernels_off(who == "torch"), attention_by("cudnn" if args.device == "cuda" else "default"):
            for what, call, generators in made(x, grid):
                # A replay costs about as much as a small kernel, so a graph holds several calls.
                calls = 1 if args.device == "cpu" else 10 if tokens <= 2**15 else 2
                time = microseconds(
                    lambda: [call() for _ in range(calls)],  # noqa: B023
                    graph=args.device == "cuda",
                    min_time=args.seconds,
                    generators=generators,
                )
                time = {name: value / calls for name, value in time.items()}
                yield {**row, "what": what, "us": time["median"], "p20": time["p20"], "p80": time["p80"], "remark": ""}
    except (ImportError, RuntimeError) as error:  # not installed, or it does not fit, or does not capture
        remark = str(error).splitlines()[0][:80]
        yield {**row, "what": "all that is left", "us": "", "p20": "", "p80": "", "remark": remark}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    on_gpu = torch.cuda.is_available()
    parser.add_argument("--device", default="cuda" if on_gpu else "cpu", choices=["cpu", "cuda"])
    parser.add_argument("--dtype", default=None, choices=list(DTYPES), help="float16 on a GPU, float32 on the CPU")
    parser.add_argument("--batch", type=int, default=2, help="2 is one image with guidance")
    parser.add_argument("--tokens", type=int, nargs="+", default=None, choices=SIZES)
    parser.add_argument("--seconds", type=float, default=0.05, help="time spent on each number")
    add_output_options(parser)
    args = parser.parse_args()
    args.dtype = args.dtype or ("float16" if args.device == "cuda" else "float32")
    sizes = args.tokens or (SIZES if args.device == "cuda" else SIZES[:5])
    with_kernels = args.device == "cuda" and kernels.ready()
    who = [name for name in (*WHO, "attention") if with_kernels or name != "kernels"]
    store, budget = Store(args.out, KEYS), Budget(args.minutes)
    about = {**machine(args.device, args.commit), "versions": versions("tomesd", "triton")}
    done = {(str(row["tokens"]), row["who"], row["dtype"], row["device"]) for row in store.rows}
    # Attention at the largest size takes most of a second.
    jobs = [(tokens, name) for tokens in sizes for name in who if name != "attention" or tokens < SIZES[-1]]
    with torch.no_grad():
        for tokens, name in tqdm(jobs, file=sys.stderr):
            if (str(tokens), name, args.dtype, args.device) in done:
                continue
            if budget.spent:
                print("stopped by --minutes; the same command goes on", file=sys.stderr)
                break
            for row in [{**row, **about} for row in measure(tokens, name, args)]:
                store.add(row)
            if args.device == "cuda":
                torch.cuda.empty_cache()
    show(store.rows, args.json)


if __name__ == "__main__":
    main()
