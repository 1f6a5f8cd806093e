"""The set "fine": ten classes of 192x192 pixels with what small pictures lack, lettering and fine texture.

Four classes are crops of photographs that ship with scikit-image (bricks, grass, gravel, a retina) and one of a
photograph's wheel; lettering is set in Pillow's own font; the rest is drawn by formula. See lab/models/data.py.
"""

from __future__ import annotations

import math
from functools import lru_cache, partial

import numpy as np
from numpy.random import Generator
from PIL import Image, ImageDraw, ImageFont

from .data import PictureSet, blend, centres, crop, hue_colour, jitter, to_bytes

SIZE = 192
WORDS = (
    "open closed north south river stone light paper token merge noise signal market garden bread coffee night "
    "morning street number seven eleven quick brown fox lazy dog welcome exit museum library station ticket"
).split()
LETTERS = "ABCDEFGHJKLMNPQRSTUVWXYZ23456789&?"

# class name: (file, lowest and highest side of the square cut out, in the photograph's pixels)
TEXTURES: dict[str, tuple[str, int, int]] = {
    "bricks": ("brick.png", 190, 300),
    "grass": ("grass.png", 150, 250),
    "gravel": ("gravel.png", 150, 250),
}
TINTS = {
    "bricks": ((1.25, 0.85, 0.7), (1.15, 1.0, 0.8), (1.0, 1.0, 1.0)),
    "grass": ((0.8, 1.15, 0.5), (1.0, 1.1, 0.5), (0.7, 1.05, 0.65)),
    "gravel": ((1.0, 1.0, 1.0), (1.1, 1.0, 0.9), (0.9, 1.0, 1.1)),
}


@lru_cache(maxsize=64)
def font_of(size: int) -> ImageFont.FreeTypeFont:
    return ImageFont.load_default(size=size)


def _turned(angle: float) -> tuple[np.ndarray, np.ndarray]:
    x, y = centres(SIZE)
    return x * math.cos(angle) + y * math.sin(angle), y * math.cos(angle) - x * math.sin(angle)


