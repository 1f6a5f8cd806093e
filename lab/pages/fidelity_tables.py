"""The tables of docs/quality.md: from all CSVs in lab/results/fidelity, of one model each ("models": of all)."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from installer.compare.schema import SAME
from shared_tome.config import ToMeConfig
from shared_tome.methods import PRESETS

from .. import store
from ..fidelity.methods import CATALOGUE, OWN_KEY, UNMERGED, sample_name
from ..fidelity.real_models import FILE
from ..models.samplers import GUIDANCE, SAMPLERS, parse_sampler
from ..store import RESULTS, Row, grouped, markdown
from .style import STYLES

FOLDER = RESULTS / "fidelity"
NOBODY = "Nobody has sent a result yet.\n"
LATER = ("texture", "texture_se")
"""Columns that older files lack: there they are empty."""
MAIN, MAIN_SAMPLER, YARDSTICK = "demo", "ddim30", "tomesd 0.5"


def read(path: Path) -> list[Row]:
    """The rows of a CSV, each with the PSNR of its single pictures as `singles`, numbers with spaces between, and as
    `yardstick` the speed of what was timed in each file."""
    rows = store.read(path)
    singles = {}
    for row in store.read(path.with_suffix(".pictures.csv")):
        variant, sampler, *numbers = row.values()
        singles[variant, sampler] = " ".join(numbers)
    speeds = {row["sampler"]: row["speedup"] for row in rows if row["variant"] == YARDSTICK}
    for row in rows:
        row["yardstick"] = speeds.get(row["sampler"], "")
        row["singles"] = singles[row["variant"], row["sampler"]]
        row["file"] = path.stem
        for column in LATER:
            row.setdefault(column, "")
    return rows


def results(folder: Path = FOLDER) -> list[Row]:
    """All rows that are kept with the project, but for those of multires_tables.py, of other precision."""
    paths = [path for path in sorted(folder.glob("*.csv")) if not path.stem.startswith("multires-")]
    return [row for path in paths if path.with_suffix(".pictures.csv").is_file() for row in read(path)]


def of_model(rows: Sequence[Row], file: str) -> list[Row]:
    """The rows, of whatever file, of the models that a file (its name without .csv) measured; "": demo, else all."""
    models = {row["model"] for row in rows if row["file"] == (file or MAIN)}
    return [row for row in rows if row["model"] in models or not (models or file)]


def of_set(rows: Sequence[Row], name: str, sampler: str) -> list[Row]:
    """The measured rows of a set, in the set's order."""
    found = {row["variant"]: row for row in rows if row["sampler"] == sampler}
    return [found[variant] for variant in CATALOGUE.sets[name] if variant in found]


def main_sampler(rows: Sequence[Row]) -> str:
    """The sampler that a model's tables and plots are about: ddim30, or what most rows were measured with."""
    count = Counter(row["sampler"] for row in rows)
    return MAIN_SAMPLER if MAIN_SAMPLER in count or not count else count.most_common(1)[0][0]


def origin(row: Row) -> str:
    """Where and with what a row was measured."""
    return "{device}, torch {torch}, {date}, commit {}, model {model}".format(row["commit"] or "unknown", **row)


def percent(share: str | float) -> str:
    value = 100 * float(share)
    return f"{value:.0f}%" if value >= 9.5 else f"{value:.1f}%"


def with_error(value: str, error: str, sign: bool = False, digits: int = 1) -> str:
    if value == "":
        return ""
    if value == "inf":
        return "the same"
    number = round(float(value), digits) + 0.0  # + 0.0: no "-0.0"
    return f"{number:{'+' if sign else ''}.{digits}f} ± {float(error):.{digits}f}"


CELLS: dict[str, tuple[str, Callable[[Row], str]]] = {
    "preset": ("preset", lambda r: r["preset"]),
    "variant": ("what", lambda r: r["variant"]),
    "cost": ("attention left", lambda r: percent(r["cost"])),
    "cost_all": ("of all layers", lambda r: percent(r["cost_all"])),
    "psnr": ("PSNR, dB", lambda r: with_error(r["psnr"], r["psnr_se"])),
    "gain": ("over tomesd 0.5", lambda r: with_error(r["gain"], r["gain_se"], sign=True)),
    "ssim": ("SSIM", lambda r: f"{float(r['ssim']):.3f}"),
    "fd_gap": ("Fréchet, change", lambda r: with_error(r["fd_gap"], r["fd_gap_se"], sign=True, digits=2)),
    "texture": ("fine detail, dB", lambda r: with_error(r["texture"], r["texture_se"], sign=True, digits=2) or "-"),
    "step": ("step, ms", lambda r: f"{float(r['step_ms']):.1f}" if r["step_ms"] else ""),
    "speedup": ("speed", lambda r: f"{float(r['speedup']):.2f}x" if r["speedup"] else ""),
}


