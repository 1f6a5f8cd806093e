"""Large vision transformers, images a second: `python -m lab.speed.vit --out lab/results/speed/vit.csv`.

timm's VisionTransformer with random weights, whole forwards in inference mode under SDPA. "limit" has the same number
of tokens in each block at no cost (the first ones are taken), so it is what merging could reach at most. All variants
of a model take turns, so that none has the GPU at another clock.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from lab.vit.measure import Variant, throughput
from lab.vit.model import Shape, build

from .common import BACKENDS, DTYPES, attention_by, machine, save, show


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
SHARES = (0.25, 0.5, 0.75, 0.95)


def variants(model: Model, shares: Sequence[float]) -> list[Variant]:
    """Unmerged; merged with a constant and a falling r, and without weights for keys; and the limit."""
    found = [Variant("bipartite", "constant", 0)]
    for method in ("bipartite", "bipartite, unweighted", "limit"):
        found += [Variant(method, "constant", model.r(share)) for share in shares]
    return found + [Variant("bipartite", "falling", model.r(share)) for share in shares]


def measure(name: str, dtype: str, args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """The rows of one model."""
    model = MODELS[name]
    shape, batch = model.shape, args.batch or model.batch
    gpus = ["cuda"] if args.device == "cuda" else []
    with torch.random.fork_rng(devices=gpus), torch.device(args.device):
        torch.manual_seed(0)
        net = build(shape).to(DTYPES[dtype]).eval().requires_grad_(False)
        images = torch.randn(batch, 3, shape.size, shape.size).to(DTYPES[dtype])
    kinds = variants(model, args.shares)
    speeds = throughput(net, images, kinds, args.rounds)
    unmerged = speeds[kinds[0]]["images_s"]
    for kind in kinds:
        yield {
            "model": name,
            "pixels": shape.size,
            "channels": shape.channels,
            "depth": shape.depth,
            "batch": batch,
            "dtype": dtype,
            "device": args.device,
            "backend": args.backend,
            "method": kind.method if kind.r else "unmerged",
            "schedule": kind.schedule if kind.r else "",
            "r": kind.r,
            "tokens": shape.tokens + 1,
            "tokens_left": kind.spread(shape.depth, shape.tokens)[-1],
            **speeds[kind],
            "speedup": speeds[kind]["images_s"] / unmerged,
            "rounds": args.rounds,
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=["cpu", "cuda"])
    parser.add_argument("--models", nargs="+", choices=list(MODELS), help="all large ones on a GPU, small on the CPU")
    parser.add_argument("--dtypes", nargs="+", choices=list(DTYPES), help="float16 and bfloat16; float32 on the CPU")
    parser.add_argument(
        "--shares", type=float, nargs="+", default=SHARES, help="of the patches that are gone at the end"
    )
    parser.add_argument("--backend", default="flash", choices=["default", *BACKENDS], help="on a GPU")
    parser.add_argument("--batch", type=int, help="images at a time (default: by the model)")
    parser.add_argument("--rounds", type=int, default=7, help="times that each variant is measured")
    parser.add_argument("--json", action="store_true", help="one JSON list on stdout instead of CSV")
    parser.add_argument("--commit", help="where the tree is no git checkout")
    parser.add_argument("--out", type=Path, help="a CSV file to write as well")
    args = parser.parse_args()
    gpu = args.device == "cuda"
    models = args.models or ([name for name in MODELS if name != "small"] if gpu else ["small"])
    about = machine(args.device, args.commit)
    rows: list[dict[str, Any]] = []
    timm = version("timm")
    for dtype in args.dtypes or (["float16", "bfloat16"] if gpu else ["float32"]):
        for name in models:
            print(f"{name} in {dtype}", file=sys.stderr)
            with attention_by(args.backend):
                rows += [{**row, "timm": timm, **about} for row in measure(name, dtype, args)]
            save(rows, args.out)  # as it goes, so that an interrupted run keeps what it has
    show(rows, args.json)


if __name__ == "__main__":
    main()
