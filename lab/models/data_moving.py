"""The set "moving": nine classes of videos, eight frames of 64x64 pixels, whose motion is even within a video; and
all sets by name.

Four classes are a window that glides over a photograph of scikit-image, one over its tray of coins; in the others discs
or a letter fly over a photograph of a surface, stripes drift, rings grow. See lab/models/data.py.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import numpy as np
from numpy.random import Generator
from PIL import Image, ImageDraw

from .data import DEMO, PHOTOGRAPHS, SIZE, TILTS, PictureSet, blend, centres, hue_colour, jitter, to_bytes, window
from .data_fine import FINE, LETTERS, TEXTURES, font_of

FRAMES = 8
GLIDING = ("cat", "astronaut", "coffee", "motorcycle")


def _video(draw: Callable[[float], np.ndarray]) -> np.ndarray:
    """Frames one below the other, [FRAMES * SIZE, SIZE, 3]; draw: of a time from -1/2 to 1/2."""
    return np.concatenate([draw(time) for time in np.linspace(-0.5, 0.5, FRAMES)])


def glide(rng: Generator, spec: tuple[str, int, int, int]) -> np.ndarray:
    """A window that moves over a photograph's subject by up to a third of itself, and comes nearer or recedes."""
    name, x, y, size = spec
    tilt, side = int(rng.choice(TILTS)), size * rng.uniform(0.6, 0.9)
    angle, way = rng.uniform(0, 2 * math.pi), rng.uniform(0.1, 0.35) * side
    dx, dy, nearer = math.cos(angle) * way, math.sin(angle) * way, rng.uniform(-0.25, 0.25)
    scale = min(1.0, 3 * SIZE / size)

    def frame(time: float) -> np.ndarray:
        return window(name, scale, tilt, x + time * dx, y + time * dy, side * (1 + time * nearer))

    return jitter(_video(frame), rng)


def coins(rng: Generator) -> np.ndarray:
    """The tray of coins, passing by."""
    x, y = rng.uniform(90, 290), rng.uniform(80, 225)
    return glide(rng, ("coins.png", x, y, 150))


def _ground(rng: Generator) -> np.ndarray:
    """A still photograph of a surface, tinted: [SIZE, SIZE, 3], 0 to 1."""
    file, low, high = TEXTURES[str(rng.choice(list(TEXTURES)))]
    side = rng.uniform(low, high) / 2
    x, y = rng.uniform(side / 2, 512 - side / 2, 2)
    tint = hue_colour(rng.random(), rng.uniform(0.0, 0.4), 1.0)
    return window(file, 1.0, 0, x, y, side) / 255 * tint


def discs(rng: Generator) -> np.ndarray:
    """One to three shaded discs that fly over a surface."""
    ground, (x, y) = _ground(rng), centres(SIZE)
    count, hue = int(rng.integers(1, 4)), rng.random()
    radius, place, way = rng.uniform(8, 15, count), rng.uniform(-16, 16, (count, 2)), rng.uniform(-30, 30, (count, 2))

    def frame(time: float) -> np.ndarray:
        canvas = ground
        for i in range(count):
            u, v = ((axis - place[i, n] - time * way[i, n]) / radius[i] for n, axis in enumerate((x, y)))
            inside = ((1 - np.hypot(u, v)) * radius[i] + 0.5).clip(0, 1)
            light = (0.75 - 0.35 * u - 0.45 * v).clip(0.15, 1.1)
            canvas = blend(canvas, hue_colour(hue + 0.3 * i, 0.8, 0.95) * light[..., None], inside)
        return to_bytes(canvas)

    return _video(frame)


def letter(rng: Generator) -> np.ndarray:
    """A big letter that flies over a surface and turns."""
    ground = Image.fromarray(to_bytes(_ground(rng) * 0.6 + (0.0, 0.4)[int(rng.integers(2))]))
    colour = tuple(int(255 * c) for c in hue_colour(rng.random(), 0.8, rng.choice((0.35, 1.0))))
    text, place, way = LETTERS[int(rng.integers(12))], rng.uniform(-8, 8, 2), rng.uniform(-24, 24, 2)
    angle, turn, big = rng.uniform(-20, 20), rng.uniform(-40, 40), 4 * SIZE
    glyph = Image.new("L", (big, big))
    ImageDraw.Draw(glyph).text((big / 2, big / 2), text, fill=255, font=font_of(round(0.72 * big)), anchor="mm")

    def frame(time: float) -> np.ndarray:
        shift = tuple(round(4 * (p + time * w)) for p, w in zip(place, way, strict=True))
        turned = glyph.rotate(angle + time * turn, Image.Resampling.BICUBIC, translate=shift)
        mask = turned.resize((SIZE, SIZE), Image.Resampling.BOX)
        return np.asarray(Image.composite(Image.new("RGB", (SIZE, SIZE), colour), ground, mask))

    return _video(frame)


def _waves(rng: Generator, rings: bool) -> np.ndarray:
    """Two colours in stripes that drift, or in rings that grow."""
    x, y = centres(SIZE)
    angle, period = rng.uniform(0, 2 * math.pi), rng.uniform(8, 20)
    ink = hue_colour(rng.random(), 0.8, rng.uniform(0.3, 0.6))
    paper = hue_colour(rng.random(), 0.4, rng.uniform(0.8, 1.0))
    cx, cy = rng.uniform(-24, 24, 2)
    along = np.hypot(x - cx, y - cy) if rings else x * math.cos(angle) + y * math.sin(angle)
    phase, speed = rng.random(), rng.uniform(0.3, 1.2) * rng.choice((-1, 1))

    def frame(time: float) -> np.ndarray:
        wave = np.sin(2 * math.pi * (along / period - phase - time * speed))
        return to_bytes(blend(np.broadcast_to(paper, (SIZE, SIZE, 3)), ink, (0.5 + wave * period / 6).clip(0, 1)))

    return _video(frame)


_GLIDES = {name: partial(glide, spec=PHOTOGRAPHS[name]) for name in GLIDING}
_FLYING = {"coins": coins, "discs": discs, "letter": letter}
_WAVES = {"stripes": partial(_waves, rings=False), "rings": partial(_waves, rings=True)}
MOVING = PictureSet("moving", SIZE, _GLIDES | _FLYING | _WAVES, FRAMES)


SETS: dict[str, PictureSet] = {pictures.name: pictures for pictures in (DEMO, FINE, MOVING)}
