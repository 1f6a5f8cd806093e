"""Where things lie. All that the installer makes is below .venv/ and .cache/, out of git's sight."""

from __future__ import annotations

from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
VENV = ROOT / ".venv"
CACHE = ROOT / ".cache"
REQUIREMENTS = ROOT / "requirements"
RESULTS = ("compare.png", "compare.md")  # in the folder that --out names
TABLE_HEAD = ("", "seconds a step", "speed-up", "PSNR", "tokens kept")  # by which a compare.md is known
COMPARED = ("generations.jsonl", "compare.json", "table.md", "chart.png")  # of `compare`; the first one is its journal
