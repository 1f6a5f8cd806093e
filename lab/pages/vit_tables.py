"""The tables of docs/vit.md."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from ..store import RESULTS, Row, grouped, markdown, read
from .speed_tables import about

SMALL, LARGE = RESULTS / "fidelity" / "vit.csv", RESULTS / "speed" / "vit.csv"


def _about(row: Row, words: str) -> str:
    return f"\n{words} {about([row | {'versions': 'timm ' + row['timm']}])}.\n"


def _lost(row: Row | None) -> str:
    if row is None or not row["lost"]:
        return ""
    return f"{0.0 - float(row['lost']):+.2f} ± {float(row['lost_se']):.2f}"


def _speed(row: Row | None) -> str:
    return f"{float(row['speedup']):.2f}x" if row else ""


def _by_r(rows: list[Row], column: str) -> list[tuple[str, dict[str, Row]]]:
    """Each r, rising, with its rows by the values of a column."""
    return sorted(((r, found) for (r,), found in grouped(rows, ("r",), column).items()), key=lambda one: int(one[0]))


def vit_accuracy(rows: list[Row]) -> str:
    """The two models at a constant r."""
    body = []
    ours = [row for row in rows if (row["method"], row["schedule"]) == ("bipartite", "constant")]
    for r, found in _by_r(ours, "trained"):
        one = found["unmerged"]
        both = (found.get(name) for name in ("unmerged", "merged"))
        cells = [f"{float(row['accuracy']):.2f} ({_lost(row)})" if row else "" for row in both]
        rate = f"{float(one['images_s']):,.0f} ({float(one['images_s_p20']):,.0f} to {float(one['images_s_p80']):,.0f})"
        body.append([r, one["tokens_left"], rate, _speed(one), *cells])
    first = rows[0]
    second = next((row for row in rows if row["trained"] == "merged"), first)
    head = ["r", "tokens left", "images/s (p20 to p80)", "speed", "trained without merging, %", "trained with it, %"]
    words = (
        f"{first['pictures']} held-out pictures, trained for {first['train_steps']} steps without merging and for "
        f"{second['train_steps']} with r = {second['train_r']}; in brackets the points against the first model "
        f"unmerged and the standard error of that paired difference. {first['precision']}, batch {first['batch']}, "
        f"median of {first['rounds']} runs in turns."
    )
    return markdown(head, body) + _about(first, words)


def vit_schedules(rows: list[Row]) -> str:
    """Points lost and speed by schedule, trained without merging."""
    ours = [row for row in rows if row["trained"] == "unmerged" and row["method"] == "bipartite"]
    names = list(dict.fromkeys(row["schedule"] for row in ours))
    body = []
    for r, by_name in _by_r([row for row in ours if row["r"] != "0"], "schedule"):
        found = [by_name.get(name) for name in names]
        body.append([r, *(f"{_lost(row)}, {_speed(row)}, {row['tokens_left']} left" if row else "" for row in found)])
    return markdown(["r", *names], body)


def vit_methods(rows: list[Row]) -> str:
    """Other ways to have as many tokens fewer, trained without merging."""
    ours = [row for row in rows if row["trained"] == "unmerged" and row["schedule"] == "constant"]
    methods = grouped(ours, ("method",), "r")
    rs = sorted(list(methods.values())[-1], key=int)
    body = [
        [name, *(", ".join(filter(None, (_lost(found.get(r)), _speed(found.get(r))))) for r in rs)]
        for (name,), found in methods.items()
    ]
    return markdown(["method", *(f"r = {r}" for r in rs)], body)


def vit_large(rows: list[Row]) -> str:
    """Large models with random weights: images a second."""
    kinds = ("bipartite, constant", "bipartite, falling", "bipartite, unweighted, constant", "limit, constant")
    rows = [{**row, "kind": f"{row['method']}, {row['schedule']}"} for row in rows]
    body = []
    for job in dict.fromkeys((row["model"], row["dtype"], row["backend"]) for row in rows):
        mine = [row for row in rows if (row["model"], row["dtype"], row["backend"]) == job]
        rate = next(f"{float(row['images_s']):,.0f}" for row in mine if row["method"] == "unmerged")
        for r, found in _by_r([row for row in mine if row["method"] != "unmerged"], "kind"):
            one, (model, *how) = found.get(kinds[0]), job
            if one:
                fewer = f"{one['tokens']} to {one['tokens_left']}"
                body.append([model, ", ".join(how), rate, r, fewer, *(_speed(found.get(kind)) for kind in kinds)])
    head = [
        "model, pixels", "precision, attention", "unmerged, images/s", "r", "tokens", "constant", "falling",
        "unweighted", "limit",
    ]  # fmt: skip
    batches = ", ".join(dict.fromkeys(f"{row['model']}: {row['batch']}" for row in rows))
    return markdown(head, body) + _about(rows[0], f"Median of {rows[0]['rounds']} runs in turns, batches {batches}.")


MAKERS: dict[str, tuple[Path, Callable[[list[Row]], str]]] = {
    "vit_accuracy": (SMALL, vit_accuracy),
    "vit_schedules": (SMALL, vit_schedules),
    "vit_methods": (SMALL, vit_methods),
    "vit_large": (LARGE, vit_large),
}


def made(name: str) -> str:
    """The table of that name; empty where nothing was measured."""
    path, maker = MAKERS[name]
    rows = read(path)
    return maker(rows) if rows else ""
