"""What to use at which size and model: docs/settings.md's table, and what README's chart names."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ..store import RESULTS, Row, markdown
from .frontier_tables import about, points
from .frontier_times import PLACES, Place, frontier_rows

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


def recipe(folder: Path = RESULTS / "fidelity", places: dict[str, list[Place]] = PLACES) -> str:
    """A row for each place of each model that was measured; a cell: the choice, its time, its PSNR."""
    lines, notes = [], []
    for model, where in places.items():
        rows = frontier_rows(model, folder)
        for place in where:
            found = choices(rows, place)
            cells = [_cell(found, fastest(found, least)) for least in LIMITS]
            lines += [[place.title, model, *cells]] if found else []
        notes += [f"{model}: {about(rows, where)}"] if rows else []
    if not lines:
        return ""
    table = markdown(["time of", "pictures of", *(f"{least:.0f} dB or more" for least in LIMITS)], lines)
    return f"{table}\n{' '.join(notes)}\n"


def _cell(found: dict[str, tuple[float, float]], name: str | None) -> str:
    return "unmerged" if name is None else f"{name}: {found[name][0]:.0%}, {found[name][1]:.1f} dB"


def when(folder: Path = RESULTS / "fidelity", places: dict[str, list[Place]] = PLACES) -> str:
    """Three lines: when ToMe, when something else, when both. Empty where a place that they name was not measured."""
    found = {
        (model, place.title): choices(frontier_rows(model, folder), place)
        for model, where in places.items()
        for place in where
    }
    demo = [found.get(("demo", f"SD 1.5 {size}"), {}) for size in ("512²", "1024²", "2048²")]
    sdxl, wan = found.get(("demo", "SDXL 1024²"), {}), found.get(("dit", "Wan 14B 720p"), {})
    flux = [found.get(("dit", f"Flux {size}"), {}) for size in ("1024²", "2048²")]
    if not all((*demo, sdxl, *flux, wan)):
        return ""

    def times(name: str, *where: dict[str, tuple[float, float]]) -> str:
        return " and ".join(f"{one[name][0]:.0%}" for one in where)

    def near(name: str, where: dict[str, tuple[float, float]]) -> str:
        return f"{where[name][1]:.0f} dB"

    small, middle, large = demo
    return (
        f"- **ToMe alone** is nearest on U-Nets: Quality, {near('Quality', large)} to the unmerged picture, takes "
        f"{times('Quality', middle, large)} of the time of SD 1.5 at 1024² and 2048². On long videos (Wan 720p) it "
        f"takes {times('Quality', wan)} at {near('Quality', wan)}.\n"
        f"- **EasyCache alone** is better on transformers at Flux's sizes: EasyCache 0.05 takes "
        f"{times('EasyCache 0.05', flux[0])} at {near('EasyCache 0.05', flux[0])}, Balanced "
        f"{times('Balanced', *flux)} at 1024² and 2048², at {near('Balanced', flux[0])}. Of SD 1.5 at 512² and SDXL at "
        f"1024² EasyCache 0.1 takes {times('EasyCache 0.1', small)}, Quality {times('Quality', small, sdxl)}.\n"
        f"- **Both together** for more speed: EasyCache 0.1 and Fast take "
        f"{times('EasyCache 0.1 + Fast', middle, large)} of the time of SD 1.5 at 1024² and 2048², at "
        f"{near('EasyCache 0.1 + Fast', large)}; EasyCache 0.05 and Balanced "
        f"{times('EasyCache 0.05 + Balanced', wan)} of Wan at 720p, at {near('EasyCache 0.05 + Balanced', wan)}.\n"
    )
