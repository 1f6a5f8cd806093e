"""Large vision transformers, images a second: `python -m lab.speed.vit --out lab/results/speed/vit.csv`.

timm's VisionTransformer with random weights, whole forwards in inference mode under SDPA. "limit" has the same number
of tokens in each block at no cost (the first ones are taken), so it is what merging could reach at most. All variants
of a model take turns, so that none has the GPU at another clock.
"""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

import torch

from ..vit.model import Shape, build
from ..vit.run import Variant, throughput
from .common import BACKENDS, DTYPES, Arguments, Job, attention_by, run_jobs


@dataclass(frozen=True)
class Model:
    """A shape, and how many images are measured at a time."""

    shape: Shape
    batch: int

    def r(self, share: float) -> int:
        """How many tokens fewer in each block, so that about that share of the patches is gone in the end."""
        return round(share * self.shape.tokens / self.shape.depth)


MODELS = {
    "ViT-L/16 384": Model(Shape(384, 16, 1024, 24, 16, 1000), 64),
    "ViT-L/14 518": Model(Shape(518, 14, 1024, 24, 16, 1000), 32),
    "ViT-H/14 378": Model(Shape(378, 14, 1280, 32, 16, 1000), 32),
    "ViT-H/14 518": Model(Shape(518, 14, 1280, 32, 16, 1000), 32),
    "small": Model(Shape(64, 8, 64, 4, 2, 10), 2),  # for a look at this program
}
UNMERGED = ("unmerged", "", 0)
SHARES = (0.25, 0.5, 0.75, 0.95)  # of the patches that are gone


def variants(job: Job) -> list[tuple[str, str, int]]:
    """(method, schedule, r): unmerged; merged with a constant and a falling r, and without weights for keys; and the
    limit."""
    model = MODELS[job["model"]]
    found = [UNMERGED]
    for method in ("bipartite", "bipartite, unweighted", "limit"):
        found += [(method, "constant", model.r(share)) for share in SHARES]
    return found + [("bipartite", "falling", model.r(share)) for share in SHARES]


def measure(job: Job, names: Sequence[tuple[str, str, int]], args: Namespace) -> Iterator[dict[str, Any]]:
    """The rows of one model; the first of the names is unmerged."""
    shape, dtype = MODELS[job["model"]].shape, DTYPES[job["dtype"]]
    with torch.random.fork_rng(devices=["cuda"] if args.on_gpu else []), torch.device(args.device):
        torch.manual_seed(0)
        net = build(shape).to(dtype).eval().requires_grad_(False)
        images = torch.randn(job["batch"], 3, shape.size, shape.size).to(dtype)
    kinds = {name: Variant(*name) if name[2] else Variant("bipartite", "constant", 0) for name in names}
    with attention_by(args.backend):
        speeds = throughput(net, images, list(kinds.values()), args.rounds)
    base = speeds[kinds[names[0]]]["images_s"]
    for (method, schedule, r), kind in kinds.items():
        yield {
            "pixels": shape.size, "channels": shape.channels, "depth": shape.depth,
            "method": method, "schedule": schedule, "r": r,
            "tokens": shape.tokens + 1, "tokens_left": kind.spread(shape.depth, shape.tokens)[-1],
            **speeds[kind], "speedup": speeds[kind]["images_s"] / base, "rounds": args.rounds,
        }  # fmt: skip


def main() -> None:
    parser = Arguments(__doc__)
    parser.some_of("--models", MODELS, [name for name in MODELS if name != "small"], ["small"])
    parser.some_of("--dtypes", DTYPES, ["float16", "bfloat16"], ["float32"])
    parser.add_argument("--backend", default="flash", choices=["default", *BACKENDS], help="on a GPU")
    parser.add_argument("--batch", type=int, help="images at a time (default: by the model)")
    parser.add_argument("--rounds", type=int, default=7, help="times that each variant is measured")
    args = parser.parsed()
    fixed = {"device": args.device, "backend": args.backend}
    jobs = [
        {"model": name, "batch": args.batch or MODELS[name].batch, "dtype": dtype, **fixed}
        for dtype in args.dtypes
        for name in args.models
    ]
    about = {"timm": version("timm")}
    run_jobs(args, jobs, measure, variants, by="method schedule r", first=[UNMERGED], about=about)


if __name__ == "__main__":
    main()
