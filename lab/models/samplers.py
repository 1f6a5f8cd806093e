"""The samplers, on pictures plus noise: x = x0 + sigma * noise, sigma from the model's own schedule.

ddim: Song et al. (arXiv 2010.02502) with eta 0, which in these units is Euler's method, also that of a rectified flow
(Liu et al., arXiv 2209.03003): its x_t is x / (1 + sigma), its t is sigma / (1 + sigma). euler_a: ancestral
sampling, Song et al. (arXiv 2011.13456), appendix F. dpmpp2m: DPM-Solver++(2M), Lu et al. (arXiv 2211.01095),
algorithm 2. lcm: multistep consistency sampling, Song et al. (arXiv 2303.01469), algorithm 1, with an ordinary
model in place of a consistency model: predict, add noise, repeat.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from .diffusion import clean, signal_and_noise

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

    Guidance: Ho and Salimans (arXiv 2207.12598). prediction: one of PREDICTIONS (diffusion.py).
    """

    def denoised(x: Tensor, step: int) -> Tensor:
        signal, share = signal_and_noise(sigmas[step], prediction)
        x = x * signal
        times = torch.full((len(context),), float(order[step]), device=x.device)
        out, free = network(torch.cat((x, x)).to(context.dtype), times, context).float().chunk(2)
        return clean(prediction, x, free + guidance * (out - free), signal, share)

    return denoised


def sample(
    network: Network,
    noise: Tensor,
    context: Tensor,
    unconditional: Tensor,
    table: Tensor,
    steps: int = 30,
    guidance: float = GUIDANCE,
    prediction: str = "v",
) -> Tensor:
    """DDIM: pictures (or latents) [B, C, H, W] of about -1 to 1 from ``noise`` [B, C, H, W] of unit variance.

    context: [B, M, D]. unconditional: [1, M, D]. table: [STEPS], a schedule's sigmas.
    """
    both = torch.cat((context, unconditional.expand(len(context), -1, -1)))
    order, sigmas = step_sigmas(table, steps)
    denoised = denoiser(network, both, order, sigmas, prediction, guidance)
    return run(Sampler(ddim, steps, ""), denoised, noise, sigmas, lambda: noise)
