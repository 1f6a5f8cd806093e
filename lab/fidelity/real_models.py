"""Results of `install.py compare` from people's own models: checked, and added to lab/results/fidelity/real-models.csv.

python -m lab.fidelity.real_models add-result compare.json
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from installer.compare.plan import DEMO, FLOOR_NAME
from installer.compare.schema import problems

from .. import store

FILE = store.RESULTS / "fidelity" / "real-models.csv"
KEYS = ("date", "model", "sha256", "device", "size", "variant")
NUMBERS = ("steps", "seconds", "speedup", "first_seconds", "peak_gib", "skipped", "psnr", "ssim", "lpips")
COLUMNS = (
    "date", "tome", "model", "sha256", "family", "dtype", "workflow", "device", "memory_gib", "torch", "comfyui",
    "system", "pictures", "size", "variant", "options", *NUMBERS, "floor_psnr",
)  # fmt: skip


def rows_of(found: dict[str, Any]) -> list[dict[str, Any]]:
    """One row for each variant and size. Raises ValueError with all that is wrong."""
    wrong = problems(found)
    if wrong:
        raise ValueError("\n".join(wrong))
    machine, model = found["machine"], found["model"]
    floors = {row["size"]: row["psnr"] for row in found["results"] if row["variant"] == FLOOR_NAME}
    shared = {"date": found["date"], "tome": found["tome"], "model": model["name"], "pictures": found["pictures"]}
    shared |= {name: model[name] for name in ("sha256", "family", "dtype", "workflow")}
    shared |= {name: machine[name] for name in ("device", "memory_gib", "torch", "comfyui", "system")}
    rows = []
    for row in found["results"]:
        if row["variant"] != FLOOR_NAME:
            options = ", ".join(f"{name} {value}" for name, value in (row["tome"] or {}).items())
            mine = {"size": row["size"], "variant": row["variant"], "options": options}
            numbers = {name: row[name] for name in NUMBERS} | {"floor_psnr": floors.get(row["size"])}
            values = {**shared, **mine, **numbers}
            rows.append({name: "" if values[name] is None else values[name] for name in COLUMNS})
    return rows


def add_result(path: Path, into: Path = FILE) -> int:
    """Add a file's rows to the CSV; how many. Raises ValueError where the file is not right, or is in it already."""
    try:
        found = json.loads(path.read_text(encoding="utf-8-sig"))  # pasted and saved on Windows
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path.name} is no JSON: {error}") from error
    rows, there = rows_of(found), store.Store(into, KEYS)
    if rows[0]["model"] == DEMO:
        raise ValueError("the demo's model is no real one: compare with --checkpoint or --workflow")
    if any(there.has(**{key: row[key] for key in KEYS}) for row in rows):
        raise ValueError(f"{path.name} is in {into.name} already")
    store.save([*there.rows, *rows], into)
    return len(rows)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m lab.fidelity.real_models", description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    add = commands.add_parser("add-result", help="check a compare.json and add it; then run `python -m lab.pages`")
    add.add_argument("file", type=Path)
    args = parser.parse_args()
    try:
        print(f"added {add_result(args.file)} rows to {FILE.name}; now run `python -m lab.pages`")
    except (ValueError, OSError) as error:
        print(f"{args.file}: not added:\n{error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
