"""Measures merging beside what people would use in its place: fidelity, and the calls and attention that are left.

    python -m lab.fidelity.frontier --model demo/model.safetensors --name demo --pictures 72 \
        --classifier out/classifier.safetensors --commit $(git rev-parse --short HEAD)

Fewer steps, EasyCache, LazyCache, outputs held (reuse.py), and pooled tails on transformers, each alone and with each
preset (methods.rivals): lab/results/fidelity/frontier-NAME.csv. The other models come from lab.models.train, the
classifiers from lab.models.classifier (of dit: demo's; of lab and dit-fine: --data fine):

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
from collections.abc import Sequence
from pathlib import Path

import torch

from ..models.dit import DiT
from ..models.samplers import parse_sampler
from ..store import RESULTS
from .bench import Measurement, Pictures, arguments, put_mean
from .hooks import Run
from .methods import AGAIN, SETS, UNMERGED, Variant, rivals
from .metrics import psnr, ssim, texture

EQUAL = 100.0  # dB


class Frontier(Measurement):
    def __init__(self, args: argparse.Namespace) -> None:
        super().__init__(args, args.pictures, {"pictures": args.pictures})
        self.sampler = args.sampler or ("flow28" if self.bench.model.prediction == "flow" else "ddim30")
        self.steps = parse_sampler(self.sampler)[0].steps
        self.variants = rivals(self.steps, isinstance(self.bench.network, DiT), args.steps, args.sets)

    def pictures(self, variant: Variant, sampler: str) -> Pictures:
        self.bench.batch = max(1, self.args.batch // 3) if variant.name == AGAIN else self.args.batch
        return super().pictures(variant, sampler)

    def measure(self, variant: Variant, sampler: str) -> dict[str, object]:
        reference = self.reference(self.variants[UNMERGED], sampler)
        made = self.pictures(variant, sampler)
        row: dict[str, object] = {"variant": variant.name, "family": variant.family, "sampler": sampler}
        row["method"] = f"{variant.tail} tail" if variant.tail else variant.config.method if variant.is_merged else ""
        row["ratio"] = f"{variant.config.ratio:g}"

        single = psnr(made.ranged, reference.ranged)
        # Where a cache skips nothing a picture is the same: its distance counts as EQUAL beside the others'.
        put_mean(row, "psnr", single if single.isinf().all() else single.clamp(max=EQUAL))
        put_mean(row, "ssim", ssim(made.ranged, reference.ranged), 5)
        put_mean(row, "texture", texture(made.ranged, reference.ranged))
        self.put_frechet(row, made, reference)
        return row | self._work(variant, made.run) | self.stamp

    def _work(self, variant: Variant, run: Run) -> dict[str, object]:
        """Shares of what the unmerged pictures take."""
        all_calls = self.steps * self.args.pictures
        calls = {f"calls_{name}": count / all_calls for name, count in run.calls.items()}
        steps = variant.steps or self.steps
        ran = " ".join(f"{100 * run.ran.get(step, 0) / self.args.pictures:.0f}" for step in range(steps))
        shares = {**calls, "attention": run.cost_all * sum(calls.values())}
        return {"steps": steps, **{name: f"{share:.5f}" for name, share in shares.items()}, "ran": ran}


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = arguments("frontier", __doc__, 72, "mixed" if torch.cuda.is_available() else "float32")
    parser.add_argument("--name", required=True, help="of the model, in the file's name")
    parser.add_argument("--out", type=Path, help="CSV file; lab/results/fidelity/frontier-NAME.csv")
    parser.add_argument("--sets", nargs="+", choices=SETS, default=SETS)
    parser.add_argument("--steps", nargs="+", type=int, default=(), help="fewer steps to measure")
    parser.add_argument("--sampler", help="flow28 for a flow, else ddim30")
    parser.add_argument("--pictures", type=int, default=72, help="a row")
    args = parser.parse_args(argv)
    args.out = args.out or RESULTS / "fidelity" / f"frontier-{args.name}.csv"
    return args


def main(argv: Sequence[str] | None = None) -> None:
    told = "psnr psnr_se ssim fd_gap texture calls_whole calls_merged attention".split()
    frontier = Frontier(parse(argv))
    for row in frontier.run((variant, frontier.sampler) for variant in frontier.variants.values()):
        print(f"{row['variant']:<46}", *(f"{row[column] or '-':>9}" for column in told), flush=True)


if __name__ == "__main__":
    main()
