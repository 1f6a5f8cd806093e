"""What all rows of a measurement share: model, noise, classes; and how a variant's pictures and times are made."""

from __future__ import annotations

import hashlib
import time
from copy import deepcopy
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from shared_tome.schedule import ratio_at

from .hooks import Run, merged
from .methods import Variant
from .samplers import SAMPLERS, run, step_sigmas
from .train import load_model
from .unet import UNet

GUIDANCE = 3.0
PRECISIONS = ("float32", "mixed", "half")


@dataclass(frozen=True)
class Timing:
    """Milliseconds of a U-Net step: quantiles over repeats."""

    p20: float
    median: float
    p80: float

    def mixed(self, other: Timing, share: float) -> Timing:
        """The mean step of a run in which ``share`` of the steps are like the other."""
        mix = (a + (b - a) * share for a, b in zip(self, other, strict=True))
        return Timing(*mix)

    def __iter__(self):
        return iter((self.p20, self.median, self.p80))


class Bench:
    """Makes pictures with a variant of ToMe, always from the same noise and the same mix of classes.

    images: for each seed, classes in turn. batch: pictures at a time; each has a prompted and an unprompted row.
    precision: float32 (TF32 off); mixed (float32, but convolutions and linear layers in TF32 and self-attention in
    float16; the row "unmerged, float32" says how far that is from float32); half (float16 weights).
    """

    def __init__(
        self, file: Path, device: str, images: int, seeds: int, batch: int, precision: str = "float32"
    ) -> None:
        self.device, self.images, self.seeds, self.batch = torch.device(device), images, seeds, batch
        model, self.table, metadata = load_model(file)
        self.size = int(metadata["size"])
        self.hash = hashlib.sha256(file.read_bytes()).hexdigest()[:12]
        self.tokens = model.class_tokens.detach().to(self.device)  # (K + 1, M, D)
        self.dtype = torch.float16 if precision == "half" else torch.float32
        self.mixed = precision == "mixed"
        self.unet = model.unet.to(self.device, self.dtype).requires_grad_(False)
        self._timed: dict[tuple[str, float], Timing] = {}
        self._timed_unet: UNet | None = None

    def context(self, classes: Tensor) -> Tensor:
        """Prompted rows, then as many unprompted ones: [2 * b, M, D] for class numbers [b]."""
        free = self.tokens[-1:].expand(len(classes), -1, -1)
        return torch.cat((self.tokens[classes], free)).to(self.dtype)

    def pictures(self, variant: Variant, sampler: str) -> tuple[Tensor, Run]:
        """Pictures [seeds * images, 3, H, W] in float32 on the device, and the run with its count of work."""
        done = []
        mixed = self.mixed and not variant.strict
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = mixed
        for seed in range(self.seeds):
            generator = torch.Generator().manual_seed(1000 + seed)
            start = torch.randn((self.images, 3, self.size, self.size), generator=generator)
            for first in range(0, self.images, self.batch):
                part = start[first : first + self.batch].to(self.device)
                with merged(self.unet, variant, torch.float16 if mixed else None) as state:
                    done.append(self._sample(part, state, sampler, seed, first))
        return torch.cat(done), state

    def _sample(self, start: Tensor, state: Run, name: str, seed: int, first: int) -> Tensor:
        count, sampler = len(start), SAMPLERS[name]
        order, sigmas = step_sigmas(self.table, sampler.steps)
        place = torch.arange(first, first + count, device=self.device)
        context = self.context(place % (len(self.tokens) - 1))
        # One random choice for a picture's two rows, or one for each; another for each picture, so that the
        # standard error over pictures covers the draw.
        tome_seed = place + 100_003 * (seed + 1)
        if state.variant.per_row:
            tome_seed = torch.cat((tome_seed, tome_seed + 50_000_017))
        generator = torch.Generator(self.device).manual_seed(7_000_000 + 1000 * seed + first)

        def noise() -> Tensor:
            return torch.randn(start.shape, generator=generator, device=self.device)

        def denoised(x: Tensor, step: int) -> Tensor:
            sigma = sigmas[step]
            signal = (1 + sigma**2) ** -0.5
            x = x * signal
            state.begin((self.size, self.size), self.device, tome_seed, step, sampler.steps)
            times = torch.full((2 * count,), float(order[step]), device=self.device)
            v, free = self.unet(torch.cat((x, x)).to(self.dtype), times, context).float().chunk(2)
            v = free + GUIDANCE * (v - free)
            return signal * x - sigma * signal * v

        return run(sampler, denoised, start, sigmas, noise)

    def timing(self, variant: Variant, sampler: str, size: int, rows: int, repeats: int) -> Timing | None:
        """A step's time in half precision at ``size`` pixels a side, the mean over the sampler's steps.

        None where the variant is not to be timed. All that merging needs is counted: seeds, draws, match, unmerge.
        """
        steps = SAMPLERS[sampler].steps
        ratios = [ratio_at(variant.config, i / steps) for i in range(steps)]
        if repeats == 0 or not variant.timed or len(set(ratios)) > 2:
            return None
        timings = [self._time(variant, ratio, size, rows, repeats) for ratio in sorted(set(ratios))]
        return timings[0].mixed(timings[-1], ratios.count(max(ratios)) / steps)

    @torch.no_grad()
    def _time(self, variant: Variant, ratio: float, size: int, rows: int, repeats: int) -> Timing:
        place = (variant.name if ratio else "", ratio)
        if place in self._timed:
            return self._timed[place]
        gpu = self.device.type == "cuda"
        dtype = torch.float16 if gpu else torch.float32
        if self._timed_unet is None:
            self._timed_unet = deepcopy(self.unet).to(dtype)
        generator = torch.Generator().manual_seed(0)
        x = torch.randn((rows, 3, size, size), generator=generator).to(self.device, dtype)
        context = self.context(torch.arange(rows // 2, device=self.device) % (len(self.tokens) - 1)).to(dtype)
        times = torch.full((rows,), 500.0, device=self.device)
        seed = torch.zeros((), dtype=torch.int64, device=self.device)  # as the hosts: one for the batch
        config = variant.config.replace(ratio=ratio, start=0.0, end=1.0, ratio_end=-1.0)
        took = []
        with merged(self._timed_unet, replace(variant, config=config)) as state:
            for i in range(repeats + 3):
                before = _now(gpu)
                state.begin((size, size), self.device, seed, i, repeats + 3)
                self._timed_unet(x, times, context)
                took.append((before, _now(gpu)))
        if gpu:
            torch.cuda.synchronize()
        spans = torch.tensor([a.elapsed_time(b) if gpu else (b - a) * 1e3 for a, b in took[3:]])
        self._timed[place] = Timing(*spans.quantile(torch.tensor([0.2, 0.5, 0.8])).tolist())
        return self._timed[place]


def _now(gpu: bool):
    if not gpu:
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event
