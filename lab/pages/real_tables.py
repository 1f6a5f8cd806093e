"""docs/quality.md's table of what people measured on their own models."""

from __future__ import annotations

from pathlib import Path

from installer.compare.plan import UNMERGED
from installer.compare.schema import SAME

from ..fidelity.real_models import FILE
from ..store import markdown, read

NOBODY = "Nobody has sent a result yet.\n"


def real_models(file: Path = FILE) -> str:
    """A line a model, size and variant."""
    lines = []
    for row in read(file):
        if row["variant"] == UNMERGED:
            continue
        model = f"{row['model']} ({row['family']}, {row['sha256'] or row['dtype']})"
        place = f"{row['device']}, torch {row['torch']}, ToMe {row['tome']}, {row['date']}"
        ends = [_decibels(row["psnr"]), _number(row["ssim"], 3), _number(row["lpips"], 3), _decibels(row["floor_psnr"])]
        lines.append([model, row["size"], place, row["variant"], f"{_number(row['speedup'], 2)}x", *ends])
    head = ["model", "size", "measured on", "variant", "speed", "PSNR, dB", "SSIM", "LPIPS", "noise floor, dB"]
    return markdown(head, lines, left=4) if lines else NOBODY


def _number(value: str, places: int) -> str:
    return f"{float(value):.{places}f}" if value else ""


def _decibels(value: str) -> str:
    return "the same" if value and float(value) >= SAME else _number(value, 1)
