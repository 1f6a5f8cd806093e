"""The tables of docs/vit.md."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from ..store import RESULTS, Row, markdown, read
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


def _find(rows: list[Row], **values: str) -> Row | None:
    return next((row for row in rows if all(row[key] == value for key, value in values.items())), None)


def _rs(rows: list[Row], **values: str) -> list[str]:
    return sorted({row["r"] for row in rows if all(row[k] == v for k, v in values.items())}, key=int)


def vit_accuracy(rows: list[Row]) -> str:
    """The two models at a constant r."""
    body = []
    for r in _rs(rows, method="bipartite", schedule="constant"):
        one, two = (
            _find(rows, trained=name, method="bipartite", schedule="constant", r=r) for name in ("unmerged", "merged")
        )
        cells = [f"{float(row['accuracy']):.2f} ({_lost(row)})" if row else "" for row in (one, two)]
        rate = f"{float(one['images_s']):,.0f} ({float(one['images_s_p20']):,.0f} to {float(one['images_s_p80']):,.0f})"
        body.append([r, one["tokens_left"], rate, _speed(one), *cells])
    first = rows[0]
    second = _find(rows, trained="merged") or first
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
    for r in (r for r in _rs(ours) if r != "0"):
        found = [_find(ours, schedule=name, r=r) for name in names]
        body.append([r, *(f"{_lost(row)}, {_speed(row)}, {row['tokens_left']} left" if row else "" for row in found)])
    return markdown(["r", *names], body)


def vit_methods(rows: list[Row]) -> str:
    """Other ways to have as many tokens fewer, trained without merging."""
    ours = [row for row in rows if row["trained"] == "unmerged" and row["schedule"] == "constant"]
    names = list(dict.fromkeys(row["method"] for row in ours))
    rs = _rs(ours, method=names[-1])
    body = []
    for name in names:
        found = [_find(ours, method=name, r=r) for r in rs]
        body.append([name, *(", ".join(filter(None, (_lost(row), _speed(row)))) for row in found)])
    return markdown(["method", *(f"r = {r}" for r in rs)], body)


def vit_large(rows: list[Row]) -> str:
    """Large models with random weights: images a second."""
    body = []
    jobs = dict.fromkeys((row["model"], row["dtype"], row["backend"]) for row in rows)
    for model, dtype, backend in jobs:
        job = {"model": model, "dtype": dtype, "backend": backend}
        base = _find(rows, **job, method="unmerged")
        kinds = (("bipartite", "constant"), ("bipartite", "falling"), ("bipartite, unweighted", "constant"))
        for r in _rs(rows, **job, method="bipartite"):
            found = [_find(rows, **job, method=m, schedule=s, r=r) for m, s in (*kinds, ("limit", "constant"))]
            rate = f"{float(base['images_s']):,.0f}"
            fewer = f"{found[0]['tokens']} to {found[0]['tokens_left']}"
            body.append([model, f"{dtype}, {backend}", rate, r, fewer, *map(_speed, found)])
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
