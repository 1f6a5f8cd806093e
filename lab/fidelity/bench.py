"""What all rows of a measurement share: model, noise, classes; and how a variant's pictures and times are made."""

from __future__ import annotations

import hashlib
import math
import statistics
import sys
import time
from collections import Counter
from collections.abc import Iterable
from copy import deepcopy
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn
from tqdm import tqdm

from shared_tome.core.schedule import ratio_at

from ..models.data import make_bank
from ..models.diffusion import clean, signal_of
from ..models.model import load_model, picture_set
from ..models.tensors import as_pictures
from ..models.unet import FeedForward, ResBlock
from .hooks import Run, merged
from .methods import CATALOGUE, UNMERGED, Variant, plain
from .samplers import parse_sampler, run, step_sigmas

KNOWN_SEED = 303  # of the pictures to inpaint; see lab/models/classifier.py
PRECISIONS = ("float32", "mixed", "half")
COMPILED = (ResBlock, FeedForward)


@dataclass(frozen=True)
class Timing:
    """Milliseconds of a step: quantiles over repeats."""

    p20: float
    median: float
    p80: float

    def mixed(self, other: Timing, share: float) -> Timing:
        """The mean step of a run in which ``share`` of the steps are like the other."""
        mix = (a + (b - a) * share for a, b in zip(self, other, strict=True))
        return Timing(*mix)

    def __iter__(self):
        return iter((self.p20, self.median, self.p80))


class Beginnings:
    """Predictions that several variants share because they do the same until then: late starts and early ends do.

    A place is a number for a sampler and all that was done in its steps so far. What is kept is what `expect` says.
    """

    def __init__(self) -> None:
        self._places: dict[tuple, int] = {}
        self._shared: set[int] = set()
        self.predicted: dict[tuple[int, int, int], Tensor] = {}  # x0 by (place, seed, first picture's number)
        self.seen: dict[int, list] = {}  # what was counted for the layers of a place's last step

    def places(self, variant: Variant, sampler: str) -> list[int]:
        """The place after each step."""
        steps, place, found = parse_sampler(sampler)[0].steps, -1, []
        for i in range(steps):
            key = (sampler if i == 0 else place, _step_of(variant, i / steps))
            place = self._places.setdefault(key, len(self._places))
            found.append(place)
        return found

    def expect(self, keys: Iterable[tuple[Variant, str]]) -> None:
        """Keep what two of these variants and samplers have in common, and what was kept before."""
        count = Counter(place for key in dict.fromkeys(keys) for place in self.places(*key))
        self._shared |= {place for place, times in count.items() if times > 1}

    def keeps(self, place: int) -> bool:
        return place in self._shared


def _step_of(variant: Variant, progress: float) -> object:
    """What a variant does in a step, alike for variants that do the same."""
    if variant.strict:
        return variant.name
    config = variant.config.replace(ratio=ratio_at(variant.config, progress), start=0.0, end=1.0, ratio_end=-1.0)
    if config.is_off:
        return None
    # What is not the core's own may look back at its earlier steps.
    return config if variant.make is plain and not variant.per_row else variant.name


