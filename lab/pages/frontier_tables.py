"""What people would use in place of merging, from frontier-MODEL.csv and step times: docs/quality.md's tables, and what
docs/settings.md and README say to use at which size and model."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from shared_tome.methods import PRESETS

from ..fidelity.methods import AGAIN, EXACT, EXACT_EVERY, UNMERGED
from ..store import Row, markdown, read
from .fidelity_tables import CELLS, MODELS, origin, percent
from .frontier_times import FOLDER, PLACES, Place, best, between, calls_of, frontier_rows

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
    return {
        row["variant"]: (time, float(row["psnr"]))
        for row in rows
        if row["family"] not in (UNMERGED, *HELD) and row["psnr"] != "inf" and (time := place.time(row)) is not None
    }


def rivals(model: str = "lab", folder: Path = FOLDER, places: Sequence[Place] | None = None) -> str:
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


def held(model: str = "dit", folder: Path = FOLDER, places: Sequence[Place] | None = None) -> str:
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


def tiles(model: str = "demo", folder: Path = FOLDER) -> str:
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


def steps(folder: Path = FOLDER) -> str:
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
    counts = "{pictures} pictures, {sampler}, {precision} precision".format(**one)
    return f"{counts}, {origin(one)}{rounding}.{times}"


# -- what to use at which size and model -----------------------------------------------------------------------------

LIMITS = (50.0, 39.0, 33.0)
"""dB: how near the picture shall be at least."""
SAME_TIME = 0.02
"""Of the unmerged generation: of what is as fast as that the nearest is taken."""


def choices(rows: Sequence[Row], place: Place) -> dict[str, tuple[float, float]]:
    """(time, PSNR) of each choice that people can make: pooled tails run in the lab alone."""
    lab_alone = {row["variant"] for row in rows if "pooled tail" in row["family"]}
    return {name: point for name, point in points(rows, place).items() if name not in lab_alone}


def fastest(found: dict[str, tuple[float, float]], least: float) -> str | None:
    """The name of the fastest choice of so many dB or more; of those in the same time the nearest one."""
    near = {name: point for name, point in found.items() if point[1] >= least and point[0] < 1.0}
    if not near:
        return None
    limit = min(time for time, _ in near.values()) + SAME_TIME
    return max((name for name in near if near[name][0] <= limit), key=lambda name: near[name][1])


def recipe(folder: Path = FOLDER, places: dict[str, list[Place]] = PLACES) -> str:
    """A row for each place; a cell: for each of the lab's models the choice, its time, its PSNR."""
    rows = {model: frontier_rows(model, folder) for model in places}
    found: dict[Place, dict[str, dict[str, tuple[float, float]]]] = {}
    for model, where in places.items():
        for place in where if rows[model] else ():
            found.setdefault(place, {})[model] = choices(rows[model], place)
    lines = [
        [place.title, *("<br>".join(_cell(model, of[model], least) for model in of) for least in LIMITS)]
        for place, of in found.items()
        if any(of.values())
    ]
    if not lines:
        return ""
    table = markdown(["time of", *(f"{least:.0f} dB or more" for least in LIMITS)], lines)
    notes = [f"{model}: {about(rows[model], where)}" for model, where in places.items() if rows[model]]
    return f"{table}\n{' '.join(notes)}\n"


def _cell(model: str, found: dict[str, tuple[float, float]], least: float) -> str:
    name = fastest(found, least)
    return f"{model}: " + ("unmerged" if name is None else f"{name}, {found[name][0]:.0%}, {found[name][1]:.1f} dB")


NEAREST = f"Quality{EXACT_EVERY}4"
WHERE = {
    "large": ("demo", "SD 1.5 2048²"), "other": ("lab", "SD 1.5 2048²"), "small": ("lab", "SD 1.5 1024²"),
    "flux": ("dit", "Flux 1024²"), "large flux": ("dit", "Flux 2048²"), "wan": ("dit", "Wan 14B 720p"),
}  # fmt: skip
WHEN = f"""\
- **ToMe alone** for large pictures and long videos: Balanced takes [time: Balanced, large] of the time of SD 1.5 at \
2048², at [dB: Balanced, large, other] on our two small U-Nets, {NEAREST} [time: {NEAREST}, large] at \
[dB: {NEAREST}, large, other]; Quality [time: Quality, wan] of Wan at 720p, at [dB: Quality, wan].
- **Something else** at Flux's sizes, and for some models up to 1024²: EasyCache 0.05 takes \
[time: EasyCache 0.05, flux] of Flux at [dB: EasyCache 0.05, flux], Balanced \
[time: Balanced, flux, large flux] at 1024² and 2048², at [dB: Balanced, flux]. 22 of 30 steps take \
[time: 22 steps, small] of SD 1.5 at 1024², at [dB: 22 steps, large, small] on the two U-Nets, Quality \
[time: Quality, small] at [dB: Quality, large, small].
- **Both together** for more speed: EasyCache 0.1 and Fast take [time: EasyCache 0.1 + Fast, large] of SD 1.5 at \
2048², at [dB: EasyCache 0.1 + Fast, large, other], 18 steps and Quality [time: 18 steps + Quality, other] at \
[dB: 18 steps + Quality, large, other]; EasyCache 0.05 and Balanced [time: EasyCache 0.05 + Balanced, wan] of Wan at \
720p, at [dB: EasyCache 0.05 + Balanced, wan].
"""


def when(folder: Path = FOLDER, places: dict[str, list[Place]] = PLACES) -> str:
    """Three lines: when ToMe, when something else, when both. Empty where a place that they name was not measured."""
    known = {
        (model, place.title): choices(frontier_rows(model, folder), place)
        for model, where in places.items()
        for place in where
    }
    found = {name: known.get(where, {}) for name, where in WHERE.items()}

    def number(field: re.Match) -> str:
        name, *where = field[2].split(", ")
        points = [found[one][name] for one in where]
        if field[1] == "time":
            return " and ".join(f"{time:.0%}" for time, _ in points)
        return " and ".join(f"{psnr:.0f}" for _, psnr in points) + " dB"

    return re.sub(r"\[(time|dB): ([^]]+)\]", number, WHEN) if all(found.values()) else ""
