"""The charts of merging beside what people would use in its place: one a model of the lab, a panel for each size."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from shared_tome.methods import PRESETS

from ..fidelity.rivals import EXACT
from ..store import RESULTS, Row
from .frontier_tables import points
from .frontier_times import PLACES, Place, best, frontier_rows
from .style import INK, PAPER, figure_of, save_panels

# family without a preset: (colour, marker). Colours after Okabe and Ito.
STYLES = {
    "ToMe": ("#0072b2", "o"),
    EXACT: ("#56b4e9", "o"),
    "fewer steps": ("#7a7a7a", "s"),
    "EasyCache": ("#d55e00", "^"),
    "LazyCache": ("#e69f00", "v"),
    "pooled tail": ("#009e73", "D"),
    "EasyCache + pooled tail": ("#009e73", "^"),
}
WITH = {name: fill for name, fill in zip(PRESETS, ("full", "left", "bottom"), strict=True)}
"""How a marker that stands for both is filled, by the preset; what stands alone is empty."""
LOWEST, HIGHEST, APART = 15.0, 70.0, 1.5
"""dB: what is shown, and how far from the last name on the line the next one is."""


def panel(axes: Any, rows: Sequence[Row], place: Place) -> None:
    """Time across, PSNR up; the dark line is what nothing beats in both, the others join what is alike."""
    found = {name: point for name, point in points(rows, place).items() if point[1] >= LOWEST and point[0] <= 1.05}
    families = {row["variant"]: row["family"] for row in rows}
    edge = best(found)
    axes.step(
        [100 * found[name][0] for name in edge], [found[name][1] for name in edge], where="post", color=INK,
        linewidth=1, zorder=1,
    )  # fmt: skip
    labelled = set()
    for name, (time, psnr) in found.items():
        family, _, preset = families[name].rpartition(" + ")
        if preset not in PRESETS:
            family, preset = families[name], ""
        colour, marker = STYLES[family]
        label = family if not preset else "the same with ToMe: Quality, Balanced, Fast"
        axes.plot(
            100 * time, psnr, marker=marker, color=colour, markersize=7 if name in edge else 5, linestyle="",
            fillstyle=WITH.get(preset, "full" if family == "ToMe" else "none"), markerfacecoloralt=PAPER,
            alpha=1.0 if name in edge else 0.55, label=None if label in labelled else label,
        )  # fmt: skip
        labelled.add(label)
    for family, (colour, _) in STYLES.items():
        line = sorted(found[name] for name in found if families[name] == family and family != "ToMe")
        axes.plot([100 * time for time, _ in line], [psnr for _, psnr in line], color=colour, linewidth=0.6, alpha=0.5)
    last = -APART
    for name in edge:
        time, psnr = found[name]
        if psnr - last >= APART:
            axes.annotate(
                name, (100 * time, psnr), xytext=(-5, 3), textcoords="offset points", fontsize=6, ha="right",
                annotation_clip=True,
            )  # fmt: skip
            last = psnr
    axes.set_xlim(0, 105)
    axes.set_ylim(LOWEST, min(HIGHEST, 2 + max((psnr for _, psnr in found.values()), default=HIGHEST)))
    axes.set_title(place.title, fontsize=10)
    axes.set_xlabel("time of a generation, % of the unmerged one's", fontsize=8)
    axes.tick_params(labelsize=8)


def chart(rows: Sequence[Row], places: Sequence[Place], path: Path) -> None:
    """A panel for each place at which anything can be told."""
    places = [place for place in places if points(rows, place)]
    figure, panels = figure_of(len(places), 4.6, 4.8, 120, sharey=True)
    for axes, place in zip(panels, places, strict=True):
        panel(axes, rows, place)
    panels[0].set_ylabel("PSNR to the unmerged picture, dB")
    save_panels(figure, path, panels, fontsize=8)


def draw(folder: Path, results: Path = RESULTS / "fidelity", places: dict[str, list[Place]] = PLACES) -> list[Path]:
    """The charts of the models that were measured; where they were written."""
    made = []
    for model, where in places.items():
        rows = frontier_rows(model, results)
        if rows and any(points(rows, place) for place in where):
            made.append(folder / f"frontier-{model}.png")
            chart(rows, where, made[-1])
    return made
