"""The rows of measurements: reading them, and choosing those of a model, a set or a sampler."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from .. import store
from ..fidelity.methods import CATALOGUE
from ..store import RESULTS, Row

LATER = ("texture", "texture_se")
"""Columns that older files lack: there they are empty."""
MAIN, MAIN_SAMPLER, YARDSTICK = "demo", "ddim30", "tomesd 0.5"


def read(path: Path) -> list[Row]:
    """The rows of a CSV, each with the PSNR of its single pictures as `singles`, numbers with spaces between, and as
    `yardstick` the speed of what was timed in each file."""
    rows = store.read(path)
    singles = {}
    for row in store.read(path.with_suffix(".pictures.csv")):
        variant, sampler, *numbers = row.values()
        singles[variant, sampler] = " ".join(numbers)
    speeds = {row["sampler"]: row["speedup"] for row in rows if row["variant"] == YARDSTICK}
    for row in rows:
        row["yardstick"] = speeds.get(row["sampler"], "")
        row["singles"] = singles[row["variant"], row["sampler"]]
        row["file"] = path.stem
        for column in LATER:
            row.setdefault(column, "")
    return rows


def results(folder: Path = RESULTS / "fidelity") -> list[Row]:
    """All rows that are kept with the project, but for those of multires_tables.py, of other precision."""
    paths = [path for path in sorted(folder.glob("*.csv")) if not path.stem.startswith("multires-")]
    return [row for path in paths if path.with_suffix(".pictures.csv").is_file() for row in read(path)]


def of_model(rows: Sequence[Row], file: str) -> list[Row]:
    """The rows, of whatever file, of the models that a file (its name without .csv) measured; "": demo, else all."""
    models = {row["model"] for row in rows if row["file"] == (file or MAIN)}
    return [row for row in rows if row["model"] in models or not (models or file)]


def of_set(rows: Sequence[Row], name: str, sampler: str) -> list[Row]:
    """The measured rows of a set, in the set's order."""
    found = {row["variant"]: row for row in rows if row["sampler"] == sampler}
    return [found[variant] for variant in CATALOGUE.sets[name] if variant in found]


def main_sampler(rows: Sequence[Row]) -> str:
    """The sampler that a model's tables and plots are about: ddim30, or what most rows were measured with."""
    count = Counter(row["sampler"] for row in rows)
    return MAIN_SAMPLER if MAIN_SAMPLER in count or not count else count.most_common(1)[0][0]
