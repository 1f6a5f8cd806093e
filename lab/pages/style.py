"""How plots look: colours, axes, one legend for several panels, one way to save."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

PAPER, INK, GRID = "#fbfbf9", "#22262b", "#d9d9d4"
LOOK = {
    **dict.fromkeys(("figure.facecolor", "axes.facecolor", "savefig.facecolor"), PAPER),
    **dict.fromkeys(("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color"), INK),
    **dict.fromkeys(("axes.spines.top", "axes.spines.right", "legend.frameon"), False),
    **dict.fromkeys(("axes.grid", "axes.axisbelow"), True),
    "grid.color": GRID,
    "grid.linewidth": 0.8,
    "savefig.bbox": "tight",
}
# family: (colour, marker, line). Colours after Okabe and Ito, told apart by colour-blind eyes too.
STYLES: dict[str, tuple[str, str, str]] = {
    "sample": ("#0072b2", "o", "-"),
    "sample from 0.1": ("#56b4e9", "v", "--"),
    "sample from 0.2": ("#56b4e9", "o", "--"),
    "sample from 0.4": ("#56b4e9", "s", "--"),
    "sample from 0.6": ("#56b4e9", "^", "--"),
    "sample, own token kept": ("#5e3c99", "o", "-"),
    "sample, own token kept from 0.1": ("#9a7fc7", "v", "--"),
    "sample, own token kept from 0.2": ("#9a7fc7", "o", "--"),
    "ToDo": ("#009e73", "D", "-"),
    "merge_keys, pick": ("#cc79a7", "v", "-"),
    "merge_keys, mean": ("#cc79a7", "v", ":"),
    "merge_queries": ("#8c6d31", "P", "-"),
    "merge, proportional": ("#e69f00", "s", "-"),
    "tomesd": ("#d55e00", "s", "-"),
    "prune": ("#7a7a7a", "X", "-"),
    "ToDo from 0.2": ("#009e73", "D", "--"),
    "merge, proportional from 0.2": ("#e69f00", "s", "--"),
    "tomesd from 0.2": ("#d55e00", "s", "--"),
}


def figure_of(
    columns: int, width: float, height: float, dpi: int, rows: int = 1, **kwargs: Any
) -> tuple[Any, list[Any]]:
    """(figure, its axes, row by row), drawn without a screen. width: of one, height: of all, in inches."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    plt.rcParams.update(LOOK)
    size = (width * columns, height)
    figure, axes = plt.subplots(rows, columns, figsize=size, dpi=dpi, squeeze=False, **kwargs)
    return figure, list(axes.flat)


def save(figure: Any, path: Path) -> Path:
    """Write the picture, the same bytes each time."""
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, metadata={"Software": None})
    return path


def save_panels(figure: Any, path: Path, panels: Sequence[Any] = (), fontsize: int = 9) -> Path:
    """The same for several panels; of those named every label once, at the right."""
    figure.tight_layout()
    named = {}
    for axes in panels:
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
            named.setdefault(label, handle)
    if named:
        place = {"loc": "center left", "bbox_to_anchor": (1.0, 0.5)}
        figure.legend(named.values(), named.keys(), fontsize=fontsize, **place)
    return save(figure, path)
