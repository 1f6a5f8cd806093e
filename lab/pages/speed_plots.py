"""The plots of docs/speed.md. One whose CSV is missing is left out."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..store import Row, grouped, read
from .speed_tables import FOLDER, MODELS
from .style import INK, figure_of, save_panels

# variant: (colour, marker, line). Colours after Okabe and Ito, told apart by colour-blind eyes too.
STYLES: dict[str, tuple[str, str, str]] = {
    "sample 0.5": ("#56b4e9", "o", "-"),
    "sample 0.75": ("#0072b2", "o", "-"),
    "sample 0.9375": ("#003f63", "o", "-"),
    "sample 0.75, own token": ("#6a3d9a", "o", "-"),
    "sample 0.9375, own token": ("#3f1f63", "o", "--"),
    "downsample 0.75": ("#009e73", "D", "-"),
    "merge 0.25": ("#f3cf80", "s", "-"),
    "merge 0.5": ("#e69f00", "s", "-"),
    "merge 0.75": ("#b87d00", "s", "-"),
    "merge_queries 0.5": ("#8c6d31", "P", "-"),
    "comfyui core 0.5": ("#8c6d31", "P", "-"),
    "tomesd 0.5": ("#d55e00", "X", "-"),
    "half at no cost": ("#e69f00", "", ":"),
    "limit": ("#22262b", "", ":"),
}
WHO = {"kernels": ("#0072b2", "o", "-"), "torch": ("#56b4e9", "v", "--"), "tomesd": ("#d55e00", "X", "-")}


def _figure(rows: Sequence[Row], columns: int, title: str, width: float, height: float) -> tuple[Any, list[Any]]:
    """Panels of the same height; the title ends with the rows' machines."""
    figure, panels = figure_of(columns, width, height, 120, sharey=True)
    machines = " and ".join(dict.fromkeys(row["machine"] for row in rows))
    figure.suptitle(f"{title}, {machines}", x=0.01, ha="left", fontsize=12)
    for each in panels:
        each.tick_params(labelsize=8)
    return figure, panels


_SPREAD = ("speedup_p20", "speedup", "speedup_p80")


def _lines(axes: Any, rows: Sequence[Row], low: float, high: float) -> None:
    """Speed against pixels, with a bar from p20 to p80, one line a variant. low, high: the slowest and the fastest."""
    sizes = sorted({row["pixels"] for row in rows}, key=int)
    axes.set_yscale("log", base=2)
    axes.axhline(1.0, color=INK, linewidth=1)
    for name, (colour, marker, line) in STYLES.items():
        mine = {row["pixels"]: row for row in rows if row["variant"] == name and row["speedup"]}
        at = [size for size in sizes if size in mine]
        if not at:
            continue
        slow, speeds, fast = ([float(mine[size][name]) for size in at] for name in _SPREAD)
        bars = [[b - a for a, b in zip(*side, strict=True)] for side in ((slow, speeds), (speeds, fast))]
        axes.errorbar(
            [sizes.index(size) for size in at], speeds, yerr=bars, color=colour, marker=marker or None, linestyle=line,
            linewidth=1.6, markersize=5, elinewidth=1, capsize=2, label=name,
        )  # fmt: skip
    axes.set_xticks(range(len(sizes)), [f"{size}²" for size in sizes])
    axes.minorticks_off()
    axes.set_ylim(low * 0.95, high * 1.05)
    ticks = [tick for tick in (0.5, 0.7, 0.8, 0.9, 1, 1.2, 1.5, 2, 2.5, 3, 4, 5, 6, 8) if low <= tick <= high]
    axes.set_yticks(ticks, [f"{tick:g}x" for tick in ticks])


def _by_model(rows: Sequence[Row], title: str, path: Path) -> None:
    """With the attention that was measured first."""
    rows = [row for row in rows if row["backend"] == rows[0]["backend"]]
    models = list(dict.fromkeys(row["model"] for row in rows))
    shown = [float(row[name]) for row in rows if row["speedup"] and row["variant"] in STYLES for name in _SPREAD]
    figure, panels = _figure(rows, len(models), title, 4.6, 4.4)
    for axes, model in zip(panels, models, strict=True):
        _lines(axes, [row for row in rows if row["model"] == model], min(shown, default=1.0), max(shown, default=1.0))
        axes.set_title(MODELS.get(model, model), fontsize=10)
        axes.set_xlabel("pixels")
    panels[0].set_ylabel("times as fast as unmerged")
    save_panels(figure, path, panels)


def steps(rows: Sequence[Row], path: Path) -> None:
    """diffusers' U-Nets, as a graph where there is one."""
    rows = [row for row in rows if row["mode"] == "graph"] or rows
    mode = rows[0]["mode"].replace("graph", "CUDA graph")
    _by_model(rows, f"A step of diffusers' U-Nets, {mode}, {rows[0]['backend']} attention", path)


