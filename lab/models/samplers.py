"""Noise schedules, predictions and samplers.

All schedules are told as sigmas, noise over signal: tan(a), or t / (1 - t).

v-prediction is Salimans and Ho, "Progressive Distillation" (arXiv 2202.00512): of x_t = cos(a) x_0 + sin(a) e
the network gives v = cos(a) e - sin(a) x_0. epsilon-prediction is Ho et al. (arXiv 2006.11239): the network gives
e, the noise. flow is the rectified flow of Liu et al. (arXiv 2209.03003), that of Stable Diffusion 3 and Flux: of
x_t = (1 - t) x_0 + t e the network gives e - x_0.

Samplers work on pictures plus noise: x = x0 + sigma * noise. ddim: Song et al. (arXiv 2010.02502) with eta 0, which in
these units is Euler's method, also that of a rectified flow: its x_t is x / (1 + sigma), its t is sigma / (1 + sigma).
euler_a: ancestral sampling, Song et al. (arXiv 2011.13456), appendix F. dpmpp2m: DPM-Solver++(2M), Lu et al. (arXiv
2211.01095), algorithm 2. lcm: multistep consistency sampling, Song et al. (arXiv 2303.01469), algorithm 1, with an
ordinary model in place of a consistency model: predict, add noise, repeat.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

import torch
from torch import Tensor

STEPS = 1000
SIGMA_MIN, SIGMA_MAX = 0.01, 100.0
PREDICTIONS = ("v", "epsilon", "flow")


def cosine_sigmas() -> Tensor:
    """Tan of evenly spaced angles.

    This is the cosine schedule (Nichol and Dhariwal, arXiv 2102.09672) cut off at both ends, so that no entry
    is zero, infinite or equal to another, which samplers that look steps up by sigma rely on.
    """
    return torch.linspace(math.atan(SIGMA_MIN), math.atan(SIGMA_MAX), STEPS, dtype=torch.float64).tan().float()


def scaled_linear_sigmas() -> Tensor:
    """0.03 to 14.6, Stable Diffusion 1.x's: the betas' roots are evenly spaced (Rombach et al., arXiv 2112.10752)."""
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, STEPS, dtype=torch.float64) ** 2
    kept = (1 - betas).cumprod(0)
    return ((1 - kept) / kept).sqrt().float()


def flow_sigmas(shift: float = 1.0) -> Tensor:
    """t / (1 - t) for evenly spaced t, neither 0 nor 1, times shift.

    shift: more noise for larger pictures, the root of how many times as many pixels they have (Esser et al., arXiv
    2403.03206, section 5.3.2).
    """
    t = torch.linspace(0.001, 1 - 0.001, STEPS, dtype=torch.float64)
    return (shift * t / (1 - t)).float()


# Noise over signal at each training step, [STEPS], rising.
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


def clean(prediction: str, x: Tensor, out: Tensor, signal: Tensor | float, share: Tensor | float) -> Tensor:
    """The picture that a network's output stands for; x = signal * picture + share * noise, all [B, C, H, W]."""
    if prediction == "v":
        return signal * x - share * out
    return x - share * out if prediction == "flow" else (x - share * out) / signal


Denoised = Callable[[Tensor, int], Tensor]
"""(x [B, C, H, W], step) -> the predicted picture x0 [B, C, H, W]."""
Noise = Callable[[], Tensor]
"""Fresh noise [B, C, H, W] of unit variance."""
Update = Callable[["State"], Tensor]


@dataclass
class State:
    """What an update may look at: pictures at sigma, the prediction there, and the one before."""

    x: Tensor
    x0: Tensor
    sigma: float
    next: float
    last_x0: Tensor | None
    last_sigma: float
    noise: Noise


def ddim(s: State) -> Tensor:
    return s.x0 + (s.x - s.x0) * (s.next / s.sigma)


def euler_a(s: State) -> Tensor:
    up = min(s.next, (s.next**2 * (s.sigma**2 - s.next**2) / s.sigma**2) ** 0.5)
    down = (s.next**2 - up**2) ** 0.5
    x = s.x0 + (s.x - s.x0) * (down / s.sigma)
    return x + up * s.noise() if s.next > 0 else x


def dpmpp2m(s: State) -> Tensor:
    if s.next == 0:
        return s.x0
    x0 = s.x0
    if s.last_x0 is not None:
        # Steps in log(1 / sigma); the guess for x0 halfway is a line through the last two predictions.
        now, before = math.log(s.sigma / s.next), math.log(s.last_sigma / s.sigma)
        x0 = s.x0 + (s.x0 - s.last_x0) * (now / before / 2)
    return x0 + (s.x - x0) * (s.next / s.sigma)


