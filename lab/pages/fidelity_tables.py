"""Draws the plots and writes the tables of docs/quality.md from a measurement's CSV.

    python -m lab.pages.fidelity_tables --plots docs/images --tables docs/quality.md
    python -m lab.pages.fidelity_tables --of lab --plots docs/images

Tables stand between the markers `<!-- table NAME -->` and `<!-- end -->`; `--check` changes nothing and fails where a
table and the CSV disagree. A table NAME is of the model that lab/results/fidelity/demo.csv measured, NAME@lab of that
of lab.csv; "models" is of all.
"""

from __future__ import annotations

import argparse
import re
import statistics
from collections.abc import Callable, Container, Sequence
from pathlib import Path

from shared_tome.config import PRESETS, ToMeConfig

from ..fidelity.methods import CATALOGUE, OWN, OWN_KEY, sample_name
from ..fidelity.samplers import GUIDANCE, SAMPLERS, parse_sampler
from .rows import MAIN, Row, main_sampler, of_model, of_set, read, results

PAPER, INK, GRID = "#fbfbf9", "#22262b", "#d9d9d4"
# family: (colour, marker, line). Colours after Okabe and Ito, told apart by colour-blind eyes too.
STYLES: dict[str, tuple[str, str, str]] = {
    "sample": ("#0072b2", "o", "-"),
    "sample from 0.05": ("#56b4e9", "D", "--"),
    "sample from 0.1": ("#56b4e9", "v", "--"),
    "sample from 0.2": ("#56b4e9", "o", "--"),
    "sample from 0.4": ("#56b4e9", "s", "--"),
    "sample from 0.6": ("#56b4e9", "^", "--"),
    "sample, own token kept": ("#5e3c99", "o", "-"),
    "sample, own token kept from 0.1": ("#9a7fc7", "v", "--"),
    "sample, own token kept from 0.2": ("#9a7fc7", "o", "--"),
    "ToDo": ("#009e73", "D", "-"),
    "merge_keys, pick": ("#cc79a7", "v", "-"),
    "merge_keys, mean": ("#cc79a7", "v", ":"),
    "merge_queries": ("#8c6d31", "P", "-"),
    "merge, proportional": ("#e69f00", "s", "-"),
    "tomesd": ("#d55e00", "s", "-"),
    "prune": ("#7a7a7a", "X", "-"),
    "ToDo from 0.2": ("#009e73", "D", "--"),
    "merge, proportional from 0.2": ("#e69f00", "s", "--"),
    "tomesd from 0.2": ("#d55e00", "s", "--"),
    "sample, unweighted": ("#0072b2", "x", ":"),
    "ToDo, unweighted": ("#009e73", "x", ":"),
}
TITLES = {
    "tomesd": "as tomesd does",
    "ToDo": "downsample (ToDo)",
    "sample, unweighted": "sample, each key counted once",
    "ToDo, unweighted": "downsample, each key counted once",
}


def title(family: str) -> str:
    name, _, start = family.partition(" from ")
    name = TITLES.get(name, name)
    return f"{name}, after {round(float(start) * 100)}% of the steps" if start else name


# -- tables -------------------------------------------------------------------------------------------------------


def percent(share: str) -> str:
    value = 100 * float(share)
    return f"{value:.0f}%" if value >= 9.5 else f"{value:.1f}%"


def with_error(value: str, error: str, sign: bool = False, digits: int = 1) -> str:
    if value == "":
        return ""
    if value == "inf":
        return "the same"
    number = round(float(value), digits) + 0.0  # + 0.0: no "-0.0"
    return f"{number:{'+' if sign else ''}.{digits}f} ± {float(error):.{digits}f}"


