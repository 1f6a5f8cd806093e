"""Measures what merging does to pictures and to the time of a step.

    python -m lab.fidelity.measure --model demo/model.safetensors --out lab/results/fidelity/demo.csv \
        --plan frontier:ddim30,main:euler_a20+lcm6 --classifier out/classifier.safetensors

A row for each variant (lab/fidelity/methods.py) and sampler; "ddim30@g7.5" is a sampler with guidance 7.5 instead of 3.
Stop it when you like: rows already in the file are not measured again. Beside OUT.csv, OUT.pictures.csv has the PSNR
of every single picture, for paired comparisons. "texture" is how much of the finest detail there is, in dB against
the unmerged picture (below 0: blurred). All are of decoded pictures where the model paints latents; PSNR, SSIM and
texture of the painted half where the sampler inpaints.
"""

from __future__ import annotations

import argparse
import csv
import math
import platform
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from ..models import classifier
from .bench import PRECISIONS, Bench, Timing
from .hooks import Run, check
from .methods import BASE, BASELINE, CATALOGUE, UNMERGED, Variant
from .metrics import frechet, frechet_gap, psnr, ssim, standard_error, texture, to_range
from .samplers import GUIDANCE, SAMPLERS, parse_sampler

COLUMNS = (
    "variant family sampler psnr psnr_se ssim ssim_se gain gain_se cost cost_all "
    "fd fd_gap fd_gap_se texture texture_se step_ms step_p20 step_p80 speedup step_shape "
    "method ratio options images seeds precision device torch date commit model"
).split()
SAME = ("images", "seeds", "precision", "device", "model")
"""Columns that must be alike in all rows of a file: else they cannot be compared."""
Key = tuple[str, str]


def parse_plan(plan: str, samplers: Sequence[str], guidance: float = GUIDANCE) -> list[Key]:
    """(variant, sampler) in the order to measure them, each once.

    plan: entries with commas between, or a file with one a line; an entry is a set's or (in a file) a variant's
    name, with or without ":sampler+sampler". guidance: of samplers that name none.
    """
    path = Path(plan)
    entries = path.read_text().splitlines() if path.is_file() else plan.split(",")
    keys: dict[Key, None] = {}
    for entry in entries:
        name, _, some = entry.partition(":")
        if not name.strip() or name.startswith("#"):
            continue
        names = CATALOGUE.sets.get(name.strip(), [name.strip()])
        for sampler in some.strip().split("+") if some.strip() else samplers:
            if guidance != GUIDANCE and "@g" not in sampler:
                sampler = f"{sampler}@g{guidance:g}"
            parse_sampler(sampler)
            for one in names:
                if one not in CATALOGUE.variants:
                    raise ValueError(f"no set or variant is named {one!r}; sets: {', '.join(CATALOGUE.sets)}")
                keys[one, sampler] = None
    return list(keys)


def describe(variant: Variant) -> str:
    """The options that differ from the lab's, and what is not the core's own."""
    config = variant.config
    plain = type(config)(**BASE)
    skip = ("ratio", "method")
    words = [f"{k}={getattr(config, k)}" for k in config.options() if getattr(config, k) != getattr(plain, k)]
    words = [w.replace(" ", "") for w in words if w.split("=")[0] not in skip]
    return " ".join([*words, *(["per_row"] if variant.per_row else [])])


@dataclass(frozen=True)
class Pictures:
    """Of one variant and sampler: pictures [n, 3, H, W], 0 to 255, their features [n, D], and the run."""

    ranged: Tensor
    features: Tensor | None
    run: Run


