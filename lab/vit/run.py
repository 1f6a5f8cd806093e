"""Trains two small vision transformers and measures them: `python -m lab.vit.run --out lab/results/fidelity/vit.csv`.

A model that is in --models already is not trained again, so training and measuring can be two calls: the first with
--train-only, which may share a GPU, the second alone on it, since it takes times.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path

import torch
from torch.nn.attention import sdpa_kernel

from ..speed.common import machine
from ..store import save
from .measure import COMPARED_RS, RS, measure, variants
from .model import Shape
from .task import HELD_OUT_SEED, TRAIN_SEED, Task
from .train import BACKENDS, Recipe, train_missing


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
