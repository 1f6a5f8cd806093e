"""What all rows of a measurement share: model, noise, classes; and how a variant's pictures and times are made."""

from __future__ import annotations

import hashlib
import math
from copy import deepcopy
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

from shared_tome.core.schedule import ratio_at

from ..models.data import make_bank
from ..models.model import load_model, picture_set
from ..models.samplers import parse_sampler, run, step_sigmas
from ..models.tensors import as_pictures
from ..timing import Moment, spread
from .hooks import Run, merged
from .methods import Variant
from .reuse import Which, reusing

KNOWN_SEED = 303  # of the pictures to inpaint; see lab/models/classifier.py
PRECISIONS = ("float32", "mixed", "half")


class Bench:
    """Makes pictures with a variant of ToMe, always from the same noise and the same mix of classes.

    file: a model of pixels or latents (lab/models/model.py); what comes out is decoded pictures.
    images: for each seed, classes in turn. batch: pictures at a time; each has a prompted and an unprompted row.
    precision: float32 (TF32 off); mixed (float32, but convolutions and linear layers in TF32 and self-attention in
    float16; the row "unmerged, float32" says how far that is from float32); half (float16 weights).
    """

    def __init__(
        self, file: Path, device: str, images: int, seeds: int, batch: int, precision: str = "float32"
    ) -> None:
        self.device, self.images, self.seeds, self.batch = torch.device(device), images, seeds, batch
        model, self.table, self.metadata = load_model(file)
        self.size = int(self.metadata["size"])
        self.hash = hashlib.sha256(file.read_bytes()).hexdigest()[:12]
        self.dtype = torch.float16 if precision == "half" else torch.float32
        self.mixed = precision == "mixed"
        self.model = model.to(self.device).requires_grad_(False)
        self.tokens = model.class_tokens.detach()  # (K + 1, M, D)
        self.network = model.network.to(self.dtype)
        self.painted = model.painted_shape(self.size)  # (C, h, w)
        self.grid = self.network.grid(*self.painted[1:])
        self._timed: dict[object, Tensor] = {}
        self._timed_network: nn.Module | None = None
        self._to_inpaint: Tensor | None = None

    def context(self, classes: Tensor) -> Tensor:
        """Prompted rows, then as many unprompted ones: [2 * b, M, D] for class numbers [b]."""
        free = self.tokens[-1:].expand(len(classes), -1, -1)
        return torch.cat((self.tokens[classes], free)).to(self.dtype)

    def pictures(self, variant: Variant, sampler: str) -> tuple[Tensor, Run]:
        """Pictures [seeds * images, 3, H, W] in float32 on the device, and the run with its count of work.

        sampler: a name, with or without guidance (lab/models/samplers.py).
        """
        done = []
        mixed = self.mixed and not variant.strict
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = mixed
        with merged(self.network, variant, torch.float16 if mixed else None) as state:
            for seed in range(self.seeds):
                generator = torch.Generator().manual_seed(1000 + seed)
                start = torch.randn((self.images, *self.painted), generator=generator)
                for first in range(0, self.images, self.batch):
                    part = start[first : first + self.batch].to(self.device)
                    done.append(self.model.decode(self._sample(part, state, sampler, seed, first)))
        return torch.cat(done), state

    def unknown(self, pictures: Tensor, sampler: str) -> Tensor:
        """The part of pictures [n, 3, H, W] that the sampler paints: the right half where it inpaints, else all."""
        return pictures[..., self.size // 2 :] if parse_sampler(sampler)[0].inpaint else pictures

    def _known(self, first: int, count: int) -> Tensor:
        """Real pictures to inpaint [count, C, h, w], of the classes of the pictures from number ``first`` on."""
        if self._to_inpaint is None:
            pictures, classes = picture_set(self.metadata), len(self.tokens) - 1
            each = math.ceil(self.images / classes)
            bank = torch.from_numpy(make_bank(each, KNOWN_SEED, workers=0, pictures=pictures))[:classes]
            in_turn = bank.transpose(0, 1).flatten(0, 1)[: self.images]  # (images, size, size, 3)
            self._to_inpaint = self.model.encode(as_pictures(in_turn.to(self.device)))
        return self._to_inpaint[first : first + count]

    def _sample(self, start: Tensor, state: Run, name: str, seed: int, first: int) -> Tensor:
        count, (sampler, guidance) = len(start), parse_sampler(name)
        steps, now = state.variant.steps or sampler.steps, 0
        order, sigmas = step_sigmas(self.table, steps)
        place = torch.arange(first, first + count, device=self.device)
        context = self.context(place % (len(self.tokens) - 1))
        # One random choice for a picture's two rows, another for each picture, so that the standard error over
        # pictures covers the draw.
        tome_seed = place + 100_003 * (seed + 1)
        generator = torch.Generator(self.device).manual_seed(7_000_000 + 1000 * seed + first)
        known = self._known(first, count) if sampler.inpaint else None
        half = self.painted[2] // 2

        def noise() -> Tensor:
            return torch.randn(start.shape, generator=generator, device=self.device)

        def predicted(x: Tensor, times: Tensor, context: Tensor, which: Which) -> Tensor:
            state.begin(self.grid, self.device, tome_seed if which is None else tome_seed[which], now, steps)
            return self.network(x, times, context)

        last = len(self.table) - 1
        guided = reusing(state.variant.reuse, predicted, context, order, sigmas, self.model.prediction, guidance, last)

        def denoised(x: Tensor, step: int) -> Tensor:
            nonlocal now
            now = step
            if known is not None:
                x = torch.cat((known[..., :half] + sigmas[step] * start[..., :half], x[..., half:]), dim=-1)
            x0 = guided(x, step)
            return x0 if known is None else torch.cat((known[..., :half], x0[..., half:]), dim=-1)

        return run(sampler, denoised, start, sigmas, noise)

    def timing(self, variant: Variant, sampler: str, size: int, rows: int, repeats: int) -> list[float] | None:
        """A step's milliseconds in half precision at ``size`` pixels (or latents) a side, the mean over the sampler's
        steps: [p20, median, p80] over repeats.

        None where the variant is not to be timed. All that merging needs is counted: seeds, draws, match, unmerge.
        """
        steps = parse_sampler(sampler)[0].steps
        ratios = [ratio_at(variant.config, i / steps) for i in range(steps)]
        if repeats == 0 or not variant.timed or len(set(ratios)) > 2:
            return None
        least, most = (self._time(variant, ratio, size, rows, repeats) for ratio in (min(ratios), max(ratios)))
        return torch.lerp(least, most, ratios.count(max(ratios)) / steps).tolist()

    @torch.no_grad()
    def _time(self, variant: Variant, ratio: float, size: int, rows: int, repeats: int) -> Tensor:
        config = variant.config.replace(ratio=ratio, start=0.0, end=1.0, ratio_end=-1.0)
        place = config if ratio else None  # a late start alone does not change what a step does
        if place in self._timed:
            return self._timed[place]
        dtype = torch.float16 if self.device.type == "cuda" else torch.float32
        if self._timed_network is None:
            self._timed_network = deepcopy(self.network).to(dtype)
        generator = torch.Generator().manual_seed(0)
        x = torch.randn((rows, self.painted[0], size, size), generator=generator).to(self.device, dtype)
        context = self.context(torch.arange(rows // 2, device=self.device) % (len(self.tokens) - 1)).to(dtype)
        times = torch.full((rows,), 500.0, device=self.device)
        seed = torch.zeros((), dtype=torch.int64, device=self.device)  # as the hosts: one for the batch
        marks = []
        with merged(self._timed_network, replace(variant, config=config)) as state:
            for i in range(repeats + 3):
                marks.append(Moment(self.device))
                state.begin(self.network.grid(size, size), self.device, seed, i, repeats + 3)
                self._timed_network(x, times, context)
        marks.append(Moment(self.device))
        found = spread([after - before for before, after in zip(marks[3:], marks[4:], strict=False)])
        self._timed[place] = torch.tensor([found["p20"], found["median"], found["p80"]])
        return self._timed[place]
