"""README's chart: time and likeness of the commonest cases, from the same rows as docs/quality.md's charts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from shared_tome.methods import PRESETS

from ..fidelity.rivals import EXACT
from ..store import RESULTS, Row
from .frontier_recipe import LIMITS, choices, fastest
from .frontier_times import Place, best, frontier_rows
from .style import INK, PAPER, figure_of, save

CASES = [
    ("demo", Place("sd15", "1024²")),
    ("demo", Place("sd15", "2048²")),
    ("lab", Place("sd15", "1024²")),
    ("lab", Place("sd15", "2048²")),
    ("dit", Place("flux", "1024²")),
    ("dit", Place("wan", "1280x720, 81 frames")),
]
# family: (label, colour, marker, size). Colours after Okabe and Ito.
SERIES = {
    "fewer steps": ("fewer steps", "#8a8a8a", "s", 6),
    "EasyCache": ("EasyCache", "#d55e00", "^", 8),
    "both": ("EasyCache or fewer steps, with ToMe", "#009e73", "D", 7),
    EXACT: ("ToMe: Quality exact every 2 to 6", "#56b4e9", "o", 8),
    "ToMe": ("ToMe: Quality, Balanced, Fast", "#0072b2", "o", 10),
}
LOWEST = 24.0
"""dB: what is shown."""
LINE = 0.062
"""Of a panel's height: a line of a name."""


def series_of(family: str) -> str | None:
    """Which of SERIES a family belongs to; None for what the chart leaves out."""
    alone, _, preset = family.rpartition(" + ")
    if preset in PRESETS:
        return "both" if alone in ("EasyCache", "fewer steps") else None
    return family if family in SERIES else None


def panel(axes: Any, rows: list[Row], model: str, place: Place) -> None:
    """Time across, PSNR up; the line is what no choice beats in both. Names: presets, and the recipe's choices."""
    kinds = {row["variant"]: series_of(row["family"]) for row in rows}
    found = {
        name: (100 * time, psnr)
        for name, (time, psnr) in choices(rows, place).items()
        if kinds[name] is not None and psnr >= LOWEST
    }
    edge = best(found)
    times, heights = zip(*(found[name] for name in edge), strict=True)
    axes.step([*times, 102], [*heights, heights[-1]], where="post", color=INK, linewidth=1.5, zorder=1)
    for kind, (label, colour, marker, size) in SERIES.items():
        line = sorted(found[name] for name in found if kinds[name] == kind and (kind != "both" or name in edge))
        axes.plot(
            *zip(*line, strict=True), marker=marker, color=colour, markersize=size, markeredgecolor=PAPER, label=label,
            linestyle="", zorder=3 if kind in ("ToMe", EXACT, "both") else 2,
        )  # fmt: skip
    named = {*PRESETS, *(fastest(choices(rows, place), least) for least in LIMITS)}
    highest, free = max(psnr for _, psnr in found.values()) + 4, LOWEST
    for name in sorted(named & set(found), key=lambda name: found[name][1]):
        (time, psnr), lines = found[name], name.replace(" + ", "\n+ ")
        text_at = {"xytext": (time + 1.5, psnr - 0.01 * (highest - LOWEST)), "ha": "left", "va": "top"}
        if name in edge:  # left and above there is room, but for the name below
            free = max(psnr + 0.3, free)
            text_at = {"xytext": (time - 1.5, free), "ha": "right", "va": "bottom"}
            free += (lines.count("\n") + 1) * LINE * (highest - LOWEST)
        axes.annotate(lines, (time, psnr), fontsize=11, linespacing=1.0, zorder=4, **text_at)
    axes.set_title(f"{place.title}, {model}", fontsize=15, loc="left")
    axes.set_xlim(0, 118)
    axes.set_xticks(range(0, 101, 20))
    axes.set_ylim(LOWEST, highest)
    axes.tick_params(labelsize=11)


def draw(folder: Path, results: Path = RESULTS / "fidelity", cases: list[tuple[str, Place]] = CASES) -> list[Path]:
    """The chart, where all of it was measured; where it was written."""
    rows = {model: frontier_rows(model, results) for model, _ in cases}
    if not all(choices(rows[model], place) for model, place in cases):
        return []
    rows_of_panels = (len(cases) + 1) // 2
    figure, panels = figure_of(2, 5.6, 4.1 * rows_of_panels, 130, rows=rows_of_panels)
    for axes, (model, place) in zip(panels, cases, strict=False):
        panel(axes, rows[model], model, place)
    for axes in panels[-2:]:
        axes.set_xlabel("time of a generation, % of the unmerged one's", fontsize=12)
    for axes in panels[::2]:
        axes.set_ylabel("PSNR to unmerged, dB", fontsize=12)
    figure.tight_layout(rect=(0, 0, 1, 1 - 0.1 / rows_of_panels))
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(
        handles[::-1], labels[::-1], loc="upper center", ncol=len(labels), fontsize=12,
        handletextpad=0.2,
    )  # fmt: skip
    path = folder / "frontier.png"
    save(figure, path)
    return [path]
