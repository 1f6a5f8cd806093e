"""From the demo's pictures and times to compare.png and a table, in numbers that can be checked."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from . import console, likeness, sheet
from .paths import RESULTS, TABLE_HEAD
from .workflow import Settings, Subject


@dataclass
class Outcome:
    """What came out for one subject: pictures [H, W, 3] and seconds a step, by "unmerged" and "ToMe"."""

    subject: Subject
    pictures: dict[str, np.ndarray] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)

    @property
    def psnr(self) -> float:
        return likeness.psnr(self.pictures["unmerged"], self.pictures["ToMe"])

    @property
    def speed_up(self) -> float:
        return self.seconds["unmerged"] / self.seconds["ToMe"]


@dataclass
class Summary:
    """The numbers over all subjects, and what they were measured with."""

    model: str
    settings: Settings
    tome: dict[str, Any]
    unmerged: float
    merged: float
    psnr: float
    groups: np.ndarray  # [h, w]: which kept token each token belongs to, in one layer of one step
    kept: np.ndarray  # [h, w]: True for the tokens that stay there
    pictures: int
    machine: str = ""

    @property
    def speed_up(self) -> float:
        return self.unmerged / self.merged


def summarise(
    outcomes: Sequence[Outcome], tome: Mapping[str, Any], settings: Settings, model: str, pixels_a_token: int
) -> Summary:
    """The medians of the times, the mean fidelity, and one layer's tokens as the node's settings choose them."""
    groups, kept = one_layer(outcomes[0].pictures["unmerged"], tome, settings.size // pixels_a_token)
    return Summary(
        model=model,
        settings=settings,
        tome=dict(tome),
        unmerged=statistics.median(outcome.seconds["unmerged"] for outcome in outcomes),
        merged=statistics.median(outcome.seconds["ToMe"] for outcome in outcomes),
        psnr=statistics.fmean(outcome.psnr for outcome in outcomes),
        groups=groups,
        kept=kept,
        pictures=len(outcomes),
    )


def one_layer(picture: np.ndarray, tome: Mapping[str, Any], side: int) -> tuple[np.ndarray, np.ndarray]:
    """(groups, kept) [side, side] of the first full-resolution layer in the first step.

    What `sample` and `downsample` choose depends on the seed alone, so this is what the model did. Methods
    that match look at the model's own activations; the picture's colours stand in for them here.
    """
    import torch
    from PIL import Image

    from shared_tome import ToMeConfig, match_tokens

    small = Image.fromarray(picture).resize((side, side), Image.Resampling.BOX)
    metric = torch.from_numpy(np.asarray(small, dtype=np.float32) / 127.5 - 1.0).reshape(1, -1, 3)  # (1, N, 3)
    options = {widget.name for widget in ToMeConfig.widgets()}  # the node has its version beside them
    config = ToMeConfig.from_widgets(**{name: value for name, value in tome.items() if name in options})
    plan = match_tokens(metric, (side, side), config, step=0, layer=0)
    kept = np.zeros(side * side, bool)
    kept[plan.index[0].numpy()] = True
    return plan.groups[0].numpy().reshape(side, side), kept.reshape(side, side)


def table(summary: Summary) -> str:
    """The numbers as a Markdown table with what they mean below it."""
    total, stay = summary.kept.size, int(summary.kept.sum())
    kept, psnr = f"{stay:,} ({100 * stay / total:.0f} %)", decibels(summary.psnr)
    unmerged = ("unmerged", f"{summary.unmerged:.3f}", "", "", f"{total:,}")
    merged = ("ToMe", f"{summary.merged:.3f}", f"{summary.speed_up:.2f} x", psnr, kept)
    return "\n".join([*console.table(TABLE_HEAD, (unmerged, merged)), "", *notes(summary)])


def notes(summary: Summary) -> list[str]:
    settings, tome = summary.settings, summary.tome
    median, mean = f"; the median of {summary.pictures} pictures", ", the mean of them"
    if summary.pictures == 1:
        median, mean = "; one picture", ""
    lines = [
        f"{summary.model}, {settings.size}x{settings.size} pixels, {settings.steps} steps of {settings.sampler}, "
        f"cfg {settings.cfg:g}; ToMe: {tome['method']}, ratio {tome['ratio']:g}, the node's defaults.",
        f"{summary.machine}.",
        f"Seconds a step: the time ComfyUI spends in the KSampler node, divided by its steps{median}.",
        f"PSNR: ToMe's picture against the unmerged one of the same seed{mean}. "
        "Tokens kept, and the map: the first full-resolution layer in the first step.",
    ]
    if summary.speed_up < 1.02:
        lines.append("ToMe is not faster here. It pays where there are many tokens: large pictures.")
    return lines


def decibels(value: float) -> str:
    return "the same" if math.isinf(value) else f"{value:.1f} dB"


def write(summary: Summary, outcomes: Sequence[Outcome], out: Path) -> list[Path]:
    """Write compare.png and compare.md and return where they are."""
    out.mkdir(parents=True, exist_ok=True)
    stay, total = int(summary.kept.sum()), summary.kept.size
    differences = [sheet.gap(outcome.pictures["unmerged"], outcome.pictures["ToMe"]) for outcome in outcomes]
    factor = sheet.amplification(differences)
    rows = []
    for outcome, gap in zip(outcomes, differences, strict=True):
        unmerged, tome = outcome.pictures["unmerged"], outcome.pictures["ToMe"]
        rows.append([
            (sheet.enlarge(unmerged), f"{outcome.subject.name}, seed {outcome.subject.seed}"),
            (sheet.enlarge(tome), f"{outcome.seconds['ToMe']:.3f} s a step, {outcome.speed_up:.2f} x"),
            (sheet.amplified(gap, factor), f"PSNR {decibels(outcome.psnr)}"),
            (sheet.token_map(tome, summary.groups, summary.kept), f"{stay:,} of {total:,} tokens stay (the dots)"),
        ])  # fmt: skip
    columns = ("Unmerged", "ToMe", f"Difference x {factor}", "Who stands for whom")
    subtitle = f"Same seed, same steps: {summary.speed_up:.2f} times as fast, PSNR {decibels(summary.psnr)}"
    picture, text = (out / name for name in RESULTS)
    text.write_text(table(summary) + "\n", encoding="utf-8")
    drawn = sheet.draw(columns, rows, "Token Merging in ComfyUI", subtitle, notes(summary))
    drawn.save(picture, optimize=True)
    return [picture, text]
