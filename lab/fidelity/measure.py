"""Measures what merging does to pictures and to the time of a step.

    python -m lab.fidelity.measure --model demo/model.safetensors --out lab/results/fidelity/demo.csv \
        --plan frontier:ddim30,main:euler_a20+lcm6 --classifier out/classifier.safetensors

A row for each variant (lab/fidelity/methods.py) and sampler; "ddim30@g7.5" is a sampler with guidance 7.5 instead of 3.
Stop it when you like: rows already in the file are not measured again. Beside OUT.csv, OUT.pictures.csv has the PSNR
of every single picture, for paired comparisons. "texture" is how much of the finest detail there is, in dB against
the unmerged picture (below 0: blurred). All are of decoded pictures where the model paints latents; PSNR, SSIM and
texture of the painted half where the sampler inpaints. Videos have two columns more: "motion", the PSNR of the
differences between neighbouring frames, and "flicker", in dB against the unmerged video (above 0: flickers more).
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ..models.samplers import SAMPLERS, parse_sampler
from ..store import Store
from . import bench
from .bench import KEYS, put_mean
from .hooks import check
from .methods import BASE, BASELINE, CATALOGUE, UNMERGED, Variant
from .metrics import flicker, motion, psnr, ssim, texture

COLUMNS = (
    "variant family sampler psnr psnr_se ssim ssim_se gain gain_se cost cost_all "
    "fd fd_gap fd_gap_se texture texture_se step_ms step_p20 step_p80 speedup step_shape "
    "method ratio options images seeds precision device torch date commit model"
).split()
OF_VIDEOS = ["motion", "motion_se", "flicker", "flicker_se"]
STRIP = 10  # pictures side by side
Key = tuple[str, str]


def parse_plan(plan: str, samplers: Sequence[str]) -> list[Key]:
    """(variant, sampler) in the order to measure them, each once.

    plan: entries with commas between, or a file with one a line; an entry is a set's or (in a file) a variant's
    name, with or without ":sampler+sampler".
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
            parse_sampler(sampler)
            for one in names:
                if one not in CATALOGUE.variants:
                    raise ValueError(f"no set or variant is named {one!r}; sets: {', '.join(CATALOGUE.sets)}")
                keys[one, sampler] = None
    return list(keys)


def describe(variant: Variant) -> str:
    """The options that differ from the lab's."""
    config = variant.config
    plain = type(config)(**BASE)
    changed = [k for k in config.options() if getattr(config, k) != getattr(plain, k) and k not in ("ratio", "method")]
    return " ".join(f"{k}={getattr(config, k)}".replace(" ", "") for k in changed)


