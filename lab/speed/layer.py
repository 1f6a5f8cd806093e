"""One self-attention layer, unmerged and with every method: `python -m lab.speed.layer --device cpu --json`.

`total_us` is all that merging needs, attention and its projections included: the choice or match, the merge, the
unmerge, and the layer's share of what is drawn once a step (a step of LAYERS layers is timed and divided).
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from shared_tome import METHODS, ModelCall, ToMeConfig
from shared_tome.attention.bias import attend

from .common import BACKENDS, DTYPES, add_output_options, attention_by, machine, microseconds, save, show

# (name, grid, channels, heads): SD1.5 levels 0 and 1, SDXL levels 1 and 2.
SHAPES = {
    "sd15-512": ((64, 64), 320, 8),
    "sd15-1024": ((128, 128), 320, 8),
    "sd15-2048": ((256, 256), 320, 8),
    "sd15-512-level1": ((32, 32), 640, 8),
    "sd15-512-level2": ((16, 16), 1280, 8),
    "sd15-768-level1": ((48, 48), 640, 8),
    "sdxl-1024-level1": ((64, 64), 640, 10),
    "sdxl-1024-level2": ((32, 32), 1280, 20),
    "sdxl-1536-level2": ((48, 48), 1280, 20),
    "sdxl-2048-level1": ((128, 128), 640, 10),
    "sdxl-2048-level2": ((64, 64), 1280, 20),
}
RATIOS = {"sample": (0.5, 0.75, 0.9375), "downsample": (0.75,)}
LAYERS = 4


class Layer(torch.nn.Module):
    """Self-attention as the U-Nets have it: q, k, v projections without bias, an output projection."""

    def __init__(self, channels: int, heads: int):
        super().__init__()
        self.heads = heads
        self.to_q, self.to_k, self.to_v = (torch.nn.Linear(channels, channels, bias=False) for _ in range(3))
        self.to_out = torch.nn.Linear(channels, channels)

    def forward(self, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None) -> Tensor:
        q, k, v = self.to_q(q), self.to_k(k), self.to_v(v)
        q, k, v = (x.unflatten(-1, (self.heads, -1)).transpose(1, 2) for x in (q, k, v))  # (B, H, N, d)
        out = F.scaled_dot_product_attention(q, k, v) if bias is None else attend(q, k, v, bias)
        return self.to_out(out.transpose(1, 2).flatten(2))  # (B, N, C)


def merged_step(layer: Layer, x: Tensor, grid: tuple[int, int], config: ToMeConfig) -> Callable[[], Tensor]:
    """A step of LAYERS layers with ToMe, all that is done once a step included."""
    step = torch.zeros((), dtype=torch.int64, device=x.device)

    def run() -> Tensor:
        call = ModelCall(config, grid, x.device, step=step)
        for _ in range(LAYERS):
            merged = call.attention(x, x, x, grid)
            out = merged.unmerge(layer(merged.q, merged.k, merged.v, merged.bias))
        return out

    return run


def tomesd_layer(
    layer: Layer, x: Tensor, grid: tuple[int, int], ratio: float, generator: torch.Generator
) -> Callable[[], Tensor] | None:
    """PyPI's tomesd around the same layer, or None where it is not installed."""
    try:
        from tomesd.merge import bipartite_soft_matching_random2d
    except ImportError:
        return None

    def run() -> Tensor:
        merge, unmerge = bipartite_soft_matching_random2d(
            x, grid[1], grid[0], 2, 2, int(x.shape[1] * ratio), no_rand=False, generator=generator
        )
        y = merge(x)
        return unmerge(layer(y, y, y))

    return run


def measure(shape: str, args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """The rows of one shape."""
    grid, channels, heads = SHAPES[shape]
    dtype = DTYPES[args.dtype]
    torch.manual_seed(0)
    layer = Layer(channels, heads).to(args.device, dtype)
    x = torch.randn(args.batch, grid[0] * grid[1], channels, device=args.device, dtype=dtype)

    generator = torch.Generator(args.device)  # tomesd's

    def time(call: Callable[[], Any], *generators: torch.Generator) -> dict[str, float]:
        return microseconds(call, graph=args.graph, min_time=args.seconds, generators=generators)

    full = time(lambda: layer(x, x, x))
    for method in METHODS:
        for ratio in RATIOS.get(method, (0.5, 0.75)):
            config = ToMeConfig(ratio=ratio, method=method, min_tokens=0, levels="auto", own_token=False)
            step = time(merged_step(layer, x, grid, config))
            total = {key: value / LAYERS for key, value in step.items()}

            def make():
                return ModelCall(config, grid, x.device).attention(x, x, x, grid)  # noqa: B023

            plan = make().plan
            y = plan.merge(x)
            theirs = tomesd_layer(layer, x, grid, ratio, generator) if method == "merge" else None
            yield {
                "shape": shape,
                "tokens": grid[0] * grid[1],
                "channels": channels,
                "batch": args.batch,
                "dtype": args.dtype,
                "device": args.device,
                "mode": "graph" if args.graph else "eager",
                "backend": args.backend,
                "method": method,
                "ratio": ratio,
                "full_us": full["median"],
                "full_p20": full["p20"],
                "full_p80": full["p80"],
                "total_us": total["median"],
                "total_p20": total["p20"],
                "total_p80": total["p80"],
                "match_us": time(lambda: ModelCall(config, grid, x.device).plan(x, grid))["median"],  # noqa: B023
                "merge_us": time(lambda: plan.merge(x))["median"],  # noqa: B023
                "unmerge_us": time(lambda: plan.unmerge(y))["median"] if config.kind.queries else 0.0,  # noqa: B023
                "tomesd_total_us": time(theirs, generator)["median"] if theirs else "",
            }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=["cpu", "cuda"])
    parser.add_argument("--dtype", default=None, choices=list(DTYPES), help="float16 on a GPU, float32 on the CPU")
    parser.add_argument("--batch", type=int, default=2, help="2 is one image with guidance")
    parser.add_argument("--shapes", nargs="+", default=None, choices=list(SHAPES))
    parser.add_argument("--backend", default="default", choices=["default", *BACKENDS], help="on a GPU")
    parser.add_argument("--graph", action="store_true", help="capture each call as a CUDA graph")
    parser.add_argument("--seconds", type=float, default=0.2, help="time spent on each number")
    add_output_options(parser, resumes=False)
    args = parser.parse_args()
    args.dtype = args.dtype or ("float16" if args.device == "cuda" else "float32")
    shapes = args.shapes or (["sd15-512"] if args.device == "cpu" else list(SHAPES))
    about = machine(args.device, args.commit)
    rows: list[dict[str, Any]] = []
    with torch.no_grad(), attention_by(args.backend):
        for shape in tqdm(shapes, file=sys.stderr):
            rows += [{**row, **about} for row in measure(shape, args)]
            save(rows, args.out)  # as it goes, so that an interrupted run keeps what it has
    show(rows, args.json)


if __name__ == "__main__":
    main()
