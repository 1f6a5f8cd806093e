"""Measures merging beside what people would use in its place: fidelity, and the calls and attention that are left.

    python -m lab.fidelity.frontier --model demo/model.safetensors --name demo --pictures 72 \
        --classifier out/classifier.safetensors --commit $(git rev-parse --short HEAD)

Fewer steps, EasyCache, LazyCache, outputs held (reuse.py), and pooled tails on transformers, each alone and with each
preset (rivals.py): lab/results/fidelity/frontier-NAME.csv. The other models come from lab.models.train, the classifiers
from lab.models.classifier (of dit: demo's; of lab and dit-fine: --data fine):

    --model out/lab/model.safetensors --name lab --classifier out/lab/classifier.safetensors
    --model out/dit/model.safetensors --name dit --classifier out/classifier.safetensors
    --model out/dit-fine/model.safetensors --name dit-fine --pictures 40 --classifier out/lab/classifier.safetensors

Rows in the file are not measured again; the most telling sets come first (--sets, --minutes). "calls_whole" and
"calls_merged" are the calls of the model that ran, as a share of the steps of the unmerged picture ("calls_both": exact
and drawn, "calls_held": with attentions held); "attention" is the share of all self-attention's work that ran. What a
generation takes follows from them and from the time of a step (lab/pages/frontier_times.py). "ran": of each step, the
percent of the pictures whose model ran. PSNR, SSIM and texture as in measure.py; the row "unmerged again" says how far
rounding alone takes the pictures.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from tqdm import tqdm

from ..models.dit import DiT
from ..models.samplers import parse_sampler
from ..store import RESULTS, Budget, Store
from .bench import PRECISIONS, Bench
from .hooks import Run
from .methods import UNMERGED, Variant
from .metrics import psnr, ssim, texture, to_range
from .rivals import AGAIN, SETS, rivals
from .stamp import check_same, judge_of, put_frechet, put_mean, stamped

KEYS = ("variant", "sampler")
SAME = ("pictures", "precision", "device", "model")
"""Columns that must be alike in all rows of a file: else they cannot be compared."""


EQUAL = 100.0  # dB


class Frontier:
    """The rows of one model."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.bench = bench = Bench(args.model, args.device, args.pictures, 1, args.batch, args.precision)
        self.batch, transformer = args.batch, isinstance(bench.network, DiT)
        self.sampler = args.sampler or ("flow28" if bench.model.prediction == "flow" else "ddim30")
        self.steps = parse_sampler(self.sampler)[0].steps
        self.variants = rivals(self.steps, transformer, args.steps, args.sets)
        self.judge = judge_of(bench, args.classifier)
        self.stamp = {"pictures": args.pictures, **stamped(bench, args.precision, args.commit)}
        self.store, self.budget = Store(args.out, KEYS), Budget(args.minutes)
        check_same(self.store.rows, SAME, self.stamp, args.out)
        self.reference: tuple[torch.Tensor, torch.Tensor | None] | None = None

    def _pictures(self, variant: Variant) -> tuple[torch.Tensor, torch.Tensor | None, Run]:
        """Pictures [n, 3, H, W], 0 to 255, their features [n, D], and the run."""
        self.bench.batch = max(1, self.batch // 3) if variant.name == AGAIN else self.batch
        made, run = self.bench.pictures(variant, self.sampler)
        return to_range(made), self.judge.features(made) if self.judge else None, run

    def measure(self, variant: Variant) -> dict[str, object]:
        if self.reference is None:
            self.reference = self._pictures(self.variants[UNMERGED])[:2]
        expected, features = self.reference
        made, own, run = self._pictures(variant)
        row: dict[str, object] = {"variant": variant.name, "family": variant.family, "sampler": self.sampler}
        row["method"] = f"{variant.tail} tail" if variant.tail else variant.config.method if variant.is_merged else ""
        row["ratio"] = f"{variant.config.ratio:g}"

        single = psnr(made, expected)
        # Where a cache skips nothing a picture is the same: its distance counts as EQUAL beside the others'.
        put_mean(row, "psnr", single if single.isinf().all() else single.clamp(max=EQUAL))
        put_mean(row, "ssim", ssim(made, expected), 5)
        put_mean(row, "texture", texture(made, expected))
        row |= dict.fromkeys(("fd", "fd_gap", "fd_gap_se"), "")
        if self.judge:
            put_frechet(row, self.judge, own, features)
        return row | self._work(variant, run) | self.stamp

    def _work(self, variant: Variant, run: Run) -> dict[str, object]:
        """Shares of what the unmerged pictures take."""
        all_calls = self.steps * len(self.reference[0])
        calls = {f"calls_{name}": count / all_calls for name, count in run.calls.items()}
        steps = variant.steps or self.steps
        ran = " ".join(f"{100 * run.ran.get(step, 0) / len(self.reference[0]):.0f}" for step in range(steps))
        shares = {**calls, "attention": run.cost_all * sum(calls.values())}
        return {"steps": steps, **{name: f"{share:.5f}" for name, share in shares.items()}, "ran": ran}

    def run(self) -> Iterator[dict[str, object]]:
        todo = [v for name, v in self.variants.items() if not self.store.has(variant=name, sampler=self.sampler)]
        bar = tqdm(todo, unit="row", file=sys.stderr, mininterval=2, disable=not todo)
        for variant in bar:
            if self.budget.spent:
                break
            bar.set_postfix_str(variant.name)
            row = self.measure(variant)
            self.store.add(row)
            yield row


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m lab.fidelity.frontier", description=__doc__.splitlines()[0])
    cuda = torch.cuda.is_available()
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--name", required=True, help="of the model, in the file's name")
    parser.add_argument("--out", type=Path, help="CSV file; lab/results/fidelity/frontier-NAME.csv")
    parser.add_argument("--sets", nargs="+", choices=SETS, default=SETS)
    parser.add_argument("--steps", nargs="+", type=int, default=(), help="fewer steps to measure")
    parser.add_argument("--sampler", help="flow28 for a flow, else ddim30")
    parser.add_argument("--pictures", type=int, default=72, help="a row")
    parser.add_argument("--batch", type=int, default=72, help="pictures at a time")
    parser.add_argument(
        "--precision", choices=PRECISIONS, default="mixed" if cuda else "float32", help="half is faster"
    )
    parser.add_argument("--classifier", type=Path, help="from lab.models.classifier; without it no Frechet distance")
    parser.add_argument("--device", default="cuda" if cuda else "cpu")
    parser.add_argument("--minutes", type=float, default=math.inf, help="begin no row after this time")
    parser.add_argument("--commit", default="", help="what was measured, where there is no git to ask")
    args = parser.parse_args(argv)
    args.out = args.out or RESULTS / "fidelity" / f"frontier-{args.name}.csv"
    return args


def main(argv: Sequence[str] | None = None) -> None:
    told = "psnr psnr_se ssim fd_gap texture calls_whole calls_merged attention".split()
    for row in Frontier(parse(argv)).run():
        print(f"{row['variant']:<46}", *(f"{row[column] or '-':>9}" for column in told), flush=True)


if __name__ == "__main__":
    main()
