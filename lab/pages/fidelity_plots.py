"""The plots of docs/quality.md, and README's chart, from the rows that the tables have."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from shared_tome.methods import PRESETS

from ..fidelity.methods import EXACT
from ..models.samplers import SAMPLERS
from ..store import Row
from .fidelity_tables import frontier, main_sampler, of_model, results
from .frontier_tables import LIMITS, choices, fastest, points
from .frontier_times import FOLDER, PLACES, Place, best, frontier_rows
from .style import INK, PAPER, STYLES, figure_of, save, save_panels

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
"""dB: what README's chart shows."""
LINE = 0.062
"""Of a panel's height: a line of a name."""
# family without a preset: (colour, marker).
RIVALS = {
    "ToMe": ("#0072b2", "o"),
    EXACT: ("#56b4e9", "o"),
    "fewer steps": ("#7a7a7a", "s"),
    "EasyCache": ("#d55e00", "^"),
    "LazyCache": ("#e69f00", "v"),
    "pooled tail": ("#009e73", "D"),
    "EasyCache + pooled tail": ("#009e73", "^"),
}
WITH = dict(zip(PRESETS, ("full", "left", "bottom"), strict=True))
"""How a marker that stands for both is filled, by the preset; what stands alone is empty."""
BOTTOM, TOP, APART = 15.0, 70.0, 1.5
"""dB: what the page's charts show, and how far from the last name on the line the next one is."""
TITLES = {"tomesd": "as tomesd does", "ToDo": "downsample (ToDo)"}
TIME = "time of a generation, % of the unmerged one's"


# -- README's chart --------------------------------------------------------------------------------------------------


def series_of(family: str) -> str | None:
    """Which of SERIES a family belongs to; None for what the chart leaves out."""
    alone, _, preset = family.rpartition(" + ")
    if preset in PRESETS:
        return "both" if alone in ("EasyCache", "fewer steps") else None
    return family if family in SERIES else None