def lcm(s: State) -> Tensor:
    return s.x0 + s.next * s.noise() if s.next > 0 else s.x0


@dataclass(frozen=True)
class Sampler:
    """inpaint: half of each picture is known, the sampler paints the rest."""

    update: Update
    steps: int
    title: str
    inpaint: bool = False


SAMPLERS: dict[str, Sampler] = {
    "ddim30": Sampler(ddim, 30, "DDIM, 30 steps"),
    "euler_a20": Sampler(euler_a, 20, "Euler ancestral, 20 steps"),
    "dpmpp2m15": Sampler(dpmpp2m, 15, "DPM++ 2M, 15 steps"),
    "lcm6": Sampler(lcm, 6, "LCM-like, 6 steps"),
    "flow28": Sampler(ddim, 28, "Euler, 28 steps"),
    "flow8": Sampler(ddim, 8, "Euler, 8 steps"),
    "inpaint30": Sampler(ddim, 30, "Inpainting half, DDIM, 30 steps", inpaint=True),
}
GUIDANCE = 3.0


def parse_sampler(name: str) -> tuple[Sampler, float]:
    """A sampler and its guidance from "ddim30" (guidance 3) or "ddim30@g7.5"."""
    plain, _, guidance = name.partition("@g")
    if plain not in SAMPLERS:
        raise ValueError(f"sampler must be one of {', '.join(SAMPLERS)}, with @g7.5 or none after it, got {name!r}")
    try:
        value = float(guidance) if guidance else GUIDANCE
    except ValueError:
        value = -1.0
    if not 0.0 <= value <= 100.0:
        raise ValueError(f"guidance must be a number from 0 to 100, got {guidance!r} in {name!r}")
    return SAMPLERS[plain], value


def step_sigmas(table: Tensor, steps: int) -> tuple[list[int], list[float]]:
    """The training steps [S] to visit and their sigmas [S + 1], which end in 0. table: [STEPS], rising."""
    order = [len(table) - 1 - int(i * len(table) / steps) for i in range(steps)]  # ComfyUI's "simple" scheduler
    return order, [*(table[i].item() for i in order), 0.0]


@torch.no_grad()
def run(sampler: Sampler, denoised: Denoised, start: Tensor, sigmas: list[float], noise: Noise) -> Tensor:
    """Pictures [B, C, H, W] from unit noise ``start`` [B, C, H, W]; sigmas: see step_sigmas."""
    x = start * (1 + sigmas[0] ** 2) ** 0.5
    last_x0, last_sigma = None, sigmas[0]
    for i, (sigma, after) in enumerate(zip(sigmas[:-1], sigmas[1:], strict=True)):
        x0 = denoised(x, i)
        x = sampler.update(State(x, x0, sigma, after, last_x0, last_sigma, noise))
        last_x0, last_sigma = x0, sigma
    return x


Network = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(x [B, C, H, W], training steps [B], context [B, M, D]) -> its prediction [B, C, H, W]."""


def denoiser(
    network: Network, context: Tensor, order: list[int], sigmas: list[float], prediction: str, guidance: float
) -> Denoised:
    """What the network predicts with guidance. context: [2 * B, M, D], of prompted rows, then of unprompted ones.

    Guidance: Ho and Salimans (arXiv 2207.12598). prediction: one of PREDICTIONS.
    """

    def denoised(x: Tensor, step: int) -> Tensor:
        signal, share = signal_and_noise(sigmas[step], prediction)
        x = x * signal
        times = torch.full((len(context),), float(order[step]), device=x.device)
        out, free = network(torch.cat((x, x)).to(context.dtype), times, context).float().chunk(2)
        return clean(prediction, x, free + guidance * (out - free), signal, share)

    return denoised


def sample(
    network: Network, noise: Tensor, context: Tensor, unconditional: Tensor, table: Tensor, steps: int = 30,
    guidance: float = GUIDANCE, prediction: str = "v",
) -> Tensor:  # fmt: skip
    """DDIM: pictures (or latents) [B, C, H, W] of about -1 to 1 from ``noise`` [B, C, H, W] of unit variance.

    context: [B, M, D]. unconditional: [1, M, D]. table: [STEPS], a schedule's sigmas.
    """
    both = torch.cat((context, unconditional.expand(len(context), -1, -1)))
    order, sigmas = step_sigmas(table, steps)
    denoised = denoiser(network, both, order, sigmas, prediction, guidance)
    return run(Sampler(ddim, steps, ""), denoised, noise, sigmas, lambda: noise)