class Measurement(bench.Measurement):
    def __init__(self, args: argparse.Namespace) -> None:
        super().__init__(args, args.images, {"images": args.images, "seeds": args.seeds})
        self.frames = getattr(self.bench.network.config, "frames", 1)
        self.columns = [*COLUMNS, *(OF_VIDEOS if self.frames > 1 else ())]
        self.check_columns(self.columns)
        for name, _ in args.keys:
            check(self.bench.network, CATALOGUE.variants[name])
        self.pictures_store = Store(args.out.with_suffix(".pictures.csv"), KEYS)
        self.singles: dict[Key, Tensor] = {}  # the PSNR of each picture
        for row in self.pictures_store.rows:
            values = [float(value) for column, value in row.items() if column not in KEYS]
            self.singles[row["variant"], row["sampler"]] = torch.tensor(values, dtype=torch.float64)

    def measure(self, variant: Variant, sampler: str) -> dict[str, object]:
        """One row; the PSNR of every picture is put into self.singles."""
        reference = self.reference(CATALOGUE.variants[UNMERGED], sampler)
        made = reference if variant.name == UNMERGED else self.pictures(variant, sampler)
        ranged, expected = (self.bench.unknown(x.ranged, sampler) for x in (made, reference))
        single = psnr(ranged, expected).cpu()  # (n,)
        self.singles[variant.name, sampler] = single
        row = dict.fromkeys(self.columns, "") | self.stamp
        row |= {"variant": variant.name, "family": variant.family, "sampler": sampler, "options": describe(variant)}
        row |= {"method": variant.config.method if variant.is_merged else UNMERGED}
        row |= {"ratio": f"{variant.config.ratio:g}"}
        row |= {"cost": f"{made.run.cost:.5f}", "cost_all": f"{made.run.cost_all:.5f}"}

        put_mean(row, "psnr", single)
        frames = [x.unflatten(2, (self.frames, -1)).transpose(1, 2) for x in (ranged, expected)]  # (n, T, 3, H, W)
        apart = [x.flatten(0, 1) for x in frames]
        put_mean(row, "ssim", ssim(*apart).unflatten(0, (-1, self.frames)).mean(1), 5)
        put_mean(row, "texture", texture(*apart).unflatten(0, (-1, self.frames)).mean(1))
        if self.frames > 1:
            put_mean(row, "motion", motion(*frames))
            put_mean(row, "flicker", flicker(*frames))
        base = self.singles.get((BASELINE, sampler))
        if base is not None and variant.is_merged:
            put_mean(row, "gain", single - base)
        self.put_frechet(row, made, reference)
        if self.args.strips:
            self.args.strips.mkdir(parents=True, exist_ok=True)
            chosen = made.ranged[:STRIP].round().byte()
            beside = chosen.permute(2, 0, 3, 1).flatten(1, 2).cpu().numpy()  # (H, n * W, 3)
            strip = Image.fromarray(np.ascontiguousarray(beside))
            strip.save(self.args.strips / f"{sampler} {variant.name}.png")
        return row | self._times(variant, sampler)

    def _times(self, variant: Variant, sampler: str) -> dict[str, str]:
        size, rows = self.args.time_size, self.args.time_rows
        full, own = (
            self.bench.timing(each, sampler, size, rows, self.args.time_repeats)
            for each in (CATALOGUE.variants[UNMERGED], variant)
        )
        if own is None:
            return {}
        found = {f"step_{name}": f"{value:.3f}" for name, value in zip(("p20", "ms", "p80"), own, strict=True)}
        shape = f"{rows}x{self.bench.painted[0]}x{size}x{size}"
        return {**found, "speedup": f"{full[1] / own[1]:.3f}", "step_shape": shape}

    def write(self, row: dict[str, object]) -> None:
        """Add a row, and its pictures' PSNR first: a row that is in the file has them."""
        key = {name: row[name] for name in KEYS}
        singles = self.singles[row["variant"], row["sampler"]].tolist()
        self.pictures_store.add({**key, **{str(i): f"{x:.2f}" for i, x in enumerate(singles)}})
        self.store.add(row)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = bench.arguments("measure", __doc__, 132, "float32")
    parser.add_argument("--out", type=Path, required=True, help="CSV file; rows are added to it")
    parser.add_argument("--plan", default="frontier", help=f"sets ({', '.join(CATALOGUE.sets)}) or a file")
    parser.add_argument("--samplers", default="ddim30", help=f"for entries that name none: {', '.join(SAMPLERS)}")
    parser.add_argument("--images", type=int, default=264, help="pictures a row, over all seeds")
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--strips", type=Path, help="folder for the first pictures of each row, side by side")
    parser.add_argument("--time-size", type=int, default=128, help="pixels or latents a side of the timed step")
    parser.add_argument("--time-rows", type=int, default=16, help="rows of the timed step's batch")
    parser.add_argument("--time-repeats", type=int, default=12, help="0: no timing")
    args = parser.parse_args(argv)
    if args.images < args.seeds or args.images % args.seeds:
        parser.error(f"--images must be a multiple of --seeds, got {args.images} and {args.seeds}")
    try:
        args.keys = parse_plan(args.plan, args.samplers.split(","))
    except ValueError as error:
        parser.error(str(error))
    return args


def main(argv: Sequence[str] | None = None) -> None:
    told = "psnr psnr_se gain ssim cost fd_gap texture step_ms".split()
    args = parse(argv)
    for row in Measurement(args).run((CATALOGUE.variants[name], sampler) for name, sampler in args.keys):
        cells = [f"{row[column] or '-':>9}" for column in told]
        print(f"{row['sampler']:>9} {row['variant']:<40}", *cells, flush=True)


if __name__ == "__main__":
    main()