def _ink_and_paper(rng: Generator) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Two colours (0 to 255) that can be told apart, either the darker."""
    dark = hue_colour(rng.random(), rng.uniform(0.2, 0.9), rng.uniform(0.05, 0.35))
    light = hue_colour(rng.random(), rng.uniform(0.05, 0.5), rng.uniform(0.8, 1.0))
    pair = [tuple(int(255 * c) for c in colour) for colour in (dark, light)]
    return (pair[0], pair[1]) if rng.random() < 0.7 else (pair[1], pair[0])


def words(rng: Generator) -> np.ndarray:
    """Two to six lines of words, turned a little, as on a sign or a page."""
    ink, paper = _ink_and_paper(rng)
    image = Image.new("RGB", (SIZE, SIZE), paper)
    draw = ImageDraw.Draw(image)
    lines = int(rng.integers(2, 7))
    pitch = SIZE / (lines + 0.4)
    font = font_of(int(min(pitch * 0.82, 44)))
    for line in range(lines):
        text = " ".join(WORDS[int(i)] for i in rng.integers(0, len(WORDS), 3 + lines // 3))
        if rng.random() < 0.35:
            text = text.upper()
        draw.text((rng.uniform(4, 14), pitch * (line + 0.3)), text, fill=ink, font=font)
    image = image.rotate(rng.uniform(-5, 5), Image.Resampling.BICUBIC, fillcolor=paper)
    x, y = _turned(rng.uniform(0, 2 * math.pi))
    light = 1 + rng.uniform(0.0, 0.25) * x / SIZE
    return to_bytes(np.asarray(image) / 255 * light[..., None])


def letters(rng: Generator) -> np.ndarray:
    """Two to five big letters in colour before stripes or dots."""
    ink, paper = _ink_and_paper(rng)
    u, v = _turned(rng.uniform(0, math.pi))
    period = rng.uniform(10, 24)
    wave = np.sin(2 * math.pi * u / period) * (np.sin(2 * math.pi * v / period) if rng.random() < 0.5 else 1)
    base = np.asarray(paper, np.float32) / 255
    canvas = blend(np.broadcast_to(base, (SIZE, SIZE, 3)), 0.85 * base, (2 * wave + 0.5).clip(0, 1))
    image = Image.fromarray(to_bytes(canvas))
    draw = ImageDraw.Draw(image)
    count = int(rng.integers(2, 6))
    for i in range(count):
        size = int(rng.uniform(70, 120) * (1.25 if count < 4 else 0.85))
        colour = ink if i % 2 == 0 else tuple(int(255 * c) for c in hue_colour(rng.random(), 0.8, rng.uniform(0.5, 1)))
        across, down = divmod(i, 2) if count > 2 else (i, 0)
        columns = (count + 1) // 2 if count > 2 else 2
        place = ((across + 0.5) * SIZE / columns, SIZE / 2 if count == 2 else (down + 0.5) * SIZE / 2)
        place = tuple(p + rng.uniform(-10, 10) for p in place)
        draw.text(place, LETTERS[int(rng.integers(len(LETTERS)))], fill=colour, font=font_of(size), anchor="mm")
    return np.asarray(image)


def texture(rng: Generator, name: str) -> np.ndarray:
    """Somewhere in the photograph of a surface, tinted."""
    file, lowest, highest = TEXTURES[name]
    side = rng.uniform(lowest, highest)
    x, y = rng.uniform(side / 2, 512 - side / 2, 2)
    tint = np.array(TINTS[name][int(rng.integers(3))])
    pixels = crop(rng, file, x, y, side, 1.0, SIZE) * tint
    return jitter(pixels.clip(0, 255).astype(np.uint8), rng, hue=0.04)


def retina(rng: Generator) -> np.ndarray:
    """Fine vessels, somewhere on the disc."""
    side = rng.uniform(380, 620)
    x, y = 705 + rng.uniform(-330, 330, 2)
    return jitter(crop(rng, "retina.jpg", x, y, side, 0.5, SIZE), rng)


def wheel(rng: Generator) -> np.ndarray:
    """A motorcycle's front wheel or its engine: spokes, fins, chrome."""
    x, y = ((560, 385), (345, 320))[int(rng.integers(2))]
    side = rng.uniform(190, 260)
    dx, dy = rng.uniform(-14, 14, 2)
    return jitter(crop(rng, "motorcycle_right.png", x + dx, y + dy, side, 1.0, SIZE), rng)


def cloth(rng: Generator) -> np.ndarray:
    """Woven cloth in a check of four colours, with folds."""
    u, v = _turned(rng.uniform(-0.4, 0.4))
    fold = rng.uniform(2, 7) * np.sin(2 * math.pi * v / rng.uniform(70, 160) + rng.uniform(0, 6))
    u, v = u + fold + SIZE, v + 0.4 * fold + SIZE
    thread = rng.uniform(3.2, 6.5)  # pixels
    hue = rng.random()
    hues = hue + np.array([0, 0.03, rng.uniform(0.3, 0.6), 0.08])
    values = rng.permutation([0.25, 0.5, 0.75, 0.95])
    colours = np.stack([hue_colour(h, rng.uniform(0.3, 0.8), value) for h, value in zip(hues, values, strict=True)])
    setting = rng.integers(0, 4, 16)  # the colours of 16 neighbouring threads, the same across and along

    def threads(place: np.ndarray) -> np.ndarray:
        return colours[setting[(place / thread / 2).astype(np.int64) % 16]]

    twill = int(rng.integers(1, 4))  # 1: plain weave
    over = ((u / thread).astype(np.int64) + (v / thread).astype(np.int64) * twill) % (twill + 1) == 0
    along, across = np.abs(np.sin(math.pi * u / thread)), np.abs(np.sin(math.pi * v / thread))
    shade = np.where(over, along, across) ** 0.6
    light = 0.9 + 0.035 * fold
    canvas = np.where(over[..., None], threads(u), threads(v)) * ((0.45 + 0.55 * shade) * light)[..., None]
    return to_bytes(canvas)


