"""docs/quality.md's tables of keys at three resolutions beside what leaves as much of the work."""

from __future__ import annotations

from collections.abc import Iterable

from ..fidelity.methods import UNMERGED
from ..models.samplers import GUIDANCE, parse_sampler
from ..store import Row, markdown, read
from .fidelity_tables import FOLDER, origin, with_error

# File of lab/results/fidelity, and what the table calls its model.
MODELS = {
    "dit": "dit, 1,024 tokens",
    "dit-fine": "dit-fine, 2,304 tokens",
    "dit-large": "dit-large, 4,096 tokens",
}
# Of the rows with a late start these are shown; the files have all.
STARTED = ("multires 0.84 from", "multires 0.77 from", "sample")
EULER = "Euler, 28 steps, guidance 3. "


def resolutions() -> str:
    """PSNR to the unmerged picture on each model, by the share of the attention's work that is left."""
    rows = {name: _merged(name) for name in MODELS}
    first, fine = rows["dit"], rows["dit-fine"]
    shown = [name for name in first if " from " not in name or name.startswith(STARTED)]
    lines = []
    for variant in sorted(shown, key=lambda name: (float(first[name]["cost"]), -float(first[name]["psnr"]))):
        gap = with_error(fine[variant]["fd_gap"], fine[variant]["fd_gap_se"], sign=True)
        lines.append([variant, _work(first[variant]), *(_psnr(found.get(variant)) for found in rows.values()), gap])
    return _made([*MODELS.values(), "Fréchet, change, dit-fine"], lines, rows, EULER)


def other_samplers() -> str:
    """The same with fewer steps, fresh noise in each step and other guidance."""
    rows = {name: _rows(f"{name}-few") for name in ("dit", "dit-fine")}
    found = {(name, row["sampler"], row["variant"]): row for name, of in rows.items() for row in of}
    columns = list(dict.fromkeys((name, sampler) for name, sampler, _ in found))
    first = {row["variant"]: row for (*place, _), row in found.items() if tuple(place) == columns[0]}
    lines = [
        [name, _work(first[name]), *(_psnr(found.get((*column, name))) for column in columns)]
        for name in sorted(first, key=lambda name: float(first[name]["cost"]))
        if name != UNMERGED
    ]
    heads = [f"{name}, {_title(sampler)}" for name, sampler in columns]
    return _made(heads, lines, {name: {"": of[0]} for name, of in rows.items()})


def on_unets() -> str:
    """On the lab's two U-Nets, where `sample` is nearer."""
    found = {name: _merged(name) for name in ("demo", "lab")}
    lines = [
        [
            variant,
            _work(row),
            *(cell for of in found.values() for cell in (_psnr(of[variant]), of[variant]["ssim"][:5])),
        ]
        for variant, row in found["demo"].items()
    ]
    heads = [f"{name}, {cell}" for name in found for cell in ("PSNR, dB", "SSIM")]
    return _made(heads, lines, found, "DDIM, 30 steps. ")


def videos() -> str:
    """Distance of videos, of what moves in them, and flicker."""
    rows, lines = _merged("video"), []
    for variant, row in sorted(rows.items(), key=lambda item: -float(item[1]["psnr"])):
        motion = with_error(row["motion"], row["motion_se"])
        flicker = with_error(row["flicker"], row["flicker_se"], sign=True)
        lines.append([variant, _work(row), _psnr(row), row["ssim"][:5], motion, flicker])
    return _made(["PSNR, dB", "SSIM", "motion, dB", "flicker, dB"], lines, {"video": rows}, EULER)


def _rows(name: str) -> list[Row]:
    return read(FOLDER / f"multires-{name}.csv")


def _merged(name: str) -> dict[str, Row]:
    return {row["variant"]: row for row in _rows(name) if row["variant"] != UNMERGED}


def _title(name: str) -> str:
    sampler, guidance = parse_sampler(name)
    return sampler.title if guidance == GUIDANCE else f"guidance {guidance:g}"


def _work(row: Row) -> str:
    return f"{float(row['cost']):.0%}"


def _psnr(row: Row | None) -> str:
    return "-" if row is None else with_error(row["psnr"], row["psnr_se"])


def _made(heads: Iterable[str], lines: list[list[str]], of: dict[str, dict[str, Row]], how: str = "") -> str:
    """The table, and below it how and where each model was measured, as its first row has it."""
    ones = {name: next(iter(rows.values())) for name, rows in of.items()}
    counts = "{images} pictures, {precision} precision"
    about = "; ".join(f"{name}: {counts.format(**row)}, {origin(row)}" for name, row in ones.items())
    return f"{markdown(['what', 'work', *heads], lines, left=1)}\n{how}{about}.\n"