def main_panel(axes: Any, rows: list[Row], model: str, place: Place) -> None:
    """Time across, PSNR up; the line is what no choice beats in both. Names: presets, and the recipe's choices."""
    kinds, known = {row["variant"]: series_of(row["family"]) for row in rows}, choices(rows, place)
    found = {
        name: (100 * time, psnr) for name, (time, psnr) in known.items() if kinds[name] is not None and psnr >= LOWEST
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
    named = {*PRESETS, *(fastest(known, least) for least in LIMITS)}
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
    axes.set(xlim=(0, 118), xticks=range(0, 101, 20), ylim=(LOWEST, highest))
    axes.tick_params(labelsize=11)


def draw_main(folder: Path, results: Path = FOLDER, cases: list[tuple[str, Place]] = CASES) -> list[Path]:
    """The chart, where all of it was measured; where it was written."""
    rows = {model: frontier_rows(model, results) for model, _ in cases}
    if not all(choices(rows[model], place) for model, place in cases):
        return []
    rows_of_panels = (len(cases) + 1) // 2
    figure, panels = figure_of(2, 5.6, 4.1 * rows_of_panels, 130, rows=rows_of_panels)
    for axes, (model, place) in zip(panels, cases, strict=False):
        main_panel(axes, rows[model], model, place)
    for axes in panels[-2:]:
        axes.set_xlabel(TIME, fontsize=12)
    for axes in panels[::2]:
        axes.set_ylabel("PSNR to unmerged, dB", fontsize=12)
    figure.tight_layout(rect=(0, 0, 1, 1 - 0.1 / rows_of_panels))
    handles, labels = panels[0].get_legend_handles_labels()
    place = {"loc": "upper center", "ncol": len(labels), "fontsize": 12, "handletextpad": 0.2}
    figure.legend(handles[::-1], labels[::-1], **place)
    return [save(figure, folder / "frontier.png")]


# -- merging beside what people would use in its place: a chart a model, a panel a size -------------------------------


def rivals_panel(axes: Any, rows: Sequence[Row], place: Place) -> None:
    """Time across, PSNR up; the dark line is what nothing beats in both, the others join what is alike."""
    known = points(rows, place).items()
    found = {name: (100 * time, psnr) for name, (time, psnr) in known if psnr >= BOTTOM and time <= 1.05}
    families = {row["variant"]: row["family"] for row in rows}
    edge = best(found)
    line = ([found[name][axis] for name in edge] for axis in range(2))
    axes.step(*line, where="post", color=INK, linewidth=1, zorder=1)
    labelled = set()
    for name, point in found.items():
        family, _, preset = families[name].rpartition(" + ")
        if preset not in PRESETS:
            family, preset = families[name], ""
        colour, marker = RIVALS[family]
        label = family if not preset else "the same with ToMe: Quality, Balanced, Fast"
        axes.plot(
            *point, marker=marker, color=colour, markersize=7 if name in edge else 5, linestyle="",
            fillstyle=WITH.get(preset, "full" if family == "ToMe" else "none"), markerfacecoloralt=PAPER,
            alpha=1.0 if name in edge else 0.55, label=None if label in labelled else label,
        )  # fmt: skip
        labelled.add(label)
    for family, (colour, _) in RIVALS.items():
        line = sorted(found[name] for name in found if families[name] == family and family != "ToMe")
        axes.plot([time for time, _ in line], [psnr for _, psnr in line], color=colour, linewidth=0.6, alpha=0.5)
    last, beside = -APART, {"xytext": (-5, 3), "textcoords": "offset points", "fontsize": 6, "ha": "right"}
    for name in edge:
        if found[name][1] - last >= APART:
            axes.annotate(name, found[name], annotation_clip=True, **beside)
            last = found[name][1]
    axes.set(xlim=(0, 105), ylim=(BOTTOM, min(TOP, 2 + max((psnr for _, psnr in found.values()), default=TOP))))
    axes.set_title(place.title, fontsize=10)
    axes.set_xlabel(TIME, fontsize=8)
    axes.tick_params(labelsize=8)


def draw_rivals(folder: Path, results: Path = FOLDER, places: dict[str, list[Place]] = PLACES) -> list[Path]:
    """The charts of the models that were measured, with the places where anything can be told; their files."""
    made = []
    for model, where in places.items():
        rows = frontier_rows(model, results)
        shown = [place for place in where if points(rows, place)]
        if shown:
            figure, panels = figure_of(len(shown), 4.6, 4.8, 120, sharey=True)
            for axes, place in zip(panels, shown, strict=True):
                rivals_panel(axes, rows, place)
            panels[0].set_ylabel("PSNR to the unmerged picture, dB")
            made.append(save_panels(figure, folder / f"frontier-{model}.png", panels, fontsize=8))
    return made


# -- methods ---------------------------------------------------------------------------------------------------------


def _methods(rows: Sequence[Row], path: Path, timed: bool) -> Path:
    """PSNR, a line a family, against the share of the attention's work that is left, or, timed, against the measured
    time of a step in percent of the unmerged step's."""
    figure, (axes,) = figure_of(1, 9.5, 5.6, 130)
    if timed:
        rows = [row for row in rows if row["speedup"]]
        devices, shape = " and ".join(sorted({r["device"] for r in rows})), rows[0]["step_shape"]
        what = "the measured time of a step"
        label = f"median time of a step, % of the unmerged one's ({devices}, float16, {shape}, eager)"
        axes.axvline(100.0, color=INK, linewidth=1.2, linestyle=":")
        axes.text(100.0, 1.0, " unmerged", fontsize=9, va="top", transform=axes.get_xaxis_transform())
    else:
        what, label = "the attention that is left", "work left in the merged layers' attention (logarithmic)"
        axes.set_xscale("log", base=2)
        ticks = [2.0**power for power in range(-6, 1)]
        axes.set_xticks(ticks, [f"{100 * t:.3g}%" for t in ticks])

    def x(row: Row) -> float:
        return 100.0 / float(row["speedup"]) if timed else float(row["cost"])

    title = f"Fidelity against {what} ({SAMPLERS[main_sampler(rows)].title})"
    axes.set_title(title, loc="left", fontsize=12, pad=12)
    axes.set(xlabel=label, ylabel="PSNR to the unmerged picture, dB")
    for family, (colour, marker, line) in STYLES.items():
        mine = sorted((row for row in rows if row["family"] == family and row["psnr"] != "inf"), key=x)
        name, _, start = family.partition(" from ")
        late = f", after {round(float(start) * 100)}% of the steps" if start else ""
        if mine:
            heights, errors = ([float(row[column]) for row in mine] for column in ("psnr", "psnr_se"))
            axes.errorbar(
                [x(row) for row in mine], heights, yerr=errors, color=colour, marker=marker, linestyle=line,
                markersize=6, markerfacecolor=PAPER if start else colour,
                linewidth=2.4 if family == "sample" else 1.4, elinewidth=1, capsize=2,
                label=TITLES.get(name, name) + late, zorder=3 if family.startswith("sample") else 2,
            )  # fmt: skip
    axes.legend(loc="center left", bbox_to_anchor=(1.01, 0.5), fontsize=9)
    return save(figure, path)


def draw_methods(folder: Path) -> list[Path]:
    """The plots of each model that pages show; where they were written."""
    made = []
    for file in ("", "lab"):
        rows, suffix = of_model(results(), file), f"-{file}" if file else ""
        rows = frontier(rows, main_sampler(rows))
        for name in ("cost", "time"):
            made.append(_methods(rows, folder / f"quality-{name}{suffix}.png", name == "time"))
    return made


def draw(folder: Path) -> list[Path]:
    return [*draw_methods(folder), *draw_main(folder), *draw_rivals(folder)]
