"""The plots of docs/quality.md."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ..models.samplers import SAMPLERS
from .fidelity_tables import frontier
from .rows import Row, main_sampler, of_model, results
from .style import INK, PAPER, STYLES, figure_of, save

TITLES = {"tomesd": "as tomesd does", "ToDo": "downsample (ToDo)"}


def _plot(rows: Sequence[Row], path: Path, timed: bool) -> None:
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
        ticks = [1 / 64, 1 / 32, 1 / 16, 1 / 8, 1 / 4, 1 / 2, 1]
        axes.set_xticks(ticks, [f"{100 * t:.3g}%" for t in ticks])

    def x(row: Row) -> float:
        return 100.0 / float(row["speedup"]) if timed else float(row["cost"])

    title = SAMPLERS[main_sampler(rows)].title
    axes.set_title(f"Fidelity against {what} ({title})", loc="left", fontsize=12, pad=12)
    axes.set_xlabel(label)
    axes.set_ylabel("PSNR to the unmerged picture, dB")
    for family, (colour, marker, line) in STYLES.items():
        mine = sorted((row for row in rows if row["family"] == family and row["psnr"] != "inf"), key=x)
        name, _, start = family.partition(" from ")
        late = f", after {round(float(start) * 100)}% of the steps" if start else ""
        if mine:
            axes.errorbar(
                [x(row) for row in mine],
                [float(row["psnr"]) for row in mine],
                yerr=[float(row["psnr_se"]) for row in mine],
                color=colour,
                marker=marker,
                linestyle=line,
                markersize=6,
                markerfacecolor=PAPER if " from " in family else colour,
                linewidth=2.4 if family == "sample" else 1.4,
                elinewidth=1,
                capsize=2,
                label=TITLES.get(name, name) + late,
                zorder=3 if family.startswith("sample") else 2,
            )
    axes.legend(loc="center left", bbox_to_anchor=(1.01, 0.5), fontsize=9)
    save(figure, path)


def draw(folder: Path) -> list[Path]:
    """The plots of each model that pages show; where they were written."""
    made = []
    for file in ("", "lab"):
        rows, suffix = of_model(results(), file), f"-{file}" if file else ""
        rows = frontier(rows, main_sampler(rows))
        for name in ("cost", "time"):
            made.append(folder / f"quality-{name}{suffix}.png")
            _plot(rows, made[-1], name == "time")
    return made
