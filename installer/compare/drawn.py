"""The chart (time across, PSNR up) and the contact sheets, in Pillow."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from PIL import Image, ImageDraw
from PIL.ImageFont import load_default as font

from ..sheet import INK, LINE, PAPER, QUIET, Panel, amplification, amplified, draw, enlarge, gap
from .plan import FLOOR_NAME, UNMERGED
from .schema import SAME

ROWS = 4  # of a contact sheet
CHART, PLOT, LEFT = (980, 520), (560, 380), 90  # a chart and its plot, in pixels
HIGHEST = 60.0  # dB; what lies above cannot be seen, and is drawn here
DOTS = ("#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#d55e00", "#5e3c99", "#7a7a7a")  # Okabe and Ito


def contact(names: Sequence[str], rows: Sequence[tuple[str, Sequence[np.ndarray]]]) -> Image.Image:
    """A column a variant, the unmerged one first; under each picture its difference from that one.

    rows: what stands beside a row, and its pictures, uint8 [H, W, 3].
    """
    factor = amplification([gap(pictures[0], one) for _, pictures in rows for one in pictures])
    panels: list[list[Panel | None]] = []
    for title, (unmerged, *others) in rows:
        panels.append([(enlarge(unmerged), title), *((enlarge(one), "") for one in others)])
        far = (amplified(gap(unmerged, one), factor) for one in others)
        panels.append([None, *((one, f"difference x {factor}") for one in far)])
    return draw(names, panels)


def chart(rows: Sequence[Mapping[str, Any]], title: str) -> Image.Image:
    """A plot a size, side by side: seconds of a whole generation across, PSNR to unmerged up."""
    sizes = list(dict.fromkeys(row["size"] for row in rows))
    image = Image.new("RGB", (CHART[0] * len(sizes), CHART[1]), PAPER)
    pen = ImageDraw.Draw(image)
    for number, size in enumerate(sizes):
        _plot(pen, CHART[0] * number + LEFT, [row for row in rows if row["size"] == size], f"{title}, {size}")
    return image


def _plot(pen: ImageDraw.ImageDraw, left: int, rows: Sequence[Mapping[str, Any]], title: str) -> None:
    shown = [row for row in rows if row["psnr"] is not None and row["seconds"] is not None]
    floor = next((row["psnr"] for row in rows if row["variant"] == FLOOR_NAME), None)
    unmerged = next(row["seconds"] for row in rows if row["variant"] == UNMERGED)
    top, bottom = 60, 60 + PLOT[1]
    across = ticks(0, max([unmerged, *(row["seconds"] for row in shown)]))
    heights = [min(row["psnr"], HIGHEST) for row in shown] or [HIGHEST]
    up = ticks(min(heights) - 2, max(heights))

    def place(seconds: float, psnr: float) -> tuple[float, float]:
        x = left + PLOT[0] * (seconds - across[0]) / (across[-1] - across[0])
        return x, bottom - PLOT[1] * (min(psnr, HIGHEST) - up[0]) / (up[-1] - up[0])

    pen.text((left, 18), title, INK, font(20))
    for tick in across:
        x, _ = place(tick, up[0])
        pen.line((x, top, x, bottom), LINE)
        pen.text((x, bottom + 6), f"{tick:g}", QUIET, font(15), anchor="mt")
    for tick in up:
        _, y = place(across[0], tick)
        pen.line((left, y, left + PLOT[0], y), LINE)
        pen.text((left - 8, y), f"{tick:g}", QUIET, font(15), anchor="rm")
    pen.text((left + PLOT[0] / 2, bottom + 30), "seconds of a whole generation", INK, font(15), anchor="mt")
    pen.text((left - LEFT + 8, top - 24), f"PSNR, dB ({HIGHEST:g}: or more)", INK, font(15))
    x, _ = place(unmerged, up[0])
    pen.line((x, top, x, bottom), QUIET, 2)
    pen.text((x - 4, top + 2), UNMERGED, QUIET, font(14), anchor="rt")
    if floor is not None:
        _, y = place(across[0], floor)
        pen.line((left, y, left + PLOT[0], y), QUIET, 2)
        pen.text((left + 4, y + 3), FLOOR_NAME, QUIET, font(14), anchor="lt")
    for number, row in enumerate(shown):
        x, y = place(row["seconds"], row["psnr"])
        colour = DOTS[number % len(DOTS)]
        pen.ellipse((x - 6, y - 6, x + 6, y + 6), colour)
        y = top + 24 * number + 10
        x = left + PLOT[0] + 30
        pen.ellipse((x - 6, y - 6, x + 6, y + 6), colour)
        psnr = "the same" if row["psnr"] >= SAME else f"{row['psnr']:.1f} dB"
        pen.text((x + 14, y), f"{row['variant']}: {row['speedup']:.2f} x, {psnr}", INK, font(15), anchor="lm")


def ticks(low: float, high: float) -> list[float]:
    """Round numbers from at most low to at least high, four to nine of them."""
    span = max(high - low, 1e-6)
    unit = 10.0 ** np.floor(np.log10(span))
    step = next(unit * part for part in (0.2, 0.25, 0.5, 1, 2) if span / (unit * part) <= 6)
    first, last = np.floor(low / step), np.ceil(high / step)
    return [float(round(step * number, 10)) for number in np.arange(first, last + 1)]
