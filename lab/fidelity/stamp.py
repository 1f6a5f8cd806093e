"""What all measurements of fidelity have in common: arguments, pictures, where a row comes from, means with errors."""

from __future__ import annotations

import argparse
import math
import platform
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from ..models import classifier
from ..store import Budget, Store
from .bench import PRECISIONS, Bench
from .hooks import Run
from .methods import Variant
from .metrics import frechet, frechet_gap, standard_error, to_range

KEYS = ("variant", "sampler")


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
        self.stamp = {
            **counts,
            "precision": args.precision,
            "device": torch.cuda.get_device_name(self.bench.device) if gpu else f"CPU {platform.machine()}",
            "torch": torch.__version__,
            "date": date.today().isoformat(),
            "commit": args.commit,
            "model": self.bench.hash,
        }
        self.store, self.budget = Store(args.out, KEYS), Budget(args.minutes)
        for row in self.store.rows:
            for column in (*counts, "precision", "device", "model"):
                if str(row[column]) != str(self.stamp[column]):
                    raise ValueError(
                        f"{args.out} was measured with {column} {row[column]}, this is {self.stamp[column]}: choose "
                        "another --out"
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