class Bench:
    """Makes pictures with a variant of ToMe, always from the same noise and the same mix of classes.

    file: a model of pixels or latents (lab/models/model.py); what comes out is decoded pictures.
    images: for each seed, classes in turn. batch: pictures at a time; each has a prompted and an unprompted row.
    compiled: whether to try torch.compile on the parts that no variant touches, and to keep it where it is faster.
    precision: float32 (TF32 off); mixed (float32, but convolutions and linear layers in TF32 and self-attention in
    float16; the row "unmerged, float32" says how far that is from float32); half (float16 weights).
    """

    def __init__(
        self,
        file: Path,
        device: str,
        images: int,
        seeds: int,
        batch: int,
        precision: str = "float32",
        compiled: bool = False,
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
        self._timed: dict[tuple, Timing] = {}
        self._timed_network: nn.Module | None = None
        self.beginnings = Beginnings()
        self._to_inpaint: Tensor | None = None
        if compiled:
            self._try_to_compile()

    def _try_to_compile(self) -> None:
        """Compile the parts one by one: the attention between them changes from variant to variant."""
        parts = [part for part in self.network.modules() if isinstance(part, COMPILED)]
        before = self._seconds_a_step()
        try:
            limit = torch._dynamo.config.recompile_limit  # the parts are of few classes, each an entry of its own
            torch._dynamo.config.recompile_limit = max(limit, 2 * len(parts))
            for part in parts:
                part.compile(dynamic=False)
            after = self._seconds_a_step()
        except Exception as error:  # whatever the compiler fails with, pictures can be made without it
            after, word = math.inf, f"failed, going on without it: {type(error).__name__}: {str(error)[:500]}"
        else:
            word = f"of {len(parts)} parts: {before * 1e3:.1f} ms a step before, {after * 1e3:.1f} after"
        if after > before:
            for part in parts:
                part._compiled_call_impl = None
        tqdm.write(f"torch.compile {word}", file=sys.stderr)

    @torch.no_grad()
    def _seconds_a_step(self, count: int = 5) -> float:
        """Of an unmerged step of a batch of pictures."""
        rows = min(self.batch, self.images)
        x = torch.zeros((2 * rows, *self.painted), device=self.device, dtype=self.dtype)
        context = self.context(torch.zeros(rows, dtype=torch.int64, device=self.device))
        times = torch.full((2 * rows,), 500.0, device=self.device)
        self._set_precision(self.mixed)
        took = []
        with merged(self.network, CATALOGUE.variants[UNMERGED], torch.float16 if self.mixed else None) as state:
            for i in range(count + 1):
                state.begin(self.grid, self.device, torch.zeros(1, device=self.device), i, count + 1)
                before = time.perf_counter()
                self.network(x, times, context).sum().item()
                took.append(time.perf_counter() - before)
        return statistics.median(took[1:])

    def _set_precision(self, mixed: bool) -> None:
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = mixed

    def context(self, classes: Tensor) -> Tensor:
        """Prompted rows, then as many unprompted ones: [2 * b, M, D] for class numbers [b]."""
        free = self.tokens[-1:].expand(len(classes), -1, -1)
        return torch.cat((self.tokens[classes], free)).to(self.dtype)

    def pictures(self, variant: Variant, sampler: str) -> tuple[Tensor, Run]:
        """Pictures [seeds * images, 3, H, W] in float32 on the device, and the run with its count of work.

        sampler: a name, with or without guidance (lab/fidelity/samplers.py).
        """
        done = []
        mixed = self.mixed and not variant.strict
        self._set_precision(mixed)
        for seed in range(self.seeds):
            generator = torch.Generator().manual_seed(1000 + seed)
            start = torch.randn((self.images, *self.painted), generator=generator)
            for first in range(0, self.images, self.batch):
                part = start[first : first + self.batch].to(self.device)
                with merged(self.network, variant, torch.float16 if mixed else None) as state:
                    painted = self._sample(part, state, sampler, seed, first)
                done.append(self.model.decode(painted))
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
        count, (sampler, guidance), prediction = len(start), parse_sampler(name), self.model.prediction
        order, sigmas = step_sigmas(self.table, sampler.steps)
        place = torch.arange(first, first + count, device=self.device)
        context = self.context(place % (len(self.tokens) - 1))
        # One random choice for a picture's two rows, or one for each; another for each picture, so that the
        # standard error over pictures covers the draw.
        tome_seed = place + 100_003 * (seed + 1)
        if state.variant.per_row:
            tome_seed = torch.cat((tome_seed, tome_seed + 50_000_017))
        generator = torch.Generator(self.device).manual_seed(7_000_000 + 1000 * seed + first)
        known = self._known(first, count) if sampler.inpaint else None
        half = self.painted[2] // 2
        begun, places = self.beginnings, self.beginnings.places(state.variant, name)

        def noise() -> Tensor:
            return torch.randn(start.shape, generator=generator, device=self.device)

        def paint(x: Tensor, step: int) -> Tensor:
            sigma = sigmas[step]
            signal = signal_of(sigma, prediction)
            x = x * signal
            state.begin(self.grid, self.device, tome_seed, step, sampler.steps)
            times = torch.full((2 * count,), float(order[step]), device=self.device)
            out, free = self.network(torch.cat((x, x)).to(self.dtype), times, context).float().chunk(2)
            out = free + guidance * (out - free)
            return clean(prediction, x, out, signal, sigma * signal)

        def denoised(x: Tensor, step: int) -> Tensor:
            key = (places[step], seed, first)
            if key in begun.predicted:  # bit for bit what would come out
                state.begin(self.grid, self.device, tome_seed, step, sampler.steps)
                state.count_again(begun.seen[places[step]])
                return begun.predicted[key]
            if known is not None:
                x = torch.cat((known[..., :half] + sigmas[step] * start[..., :half], x[..., half:]), dim=-1)
            x0 = paint(x, step)
            if known is not None:
                x0 = torch.cat((known[..., :half], x0[..., half:]), dim=-1)
            if begun.keeps(places[step]):
                begun.predicted[key], begun.seen[places[step]] = x0, state.seen
            return x0

        return run(sampler, denoised, start, sigmas, noise)

    def timing(self, variant: Variant, sampler: str, size: int, rows: int, repeats: int) -> Timing | None:
        """A step's time in half precision at ``size`` pixels (or latents) a side, the mean over the sampler's steps.

        None where the variant is not to be timed. All that merging needs is counted: seeds, draws, match, unmerge.
        """
        steps = parse_sampler(sampler)[0].steps
        ratios = [ratio_at(variant.config, i / steps) for i in range(steps)]
        if repeats == 0 or not variant.timed or len(set(ratios)) > 2:
            return None
        timings = [self._time(variant, ratio, size, rows, repeats) for ratio in sorted(set(ratios))]
        return timings[0].mixed(timings[-1], ratios.count(max(ratios)) / steps)

    @torch.no_grad()
    def _time(self, variant: Variant, ratio: float, size: int, rows: int, repeats: int) -> Timing:
        config = variant.config.replace(ratio=ratio, start=0.0, end=1.0, ratio_end=-1.0)
        # A late start alone does not change what a step does.
        place = (config, variant.make) if ratio else ()
        if place in self._timed:
            return self._timed[place]
        gpu = self.device.type == "cuda"
        dtype = torch.float16 if gpu else torch.float32
        if self._timed_network is None:
            self._timed_network = deepcopy(self.network).to(dtype)
        generator = torch.Generator().manual_seed(0)
        x = torch.randn((rows, self.painted[0], size, size), generator=generator).to(self.device, dtype)
        context = self.context(torch.arange(rows // 2, device=self.device) % (len(self.tokens) - 1)).to(dtype)
        times = torch.full((rows,), 500.0, device=self.device)
        seed = torch.zeros((), dtype=torch.int64, device=self.device)  # as the hosts: one for the batch
        took = []
        with merged(self._timed_network, replace(variant, config=config)) as state:
            for i in range(repeats + 3):
                before = _now(gpu)
                state.begin(self.network.grid(size, size), self.device, seed, i, repeats + 3)
                self._timed_network(x, times, context)
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