NOTHING = "Not measured yet."
CELLS: dict[str, tuple[str, Callable[[Row], str]]] = {
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
        return NOTHING
    known = {name: sum(row[column] != "" for row in rows) for name, column in _LEFT_OUT.items()}
    few = {"texture": len(rows) // 2}
    names = [name for name in cells.split() if known.get(name, len(rows)) > few.get(name, 0)]
    head = [CELLS[name][0] for name in names]
    lines = [head, ["---", *("---:" for _ in names[1:])]]
    lines += [[CELLS[name][1](row) for name in names] for row in rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def frontier(rows: Sequence[Row], sampler: str) -> list[Row]:
    """What the plots show: every method, and late starts."""
    found = {
        row["variant"]: row for name in ("frontier", "starts", "joint", "own") for row in of_set(rows, name, sampler)
    }
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


def frontier_table(rows: Sequence[Row]) -> str:
    chosen = frontier(rows, main_sampler(rows))
    order = sorted(chosen, key=lambda r: -float(r["psnr"]))
    return table(order, FULL)


def sampling_table(rows: Sequence[Row]) -> str:
    chosen = of_set(rows, "sampling", main_sampler(rows))
    return table(chosen, "variant cost psnr gain ssim texture") if len(chosen) > 9 else NOTHING  # else key's alone


def texture_table(rows: Sequence[Row]) -> str:
    sampler = main_sampler(rows)
    chosen = [row for name in ("texture", "texture_more") for row in of_set(rows, name, sampler)]
    return table(chosen, UNTIMED) if sum(row["texture"] != "" for row in chosen) > 3 else NOTHING


def joint_table(rows: Sequence[Row]) -> str:
    chosen = of_set(rows, "joint", main_sampler(rows))
    return table(chosen, UNTIMED) if any("unweighted" in row["family"] for row in chosen) else NOTHING


def of_sampler_table(rows: Sequence[Row], sampler: str) -> str:
    """The set "key" with a sampler that is not the tables' own."""
    return table(of_set(rows, "key", sampler), UNTIMED)


def models_table(rows: Sequence[Row]) -> str:
    """PSNR on each of the MODELS that was measured, side by side, each with its own sampler."""
    found: dict[str, dict[str, Row]] = {}
    for model in MODELS:
        own = of_model(rows, model)
        sampler = main_sampler(own)
        if own:
            found[f"{model}, {sampler_title(sampler)}"] = {r["variant"]: r for r in own if r["sampler"] == sampler}
    if len(found) < 2:
        return NOTHING
    lines = [["what", *found], ["---", *("---:" for _ in found)]]
    for variant in dict.fromkeys(CATALOGUE.sets["key"][1:] + CATALOGUE.sets["joint"][1:]):
        cells = [own.get(variant) for own in found.values()]
        if sum(cell is not None for cell in cells) > 1:
            lines.append([variant, *("" if c is None else with_error(c["psnr"], c["psnr_se"]) for c in cells)])
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def apart_table(rows: Sequence[Row]) -> str:
    """Draws that differ between heads or queries, by the sampler that most of them were measured with."""
    kinds = [(row["sampler"], row["images"]) for row in rows if " apart" in row["family"]]
    if not kinds:
        return NOTHING
    sampler, images = statistics.mode(kinds)  # of so many pictures: means over 8 and over 264 do not compare
    chosen = of_set([row for row in rows if row["images"] == images], "apart", sampler)
    # What nobody has measured of a file is empty: the Frechet distance needs a classifier.
    columns = UNTIMED if all(row["fd_gap"] for row in chosen) else UNTIMED.replace(" fd_gap", "")
    return table(chosen, columns)


def guided_table(rows: Sequence[Row]) -> str:
    chosen = of_set(rows, "guided", main_sampler(rows))
    return table(chosen, FULL) if any("guided" in row["family"] for row in chosen) else NOTHING


def paper_table(rows: Sequence[Row]) -> str:
    chosen = of_set(rows, "paper", main_sampler(rows))
    if len(chosen) < 5:
        return NOTHING
    return table(chosen, "variant cost cost_all psnr gain ssim fd_gap texture")


def sampler_title(name: str) -> str:
    sampler, guidance = parse_sampler(name)
    return sampler.title if guidance == GUIDANCE else f"{sampler.title}, guidance {guidance:g}"


def samplers_table(rows: Sequence[Row]) -> str:
    measured = dict.fromkeys(row["sampler"] for row in rows)
    most = {name: max(int(row["images"]) for row in rows if row["sampler"] == name) for name in measured}
    # Means over 8 pictures and over 264 do not compare: a column has rows of the most pictures.
    found = {(row["variant"], row["sampler"]): row for row in rows if int(row["images"]) == most[row["sampler"]]}
    names = [s for s in SAMPLERS if s in measured] + [s for s in measured if s not in SAMPLERS]
    names = [s for s in names if sum(sampler == s for _, sampler in found) > 3]  # not what has only been begun
    lines = [["what", *(sampler_title(s) for s in names)], ["---", *("---:" for _ in names)]]
    for variant in dict.fromkeys(CATALOGUE.sets["main"][1:] + CATALOGUE.sets["key"][1:]):
        cells = [found.get((variant, s)) for s in names]
        if sum(cell is not None for cell in cells) > 1:
            lines.append([variant, *("" if c is None else with_error(c["psnr"], c["psnr_se"]) for c in cells)])
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) if len(lines) > 3 else NOTHING


def starts_table(rows: Sequence[Row]) -> str:
    chosen = [row for row in timed_together(of_set(rows, "starts", main_sampler(rows))) if " from " in row["variant"]]
    return table(chosen, FULL)


def preset_variant(name: str) -> str:
    """The variant that a preset of the core is."""
    config = ToMeConfig(**PRESETS[name].options)
    if config.method != "sample":
        return f"{config.method} {config.ratio:g}" + (f" from {config.start:g}" if config.start else "")
    return sample_name(config.ratio, config.start, config.keeps_own)


WITHOUT_OWN = "*: measured without the own token."


def preset_measured(name: str, measured: Container[str]) -> tuple[str, str]:
    """A preset's variant and "", or where it is not among the `measured` that without own tokens and the mark "*",
    which WITHOUT_OWN explains. That one need not be among them either."""
    variant = preset_variant(name)
    return (variant, "") if variant in measured or OWN not in variant else (variant.removesuffix(f", {OWN}"), "*")


def presets_table(rows: Sequence[Row]) -> str:
    sampler = main_sampler(rows)
    found = {row["variant"]: row for row in rows if row["sampler"] == sampler}
    chosen = [preset_measured(name, found) for name in PRESETS]
    if not all(variant in found for variant, _ in chosen):
        return NOTHING
    found = {row["variant"]: row for row in timed_together(list(found.values()))}
    lines = table([{**found[variant], "variant": variant + mark} for variant, mark in chosen], FULL)
    head, rule, *rest = lines.splitlines()
    named = [f"| {name} {line}" for name, line in zip(PRESETS, rest, strict=True)]
    note = ["", WITHOUT_OWN] if any(mark for _, mark in chosen) else []
    return "\n".join([f"| preset {head}", f"| --- {rule}", *named, *note])


PAIRS = (
    ("sample 0.75", "downsample 2x2"),
    ("sample 0.9375", "downsample 4x4"),
    ("sample 0.5", "merge_keys pick 0.5"),
    ("sample 0.75", "merge_keys mean 0.75"),
    ("sample 0.9375 from 0.2", "sample 0.75"),
    *((sample_name(*at), sample_name(*at, own=True)) for at in OWN_KEY[1:2] + OWN_KEY[3:]),
    ("sample 0.75", "sample 0.75, unweighted"),
    ("sample 0.9375", "sample 0.9375, unweighted"),
    ("downsample 2x2", "downsample 2x2, unweighted"),
    ("downsample 4x4", "downsample 4x4, unweighted"),
    ("merge 0.25", "tomesd 0.25"),
    ("merge 0.5", "tomesd 0.5"),
    ("merge 0.75", "tomesd 0.75"),
    ("merge_keys pick 0.5", "merge_keys mean 0.5"),
    ("merge_keys pick 0.75", "merge_keys mean 0.75"),
    *(
        (f"sample {ratio}", f"sample {ratio}, {word}")
        for ratio in ("0.75", "0.9375")
        for word in ("independent", "walk by layers", "walk by steps", "once a step", "once", f"one draw, {OWN}", OWN)
    ),
)


def pairs_table(rows: Sequence[Row]) -> str:
    """Differences picture by picture, and how many pictures each side spoils (under 30 dB)."""
    sampler = main_sampler(rows)
    found = {
        (row["file"], row["variant"]): [float(x) for x in row["singles"].split()]
        for row in rows
        if row["sampler"] == sampler
    }
    files = list(dict.fromkeys(file for file, _ in found))
    lines = [
        "| this | minus this | dB, picture by picture | under 30 dB: this | that |",
        "| --- | --- | ---: | ---: | ---: |",
    ]
    for one, other in PAIRS:
        both = [file for file in files if {(file, one), (file, other)} <= found.keys()]
        if both:  # pictures can be paired within a measurement alone
            a, b = found[both[-1], one], found[both[-1], other]
            gaps = [x - y for x, y in zip(a, b, strict=True)]
            error = statistics.stdev(gaps) / len(gaps) ** 0.5
            spoiled = (f"{100 * sum(x < 30 for x in side) / len(side):.0f}%" for side in (a, b))
            difference = with_error(str(statistics.fmean(gaps)), str(error), sign=True)
            lines.append("| " + " | ".join((one, other, difference, *spoiled)) + " |")
    return "\n".join(lines)


def floor_table(rows: Sequence[Row]) -> str:
    """One sentence: what rounding alone does."""
    row = next((row for row in rows if row["variant"] == "unmerged, float32"), None)
    if row is None:
        return NOTHING
    return f"Unmerged in float32 against unmerged in {row['precision']} precision: {row['psnr']} dB."


def about(rows: Sequence[Row]) -> str:
    """Where the numbers come from; one line for each combination."""
    columns = ("device", "torch", "date", "commit", "model", "images", "seeds", "precision")
    kinds = dict.fromkeys(tuple(row[column] for column in columns) for row in rows)
    shapes = sorted({row["step_shape"] for row in rows if row["step_shape"]})
    lines = [
        f"- {device}, torch {torch}, {when}, commit {commit or 'unknown'}, model {model}; {images} pictures a row over "
        f"{seeds} seeds, precision {precision}"
        for device, torch, when, commit, model, images, seeds, precision in kinds
    ]
    return "\n".join([*lines, *(f"- timed step: float16, input {shape}" for shape in shapes)])


TABLES: dict[str, Callable[[Sequence[Row]], str]] = {
    "about": about,
    "frontier": frontier_table,
    "samplers": samplers_table,
    "sampling": sampling_table,
    "pairs": pairs_table,
    "presets": presets_table,
    "starts": starts_table,
    "floor": floor_table,
    "paper": paper_table,
    "texture": texture_table,
    "joint": joint_table,
    "apart": apart_table,
    "guided": guided_table,
    "guidance": lambda rows: of_sampler_table(rows, "ddim30@g7.5"),
    "inpaint": lambda rows: of_sampler_table(rows, "inpaint30"),
}
MODELS = (MAIN, "lab", "dit", "dit-fine")
ACROSS: dict[str, Callable[[Sequence[Row]], str]] = {"models": models_table}
"""Tables of all models at once."""


def with_tables(text: str, rows: Sequence[Row]) -> str:
    """The page with every table written anew."""

    def write(match: re.Match) -> str:
        name, _, file = match[1].partition("@")
        if name not in TABLES | ACROSS:
            raise ValueError(f"no table is named {name!r}; there are {', '.join([*TABLES, *ACROSS])}")
        chosen = rows if name in ACROSS else of_model(rows, file)
        found = (TABLES | ACROSS)[name](chosen) if chosen else NOTHING
        return f"<!-- table {match[1]} -->\n{found}\n<!-- end -->"

    return re.sub(r"<!-- table (\S+) -->\n.*?<!-- end -->", write, text, flags=re.DOTALL)


# -- plots --------------------------------------------------------------------------------------------------------


def _axes(title: str, x_label: str):
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(9.5, 5.6), dpi=130, facecolor=PAPER)
    axes.set_facecolor(PAPER)
    axes.set_title(title, color=INK, loc="left", fontsize=12, pad=12)
    axes.set_xlabel(x_label, color=INK)
    axes.set_ylabel("PSNR to the unmerged picture, dB", color=INK)
    axes.grid(color=GRID, linewidth=0.8)
    axes.tick_params(colors=INK)
    for side, spine in axes.spines.items():
        spine.set_visible(side in ("left", "bottom"))
        spine.set_color(INK)
    return figure, axes


def _draw(axes, rows: Sequence[Row], x: Callable[[Row], float]) -> None:
    for family, (colour, marker, line) in STYLES.items():
        mine = sorted((row for row in rows if row["family"] == family), key=x)
        if not mine:
            continue
        axes.errorbar(
            [x(row) for row in mine],
            [float(row["psnr"]) for row in mine],
            yerr=[float(row["psnr_se"]) for row in mine],
            color=colour,
            marker=marker,
            linestyle=line,
            markersize=6,
            markerfacecolor=PAPER if " from " in family else colour,
            linewidth=2.4 if family == "sample" else 1.4,
            elinewidth=1,
            capsize=2,
            label=title(family),
            zorder=3 if family.startswith("sample") else 2,
        )
    axes.legend(loc="center left", bbox_to_anchor=(1.01, 0.5), frameon=False, labelcolor=INK, fontsize=9)


def plot_cost(rows: Sequence[Row], path: Path) -> None:
    """PSNR against the share of the attention's work that is left."""
    sampler = main_sampler(rows)
    figure, axes = _axes(
        f"Fidelity against the attention that is left ({SAMPLERS[sampler].title})",
        "work left in the merged layers' attention (logarithmic)",
    )
    axes.set_xscale("log", base=2)
    ticks = [1 / 64, 1 / 32, 1 / 16, 1 / 8, 1 / 4, 1 / 2, 1]
    axes.set_xticks(ticks, [f"{100 * t:.3g}%" for t in ticks])
    _draw(axes, [r for r in frontier(rows, sampler) if r["psnr"] != "inf"], lambda r: float(r["cost"]))
    _save(figure, path)


def plot_time(rows: Sequence[Row], path: Path) -> None:
    """PSNR against the measured time of a step, in percent of the unmerged step's."""
    sampler = main_sampler(rows)
    chosen = [r for r in frontier(rows, sampler) if r["speedup"]]
    devices, shape = " and ".join(sorted({r["device"] for r in chosen})), chosen[0]["step_shape"]
    figure, axes = _axes(
        f"Fidelity against the measured time of a step ({SAMPLERS[sampler].title})",
        f"median time of a step, % of the unmerged one's ({devices}, float16, {shape}, eager)",
    )
    axes.axvline(100.0, color=INK, linewidth=1.2, linestyle=":")
    axes.text(100.0, 1.0, " unmerged", color=INK, fontsize=9, va="top", transform=axes.get_xaxis_transform())
    _draw(axes, [r for r in chosen if r["psnr"] != "inf"], lambda r: 100.0 / float(r["speedup"]))
    _save(figure, path)


def _save(figure, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, bbox_inches="tight", facecolor=PAPER, metadata={"Software": None})


def sheet(folder: Path, sampler: str, variants: Sequence[str], pictures: int, path: Path) -> None:
    """Strips of lab.fidelity.measure below each other, named: a page of pictures side by side."""
    from PIL import Image, ImageDraw, ImageFont

    strips = [Image.open(folder / f"{sampler} {name}.png").convert("RGB") for name in variants]
    side = strips[0].height
    scale = max(1, 128 // side)  # small pictures twice as large
    strips = [s.crop((0, 0, side * pictures, side)).resize((side * pictures * scale, side * scale), 0) for s in strips]
    left, height = 190, side * scale + 4
    page = Image.new("RGB", (left + strips[0].width + 4, height * len(strips) + 4), PAPER)
    draw, font = ImageDraw.Draw(page), ImageFont.load_default(size=14)
    for i, (name, strip) in enumerate(zip(variants, strips, strict=True)):
        page.paste(strip, (left, i * height + 4))
        draw.text((8, i * height + height // 2 - 6), name, fill=INK, font=font)
    path.parent.mkdir(parents=True, exist_ok=True)
    page.save(path, quality=90)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m lab.pages.fidelity_tables", description=__doc__.splitlines()[0])
    parser.add_argument("csv", type=Path, nargs="*", help="default: all of lab/results/fidelity")
    parser.add_argument("--plots", type=Path, help="folder for quality-cost.png and quality-time.png")
    parser.add_argument("--of", default="", help="plot the model that this file measured (default demo)")
    parser.add_argument("--tables", type=Path, help="page whose tables to write")
    parser.add_argument("--check", action="store_true", help="only say whether the page agrees with the CSV")
    parser.add_argument("--strips", type=Path, help="folder of lab.fidelity.measure --strips")
    parser.add_argument("--sheet", type=Path, help="picture to write from the strips")
    parser.add_argument("--sheet-sampler", default="ddim30")
    parser.add_argument("--sheet-rows", nargs="+", default=["unmerged", "tomesd 0.5"], help="variants, from the top")
    parser.add_argument("--sheet-pictures", type=int, default=8)
    args = parser.parse_args(argv)
    rows = [row for path in args.csv for row in read(path)] or results()
    if args.plots:
        chosen, suffix = of_model(rows, args.of), f"-{args.of}" if args.of else ""
        if not chosen:
            parser.error(f"no row is of a file {args.of}.csv")
        plot_cost(chosen, args.plots / f"quality-cost{suffix}.png")
        plot_time(chosen, args.plots / f"quality-time{suffix}.png")
    if args.tables:
        text = args.tables.read_text(encoding="utf-8")
        fresh = with_tables(text, rows)
        if args.check:
            if fresh != text:
                parser.exit(1, f"{args.tables} does not agree with the CSV: run without --check\n")
        else:
            args.tables.write_text(fresh, encoding="utf-8")
    if args.strips and args.sheet:
        sheet(args.strips, args.sheet_sampler, args.sheet_rows, args.sheet_pictures, args.sheet)


if __name__ == "__main__":
    main()