def hosts(rows: Sequence[Row], path: Path) -> None:
    named = f"{rows[0]['backend']} attention".replace("default", "its own choice of")
    _by_model(rows, f"A step of ComfyUI's KSampler, {named}", path)


def growth(rows: Sequence[Row], path: Path) -> None:
    """Time against tokens, a panel for each part."""
    rows = [row for row in rows if row["us"]]
    parts = [what for what in ("match", "merge", "unmerge", "draw", "gather") if any(r["what"] == what for r in rows)]
    title = f"How cost grows: 320 channels, batch {rows[0]['batch']}, {rows[0]['dtype']}"
    figure, panels = _figure(rows, len(parts), title, 3.3, 3.8)
    attention = sorted((int(r["tokens"]), float(r["us"])) for r in rows if r["what"] == "attention")
    for axes, part in zip(panels, parts, strict=True):
        if attention:
            axes.plot(*zip(*attention, strict=True), color=INK, linestyle=":", label="attention, unmerged")
        for who, (colour, marker, line) in WHO.items():
            mine = sorted((int(r["tokens"]), float(r["us"])) for r in rows if (r["what"], r["who"]) == (part, who))
            if mine:
                look = {"color": colour, "marker": marker, "linestyle": line, "markersize": 4, "label": who}
                axes.plot(*zip(*mine, strict=True), **look)
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.set_xticks([2**10, 2**12, 2**14, 2**16, 2**18], ["1k", "4k", "16k", "65k", "262k"])
        axes.set_title(part, fontsize=10)
        axes.set_xlabel("tokens")
    panels[0].set_ylabel("µs")
    save_panels(figure, path, panels)


def _bars(axes: Any, names: Sequence[str], bars: dict[str, tuple[float, str]], at: float, first: bool) -> None:
    """A bar for each name that has a value and a text; a line at `at`."""
    for place, name in enumerate(names):
        if name in bars:
            value, text = bars[name]
            colour = STYLES.get(name.partition(",")[0], ("#7a7a7a",))[0]
            axes.barh(place, value, color=colour, alpha=0.45 if "unweighted" in name else 1.0)
            axes.text(max(value, 0.0), place, text, va="center", fontsize=8)
    axes.axvline(at, color=INK, linewidth=1)
    axes.set_yticks(range(len(names)), names)
    if first:
        axes.invert_yaxis()


def memory(rows: Sequence[Row], path: Path) -> None:
    """What merging adds to the layer's peak, a panel for each number of tokens."""
    rows = [row for row in rows if row["merged_mb"] and row["channels"] == rows[0]["channels"]]
    groups = grouped(({**row, "name": f"{row['method']} {row['ratio']}"} for row in rows), ("tokens",), "name")
    names = list(dict.fromkeys(name for found in groups.values() for name in found))
    title = f"Peak memory that merging adds to a layer of {rows[0]['channels']} channels"
    figure, panels = _figure(rows, len(groups), title, 3.6, 3.8)
    for axes, (tokens,) in zip(panels, sorted(groups, key=lambda key: int(key[0])), strict=True):
        added = {name: float(row["added_tensors"]) for name, row in groups[tokens,].items()}
        _bars(axes, names, {name: (x, f" {x:+.1f}") for name, x in added.items()}, 0.0, axes is panels[0])
        axes.set_title(f"{int(tokens):,} tokens", fontsize=10)
        axes.set_xlabel("times the token tensor")
        axes.margins(x=0.2)
    save_panels(figure, path)


def dit(rows: Sequence[Row], path: Path) -> None:
    """Transformers: times as fast as unmerged, a panel for each model and size."""
    rows = [row for row in rows if row["backend"] == rows[0]["backend"]]
    jobs = grouped(rows, ("model", "size"), "variant")
    names = [name for name in dict.fromkeys(row["variant"] for row in rows) if name != "unmerged"]
    title = f"Transformers in ComfyUI, {rows[0]['backend']} attention"
    figure, panels = _figure(rows, len(jobs), title, 3.2, 3.4)
    for axes, ((model, size), found) in zip(panels, jobs.items(), strict=True):
        speeds = {name: float(row["speedup"]) for name, row in found.items()}
        _bars(axes, names, {name: (x, f" {x:.2f}x") for name, x in speeds.items()}, 1.0, axes is panels[0])
        axes.set_title(f"{MODELS.get(model, model)}\n{size}", fontsize=9)
        axes.set_xlabel("times as fast", fontsize=9)
        axes.margins(x=0.25)
    save_panels(figure, path)


PLOTS = {"steps": steps, "hosts": hosts, "growth": growth, "memory": memory, "dit": dit}
"""What draws speed-NAME.png from NAME.csv."""


def draw(folder: Path, results: Path = FOLDER) -> list[Path]:
    """The plots whose CSVs are there; where they were written."""
    made = []
    for source, plot in PLOTS.items():
        if rows := read(results / f"{source}.csv"):
            made.append(folder / f"speed-{source}.png")
            plot(rows, made[-1])
    return made
