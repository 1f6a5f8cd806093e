"""Trains two small vision transformers and measures them: `python -m lab.vit.run --out lab/results/fidelity/vit.csv`.

A model that is in --models already is not trained again, so training and measuring can be two calls: the first with
--train-only, which may share a GPU, the second alone on it, since it takes times.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import sdpa_kernel
from tqdm import tqdm

import shared_tome.vit as vit
from shared_tome.vit.options import Options

from ..speed.common import machine
from ..store import save
from ..timing import Moment, columns, spread, take_turns
from .methods import METHODS, apply, late
from .model import HELD_OUT_SEED, TRAIN_SEED, Shape, Task, load
from .train import BACKENDS, MERGED_R, MODELS, Recipe, train_missing

RS = (0, 2, 4, 6, 8, 10, MERGED_R, 12, 14, 16, 18, 20)
COMPARED_RS = (4, 8, MERGED_R, 16, 20)
SCHEDULES = ("constant", "falling", "late")
COMPARED = tuple(method for method in METHODS if method != "bipartite")


@dataclass(frozen=True)
class Variant:
    """How tokens go: a method (methods.py), r in each block on average, and how it is spread over the blocks."""

    method: str
    schedule: str
    r: int

    def put_on(self, model: nn.Module) -> None:
        """Merge from now on; r = 0 is the model as it was trained, without a hook."""
        vit.remove_patch(model)
        if self.r and self.schedule == "late":
            apply(model, self.method, late(self.r, len(model.blocks)))
        elif self.r:
            apply(model, self.method, self.r, self.schedule)

    def spread(self, depth: int, tokens: int, prefix: int = 1) -> list[int]:
        """How many tokens each block's MLP has, the prefix included. tokens: patches, without the prefix."""
        r = late(self.r, depth) if self.schedule == "late" else self.r
        schedule = "constant" if self.schedule == "late" else self.schedule
        left, counts = tokens + prefix, []
        for goes in Options(r=r, schedule=schedule).per_block(depth, tokens):
            left -= min(goes, (left - prefix) // 2)
            counts.append(left)
        return counts


def variants(rs: Sequence[int] = RS, compared: Sequence[int] = COMPARED_RS) -> list[Variant]:
    """All that is measured: bipartite matching in every schedule, the other methods at a constant r."""
    found = [Variant("bipartite", "constant", 0)] if 0 in rs else []
    found += [Variant("bipartite", schedule, r) for schedule in SCHEDULES for r in rs if r]
    return found + [Variant(method, "constant", r) for method in COMPARED for r in compared]


@torch.no_grad()
def right(model: nn.Module, pictures: Tensor, classes: Tensor, batch: int) -> Tensor:
    """Which pictures [n, 3, H, W] the model names rightly: [n] of 0 and 1, float64 on the CPU."""
    dtype = next(model.parameters()).dtype
    found = [model(part.to(dtype)).argmax(-1) for part in pictures.split(batch)]
    return (torch.cat(found) == classes).double().cpu()


def accuracy(found: Tensor, base: Tensor) -> dict[str, float]:
    """In percent: the accuracy and its binomial error; how many points are lost against `base` on the same pictures,
    and the error of that paired difference."""
    count = len(found)
    share, lost = found.mean().item(), base - found
    return {
        "accuracy": 100 * share,
        "accuracy_se": 100 * (share * (1 - share) / count) ** 0.5,
        "lost": 100 * lost.mean().item(),
        "lost_se": 100 * lost.std().item() / count**0.5,
    }


@torch.no_grad()
def throughput(
    model: nn.Module, batch: Tensor, kinds: Iterable[Variant], rounds: int
) -> dict[Variant, dict[str, float]]:
    """Images a second: {"images_s", "images_s_p20", "images_s_p80"}, for each variant in turn, `rounds` times over."""

    def turn(kind: Variant) -> list[float]:
        kind.put_on(model)
        begin = Moment(batch.device)
        model(batch)
        return [Moment(batch.device) - begin]

    turns = {kind: lambda kind=kind: turn(kind) for kind in kinds}
    take_turns(turns, 0.0, least=1)  # kernels are compiled
    found = take_turns(turns, 0.0, least=rounds)
    vit.remove_patch(model)
    return {kind: images_per_second(times, len(batch)) for kind, times in found.items()}


def images_per_second(times: list[float], batch: int) -> dict[str, float]:
    """Of a batch's times in milliseconds."""
    return columns(spread([1e3 * batch / span for span in times]), "images_s", "images_s_")


def measure(
    folder: Path, pictures: Tensor, classes: Tensor, kinds: list[Variant], batch: int, rounds: int, device: str
) -> list[dict[str, Any]]:
    """The rows of both models. Points lost are against the model trained without merging, unmerged; methods to
    compare with are measured on that one alone."""
    rows: list[dict[str, Any]] = []
    base = Variant("bipartite", "constant", 0)
    speeds: dict[Variant, dict[str, float]] = {}
    for name in MODELS:
        model, shape, training = load(folder / f"{name}.safetensors")
        dtype = torch.bfloat16 if device == "cuda" else torch.float32
        model = model.to(device, dtype).requires_grad_(False)
        if not speeds:  # speed does not depend on the weights
            part = pictures[torch.arange(batch) % len(pictures)].to(dtype)
            speeds = throughput(model, part, [base, *(kind for kind in kinds if kind != base)], rounds)
            base_right = right(model, pictures, classes, batch)
        for kind in tqdm(kinds, desc=name, unit="variant"):
            if name != "unmerged" and kind.method != "bipartite":
                continue
            kind.put_on(model)
            found = {} if kind.method == "limit" else accuracy(right(model, pictures, classes, batch), base_right)
            blank = dict.fromkeys(("accuracy", "accuracy_se", "lost", "lost_se"), "")
            rows.append({
                "trained": name, "train_r": training["r"], "train_steps": training["steps"],
                "method": kind.method, "schedule": kind.schedule, "r": kind.r,
                "tokens_left": kind.spread(shape.depth, shape.tokens)[-1],
                **(found or blank), **speeds[kind], "speedup": speeds[kind]["images_s"] / speeds[base]["images_s"],
                "pictures": len(pictures), "batch": batch, "precision": str(dtype).removeprefix("torch."),
                "rounds": rounds,
            })  # fmt: skip
        vit.remove_patch(model)
    return rows


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m lab.vit.run", description=__doc__.splitlines()[0])
    parser.add_argument("--models", type=Path, default=Path("out/vit"), help="folder of the trained models")
    parser.add_argument("--out", type=Path, help="CSV file to write (default: none, the models are trained alone)")
    parser.add_argument("--train-only", action="store_true", help="train what is missing and stop")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=["cpu", "cuda"])
    parser.add_argument("--workers", type=int, help="processes that draw pictures (default: one a core)")
    for name, help in (
        ("steps", "of each training, at most"),
        ("seconds", "of each training, at most"),
        ("batch", "of training"),
        ("rate", "highest learning rate"),
    ):
        default = getattr(Recipe, name)
        parser.add_argument(f"--{name}", type=type(default), default=default, help=help)
    parser.add_argument("--per-class", type=int, default=512, help="drawings of each class to train on")
    parser.add_argument("--held-out", type=int, default=400, help="held-out pictures of each class")
    parser.add_argument("--timed-batch", type=int, default=2048, help="pictures at a time when measuring")
    parser.add_argument("--rounds", type=int, default=10, help="times that each variant is timed")
    parser.add_argument("--rs", type=int, nargs="+", default=RS, help="tokens fewer in each block")
    parser.add_argument("--compared-rs", type=int, nargs="+", default=COMPARED_RS, help="the same for other methods")
    for name in ("depth", "channels", "heads"):
        parser.add_argument(f"--{name}", type=int, default=getattr(Shape, name))
    parser.add_argument("--commit", help="where the tree is no git checkout")
    args = parser.parse_args(argv)
    if not args.train_only and args.out is None:
        parser.error("give --out FILE.csv, or --train-only")
    return args


def main(argv: Sequence[str] | None = None) -> None:
    args = parse(argv)
    if args.device == "cuda":
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    recipe = Recipe(steps=args.steps, seconds=args.seconds, batch=args.batch, rate=args.rate)
    shape = Shape(channels=args.channels, depth=args.depth, heads=args.heads)
    task = Task(args.per_class, TRAIN_SEED, args.device, args.workers)
    train_missing(args.models, task, recipe, shape, args.device)
    if args.train_only:
        return
    held_out = Task(args.held_out, HELD_OUT_SEED, args.device, args.workers)
    pictures, classes = held_out.every()
    kinds = variants(args.rs, args.compared_rs)
    with sdpa_kernel(BACKENDS):
        rows = measure(args.models, pictures, classes, kinds, args.timed_batch, args.rounds, args.device)
    about = {"timm": version("timm"), **machine(args.device, args.commit)}
    save([{**row, **about} for row in rows], args.out)


if __name__ == "__main__":
    main()
