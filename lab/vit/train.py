"""Trains the small vision transformer without merging and with it, for the same number of steps."""

from __future__ import annotations

import csv
import math
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from tqdm import tqdm

import shared_tome.vit as vit

from .model import Shape, build, load, save
from .task import Task

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


def precision(device: str) -> AbstractContextManager:
    """bfloat16 where there are matrix units for it."""
    return torch.autocast("cuda", torch.bfloat16) if device == "cuda" else nullcontext()


def _steps(recipe: Recipe) -> Iterator[tuple[int, float]]:
    """(step, share done), until the steps or the seconds are over. The first step's start-up does not count."""
    start = time.monotonic()
    for step in range(recipe.steps):
        if step == 1:
            start = time.monotonic()
        progress = max(step / recipe.steps, (time.monotonic() - start) / recipe.seconds)
        if progress >= 1:
            return
        yield step, progress


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
    groups = [
        {"params": [p for p in model.parameters() if p.dim() > 1], "weight_decay": recipe.decay},
        {"params": [p for p in model.parameters() if p.dim() <= 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=recipe.rate, betas=(0.9, 0.98), fused=device == "cuda")
    generator = torch.Generator(device).manual_seed(SEED)
    rows, begun, done = [], time.monotonic(), 0
    losses, right = [], []
    for step, progress in tqdm(_steps(recipe), total=recipe.steps, unit="step", mininterval=5):
        for group in optimizer.param_groups:
            group["lr"] = rate_at(progress, recipe)
        pictures, classes = task.draw(recipe.batch, generator)
        with precision(device):
            scores = model(pictures).float()
        loss = F.cross_entropy(scores, classes, label_smoothing=recipe.smoothing)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        done = step + 1
        losses.append(loss.detach())
        right.append((scores.detach().argmax(-1) == classes).float().mean())
        if done % 100 == 0:
            took = time.monotonic() - begun
            rows.append([done, f"{took:.1f}", f"{_mean(losses):.4f}", f"{100 * _mean(right):.2f}"])
            tqdm.write(f"step {done}: loss {rows[-1][2]}, {rows[-1][3]}% right, {took:.0f} s")
            losses, right = [], []
    if log is not None:
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("w", newline="", encoding="utf-8") as file:
            csv.writer(file, lineterminator="\n").writerows([["step", "seconds", "loss", "right"], *rows])
    return done, time.monotonic() - begun


def _mean(values: list) -> float:
    return torch.stack(values).mean().item()


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
