"""Rows of measurements in CSV files: read, written, gone on with, and shown as a Markdown table."""

from __future__ import annotations

import csv
import io
import sys
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

Row = dict[str, str]
RESULTS = Path(__file__).parent / "results"


def read(path: Path) -> list[Row]:
    """The rows of a CSV; none where there is no such file."""
    if not path.exists():
        return []
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def as_csv(rows: list[dict[str, Any]]) -> str:
    text = io.StringIO()
    if rows:
        columns = list(dict.fromkeys(column for row in rows for column in row))
        writer = csv.DictWriter(text, columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rounded(rows))
    return text.getvalue()


def save(rows: list[dict[str, Any]], out: Path | None) -> None:
    """Write the rows to a CSV file, if one is named."""
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(as_csv(rows), encoding="utf-8")


def rounded(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Floats to two places, shares to four."""

    def cell(value: Any) -> Any:
        return round(value, 2 if abs(value) >= 1 else 4) if isinstance(value, float) else value

    return [{key: cell(value) for key, value in row.items()} for row in rows]


class Store:
    """The rows of a benchmark: those that an earlier run left in the file, and those of this one.

    path: a CSV file, written anew with each row, so that an interrupted run keeps what it has; None: memory alone.
    keys: the columns that tell one row from another.
    """

    def __init__(self, path: Path | None, keys: Sequence[str]):
        self.path, self.keys = path, tuple(keys)
        self.rows: list[dict[str, Any]] = [] if path is None else read(path)
        missing = [key for row in self.rows[:1] for key in self.keys if key not in row]
        if missing:
            raise ValueError(f"{path} has no column {missing[0]!r}: it is of another benchmark or an older form")
        self._seen = {self._key(row) for row in self.rows}

    def _key(self, row: dict[str, Any]) -> tuple[str, ...]:
        return tuple(str(row[key]) for key in self.keys)

    def has(self, **row: Any) -> bool:
        return self._key(row) in self._seen

    def add(self, row: dict[str, Any]) -> None:
        """Another row; one with keys that are there already is left out."""
        if self._key(row) not in self._seen:
            self.rows.append(row)
            self._seen.add(self._key(row))
            save(self.rows, self.path)


class Budget:
    """How long a run may go on. minutes: None for as long as it takes."""

    def __init__(self, minutes: float | None):
        self._end = None if minutes is None else time.monotonic() + 60 * minutes

    @property
    def spent(self) -> bool:
        """Whether nothing new is to be begun; says so."""
        over = self._end is not None and time.monotonic() > self._end
        if over:
            print("stopped by --minutes; the same command goes on", file=sys.stderr)
        return over


def grouped(rows: Iterable[Row], keys: Sequence[str], by: str) -> dict[tuple[str, ...], dict[str, Row]]:
    """The rows that agree in `keys`, each under its value of the column `by`."""
    groups: dict[tuple[str, ...], dict[str, Row]] = {}
    for row in rows:
        groups.setdefault(tuple(row[key] for key in keys), {})[row[by]] = row
    return groups


def markdown(head: Sequence[str], rows: Sequence[Sequence[str]], left: int | None = None) -> str:
    """A Markdown table. left: how many columns are words, the rest being numbers; None: all are words."""
    rule = ["---" if left is None or place < left else "---:" for place in range(len(head))]
    return "".join(f"| {' | '.join(line)} |\n" for line in (head, rule, *rows))