FULL = "variant cost psnr gain ssim fd_gap texture step speedup"
UNTIMED = "variant cost psnr gain ssim fd_gap texture"
_LEFT_OUT = {"texture": "texture", "step": "step_ms", "speedup": "speedup"}  # cells that not every row knows


def table(rows: Sequence[Row], cells: str) -> str:
    """Of the cells named; fine detail is left out where not most rows of the table know it, times where none does."""
    if len(rows) < 3:
        return ""
    known = {name: sum(row[column] != "" for row in rows) for name, column in _LEFT_OUT.items()}
    few = {"texture": len(rows) // 2}
    names = [name for name in cells.split() if known.get(name, len(rows)) > few.get(name, 0)]
    cells = [[CELLS[name][1](row) for name in names] for row in rows]
    return markdown([CELLS[name][0] for name in names], cells, left=2 if "preset" in names else 1)


def frontier(rows: Sequence[Row], sampler: str) -> list[Row]:
    """What the plots show: every method, and late starts."""
    found = {row["variant"]: row for name in ("frontier", "starts", "own") for row in of_set(rows, name, sampler)}
    return timed_together([row for row in found.values() if row["family"] in STYLES or row["family"] == "unmerged"])


def timed_together(rows: Sequence[Row]) -> list[Row]:
    """The rows, without the times of those that were not measured with the unmerged one. Their speed stays where both
    runs found the yardstick (tomesd) alike, within 3%: elsewhere they do not compare."""
    first = next((row for row in rows if row["family"] == "unmerged"), None)
    file, yardstick = ("", "") if first is None else (first["file"], first["yardstick"])

    def compares(row: Row) -> bool:
        return bool(yardstick and row["yardstick"]) and abs(float(row["yardstick"]) / float(yardstick) - 1) < 0.03

    return [
        row if row["file"] == file else {**row, "step_ms": "", "speedup": row["speedup"] if compares(row) else ""}
        for row in rows
    ]


def psnr_table(variants: Iterable[str], columns: dict[str, dict[str, Row]]) -> str:
    """Several measurements side by side: of each variant that two or more of them have."""
    lines = []
    for variant in dict.fromkeys(variants):
        cells = [found.get(variant) for found in columns.values()]
        if sum(cell is not None for cell in cells) > 1:
            lines.append([variant, *("" if c is None else with_error(c["psnr"], c["psnr_se"]) for c in cells)])
    return markdown(["what", *columns], lines, left=1) if len(lines) > 1 else ""


def models_table(rows: Sequence[Row]) -> str:
    """PSNR on each of the MODELS that was measured, side by side, each with its own sampler."""
    found: dict[str, dict[str, Row]] = {}
    for model in MODELS:
        if own := of_model(rows, model):
            sampler = main_sampler(own)
            found[f"{model}, {sampler_title(sampler)}"] = {r["variant"]: r for r in own if r["sampler"] == sampler}
    return psnr_table(CATALOGUE.sets["key"][1:], found)


def paper_table(rows: Sequence[Row]) -> str:
    chosen = of_set(rows, "paper", main_sampler(rows))
    return table(chosen, "variant cost cost_all psnr gain ssim fd_gap texture") if len(chosen) > 4 else ""


def sampler_title(name: str) -> str:
    sampler, guidance = parse_sampler(name)
    return sampler.title if guidance == GUIDANCE else f"{sampler.title}, guidance {guidance:g}"


def samplers_table(rows: Sequence[Row]) -> str:
    most: dict[str, int] = {}
    for row in rows:
        most[row["sampler"]] = max(int(row["images"]), most.get(row["sampler"], 0))
    # Means over 8 pictures and over 264 do not compare: a column has rows of the most pictures.
    found = grouped((row for row in rows if int(row["images"]) == most[row["sampler"]]), ("sampler",), "variant")
    names = dict.fromkeys([*(s for s in SAMPLERS if s in most), *most])
    columns = {sampler_title(s): found[s,] for s in names if len(found[s,]) > 3}  # not what has only been begun
    return psnr_table(CATALOGUE.sets["main"][1:] + CATALOGUE.sets["key"][1:], columns)


def preset_variant(name: str) -> str:
    """The variant that a preset of the core is."""
    config = ToMeConfig(**PRESETS[name].options).resolved(multires=False)  # the models of the page are U-Nets
    if config.method != "sample":
        return f"{config.method} {config.ratio:g}" + (f" from {config.start:g}" if config.start else "")
    return sample_name(config.ratio, config.start, config.keeps_self)


def presets_table(rows: Sequence[Row]) -> str:
    sampler = main_sampler(rows)
    once = {row["variant"]: row for row in rows if row["sampler"] == sampler}
    found = {row["variant"]: row for row in timed_together(list(once.values()))}
    variants = {name: preset_variant(name) for name in PRESETS}
    if not found.keys() >= set(variants.values()):
        return ""
    return table([{**found[variant], "preset": name} for name, variant in variants.items()], f"preset {FULL}")


PAIRS = (
    ("sample 0.75", "downsample 2x2"),
    ("sample 0.9375", "downsample 4x4"),
    ("sample 0.5", "merge_keys pick 0.5"),
    ("sample 0.75", "merge_keys mean 0.75"),
    ("sample 0.9375 from 0.2", "sample 0.75"),
    *((sample_name(*at), sample_name(*at, own=True)) for at in OWN_KEY[1:2] + OWN_KEY[3:]),
    ("merge 0.25", "tomesd 0.25"),
    ("merge 0.5", "tomesd 0.5"),
    ("merge 0.75", "tomesd 0.75"),
    ("merge_keys pick 0.5", "merge_keys mean 0.5"),
    ("merge_keys pick 0.75", "merge_keys mean 0.75"),
)


def pairs_table(rows: Sequence[Row]) -> str:
    """Differences picture by picture, and how many pictures each side spoils (under 30 dB)."""
    sampler = main_sampler(rows)
    mine = [row for row in rows if row["sampler"] == sampler]
    found = {(row["file"], row["variant"]): [float(x) for x in row["singles"].split()] for row in mine}
    files = list(dict.fromkeys(file for file, _ in found))
    lines = []
    for one, other in PAIRS:
        both = [file for file in files if {(file, one), (file, other)} <= found.keys()]
        if both:  # pictures can be paired within a measurement alone
            a, b = found[both[-1], one], found[both[-1], other]
            gaps = [x - y for x, y in zip(a, b, strict=True)]
            error = statistics.stdev(gaps) / len(gaps) ** 0.5
            spoiled = (f"{100 * sum(x < 30 for x in side) / len(side):.0f}%" for side in (a, b))
            difference = with_error(str(statistics.fmean(gaps)), str(error), sign=True)
            lines.append([one, other, difference, *spoiled])
    return markdown(["this", "minus this", "dB, picture by picture", "under 30 dB: this", "that"], lines, left=2)


def floor_table(rows: Sequence[Row]) -> str:
    """One sentence: what rounding alone does."""
    found = (row for row in rows if row["variant"] == "unmerged, float32")
    text = "Unmerged in float32 against unmerged in {precision} precision: {psnr} dB."
    return next((text.format(**row) for row in found), "")


def about(rows: Sequence[Row]) -> str:
    """Where the numbers come from; one line for each combination."""
    shapes = sorted({row["step_shape"] for row in rows if row["step_shape"]})
    counts = "; {images} pictures a row over {seeds} seeds, precision {precision}"
    lines = dict.fromkeys(f"- {origin(row)}{counts.format(**row)}" for row in rows)
    return "\n".join([*lines, *(f"- timed step: float16, input {shape}" for shape in shapes)])


def real_models(file: Path = FILE) -> str:
    """What people measured on their own models: a line a model, size and variant."""

    def number(value: str, places: int) -> str:
        return f"{float(value):.{places}f}" if value else ""

    def decibels(value: str) -> str:
        return "the same" if value and float(value) >= SAME else number(value, 1)

    lines = []
    for row in store.read(file):
        if row["variant"] != UNMERGED:
            model = f"{row['model']} ({row['family']}, {row['sha256'] or row['dtype']})"
            place = f"{row['device']}, torch {row['torch']}, ToMe {row['tome']}, {row['date']}"
            ends = [decibels(row["psnr"]), number(row["ssim"], 3), number(row["lpips"], 3), decibels(row["floor_psnr"])]
            lines.append([model, row["size"], place, row["variant"], f"{number(row['speedup'], 2)}x", *ends])
    head = ["model", "size", "measured on", "variant", "speed", "PSNR, dB", "SSIM", "LPIPS", "noise floor, dB"]
    return markdown(head, lines, left=4) if lines else NOBODY


TABLES: dict[str, Callable[[Sequence[Row]], str]] = {
    "about": about,
    "frontier": lambda rows: table(sorted(frontier(rows, main_sampler(rows)), key=lambda r: -float(r["psnr"])), FULL),
    "samplers": samplers_table,
    "pairs": pairs_table,
    "presets_fidelity": presets_table,
    "starts": lambda rows: table(
        [row for row in timed_together(of_set(rows, "starts", main_sampler(rows))) if " from " in row["variant"]], FULL
    ),
    "floor": floor_table,
    "paper": paper_table,
    # The set "key" with samplers that are not the tables' own.
    "guidance": lambda rows: table(of_set(rows, "key", "ddim30@g7.5"), UNTIMED),
    "inpaint": lambda rows: table(of_set(rows, "key", "inpaint30"), UNTIMED),
    "models": models_table,
}
MODELS = (MAIN, "lab", "dit", "dit-fine")


def made(name: str, rows: Sequence[Row], file: str = "") -> str:
    """The table of that name, of the model that a file measured ("": demo.csv); empty where nothing was measured."""
    chosen = rows if name == "models" else of_model(rows, file)
    return TABLES[name](chosen) if chosen else ""
