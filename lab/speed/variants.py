"""ToMe's options by the names that the benchmarks of lab/speed have for them."""

from __future__ import annotations

from typing import Any

from shared_tome.methods import PRESETS

MARKS: dict[str, dict[str, Any]] = {
    "own token": {"own_token": True},
    "shared": {"share_match": True},
    "unweighted": {"proportional": False},
    "where it pays": {"levels": "auto"},
    "levels auto": {"levels": "auto"},
}


def options_of(name: str) -> dict[str, Any]:
    """Of a method, a ratio, a start and marks, or of a preset: "sample 0.9375 from 0.1", "merge 0.5, shared"."""
    whole, *marks = name.split(", ")
    found = dict(PRESETS[whole].options) if whole in PRESETS else {}
    if not found:
        head, _, start = whole.partition(" from ")
        method, ratio = head.split()
        found = {"method": method, "ratio": float(ratio), "start": float(start or 0), "own_token": method != "sample"}
    for mark in marks:
        found |= MARKS[mark]
    return found
