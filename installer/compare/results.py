"""From the generations to compare.json, a table, a chart and contact sheets."""

from __future__ import annotations

import datetime
import json
import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from .. import console, files, likeness
from ..paths import COMPARED
from . import drawn, plan, schema
from .journal import Journal
from .plan import DEMO, FIRST, FLOOR, FLOOR_NAME, TIMED, UNMERGED, Job, Request, Variant

SAME = schema.SAME
UNKNOWN = "unknown"  # the model of a workflow whose loaders are not known


def variants_of(journal: Journal) -> list[Variant]:
    """Those that were settled on when the comparison began; none before."""
    return [Variant(**one) for one in journal.settings.get("variants", ())]


def is_complete(journal: Journal, request: Request) -> bool:
    jobs = plan.jobs(request.sizes, variants_of(journal), len(request.pictures)) if variants_of(journal) else ()
    return bool(jobs) and all(journal.has(job.key) for job in jobs)


def summarise(out: Path, journal: Journal, request: Request) -> dict[str, Any]:
    """What the JSON holds: nothing in it names the person, their folders or their own prompts."""
    settings, variants = journal.settings, variants_of(journal)
    lpips = likeness.Lpips()
    notes = [*settings["notes"], *([f"LPIPS was not measured: {lpips.why}."] if lpips.why else [])]
    first = journal.records[Job(request.sizes[0], variants[0], 0, FIRST).key]
    rows = [
        _row(out, journal, size, variant, request, lpips)
        for size in request.sizes
        for variant in (*variants, Variant(FLOOR_NAME, split=True))
    ]
    model = DEMO if request.is_demo else ", ".join(settings["model_files"]) or UNKNOWN
    return {
        "format": schema.FORMAT,
        "version": schema.VERSION,
        "tome": settings["tome"],
        "date": datetime.date.today().isoformat(),
        "machine": settings["machine"],
        "model": {
            "name": model,
            "sha256": settings.get("sha256"),
            "family": first["family"],
            "dtype": first["dtype"],
            "workflow": request.workflow is not None,
        },
        "seeds": sorted({picture.seed for picture in request.pictures}),
        "prompts": None if request.own_prompts else list(dict.fromkeys(p.prompt for p in request.pictures)),
        "pictures": len(request.pictures),
        "results": rows,
        "notes": notes,
    }


def _row(
    out: Path, journal: Journal, size: str, variant: Variant, request: Request, lpips: likeness.Lpips
) -> dict[str, Any]:
    """One line of the table. Likeness is to the unmerged pictures; times are of the timed generations."""
    count, unmerged = range(len(request.pictures)), Variant(UNMERGED)

    def of(variant: Variant, kind: str) -> list[dict[str, Any]]:
        return [journal.records[Job(size, variant, picture, kind).key] for picture in count]

    base, mine = of(unmerged, TIMED), of(variant, FLOOR if variant.split else TIMED)
    pairs = [
        (read(out, a), read(out, b))
        for one, other in zip(base, mine, strict=True)
        for a, b in zip(one["pictures"], other["pictures"], strict=True)
    ]
    height, width = pairs[0][0].shape[:2]
    steps = journal.settings["steps_found"]
    row: dict[str, Any] = {
        "size": f"{width}x{height}",
        "variant": variant.name,
        "tome": variant.tome,
        "steps": steps if steps is None or variant.share == 1 else max(1, round(variant.share * steps)),
        "seconds": None, "all_seconds": None, "speedup": None, "first_seconds": None, "peak_gib": None, "skipped": None,
        "psnr": None, "ssim": None, "lpips": None,
    }  # fmt: skip
    if not variant.split:
        seconds = [one["seconds"] for one in mine]
        peaks = [one["peak_bytes"] for one in mine if one["peak_bytes"]]
        skipped = [one["skipped"] for one in mine if one["skipped"] is not None]
        row |= {
            "seconds": statistics.median(seconds),
            "all_seconds": seconds,
            "speedup": statistics.median(one["seconds"] / other for one, other in zip(base, seconds, strict=True)),
            "first_seconds": journal.records[Job(size, variant, 0, FIRST).key]["seconds"],
            "peak_gib": max(peaks) / 2**30 if peaks else None,
            "skipped": statistics.fmean(skipped) if skipped else None,
        }
    if variant.name != UNMERGED:
        distances = [lpips(*pair) for pair in pairs]
        row |= {
            "psnr": statistics.fmean(min(SAME, likeness.psnr(*pair)) for pair in pairs),
            "ssim": statistics.fmean(likeness.ssim(*pair) for pair in pairs),
            "lpips": None if None in distances else statistics.fmean(distances),
        }
    return {key: _rounded(value) for key, value in row.items()}