class Measurement:
    """Rows of one file."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        sizes = (args.images // args.seeds, args.seeds, args.batch)
        self.bench = Bench(args.model, args.device, *sizes, args.precision, args.compile)
        self.judge = classifier.load(args.classifier) if args.classifier else None
        data = self.bench.metadata["data"]
        if self.judge and self.judge.data != data:
            raise ValueError(f"{args.classifier} knows the pictures {self.judge.data!r}, the model paints {data!r}")
        for name, _ in args.keys:
            check(self.bench.network, CATALOGUE.variants[name])
        gpu = self.bench.device.type == "cuda"
        self.stamp = {
            "images": args.images // args.seeds * args.seeds,
            "seeds": args.seeds,
            "precision": args.precision,
            "device": torch.cuda.get_device_name(self.bench.device) if gpu else f"CPU {platform.machine()}",
            "torch": torch.__version__,
            "date": date.today().isoformat(),
            "commit": args.commit,
            "model": self.bench.hash,
        }
        self.out: Path = args.out
        self.out.parent.mkdir(parents=True, exist_ok=True)
        self.singles_file = self.out.with_suffix(".pictures.csv")
        self.rows = self._read_rows()
        self.singles = self._read_singles()
        self.references: dict[str, Pictures] = {}

    def _read_rows(self) -> dict[Key, dict[str, str]]:
        if not self.out.is_file():
            return {}
        with self.out.open(newline="") as file:
            reader = csv.DictReader(file)
            if reader.fieldnames != COLUMNS:
                known = reader.fieldnames or []
                lacks = ", ".join(column for column in COLUMNS if column not in known) or "none"
                more = ", ".join(column for column in known if column not in COLUMNS) or "none"
                raise ValueError(
                    f"no row can be added to {self.out}, whose columns are not those that this version writes "
                    f"(lacking: {lacks}; unknown: {more}): choose another --out. It can still be read for tables."
                )
            rows = {(row["variant"], row["sampler"]): row for row in reader}
        for row in rows.values():
            for column in SAME:
                if row[column] != str(self.stamp[column]):
                    raise ValueError(
                        f"{self.out} was measured with {column} {row[column]}, this is {self.stamp[column]}: "
                        "choose another --out"
                    )
        return rows

    def _read_singles(self) -> dict[Key, Tensor]:
        if not self.singles_file.is_file():
            return {}
        with self.singles_file.open(newline="") as file:
            rows = list(csv.reader(file))[1:]
        return {(row[0], row[1]): torch.tensor([float(x) for x in row[2:]], dtype=torch.float64) for row in rows}

    def _pictures(self, variant: Variant, sampler: str) -> Pictures:
        pictures, run = self.bench.pictures(variant, sampler)
        return Pictures(to_range(pictures), self.judge.features(pictures) if self.judge else None, run)

    def _reference(self, sampler: str) -> Pictures:
        """The unmerged pictures, made once for each sampler."""
        if sampler not in self.references:
            self.references[sampler] = self._pictures(CATALOGUE.variants[UNMERGED], sampler)
        return self.references[sampler]

    def measure(self, variant: Variant, sampler: str) -> dict[str, object]:
        """One row; the PSNR of every picture is put into self.singles."""
        reference = self._reference(sampler)
        made = reference if variant.name == UNMERGED else self._pictures(variant, sampler)
        run, features = made.run, made.features
        ranged, expected = (self.bench.unknown(x.ranged, sampler) for x in (made, reference))
        single, alike = psnr(ranged, expected).cpu(), ssim(ranged, expected).cpu()  # (n,)
        self.singles[variant.name, sampler] = single
        row = dict.fromkeys(COLUMNS, "") | self.stamp
        row |= {"variant": variant.name, "family": variant.family, "sampler": sampler}
        row |= {"psnr": f"{single.mean():.3f}", "psnr_se": f"{standard_error(single):.3f}"}
        row |= {"ssim": f"{alike.mean():.5f}", "ssim_se": f"{standard_error(alike):.5f}"}
        base = self.singles.get((BASELINE, sampler))
        if base is not None and variant.is_merged:
            gain = single - base
            row |= {"gain": f"{gain.mean():.3f}", "gain_se": f"{standard_error(gain):.3f}"}
        row |= {"cost": f"{run.cost:.5f}", "cost_all": f"{run.cost_all:.5f}"}
        if self.judge:
            gap, error = frechet_gap(features, reference.features, self.judge.real)
            row |= {"fd": f"{frechet(features, self.judge.real):.4f}"}
            row |= {"fd_gap": f"{gap:.4f}", "fd_gap_se": f"{error:.4f}"}
        detail = texture(ranged, expected).cpu()  # (n,)
        row |= {"texture": f"{detail.mean():.3f}", "texture_se": f"{standard_error(detail):.3f}"}
        row |= self._times(variant, sampler)
        row |= {"method": variant.config.method, "ratio": f"{variant.config.ratio:g}", "options": describe(variant)}
        if not variant.is_merged:
            row["method"] = UNMERGED
        if self.args.strips:
            save_strip(self.args.strips / f"{sampler} {variant.name}.png", made.ranged[self.args.strip_pictures])
        return row

    def _times(self, variant: Variant, sampler: str) -> dict[str, str]:
        shape = (self.args.time_size, self.args.time_rows, self.args.time_repeats)
        full = self.bench.timing(CATALOGUE.variants[UNMERGED], sampler, *shape)
        timing: Timing | None = self.bench.timing(variant, sampler, *shape)
        if timing is None:
            return {}
        return {
            "step_ms": f"{timing.median:.3f}",
            "step_p20": f"{timing.p20:.3f}",
            "step_p80": f"{timing.p80:.3f}",
            "speedup": f"{full.median / timing.median:.3f}",
            "step_shape": f"{shape[1]}x{self.bench.painted[0]}x{shape[0]}x{shape[0]}",
        }

    def write(self, row: dict[str, object]) -> None:
        """Append a row, and its pictures' PSNR first: a row that is in the file has them."""
        key = (row["variant"], row["sampler"])
        single = self.singles[key]
        header = ["variant", "sampler", *(str(i) for i in range(len(single)))]
        _append(self.singles_file, header, [*key, *(f"{x:.2f}" for x in single.tolist())])
        _append(self.out, COLUMNS, [row[column] for column in COLUMNS])
        self.rows[key] = {k: str(v) for k, v in row.items()}

    def run(self) -> Iterator[dict[str, object]]:
        start = time.perf_counter()
        todo = [key for key in self.args.keys if key not in self.rows]
        with_references = dict.fromkeys(todo) | {(UNMERGED, sampler): None for _, sampler in todo}
        self.bench.beginnings.expect((CATALOGUE.variants[name], sampler) for name, sampler in with_references)
        bar = tqdm(todo, unit="row", file=sys.stderr, mininterval=2, disable=not todo)
        for name, sampler in bar:
            if time.perf_counter() - start > self.args.minutes * 60:
                tqdm.write(f"time is up, {len(todo) - bar.n} rows left: run the same command again", file=sys.stderr)
                break
            bar.set_postfix_str(f"{sampler} {name}")
            row = self.measure(CATALOGUE.variants[name], sampler)
            self.write(row)
            yield row


