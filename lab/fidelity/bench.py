"""What all measurements of fidelity share: model, noise, classes; how a variant's pictures and times are made;
arguments, where a row comes from, means with errors."""

from __future__ import annotations

import argparse
import hashlib
import math
import platform
import sys
from collections.abc import Iterable, Iterator, Sequence
from copy import deepcopy
from dataclasses import dataclass, replace
from datetime import date
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from shared_tome.core.schedule import ratio_at

from ..models import classifier
from ..models.data import make_bank
from ..models.model import load_model, picture_set
from ..models.optimize import as_pictures
from ..models.samplers import parse_sampler, run, step_sigmas
from ..store import Budget, Store
from ..timing import Moment, spread
from .hooks import Run, merged
from .methods import Variant
from .metrics import frechet, frechet_gap, standard_error, to_range
from .reuse import Which, reusing

KNOWN_SEED = 303  # of the pictures to inpaint; see lab/models/classifier.py
KEYS = ("variant", "sampler")
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
        """Pictures [seeds * images, 3, H, W] in float32 on the device, and the run with its count of work."""
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


def arguments(prog: str, doc: str, batch: int, precision: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog=f"python -m lab.fidelity.{prog}", description=doc.splitlines()[0])
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--batch", type=int, default=batch, help="pictures at a time")
    parser.add_argument("--precision", choices=PRECISIONS, default=precision, help="of the pictures; half is faster")
    parser.add_argument("--classifier", type=Path, help="from lab.models.classifier; without it no Frechet distance")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--minutes", type=float, default=math.inf, help="begin no row after this time")
    parser.add_argument("--commit", default="", help="what was measured, where there is no git to ask")
    return parser


@dataclass(frozen=True)
class Pictures:
    """Of one variant and sampler: pictures [n, 3, H, W], 0 to 255, their features [n, D], and the run."""

    ranged: Tensor
    features: Tensor | None
    run: Run


class Measurement:
    """Rows of the file `args.out`, one a variant and sampler, all of one model.

    counts: how many pictures; they and where the rows come from must be alike in all rows, else these cannot be
    compared. Raises ValueError where the file's rows are others, or where the classifier knows other pictures than the
    model paints.
    """

    def __init__(self, args: argparse.Namespace, images: int, counts: dict[str, int]) -> None:
        self.args = args
        seeds = counts.get("seeds", 1)
        self.bench = Bench(args.model, args.device, images // seeds, seeds, args.batch, args.precision)
        self.judge, data = args.classifier and classifier.load(args.classifier), self.bench.metadata["data"]
        if self.judge and self.judge.data != data:
            raise ValueError(f"{args.classifier} knows the pictures {self.judge.data!r}, the model paints {data!r}")
        gpu = self.bench.device.type == "cuda"
        name = torch.cuda.get_device_name(self.bench.device) if gpu else f"CPU {platform.machine()}"
        self.stamp = {
            **counts, "precision": args.precision, "device": name, "torch": torch.__version__,
            "date": date.today().isoformat(), "commit": args.commit, "model": self.bench.hash,
        }  # fmt: skip
        self.store, self.budget = Store(args.out, KEYS), Budget(args.minutes)
        for row in self.store.rows:
            for column in (*counts, "precision", "device", "model"):
                was, now = row[column], self.stamp[column]
                if str(was) != str(now):
                    raise ValueError(
                        f"{args.out} was measured with {column} {was}, this is {now}: choose another --out"
                    )
        self.references: dict[str, Pictures] = {}

    def check_columns(self, columns: Sequence[str]) -> None:
        """Raises ValueError where the file has others."""
        for row in self.store.rows:
            if list(row) != columns:
                both = ((columns, row), (row, columns))
                lacks, more = (", ".join(c for c in one if c not in other) or "none" for one, other in both)
                raise ValueError(
                    f"no row can be added to {self.args.out}, whose columns are not those that this version writes "
                    f"(lacking: {lacks}; unknown: {more}): choose another --out. It can still be read for tables."
                )

    def pictures(self, variant: Variant, sampler: str) -> Pictures:
        made, run = self.bench.pictures(variant, sampler)
        return Pictures(to_range(made), self.judge.features(made) if self.judge else None, run)

    def reference(self, unmerged: Variant, sampler: str) -> Pictures:
        """The unmerged pictures, made once for each sampler."""
        if sampler not in self.references:
            self.references[sampler] = self.pictures(unmerged, sampler)
        return self.references[sampler]

    def measure(self, variant: Variant, sampler: str) -> dict[str, object]:
        """One row."""
        raise NotImplementedError

    def write(self, row: dict[str, object]) -> None:
        self.store.add(row)

    def run(self, keys: Iterable[tuple[Variant, str]]) -> Iterator[dict[str, object]]:
        """The rows that the file lacks, each as it has been written."""
        todo = [(one, sampler) for one, sampler in keys if not self.store.has(variant=one.name, sampler=sampler)]
        bar = tqdm(todo, unit="row", file=sys.stderr, mininterval=2, disable=not todo)
        for variant, sampler in bar:
            if self.budget.spent:
                break
            bar.set_postfix_str(f"{sampler} {variant.name}")
            row = self.measure(variant, sampler)
            self.write(row)
            yield row

    def put_frechet(self, row: dict[str, Any], made: Pictures, reference: Pictures) -> None:
        """The distance of features to real pictures, and how much farther than the reference's they are; empty where
        there is no classifier."""
        row |= dict.fromkeys(("fd", "fd_gap", "fd_gap_se"), "")
        if self.judge:
            gap, error = frechet_gap(made.features, reference.features, self.judge.real)
            far = frechet(made.features, self.judge.real)
            row |= {"fd": f"{far:.4f}", "fd_gap": f"{gap:.4f}", "fd_gap_se": f"{error:.4f}"}


def put_mean(row: dict[str, Any], column: str, values: Tensor, digits: int = 3) -> None:
    """The mean of values [n] and its standard error into two columns of a row."""
    values = values.cpu()
    row[column], row[f"{column}_se"] = f"{values.mean():.{digits}f}", f"{standard_error(values):.{digits}f}"
