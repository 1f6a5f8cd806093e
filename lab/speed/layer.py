"""One self-attention layer, unmerged and with every method: `python -m lab.speed.layer --device cpu --json`.

`total_us` is all that merging needs, attention and its projections included: the choice or match, the merge, the
unmerge, and the layer's share of what is drawn once a step (a step of LAYERS layers is timed and divided).
"""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from shared_tome import METHODS, ModelCall, ToMeConfig
from shared_tome.attention.bias import attend

from ..timing import columns
from .common import BACKENDS, DTYPES, Arguments, Job, attention_by, microseconds, run_jobs

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


def config_of(method: str, ratio: float) -> ToMeConfig:
    return ToMeConfig(ratio=ratio, method=method, min_tokens=0, levels="auto", own_token=False)


def layer_and_tokens(channels: int, heads: int, tokens: int, args: Namespace) -> tuple[Layer, Tensor]:
    """A layer with random weights and its input [batch, tokens, channels]."""
    torch.manual_seed(0)
    dtype = DTYPES[args.dtype]
    layer = Layer(channels, heads).to(args.device, dtype)
    return layer, torch.randn(args.batch, tokens, channels, device=args.device, dtype=dtype)


def merged_step(
    layer: Layer, x: Tensor, grid: tuple[int, int], config: ToMeConfig, layers: int = LAYERS
) -> Callable[[], Tensor]:
    """A step of some layers with ToMe, all that is done once a step included."""
    step = torch.zeros((), dtype=torch.int64, device=x.device)

    def run() -> Tensor:
        call = ModelCall(config, grid, x.device, step=step)
        for _ in range(layers):
            merged = call.attention(x, x, x, grid)
            out = merged.unmerge(layer(merged.q, merged.k, merged.v, merged.bias))
        return out

    return run


def tomesd_match(
    x: Tensor, grid: tuple[int, int], ratio: float
) -> tuple[Callable[[], tuple[Callable, Callable]], torch.Generator]:
    """What finds (merge, unmerge) of PyPI's tomesd, and the generator it draws from. Raises ImportError without it."""
    from tomesd.merge import bipartite_soft_matching_random2d

    generator = torch.Generator(x.device)
    given = (x, grid[1], grid[0], 2, 2, int(x.shape[1] * ratio))
    return lambda: bipartite_soft_matching_random2d(*given, no_rand=False, generator=generator), generator


def tomesd_layer(layer: Layer, x: Tensor, match: Callable[[], tuple[Callable, Callable]]) -> Tensor:
    merge, unmerge = match()
    y = merge(x)
    return unmerge(layer(y, y, y))


def measure(job: Job, names: list[tuple[str, float]], args: Namespace) -> Iterator[dict[str, Any]]:
    grid, channels, heads = SHAPES[job["shape"]]
    layer, x = layer_and_tokens(channels, heads, grid[0] * grid[1], args)

    def time(call: Callable[[], Any], *generators: torch.Generator) -> dict[str, float]:
        return microseconds(call, graph=args.graph, min_time=args.seconds, generators=generators)

    full = time(lambda: layer(x, x, x))
    for method, ratio in names:
        config = config_of(method, ratio)
        total = time(merged_step(layer, x, grid, config))

        def planned(config: ToMeConfig = config):
            return ModelCall(config, grid, x.device).plan(x, grid)

        plan = planned()
        y = plan.merge(x)
        theirs: Any = ""
        try:
            match, generator = tomesd_match(x, grid, ratio)
            if method == "merge":
                theirs = time(lambda match=match: tomesd_layer(layer, x, match), generator)["median"]
        except ImportError:
            pass
        yield {
            "tokens": grid[0] * grid[1], "channels": channels, "method": method, "ratio": ratio,
            **columns(full, "full_us", "full_"),
            **columns({key: value / LAYERS for key, value in total.items()}, "total_us", "total_"),
            "match_us": time(planned)["median"],
            "merge_us": time(lambda plan=plan: plan.merge(x))["median"],
            "unmerge_us": time(lambda plan=plan, y=y: plan.unmerge(y))["median"] if config.kind.queries else 0.0,
            "tomesd_total_us": theirs,
        }  # fmt: skip


def main() -> None:
    parser = Arguments(__doc__, "float16")
    parser.add_argument("--batch", type=int, default=2, help="2 is one image with guidance")
    parser.some_of("--shapes", SHAPES, SHAPES, ["sd15-512"])
    parser.add_argument("--backend", default="default", choices=["default", *BACKENDS], help="on a GPU")
    parser.add_argument("--graph", action="store_true", help="capture each call as a CUDA graph")
    parser.add_argument("--seconds", type=float, default=0.2, help="time spent on each number")
    args = parser.parsed()
    mode = {"mode": "graph" if args.graph else "eager", "backend": args.backend}
    fixed = {"batch": args.batch, "dtype": args.dtype, "device": args.device, **mode}
    names = [(method, ratio) for method in METHODS for ratio in RATIOS.get(method, (0.5, 0.75))]
    jobs = [{"shape": shape, **fixed} for shape in args.shapes]
    with attention_by(args.backend):
        run_jobs(args, jobs, measure, lambda _: names, by="method ratio", first=())


if __name__ == "__main__":
    main()