def save_strip(path: Path, ranged: Tensor) -> None:
    """Pictures [n, 3, H, W], 0 to 255, side by side."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = ranged.round().byte().permute(2, 0, 3, 1).flatten(1, 2).cpu().numpy()  # (H, n * W, 3)
    Image.fromarray(np.ascontiguousarray(pixels)).save(path)


def _append(path: Path, header: Sequence[str], values: Sequence[object]) -> None:
    fresh = not path.is_file()
    with path.open("a", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        if fresh:
            writer.writerow(header)
        writer.writerow(values)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m lab.fidelity.measure", description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True, help="CSV file; rows are added to it")
    parser.add_argument("--plan", default="frontier", help=f"sets ({', '.join(CATALOGUE.sets)}) or a file")
    parser.add_argument("--samplers", default="ddim30", help=f"for entries that name none: {', '.join(SAMPLERS)}")
    parser.add_argument("--guidance", type=float, default=GUIDANCE, help="of samplers that name none (default 3)")
    parser.add_argument("--images", type=int, default=264, help="pictures a row, over all seeds")
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--batch", type=int, default=132, help="pictures at a time")
    parser.add_argument("--precision", choices=PRECISIONS, default="float32", help="of the pictures")
    parser.add_argument("--compile", action="store_true", help="try torch.compile, and use it where it is faster")
    parser.add_argument("--classifier", type=Path, help="from lab.models.classifier; without it no Frechet distance")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--minutes", type=float, default=math.inf, help="begin no row after this time")
    parser.add_argument("--commit", default="", help="what was measured, where there is no git to ask")
    parser.add_argument("--strips", type=Path, help="folder for some pictures of each row, side by side")
    parser.add_argument("--strip-pictures", default="0,1,2,3,4,5,6,7,8,9", help="which, by number")
    parser.add_argument("--time-size", type=int, default=128, help="pixels or latents a side of the timed step")
    parser.add_argument("--time-rows", type=int, default=16, help="rows of the timed step's batch")
    parser.add_argument("--time-repeats", type=int, default=12, help="0: no timing")
    args = parser.parse_args(argv)
    if args.images < args.seeds or args.images % args.seeds:
        parser.error(f"--images must be a multiple of --seeds, got {args.images} and {args.seeds}")
    args.strip_pictures = [int(number) for number in args.strip_pictures.split(",") if int(number) < args.images]
    try:
        args.keys = parse_plan(args.plan, args.samplers.split(","), args.guidance)
    except ValueError as error:
        parser.error(str(error))
    return args


def main(argv: Sequence[str] | None = None) -> None:
    told = "psnr psnr_se gain ssim cost fd_gap texture step_ms".split()
    for row in Measurement(parse(argv)).run():
        cells = [f"{row[column] or '-':>9}" for column in told]
        print(f"{row['sampler']:>9} {row['variant']:<40}", *cells, flush=True)


if __name__ == "__main__":
    main()
