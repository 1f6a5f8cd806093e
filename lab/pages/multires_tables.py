"""docs/quality.md's tables of keys at three resolutions beside what leaves as much of the work."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from ..fidelity.methods import UNMERGED
from ..models.samplers import GUIDANCE, parse_sampler
from ..store import Row, markdown, read
from .fidelity_tables import FOLDER, with_error

# File of lab/results/fidelity, and what the table calls its model.
MODELS = {
    "multires-dit": "dit, 1,024 tokens",
    "multires-dit-fine": "dit-fine, 2,304 tokens",
    "multires-dit-large": "dit-large, 4,096 tokens",
}
OTHERS = {"multires-dit-few": "dit", "multires-dit-fine-few": "dit-fine"}
# Of the rows with a late start these are shown; the files have all.
STARTED = ("multires 0.84 from", "multires 0.77 from", "sample")


def resolutions(folder: Path = FOLDER) -> str:
    """PSNR to the unmerged picture on each model, by the share of the attention's work that is left."""
    rows = {name: {row["variant"]: row for row in read(folder / f"{name}.csv")} for name in MODELS}
    first, fine = rows["multires-dit"], rows["multires-dit-fine"]
    shown = [name for name in first if name != UNMERGED and (" from " not in name or name.startswith(STARTED))]
    lines = []
    for variant in sorted(shown, key=lambda name: (float(first[name]["cost"]), -float(first[name]["psnr"]))):
        cells = [_psnr(rows[name].get(variant)) for name in MODELS]
        gap = with_error(fine[variant]["fd_gap"], fine[variant]["fd_gap_se"], sign=True)
        lines.append([variant, _work(first[variant]), *cells, gap])
    table = markdown(["what", "work", *MODELS.values(), "Fréchet, change, dit-fine"], lines, left=1)
    ones = ((title.partition(",")[0], next(iter(rows[name].values()))) for name, title in MODELS.items())
    return f"{table}\nEuler, 28 steps, guidance 3. {_about(ones)}\n"


def other_samplers(folder: Path = FOLDER) -> str:
    """The same with fewer steps, fresh noise in each step and other guidance."""
    rows = {name: read(folder / f"{name}.csv") for name in OTHERS}
    found = {(name, row["sampler"], row["variant"]): row for name, of in rows.items() for row in of}
    columns = list(dict.fromkeys((name, sampler) for name, sampler, _ in found))
    variants = [name for name in dict.fromkeys(variant for *_, variant in found) if name != UNMERGED]
    first = {name: row for (file, sampler, name), row in found.items() if (file, sampler) == columns[0]}
    lines = [
        [name, _work(first[name]), *(_psnr(found.get((file, sampler, name))) for file, sampler in columns)]
        for name in sorted(variants, key=lambda name: float(first[name]["cost"]))
    ]
    table = markdown(
        ["what", "work", *(f"{OTHERS[file]}, {_title(sampler)}" for file, sampler in columns)], lines, left=1
    )
    return f"{table}\n{_about((OTHERS[name], of[0]) for name, of in rows.items())}\n"


def on_unets(folder: Path = FOLDER) -> str:
    """On the lab's two U-Nets, where `sample` is nearer."""
    found = {name: {row["variant"]: row for row in read(folder / f"multires-{name}.csv")} for name in ("demo", "lab")}
    lines = [
        [
            variant,
            _work(row),
            *(cell for rows in found.values() for cell in (_psnr(rows[variant]), rows[variant]["ssim"][:5])),
        ]
        for variant, row in found["demo"].items()
        if variant != UNMERGED
    ]
    heads = [f"{name}, {cell}" for name in found for cell in ("PSNR, dB", "SSIM")]
    about = _about((name, rows[UNMERGED]) for name, rows in found.items())
    return f"{markdown(['what', 'work', *heads], lines, left=1)}\nDDIM, 30 steps. {about}\n"


def videos(folder: Path = FOLDER) -> str:
    """Distance of videos, of what moves in them, and flicker."""
    rows = read(folder / "multires-video.csv")
    lines = []
    for row in sorted((row for row in rows if row["variant"] != UNMERGED), key=lambda row: -float(row["psnr"])):
        motion = with_error(row["motion"], row["motion_se"])
        flicker = with_error(row["flicker"], row["flicker_se"], sign=True)
        lines.append([row["variant"], _work(row), _psnr(row), row["ssim"][:5], motion, flicker])
    table = markdown(["what", "work", "PSNR, dB", "SSIM", "motion, dB", "flicker, dB"], lines, left=1)
    return f"{table}\nEuler, 28 steps, guidance 3. {_about([('video', rows[0])])}\n"


def _title(name: str) -> str:
    sampler, guidance = parse_sampler(name)
    return sampler.title if guidance == GUIDANCE else f"guidance {guidance:g}"


def _work(row: Row) -> str:
    return f"{float(row['cost']):.0%}"


def _psnr(row: Row | None) -> str:
    return "-" if row is None else with_error(row["psnr"], row["psnr_se"])


def _about(of: Iterable[tuple[str, Row]]) -> str:
    said = [
        f"{name}: {row['images']} pictures, {row['precision']} precision, {row['device']}, torch {row['torch']}, "
        f"{row['date']}, commit {row['commit']}, model {row['model']}"
        for name, row in of
    ]
    return "; ".join(said) + "."