def gratings(rng: Generator) -> np.ndarray:
    """Two to four fields of fine lines, straight or in rings."""
    ink, paper = (np.array(colour, np.float32) / 255 for colour in _ink_and_paper(rng))
    canvas = np.broadcast_to(paper, (SIZE, SIZE, 3)).astype(np.float32)
    for i in range(int(rng.integers(2, 5))):
        u, v = _turned(rng.uniform(0, 2 * math.pi))
        field = 1.0 if i == 0 else (u - rng.uniform(-40, 60) + 0.5).clip(0, 1)
        period = rng.uniform(4.5, 14)
        if rng.random() < 0.35:
            u = np.hypot(u - rng.uniform(-60, 60), v - rng.uniform(-60, 60))
        wave = np.sin(2 * math.pi * v / period) if rng.random() < 0.5 else np.sin(2 * math.pi * u / period)
        lines = (0.5 + wave * period / 6).clip(0, 1)  # edges a pixel or so wide
        colour = ink if rng.random() < 0.6 else hue_colour(rng.random(), 0.8, rng.uniform(0.4, 0.9))
        painted = blend(np.broadcast_to(paper, canvas.shape), colour, lines)
        canvas = blend(canvas, painted, np.broadcast_to(np.float32(field), (SIZE, SIZE)))
    return to_bytes(canvas)


def city(rng: Generator) -> np.ndarray:
    """Rows of buildings with their windows, by day or at night."""
    x, y = centres(SIZE)
    up = (0.5 - y / SIZE)[..., None]
    night = rng.random() < 0.5
    value = rng.uniform(0.15, 0.3) if night else rng.uniform(0.8, 1.0)
    high = hue_colour(rng.uniform(0.55, 0.7), 0.6, value)
    low = hue_colour(rng.uniform(0.0, 0.15), 0.35, min(1.0, value * 1.3))
    canvas = low + (high - low) * up
    hue = rng.random()
    for row in range(3):  # far ones first
        left = -SIZE / 2 - rng.uniform(0, 20)
        while left < SIZE / 2:
            width = float(rng.integers(24, 52))
            top = SIZE * (rng.uniform(-0.42, -0.05) + 0.17 * row)
            inside = (x >= left) & (x < left + width) & (y > top)
            wall = hue_colour(hue + rng.uniform(-0.08, 0.08), 0.3, (0.1 + 0.06 * row) if night else 0.75 - 0.17 * row)
            canvas = np.where(inside[..., None], wall, canvas)
            pitch_x, pitch_y = float(rng.integers(6, 11)), float(rng.integers(7, 13))
            in_x, in_y = (x - left) / pitch_x, (y - top) / pitch_y
            window = (in_x % 1 > 0.3) & (in_x % 1 < 0.82) & (in_y % 1 > 0.3) & (in_y % 1 < 0.78)
            window &= inside & (x < left + width - 3)
            lit = rng.random((40, 12)) < (0.55 if night else 0.15)
            lit = lit[in_y.astype(np.int64).clip(0, 39), in_x.astype(np.int64).clip(0, 11)]
            glass = np.where(lit[..., None], hue_colour(0.13, 0.5, 1.0), wall * (0.5 if night else 0.6))
            canvas = np.where(window[..., None], glass, canvas)
            left += width + float(rng.integers(-3, 8))
    return to_bytes(canvas)


_SURFACES = {name: partial(texture, name=name) for name in TEXTURES}
_OTHERS = {each.__name__: each for each in (retina, wheel, cloth, gratings, city)}
FINE = PictureSet("fine", SIZE, {"words": words, "letters": letters, **_SURFACES, **_OTHERS})
