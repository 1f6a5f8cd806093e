"""What all measurements of fidelity write and check alike: where a row comes from, who judges it, means with errors."""

from __future__ import annotations

import platform
from collections.abc import Iterable, Mapping, Sequence
from datetime import date
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..models import classifier
from .bench import Bench
from .metrics import frechet, frechet_gap, standard_error


def stamped(bench: Bench, precision: str, commit: str) -> dict[str, str]:
    """The columns that say where a row comes from. precision: of the pictures."""
    gpu = bench.device.type == "cuda"
    return {
        "precision": precision,
        "device": torch.cuda.get_device_name(bench.device) if gpu else f"CPU {platform.machine()}",
        "torch": torch.__version__,
        "date": date.today().isoformat(),
        "commit": commit,
        "model": bench.hash,
    }


def check_same(rows: Iterable[Mapping[str, Any]], columns: Sequence[str], stamp: Mapping[str, Any], out: Path) -> None:
    """Raises ValueError where rows of the file `out` differ from this measurement in a column that must be alike."""
    for row in rows:
        for column in columns:
            if str(row[column]) != str(stamp[column]):
                raise ValueError(
                    f"{out} was measured with {column} {row[column]}, this is {stamp[column]}: choose another --out"
                )


def judge_of(bench: Bench, file: Path | None) -> classifier.Judge | None:
    """The classifier of a file. Raises ValueError where it knows other pictures than the model paints."""
    if file is None:
        return None
    judge, data = classifier.load(file), bench.metadata["data"]
    if judge.data != data:
        raise ValueError(f"{file} knows the pictures {judge.data!r}, the model paints {data!r}")
    return judge


def put_mean(row: dict[str, Any], column: str, values: Tensor, digits: int = 3) -> None:
    """The mean of values [n] and its standard error into two columns of a row."""
    values = values.cpu()
    row[column], row[f"{column}_se"] = f"{values.mean():.{digits}f}", f"{standard_error(values):.{digits}f}"


def put_frechet(row: dict[str, Any], judge: classifier.Judge, features: Tensor, base: Tensor) -> None:
    """The Frechet distance of features [n, D] to real pictures, and how much farther than base [n, D] they are."""
    gap, error = frechet_gap(features, base, judge.real)
    row |= {"fd": f"{frechet(features, judge.real):.4f}", "fd_gap": f"{gap:.4f}", "fd_gap_se": f"{error:.4f}"}