def _rounded(value: Any) -> Any:
    if isinstance(value, list):
        return [_rounded(one) for one in value]
    return float(f"{value:.5g}") if isinstance(value, float) and math.isfinite(value) else value


def read(out: Path, name: str) -> np.ndarray:
    """A kept picture, uint8 [H, W, 3]."""
    with Image.open(out / "pictures" / name) as image:
        return np.asarray(image.convert("RGB"))


def table(found: Mapping[str, Any]) -> str:
    """The numbers as Markdown, with what they mean below."""
    head = ["size", "variant", "steps", "seconds", "speed-up", "first, s", "peak, GiB", "PSNR, dB", "SSIM", "LPIPS"]
    cells = []
    for row in found["results"]:
        skipped = "" if row["skipped"] is None else f" ({row['skipped']:.0%} skipped)"
        psnr = "" if row["psnr"] is None else "the same" if row["psnr"] >= SAME else f"{row['psnr']:.1f}"
        cells.append([
            row["size"], row["variant"], _text(row["steps"], "d") + skipped, _text(row["seconds"], ".2f"),
            _text(row["speedup"], ".2f", " x"), _text(row["first_seconds"], ".2f"), _text(row["peak_gib"], ".2f"),
            psnr, _text(row["ssim"], ".3f"), _text(row["lpips"], ".3f"),
        ])  # fmt: skip
    return "\n".join([*console.table(head, cells), "", *words(found)])


def _text(value: float | None, form: str, unit: str = "") -> str:
    return "" if value is None else f"{value:{form}}{unit}"


def words(found: Mapping[str, Any]) -> list[str]:
    model, machine = found["model"], found["machine"]
    return [
        f"{model['name']} ({model['family']}, {model['dtype']}), {found['pictures']} pictures; {machine['device']}, "
        f"torch {machine['torch']}, ComfyUI {machine['comfyui']}, ToMe {found['tome']}.",
        "Seconds: a whole generation from the sampler on, the median, warm and by turns; first: the first one, with "
        "compiling and tuning.",
        "PSNR, SSIM, LPIPS: the mean of all pictures, each to the unmerged one of its seed. What lies near the row of "
        "another batch split is as near as this machine is to itself.",
        *found["notes"],
    ]


def write(found: Mapping[str, Any], out: Path, request: Request) -> list[Path]:
    """Write the JSON, the table, the chart and a contact sheet for each size, and return where they are."""
    written = [out / name for name in COMPARED[1:]]
    files.put(written[0], json.dumps(found, indent=1, ensure_ascii=False) + "\n")
    files.put(written[1], table(found) + "\n")
    drawn.chart(found["results"], found["model"]["name"]).save(written[2], optimize=True)
    journal = Journal(out, {})
    for size in request.sizes:
        sheet = out / f"pictures-{size}.jpg"
        _contact(out, journal, size, request).save(sheet, quality=90)
        written.append(sheet)
    return written


def _contact(out: Path, journal: Journal, size: str, request: Request) -> Image.Image:
    """A row a picture (the first frame of a video), a column a variant."""
    variants = variants_of(journal)
    rows: list[tuple[str, Sequence[np.ndarray]]] = []
    for number, picture in enumerate(request.pictures[: drawn.ROWS]):
        names = [journal.records[Job(size, one, number, TIMED).key]["pictures"][0] for one in variants]
        rows.append((f"seed {picture.seed}", [read(out, name) for name in names]))
    return drawn.contact([variant.name for variant in variants], rows)
