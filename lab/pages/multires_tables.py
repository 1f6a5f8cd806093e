"""docs/quality.md's table of keys at three resolutions beside what leaves as much of the work."""

from __future__ import annotations

from pathlib import Path

from ..store import RESULTS, Row, markdown, read
from .fidelity_tables import with_error

# File of lab/results/fidelity, and what the table calls its model.
MODELS = {"multires-dit": "dit, 1,024 tokens", "multires-dit-large": "dit-large, 4,096 tokens"}


def resolutions(folder: Path = RESULTS / "fidelity") -> str:
    """PSNR to the unmerged picture on each model, by the share of the attention's work that is left."""
    rows = {name: {row["variant"]: row for row in read(folder / f"{name}.csv")} for name in MODELS}
    first, *_ = rows.values()
    shown = [variant for variant in first if variant != "unmerged"]
    lines = []
    for variant in sorted(shown, key=lambda name: (float(first[name]["cost"]), -float(first[name]["psnr"]))):
        cells = [with_error(rows[name][variant]["psnr"], rows[name][variant]["psnr_se"]) for name in MODELS]
        lines.append([variant, f"{float(first[variant]['cost']):.0%}", *cells])
    return f"{markdown(['what', 'work', *MODELS.values()], lines, left=1)}\n{_about(rows)}\n"


def _about(rows: dict[str, dict[str, Row]]) -> str:
    said = []
    for name, of in rows.items():
        one = next(iter(of.values()))
        said.append(
            f"{MODELS[name].partition(',')[0]}: {one['images']} pictures, {one['precision']} precision, "
            f"{one['device']}, torch {one['torch']}, {one['date']}, commit {one['commit']}, model {one['model']}"
        )
    return "Euler, 28 steps, guidance 3. " + "; ".join(said) + "."
