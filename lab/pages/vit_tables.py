"""Writes the tables of docs/vit.md from the committed CSVs: `python -m lab.pages.vit_tables`.

Between `<!-- NAME -->` and `<!-- end -->` stands what the function of that name makes. A test compares.
"""

from __future__ import annotations

import csv
import re
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "vit.md"
SMALL = ROOT / "lab" / "results" / "fidelity" / "vit.csv"
LARGE = ROOT / "lab" / "results" / "speed" / "vit.csv"
NOT_YET = "Not measured yet.\n"
_BLOCK = re.compile(r"(<!-- (\w+) -->\n)(.*?)(<!-- end -->)", re.DOTALL)
Row = dict[str, str]


def read(path: Path) -> list[Row]:
    """A CSV's rows; none where there is no such file yet."""
    if not path.exists():
        return []
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def _table(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _about(row: Row, words: str) -> str:
    place = ", ".join(part for part in (row["machine"], row["driver"] and f"driver {row['driver']}") if part)
    return f"\n{words} {place}, torch {row['torch']}, timm {row['timm']}, {row['date']}, commit {row['commit']}.\n"


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
    return _table(head, body) + _about(first, words)


def vit_schedules(rows: list[Row]) -> str:
    """Points lost and speed by schedule, trained without merging."""
    ours = [row for row in rows if row["trained"] == "unmerged" and row["method"] == "bipartite"]
    names = list(dict.fromkeys(row["schedule"] for row in ours))
    body = []
    for r in (r for r in _rs(ours) if r != "0"):
        found = [_find(ours, schedule=name, r=r) for name in names]
        body.append([r, *(f"{_lost(row)}, {_speed(row)}, {row['tokens_left']} left" if row else "" for row in found)])
    return _table(["r", *names], body)


def vit_methods(rows: list[Row]) -> str:
    """Other ways to have as many tokens fewer, trained without merging."""
    ours = [row for row in rows if row["trained"] == "unmerged" and row["schedule"] == "constant"]
    names = list(dict.fromkeys(row["method"] for row in ours))
    rs = _rs(ours, method=names[-1])
    body = []
    for name in names:
        found = [_find(ours, method=name, r=r) for r in rs]
        body.append([name, *(", ".join(filter(None, (_lost(row), _speed(row)))) for row in found)])
    return _table(["method", *(f"r = {r}" for r in rs)], body)


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
    return _table(head, body) + _about(rows[0], f"Median of {rows[0]['rounds']} runs in turns, batches {batches}.")


MAKERS: dict[str, tuple[Path, Callable[[list[Row]], str]]] = {
    "vit_accuracy": (SMALL, vit_accuracy),
    "vit_schedules": (SMALL, vit_schedules),
    "vit_methods": (SMALL, vit_methods),
    "vit_large": (LARGE, vit_large),
}


def made(name: str) -> str:
    """The table of that name. Raises KeyError for one that nobody makes."""
    path, maker = MAKERS[name]
    rows = read(path)
    return maker(rows) if rows else NOT_YET


def filled(text: str) -> str:
    """A page with its tables made anew."""
    return _BLOCK.sub(lambda found: f"{found[1]}{made(found[2])}{found[4]}", text)


def main() -> None:
    PAGE.write_text(filled(PAGE.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    main()
