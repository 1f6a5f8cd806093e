"""What to use at which size and model: docs/settings.md's table, and what README's chart names."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ..fidelity.rivals import EXACT_EVERY
from ..store import RESULTS, Row, markdown
from .frontier_tables import about, points
from .frontier_times import PLACES, Place, frontier_rows

NEAREST = f"Quality{EXACT_EVERY}4"
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


def when(folder: Path = RESULTS / "fidelity", places: dict[str, list[Place]] = PLACES) -> str:
    """Three lines: when ToMe, when something else, when both. Empty where a place that they name was not measured."""
    found = {
        (model, place.title): choices(frontier_rows(model, folder), place)
        for model, where in places.items()
        for place in where
    }
    large, other = (found.get((model, "SD 1.5 2048²"), {}) for model in ("demo", "lab"))
    small, wan = found.get(("lab", "SD 1.5 1024²"), {}), found.get(("dit", "Wan 14B 720p"), {})
    flux = [found.get(("dit", f"Flux {size}"), {}) for size in ("1024²", "2048²")]
    if not all((large, other, small, *flux, wan)):
        return ""

    def times(name: str, *where: dict[str, tuple[float, float]]) -> str:
        return " and ".join(f"{one[name][0]:.0%}" for one in where)

    def near(name: str, *where: dict[str, tuple[float, float]]) -> str:
        return " and ".join(f"{one[name][1]:.0f}" for one in where) + " dB"

    return (
        f"- **ToMe alone** for large pictures and long videos: Balanced takes {times('Balanced', large)} of the time "
        f"of SD 1.5 at 2048², at {near('Balanced', large, other)} on our two small U-Nets, {NEAREST} "
        f"{times(NEAREST, large)} at {near(NEAREST, large, other)}; Quality {times('Quality', wan)} of Wan at 720p, at "
        f"{near('Quality', wan)}.\n"
        f"- **Something else** at Flux's sizes, and for some models up to 1024²: EasyCache 0.05 takes "
        f"{times('EasyCache 0.05', flux[0])} of Flux at {near('EasyCache 0.05', flux[0])}, Balanced "
        f"{times('Balanced', *flux)} at 1024² and 2048², at {near('Balanced', flux[0])}. 22 of 30 steps take "
        f"{times('22 steps', small)} of SD 1.5 at 1024², at {near('22 steps', large, small)} on the two U-Nets, "
        f"Quality {times('Quality', small)} at {near('Quality', large, small)}.\n"
        f"- **Both together** for more speed: EasyCache 0.1 and Fast take {times('EasyCache 0.1 + Fast', large)} of SD "
        f"1.5 at 2048², at {near('EasyCache 0.1 + Fast', large, other)}, 18 steps and Quality "
        f"{times('18 steps + Quality', other)} at {near('18 steps + Quality', large, other)}; EasyCache 0.05 and "
        f"Balanced {times('EasyCache 0.05 + Balanced', wan)} of Wan at 720p, at "
        f"{near('EasyCache 0.05 + Balanced', wan)}.\n"
    )
