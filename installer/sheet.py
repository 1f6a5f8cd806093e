"""Sheets of pictures beside their differences, and a map of which tokens were kept."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageOps
from PIL.ImageFont import load_default as font

PANEL, GAP, MARGIN = 320, 18, 44
PAPER, INK, QUIET, LINE, ACCENT = "#fbfaf7", "#1d2329", "#68717b", "#dcd8d0", "#0b6e5f"
FACTORS = (1, 2, 4, 8, 16, 32)


def amplification(differences: Sequence[np.ndarray]) -> int:
    """The largest factor that drives no more than one pixel in a hundred of the differences out of range."""
    worst = max(float(np.percentile(difference, 99)) for difference in differences)
    fitting = [factor for factor in FACTORS if worst * factor <= 255.0]
    return fitting[-1] if fitting else 1


# A panel and what stands below it.
Panel = tuple[Image.Image, str]


def draw(
    columns: Sequence[str],
    rows: Sequence[Sequence[Panel | None]],
    title: str = "",
    subtitle: str = "",
    footer: Sequence[str] = (),
) -> Image.Image:
    """The sheet: columns with a heading each, panels from `enlarge` and its like; None leaves a place empty."""
    top, step, line = MARGIN + (118 if title else 34), PANEL + 66, 26
    width, height = 2 * MARGIN + len(columns) * (PANEL + GAP) - GAP, top + len(rows) * step + line * len(footer)
    sheet = Image.new("RGB", (width, height + MARGIN), PAPER)
    pen = ImageDraw.Draw(sheet)
    pen.text((MARGIN, MARGIN - 8), title, INK, font(34))
    pen.text((MARGIN, MARGIN + 38), subtitle, QUIET, font(19))
    for place, heading in enumerate(columns):
        x = MARGIN + place * (PANEL + GAP)
        pen.text((x, top - 34), heading, ACCENT if place == 1 else INK, font(21))
        for number, row in enumerate(rows):
            if (panel := row[place]) is not None:
                y = top + number * step
                sheet.paste(panel[0], (x, y))
                pen.rectangle((x - 1, y - 1, x + PANEL, y + PANEL), outline=LINE)
                pen.text((x, y + PANEL + 8), panel[1], QUIET, font(17))
    for number, text in enumerate(footer):
        pen.text((MARGIN, top + len(rows) * step - 10 + line * number), text, INK, font(17))
    return sheet


def enlarge(pixels: np.ndarray) -> Image.Image:
    """A picture at the panel's size, in a square; small ones by whole pixels, so that what is seen is what was made."""
    side = max(pixels.shape[:2])
    image = ImageOps.pad(Image.fromarray(pixels), (side, side), color=PAPER)
    small = image.width * 2 <= PANEL
    how = Image.Resampling.NEAREST if small and PANEL % image.width == 0 else Image.Resampling.LANCZOS
    return image.resize((PANEL, PANEL), how)


def amplified(gap: np.ndarray, factor: int) -> Image.Image:
    return enlarge(np.clip(gap * factor, 0, 255).astype(np.uint8))


def token_map(picture: np.ndarray, groups: np.ndarray, kept: np.ndarray) -> Image.Image:
    """Each group of tokens in the colour of the token that stands for it, edges between groups, a dot on it.

    picture: uint8 [H, W, 3]. groups: [h, w], which kept token each token belongs to; kept: [h, w], True for those.
    """
    height, width = groups.shape
    colours = np.asarray(Image.fromarray(picture).resize((width, height), Image.Resampling.BOX))
    table = np.zeros((int(groups.max()) + 1, 3), np.uint8)
    table[groups[kept]] = colours[kept]
    cell = max(1, PANEL * 2 // max(height, width))
    image = Image.fromarray(np.repeat(np.repeat(table[groups], cell, 0), cell, 1))
    pen = ImageDraw.Draw(image, "RGBA")
    edge = (0, 0, 0, 70)
    for y, x in np.argwhere(groups[:, 1:] != groups[:, :-1]):
        pen.line(((x + 1) * cell, y * cell, (x + 1) * cell, (y + 1) * cell), edge)
    for y, x in np.argwhere(groups[1:] != groups[:-1]):
        pen.line((x * cell, (y + 1) * cell, (x + 1) * cell, (y + 1) * cell), edge)
    for y, x in np.argwhere(kept):
        inset = cell // 3
        box = (x * cell + inset, y * cell + inset, (x + 1) * cell - inset, (y + 1) * cell - inset)
        light = table[groups[y, x]].astype(int) @ (299, 587, 114) > 140_000
        pen.ellipse(box, (0, 0, 0, 190) if light else (255, 255, 255, 230))
    return image.resize((PANEL, PANEL), Image.Resampling.LANCZOS)


def gap(one: np.ndarray, two: np.ndarray) -> np.ndarray:
    """How far two uint8 pictures are from each other in each place, int16."""
    return np.abs(one.astype(np.int16) - two.astype(np.int16))
