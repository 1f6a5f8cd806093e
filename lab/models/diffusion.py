"""Noise schedules, predictions, averaging of weights and learning rate of the lab's models.

v-prediction is Salimans and Ho, "Progressive Distillation" (arXiv 2202.00512): of x_t = cos(a) x_0 + sin(a) e
the network gives v = cos(a) e - sin(a) x_0. epsilon-prediction is Ho et al. (arXiv 2006.11239): the network gives
e, the noise. flow is the rectified flow of Liu et al. (arXiv 2209.03003), that of Stable Diffusion 3 and Flux: of
x_t = (1 - t) x_0 + t e the network gives e - x_0.

All schedules are told as sigmas, noise over signal: tan(a), or t / (1 - t).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from copy import deepcopy
from functools import partial
from typing import TypeVar

import torch
from torch import Tensor, nn

STEPS = 1000
SIGMA_MIN, SIGMA_MAX = 0.01, 100.0
PREDICTIONS = ("v", "epsilon", "flow")


def cosine_sigmas(steps: int = STEPS, sigma_min: float = SIGMA_MIN, sigma_max: float = SIGMA_MAX) -> Tensor:
    """Noise over signal at each training step, [steps], rising: tan of evenly spaced angles.

    This is the cosine schedule (Nichol and Dhariwal, arXiv 2102.09672) cut off at both ends, so that no entry
    is zero, infinite or equal to another, which samplers that look steps up by sigma rely on.
    """
    angles = torch.linspace(math.atan(sigma_min), math.atan(sigma_max), steps, dtype=torch.float64)
    return angles.tan().float()


def scaled_linear_sigmas(steps: int = STEPS, first: float = 0.00085, last: float = 0.012) -> Tensor:
    """Noise over signal at each training step, [steps], rising from 0.03 to 14.6: the schedule of Stable Diffusion 1.x.

    The roots of the betas are evenly spaced (Rombach et al., arXiv 2112.10752).
    """
    betas = torch.linspace(first**0.5, last**0.5, steps, dtype=torch.float64) ** 2
    kept = (1 - betas).cumprod(0)
    return ((1 - kept) / kept).sqrt().float()


def flow_sigmas(steps: int = STEPS, shift: float = 1.0, margin: float = 0.001) -> Tensor:
    """Noise over signal at each training step, [steps], rising: t / (1 - t) for evenly spaced t, then times shift.

    shift: more noise for larger pictures, the root of how many times as many pixels they have (Esser et al., arXiv
    2403.03206, section 5.3.2). margin: t begins and ends so far from 0 and 1, so that no entry is zero or infinite.
    """
    t = torch.linspace(margin, 1 - margin, steps, dtype=torch.float64)
    return (shift * t / (1 - t)).float()


SCHEDULES: dict[str, Callable[[], Tensor]] = {
    "cosine": cosine_sigmas,
    "scaled_linear": scaled_linear_sigmas,
    "flow": flow_sigmas,
    "flow3": partial(flow_sigmas, shift=3.0),
}


Sigmas = TypeVar("Sigmas", float, Tensor)


def signal_and_noise(sigmas: Sigmas, prediction: str = "v") -> tuple[Sigmas, Sigmas]:
    """The factors of picture and noise in what the network is given; same shape as sigmas.

    cos(a) and sin(a) for tan(a) = sigmas; of a flow 1 - t and t for t / (1 - t) = sigmas.
    """
    signal = 1 / (1 + sigmas) if prediction == "flow" else (1 + sigmas**2) ** -0.5
    return signal, signal * sigmas


def noisy(x0: Tensor, noise: Tensor, sigmas: Tensor, prediction: str = "v") -> tuple[Tensor, Tensor]:
    """Noisy pictures and what to predict, both [B, C, H, W], from pictures, noise and sigmas [B]."""
    signal, share = (f[:, None, None, None] for f in signal_and_noise(sigmas, prediction))  # (B, 1, 1, 1)
    if prediction == "v":
        target = signal * noise - share * x0
    else:
        target = noise - x0 if prediction == "flow" else noise
    return signal * x0 + share * noise, target


def clean(prediction: str, x: Tensor, out: Tensor, signal: Tensor | float, share: Tensor | float) -> Tensor:
    """The picture that a network's output stands for; x = signal * picture + share * noise, all [B, C, H, W]."""
    if prediction == "v":
        return signal * x - share * out
    return x - share * out if prediction == "flow" else (x - share * out) / signal


def loss_weights(sigmas: Tensor, prediction: str = "v", gamma: float = 6.0, floor: float = 0.15) -> Tensor:
    """Weight of each sample's loss, [B]: 1 where noise prevails, less for nearly clean pictures; of a flow 1.

    After min-SNR (Hang et al., arXiv 2303.09556), but with the plain v-loss kept at high noise, where a few
    sampling steps decide what the picture shows. An error of epsilon is one of v times the signal's factor, so it
    weighs more the noisier the picture: up to 10 times.
    """
    if prediction == "flow":
        return torch.ones_like(sigmas)
    snr = sigmas**-2
    weights = (gamma / (snr + 1)).clamp(floor, 1.0)
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


def learning_rate(step: int, progress: float, peak: float, warmup: int = 150, final: float = 0.02) -> float:
    """Linear warm-up over steps, then a cosine over ``progress`` (0 to 1 of the budget) to final·peak."""
    cosine = 0.5 * (1 + math.cos(math.pi * min(max(progress, 0.0), 1.0)))
    return peak * min(1.0, (step + 1) / warmup) * (final + (1 - final) * cosine)
