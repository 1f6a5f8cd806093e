"""Draws compare.png: for each picture unmerged, ToMe, their difference and which tokens were kept."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw, ImageFont

PANEL, GAP, MARGIN = 320, 18, 44
PAPER, INK, QUIET, LINE, ACCENT = "#fbfaf7", "#1d2329", "#68717b", "#dcd8d0", "#0b6e5f"
FACTORS = (1, 2, 4, 8, 16, 32)


@dataclass(frozen=True)
class Row:
    """One subject's pictures as uint8 arrays [H, W, 3], and the tokens that stay.

    groups: [h, w], which kept token each token belongs to; kept: [h, w], True for the tokens that stay.
    """

    unmerged: np.ndarray
    tome: np.ndarray
    groups: np.ndarray
    kept: np.ndarray
    notes: tuple[str, str, str, str]


def amplification(differences: Sequence[np.ndarray]) -> int:
    """The largest factor that drives no more than one pixel in a hundred of the differences out of range."""
    worst = max(float(np.percentile(difference, 99)) for difference in differences)
    fitting = [factor for factor in FACTORS if worst * factor <= 255.0]
    return fitting[-1] if fitting else 1


def draw(title: str, subtitle: str, columns: Sequence[str], rows: Sequence[Row], footer: Sequence[str]) -> Image.Image:
    """The sheet. columns: four headings; a "{factor}" in one becomes the factor of the difference."""
    factor = amplification([gap(row.unmerged, row.tome) for row in rows])
    width = 2 * MARGIN + 4 * PANEL + 3 * GAP
    top, caption, step = MARGIN + 118, 30, PANEL + 66
    height = top + len(rows) * step + 26 * len(footer) + MARGIN
    sheet = Image.new("RGB", (width, height), PAPER)
    pen = ImageDraw.Draw(sheet)
    pen.text((MARGIN, MARGIN - 8), title, INK, font(34))
    pen.text((MARGIN, MARGIN + 38), subtitle, QUIET, font(19))
    for place, heading in enumerate(columns):
        x = MARGIN + place * (PANEL + GAP)
        pen.text((x, top - 34), heading.replace("{factor}", str(factor)), ACCENT if place == 1 else INK, font(21))
    for number, row in enumerate(rows):
        y = top + number * step
        panels = (
            enlarge(row.unmerged),
            enlarge(row.tome),
            enlarge(np.clip(gap(row.unmerged, row.tome) * factor, 0, 255).astype(np.uint8)),
            token_map(row),
        )
        for place, panel in enumerate(panels):
            x = MARGIN + place * (PANEL + GAP)
            sheet.paste(panel, (x, y))
            pen.rectangle((x - 1, y - 1, x + PANEL, y + PANEL), outline=LINE)
            pen.text((x, y + PANEL + 8), row.notes[place], QUIET, font(17))
    y = top + len(rows) * step - step + PANEL + caption + 26
    for line in footer:
        pen.text((MARGIN, y), line, INK, font(17))
        y += 26
    return sheet


def enlarge(pixels: np.ndarray) -> Image.Image:
    """A picture at the panel's size; small ones by whole pixels, so that what is seen is what was made."""
    image = Image.fromarray(pixels)
    small = image.width * 2 <= PANEL
    how = Image.Resampling.NEAREST if small and PANEL % image.width == 0 else Image.Resampling.LANCZOS
    return image.resize((PANEL, PANEL), how)


def token_map(row: Row) -> Image.Image:
    """Each group of tokens in the colour of the token that stands for it, edges between groups, a dot on it."""
    height, width = row.groups.shape
    colours = np.asarray(Image.fromarray(row.tome).resize((width, height), Image.Resampling.BOX))
    table = np.zeros((int(row.groups.max()) + 1, 3), np.uint8)
    table[row.groups[row.kept]] = colours[row.kept]
    cell = max(1, PANEL * 2 // max(height, width))
    image = Image.fromarray(np.repeat(np.repeat(table[row.groups], cell, 0), cell, 1))
    pen = ImageDraw.Draw(image, "RGBA")
    edge = (0, 0, 0, 70)
    for y, x in np.argwhere(row.groups[:, 1:] != row.groups[:, :-1]):
        pen.line(((x + 1) * cell, y * cell, (x + 1) * cell, (y + 1) * cell), edge)
    for y, x in np.argwhere(row.groups[1:] != row.groups[:-1]):
        pen.line((x * cell, (y + 1) * cell, (x + 1) * cell, (y + 1) * cell), edge)
    for y, x in np.argwhere(row.kept):
        inset = cell // 3
        box = (x * cell + inset, y * cell + inset, (x + 1) * cell - inset, (y + 1) * cell - inset)
        light = table[row.groups[y, x]].astype(int) @ (299, 587, 114) > 140_000
        pen.ellipse(box, (0, 0, 0, 190) if light else (255, 255, 255, 230))
    return image.resize((PANEL, PANEL), Image.Resampling.LANCZOS)


def gap(one: np.ndarray, two: np.ndarray) -> np.ndarray:
    """How far two uint8 pictures are from each other in each place, int16."""
    return np.abs(one.astype(np.int16) - two.astype(np.int16))


def font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    """Pillow's own, of this size in pixels."""
    return ImageFont.load_default(size)
