"""Trains the small vision transformer without merging and with it, for the same number of steps."""

from __future__ import annotations

import math
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

import shared_tome.vit as vit

from .. import store
from ..models.optimize import adamw, autocast, budgeted, descend
from .model import Shape, Task, build, load, save

SEED = 606
# r = 11 in each of 12 blocks leaves 124 of the 256 patches: half of them.
MERGED_R = 11
MODELS = {"unmerged": 0, "merged": MERGED_R}
"""Name of a trained model: how many tokens fewer in each block it was trained with."""
# The second model may take so many times as long as the first to get to the same number of steps.
PATIENCE = 1.25


@dataclass(frozen=True)
class Recipe:
    """How to train. seconds: at most so long for each model; the rate falls to 0 by then."""

    steps: int = 4000
    seconds: float = 95.0
    batch: int = 256
    rate: float = 1e-3
    decay: float = 0.05
    warmup: float = 0.05
    smoothing: float = 0.1
    drop_path: float = 0.05


def rate_at(progress: float, recipe: Recipe) -> float:
    """The learning rate at a share of the training: rises in a straight line, then half a cosine down to 0."""
    if progress < recipe.warmup:
        return recipe.rate * max(progress, 1e-3) / recipe.warmup
    return recipe.rate * 0.5 * (1 + math.cos(math.pi * min(1.0, (progress - recipe.warmup) / (1 - recipe.warmup))))


# Without cuDNN's attention, which makes a new plan for each number of tokens.
BACKENDS = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]


def train(task: Task, r: int, recipe: Recipe, shape: Shape, device: str, log: Path | None = None) -> tuple:
    """(the model, how many steps it took, seconds). r: tokens fewer in each block while training."""
    gpus = [torch.cuda.current_device()] if device == "cuda" else []
    with torch.random.fork_rng(devices=gpus), sdpa_kernel(BACKENDS):
        torch.manual_seed(SEED)  # the weights, and which paths are dropped
        model = build(shape, recipe.drop_path).to(device)
        if r:
            vit.apply_patch(model, r, restore="none")
        try:
            steps, seconds = _train(model.train(), task, recipe, device, log)
        finally:
            vit.remove_patch(model)
    return model.eval(), steps, seconds


def _train(model: nn.Module, task: Task, recipe: Recipe, device: str, log: Path | None) -> tuple[int, float]:
    optimizer = adamw(model, recipe.rate, recipe.decay, 0.98)
    generator = torch.Generator(device).manual_seed(SEED)
    rows, recent, begun, done = [], [], time.monotonic(), 0
    for step, progress in budgeted(recipe.seconds, recipe.steps, "vit"):
        pictures, classes = task.draw(recipe.batch, generator)
        with autocast(torch.device(device)):
            scores = model(pictures).float()
        loss = F.cross_entropy(scores, classes, label_smoothing=recipe.smoothing)
        loss = descend(optimizer, loss, rate_at(progress, recipe))
        recent.append(torch.stack((loss, (scores.detach().argmax(-1) == classes).float().mean())))
        done = step + 1
        if done % 100 == 0:
            mean, right = torch.stack(recent).mean(0).tolist()
            took = f"{time.monotonic() - begun:.1f}"
            rows.append({"step": done, "seconds": took, "loss": f"{mean:.4f}", "right": f"{100 * right:.2f}"})
            recent = []
    store.save(rows, log)
    return done, time.monotonic() - begun


def train_missing(folder: Path, task: Task, recipe: Recipe, shape: Shape, device: str) -> None:
    """Train each model whose file is not in the folder; the second for as many steps as the first one took."""
    for name, r in MODELS.items():
        path = folder / f"{name}.safetensors"
        if not path.exists():
            model, steps, seconds = train(task, r, recipe, shape, device, folder / f"{name}.log.csv")
            about = {**asdict(recipe), "r": r, "steps": steps, "took": round(seconds, 1), "per_class": task.per_class}
            save(path, model, shape, about)
            print(f"{name}: {steps} steps in {seconds:.0f} s", flush=True)
        recipe = replace(recipe, steps=load(path)[2]["steps"], seconds=recipe.seconds * PATIENCE)
