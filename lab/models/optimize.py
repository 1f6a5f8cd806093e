"""What trainings of the lab share: noisy pictures, weights of the loss, steps within a budget, one step of the
optimizer; bytes to pictures, and files of weights."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from copy import deepcopy
from itertools import count
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from tqdm import tqdm

from .samplers import signal_and_noise


def as_pictures(pixels: Tensor) -> Tensor:
    """Bytes [B, H, W, 3] -> pictures [B, 3, H, W], -1 to 1, channels last in memory."""
    return pixels.permute(0, 3, 1, 2).float() / 127.5 - 1


def autocast(device: torch.device) -> AbstractContextManager:
    return torch.autocast("cuda", torch.bfloat16) if device.type == "cuda" else nullcontext()


def save_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: dict[str, str]) -> None:
    """Write them as they are; a run that is stopped while writing leaves the last whole file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".part")
    save_file({k: v.detach().cpu().contiguous() for k, v in tensors.items()}, partial, metadata=metadata)
    partial.replace(path)


def load_tensors(path: Path | str) -> tuple[dict[str, Tensor], dict[str, str]]:
    """(tensors by name, metadata)."""
    with safe_open(str(path), framework="pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}


def noisy(x0: Tensor, noise: Tensor, sigmas: Tensor, prediction: str = "v") -> tuple[Tensor, Tensor]:
    """Noisy pictures and what to predict, both [B, C, H, W], from pictures, noise and sigmas [B]."""
    signal, share = (f[:, None, None, None] for f in signal_and_noise(sigmas, prediction))  # (B, 1, 1, 1)
    if prediction == "v":
        target = signal * noise - share * x0
    else:
        target = noise - x0 if prediction == "flow" else noise
    return signal * x0 + share * noise, target


def loss_weights(sigmas: Tensor, prediction: str = "v") -> Tensor:
    """Weight of each sample's loss, [B]: 1 where noise prevails, less for nearly clean pictures; of a flow 1.

    After min-SNR (Hang et al., arXiv 2303.09556), but with the plain v-loss kept at high noise, where a few
    sampling steps decide what the picture shows. An error of epsilon is one of v times the signal's factor, so it
    weighs more the noisier the picture: up to 10 times.
    """
    if prediction == "flow":
        return torch.ones_like(sigmas)
    snr = sigmas**-2
    weights = (6.0 / (snr + 1)).clamp(0.15, 1.0)
    return weights if prediction == "v" else (weights * (1 + sigmas**2)).clamp(max=10.0)


def stratified_steps(batch: int, steps: int, generator: torch.Generator, device: torch.device) -> Tensor:
    """Training steps [B], one from each of B equal slices of the schedule: a less noisy loss."""
    offset = torch.rand(batch, generator=generator, device=device)
    return ((torch.arange(batch, device=device) + offset) * (steps / batch)).long().clamp(max=steps - 1)


class Ema:
    """A copy of a model with an exponential moving average of what is trained, a short one at first: early
    checkpoints are worth a look."""

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay, self.count = decay, 0
        self.model = deepcopy(model).eval()
        self.average, self.source = (
            [p.detach() for p in each.parameters() if p.requires_grad] for each in (self.model, model)
        )

    def update(self) -> None:
        self.count += 1
        decay = min(self.decay, (1 + self.count) / (10 + self.count))
        torch._foreach_lerp_(self.average, self.source, 1 - decay)


def learning_rate(step: int, progress: float, peak: float) -> float:
    """Linear warm-up over 150 steps, times a cosine over ``progress`` (0 to 1 of the budget) to 0.02 of the peak."""
    cosine = 0.5 * (1 + math.cos(math.pi * min(max(progress, 0.0), 1.0)))
    return peak * min(1.0, (step + 1) / 150) * (0.02 + 0.98 * cosine)


def budgeted(seconds: float | None, steps: int | None, desc: str) -> Iterator[tuple[int, float]]:
    """(step, share done) until the seconds or the steps are over, whichever is first, with a bar on stderr. The first
    step's start-up does not count."""
    bar = tqdm(total=100, unit="%", desc=desc, file=sys.stderr, mininterval=5)
    start = time.monotonic()
    for step in count():
        now = time.monotonic()
        start = now if step == 1 else start
        done = max(step / steps if steps else 0.0, (now - start) / seconds if seconds else 0.0)
        bar.update(int(100 * min(done, 1.0)) - bar.n)
        if done >= 1:
            bar.close()
            return
        yield step, done


def adamw(
    module: nn.Module, rate: float, decay: float = 0.01, last_beta: float = 0.99, keeps: tuple[str, ...] = ()
) -> torch.optim.AdamW:
    """AdamW on what is trained of a module. Vectors do not decay, nor the parameters named in `keeps`."""
    named = [(name, p) for name, p in module.named_parameters() if p.requires_grad]
    decays = [p for name, p in named if p.ndim > 1 and name not in keeps]
    others = [p for name, p in named if p.ndim <= 1 or name in keeps]
    groups = [{"params": decays, "weight_decay": decay}, {"params": others, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, rate, betas=(0.9, last_beta), fused=named[0][1].device.type == "cuda")


def descend(optimizer: torch.optim.Optimizer, loss: Tensor, rate: float | None = None) -> Tensor:
    """One step at this rate (None: the optimizer's own), gradients clipped to a norm of 1. Gives the loss back."""
    for group in optimizer.param_groups:
        group["lr"] = group["lr"] if rate is None else rate
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    nn.utils.clip_grad_norm_([p for group in optimizer.param_groups for p in group["params"]], 1.0)
    optimizer.step()
    return loss.detach()
