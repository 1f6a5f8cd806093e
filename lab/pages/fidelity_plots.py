"""The plots of docs/quality.md."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from ..models.samplers import SAMPLERS
from .fidelity_tables import frontier
from .rows import Row, main_sampler, of_model, results
from .style import INK, PAPER, STYLES, figure_of, save

TITLES = {
    "tomesd": "as tomesd does",
    "ToDo": "downsample (ToDo)",
}


def title_of(family: str) -> str:
    name, _, start = family.partition(" from ")
    name = TITLES.get(name, name)
    return f"{name}, after {round(float(start) * 100)}% of the steps" if start else name


def _plot(rows: Sequence[Row], path: Path, what: str, label: str, x: Callable[[Row], float], set_up: Callable) -> None:
    """PSNR against x, a line a family. set_up: what is done to the axes before."""
    figure, (axes,) = figure_of(1, 9.5, 5.6, 130)
    title = SAMPLERS[main_sampler(rows)].title
    axes.set_title(f"Fidelity against {what} ({title})", color=INK, loc="left", fontsize=12, pad=12)
    axes.set_xlabel(label, color=INK)
    axes.set_ylabel("PSNR to the unmerged picture, dB", color=INK)
    set_up(axes)
    for family, (colour, marker, line) in STYLES.items():
        mine = sorted((row for row in rows if row["family"] == family and row["psnr"] != "inf"), key=x)
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
                label=title_of(family),
                zorder=3 if family.startswith("sample") else 2,
            )
    axes.legend(loc="center left", bbox_to_anchor=(1.01, 0.5), frameon=False, labelcolor=INK, fontsize=9)
    save(figure, path)


def plot_cost(rows: Sequence[Row], path: Path) -> None:
    """PSNR against the share of the attention's work that is left."""

    def set_up(axes: Any) -> None:
        axes.set_xscale("log", base=2)
        ticks = [1 / 64, 1 / 32, 1 / 16, 1 / 8, 1 / 4, 1 / 2, 1]
        axes.set_xticks(ticks, [f"{100 * t:.3g}%" for t in ticks])

    label = "work left in the merged layers' attention (logarithmic)"
    _plot(rows, path, "the attention that is left", label, lambda r: float(r["cost"]), set_up)


def plot_time(rows: Sequence[Row], path: Path) -> None:
    """PSNR against the measured time of a step, in percent of the unmerged step's."""
    rows = [row for row in rows if row["speedup"]]
    devices, shape = " and ".join(sorted({r["device"] for r in rows})), rows[0]["step_shape"]

    def set_up(axes: Any) -> None:
        axes.axvline(100.0, color=INK, linewidth=1.2, linestyle=":")
        axes.text(100.0, 1.0, " unmerged", color=INK, fontsize=9, va="top", transform=axes.get_xaxis_transform())

    label = f"median time of a step, % of the unmerged one's ({devices}, float16, {shape}, eager)"
    _plot(rows, path, "the measured time of a step", label, lambda r: 100.0 / float(r["speedup"]), set_up)


def draw(folder: Path) -> list[Path]:
    """The plots of each model that pages show; where they were written."""
    made = []
    for file in ("", "lab"):
        rows, suffix = of_model(results(), file), f"-{file}" if file else ""
        rows = frontier(rows, main_sampler(rows))
        for name, plot in (("cost", plot_cost), ("time", plot_time)):
            made.append(folder / f"quality-{name}{suffix}.png")
            plot(rows, made[-1])
    return made
