"""docs/quality.md's tables of what people would use in place of merging, from frontier-MODEL.csv and step times."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from shared_tome.methods import PRESETS

from ..fidelity.methods import UNMERGED
from ..fidelity.rivals import AGAIN, EXACT
from ..store import RESULTS, Row, markdown, read
from .fidelity_tables import CELLS, MODELS, percent
from .frontier_times import PLACES, Place, best, between, calls_of, frontier_rows

HELD = ("outputs reused", "attention held", "drawn between", "drawn + residual", "drawn from 0.2")
FEWER = "fewer steps"
"""The family of steps-MODEL.csv."""
WHOLE = ("outputs reused", "EasyCache", "LazyCache")
"""Families that use whole outputs again."""
SHOWN = (*PRESETS, "EasyCache 0.1", "EasyCache 0.2", "EasyCache 0.3")
LEAST = 25.0
"""dB: what is farther away is in the file alone."""
CELL_NAMES = ("psnr", "ssim", "fd_gap", "texture")


def points(rows: Sequence[Row], place: Place) -> dict[str, tuple[float, float]]:
    """(time, PSNR) of each choice that changes pictures, but what was only held to find out."""
    found = {}
    for row in rows:
        if row["family"] not in (UNMERGED, *HELD) and row["psnr"] != "inf":
            time = place.time(row)
            if time is not None:
                found[row["variant"]] = (time, float(row["psnr"]))
    return found


def rivals(model: str = "lab", folder: Path = RESULTS / "fidelity", places: Sequence[Place] | None = None) -> str:
    """The choices on the frontier at any of the model's places, and the commonest; times that are on it are bold."""
    rows, places = frontier_rows(model, folder), PLACES[model] if places is None else places
    times = {place: points(rows, place) for place in places}
    edges = {place: best(times[place]) for place in places}
    shown = {name for names in edges.values() for name in names} | set(SHOWN)

    def cell(row: Row, place: Place) -> str:
        name = row["variant"]
        text = f"{times[place][name][0]:.0%}" if name in times[place] else "-"
        return f"**{text}**" if name in edges[place] else text

    near = [row for row in rows if row["variant"] in shown and float(row["psnr"]) >= LEAST]
    return _made(rows, "calls", sorted(near, key=_farness), places, cell)


def held(model: str = "dit", folder: Path = RESULTS / "fidelity", places: Sequence[Place] | None = None) -> str:
    """Attention held or drawn, beside whole outputs used again in the same time.

    In brackets: how much nearer than these, whose PSNR is on the line between two that were measured. A dash where
    none of them is as fast or as slow.
    """
    rows, places = frontier_rows(model, folder), PLACES[model] if places is None else places

    def cell(row: Row, place: Place) -> str:
        time = place.time(row)
        if time is None or row["family"] in WHOLE:
            return "-" if time is None else f"{time:.0%}"
        base = at_time(rows, place, time)
        return f"{time:.0%} (-)" if base is None else f"{time:.0%} ({float(row['psnr']) - base:+.1f})"

    return _made(rows, "attention", [row for row in rows if row["family"] in (*HELD, EXACT)], places, cell)


def tiles(model: str = "demo", folder: Path = RESULTS / "fidelity") -> str:
    """HyperTile's tiles beside the presets, from tiles-MODEL.csv."""
    rows = [row for row in read(folder / f"tiles-{model}.csv") if row["psnr"] != "inf"]
    return _made(rows, "attention", sorted(rows, key=_farness))


def _made(rows: Sequence[Row], share: str, shown: Sequence[Row], places: Sequence[Place] = (), cell: Any = None) -> str:
    """A table of some rows: their share of all calls or of the attention, their distance, a cell(row, place) each."""
    if not shown:
        return ""
    head = ["what", share, *(CELLS[name][0] for name in CELL_NAMES), *(place.title for place in places)]
    lines = []
    for row in shown:
        left = sum(calls_of(row)) if share == "calls" else row[share]
        distance = ["-" if name == "fd_gap" and row[name] == "" else CELLS[name][1](row) for name in CELL_NAMES]
        lines.append([row["variant"], percent(left), *distance, *(cell(row, place) for place in places)])
    return f"{markdown(head, lines, left=1)}\n{about(rows, places)}\n"


def _farness(row: Row) -> float:
    return -float(row["psnr"])


def steps(folder: Path = RESULTS / "fidelity") -> str:
    """Every number of steps, a column a model, from steps-MODEL.csv."""
    found = {name: read(path) for name in MODELS if (path := folder / f"steps-{name}.csv").exists()}
    if not found:
        return ""
    fewer = {name: {int(row["steps"]): row for row in rows if row["family"] == FEWER} for name, rows in found.items()}
    counts = sorted(set().union(*fewer.values()), reverse=True)
    lines = [
        [str(count), *(CELLS["psnr"][1](rows[count]) if count in rows else "-" for rows in fewer.values())]
        for count in counts
    ]
    table = markdown(["steps", *(f"{name}, PSNR, dB" for name in found)], lines, left=0)
    notes = "; ".join(f"{name}: {about(rows)[:-1]}" for name, rows in found.items())
    return f"{table}\n{notes}.\n"


def at_time(rows: Sequence[Row], place: Place, time: float) -> float | None:
    """PSNR of whole outputs used again that take this time, None beyond what was measured."""
    known = {
        row["variant"]: (spent, float(row["psnr"]))
        for row in rows
        if row["family"] in WHOLE and row["psnr"] != "inf" and (spent := place.time(row)) is not None
    }
    return between([known[name] for name in best(known)], time)


def about(rows: Sequence[Row], places: Sequence[Place] = ()) -> str:
    one = rows[0]
    again = next((row["psnr"] for row in rows if row["variant"] == AGAIN), "")
    rounding = f"; rounding alone: {float(again):.0f} dB" if again not in ("", "inf") else ""
    times = dict.fromkeys(place.source for place in places if place.source)
    times = f" Times, in % of the unmerged generation's, from {'; '.join(times) or 'nothing yet'}." if places else ""
    return (
        f"{one['pictures']} pictures, {one['sampler']}, {one['precision']} precision, {one['device']}, torch "
        f"{one['torch']}, {one['date']}, commit {one['commit'] or 'unknown'}, model {one['model']}{rounding}.{times}"
    )
