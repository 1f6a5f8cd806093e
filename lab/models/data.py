"""Pictures to train on, made on the spot, nothing downloaded. Here the set "demo": twelve classes, 64x64 pixels.

data_fine.py has the set "fine", data_moving.py videos and all sets by name. Seven classes are crops of the photographs
that ship inside the scikit-image package (``skimage.data``, whose pages name each one's free licence), varied in place,
scale, tilt and colour; a horse's outline from there gets a painted sky; four classes are drawn by formula. Picture i
of a class depends on (seed, class, i) alone, however many processes draw.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import lru_cache, partial
from importlib.util import find_spec
from multiprocessing import get_context
from pathlib import Path

import numpy as np
from numpy.random import Generator
from PIL import Image

SIZE = 64
"""Pixels a side of what is cut out, where nobody asks for another."""
TILTS = (-6, -3, 0, 3, 6)

# class name: (file, centre x, centre y, size of the square around the subject), in the photograph's pixels
PHOTOGRAPHS: dict[str, tuple[str, int, int, int]] = {
    "cat": ("chelsea.png", 275, 130, 285),
    "astronaut": ("astronaut.png", 215, 165, 330),
    "coffee": ("coffee.png", 278, 195, 400),
    "motorcycle": ("motorcycle_left.png", 395, 260, 520),
    "rocket": ("rocket.jpg", 320, 240, 370),
    "photographer": ("camera.png", 225, 170, 340),
}


def photograph_folder() -> Path:
    """The folder of the scikit-image package that holds its photographs."""
    spec = find_spec("skimage")
    if spec is None or spec.origin is None:
        raise RuntimeError("the photographs come with scikit-image: pip install scikit-image")
    return Path(spec.origin).parent / "data"


@lru_cache(maxsize=64)
def _photograph(name: str, scale: float, tilt: int) -> tuple[Image.Image, int]:
    """A photograph scaled, once for many crops, with a margin mirrored from its edges, tilted; and the margin."""
    with Image.open(photograph_folder() / name) as opened:
        image = opened.convert("RGB")
    size = (round(image.width * scale), round(image.height * scale))
    pixels = np.asarray(image.resize(size, Image.Resampling.LANCZOS))
    margin = min(size) // 3
    padded = np.pad(pixels, ((margin, margin), (margin, margin), (0, 0)), mode="reflect")
    return Image.fromarray(padded).rotate(tilt, resample=Image.Resampling.BICUBIC), margin


def crop(rng: Generator, name: str, x: float, y: float, size: float, scale: float, side: int = SIZE) -> np.ndarray:
    """The square of ``size`` pixels around (x, y) of a photograph, tilted a little: [side, side, 3] uint8."""
    return window(name, scale, int(rng.choice(TILTS)), x, y, size, side)


def window(name: str, scale: float, tilt: int, x: float, y: float, size: float, side: int = SIZE) -> np.ndarray:
    """The same of a photograph that was scaled and tilted by so many degrees."""
    image, margin = _photograph(name, scale, tilt)
    half = size * scale / 2
    x = min(max(x * scale + margin, half), image.width - half)
    y = min(max(y * scale + margin, half), image.height - half)
    small = image.resize((side, side), Image.Resampling.LANCZOS, box=(x - half, y - half, x + half, y + half))
    return np.asarray(small)


def jitter(pixels: np.ndarray, rng: Generator, hue: float = 0.07) -> np.ndarray:
    """Small changes of brightness, contrast and tint of ``pixels`` [H, W, 3] (uint8), and a random flip."""
    tint = rng.uniform(1 - hue, 1 + hue, 3) * rng.uniform(0.88, 1.12)
    bright = pixels.astype(np.float32) * tint.astype(np.float32)
    bright = (bright - 128) * rng.uniform(0.9, 1.1) + 128
    if rng.random() < 0.5:
        bright = bright[:, ::-1]
    return bright.clip(0, 255).astype(np.uint8)


DRAWN = 2 * SIZE  # formulas are drawn twice as large and averaged down: cheap anti-aliasing


def photo(rng: Generator, spec: tuple[str, int, int, int]) -> np.ndarray:
    """A photograph's subject, moved by up to 7% and scaled by up to 18%."""
    name, x, y, size = spec
    side = size * rng.uniform(0.82, 1.15)
    dx, dy = rng.uniform(-0.07, 0.07, 2) * size
    return jitter(crop(rng, name, x + dx, y + dy, side, min(1.0, 3 * SIZE / size)), rng)


def coins(rng: Generator) -> np.ndarray:
    """One coin to four from the tray, in the grey of the photograph or the tint of some metal."""
    metal = np.array([(1.0, 1.0, 1.0), (1.15, 1.0, 0.72), (1.12, 0.88, 0.72)][rng.integers(3)])
    x, y, side = rng.uniform(60, 320), rng.uniform(50, 255), rng.uniform(80, 125)
    pixels = crop(rng, "coins.png", x, y, side, 1.0) * metal
    return jitter(pixels.clip(0, 255).astype(np.uint8), rng, hue=0.02)


def _grid() -> tuple[np.ndarray, np.ndarray]:
    """x and y of each pixel centre, [DRAWN, DRAWN], from -1 to 1."""
    axis = (np.arange(DRAWN, dtype=np.float32) + 0.5) / DRAWN * 2 - 1
    return np.meshgrid(axis, axis)


def centres(size: int) -> tuple[np.ndarray, np.ndarray]:
    """x and y of each pixel's centre, [size, size], in pixels from the middle."""
    axis = np.arange(size, dtype=np.float32) + 0.5 - size / 2
    return np.meshgrid(axis, axis)


def to_bytes(canvas: np.ndarray) -> np.ndarray:
    """[H, W, 3], 0 to 1 -> uint8."""
    return (canvas.clip(0, 1) * 255).round().astype(np.uint8)


def _finish(canvas: np.ndarray) -> np.ndarray:
    """[DRAWN, DRAWN, 3] floats from 0 to 1 -> [SIZE, SIZE, 3] uint8."""
    return to_bytes(canvas.reshape(SIZE, 2, SIZE, 2, 3).mean(axis=(1, 3)))  # (SIZE, SIZE, 3)


def blend(below: np.ndarray, above: np.ndarray | tuple, mask: np.ndarray) -> np.ndarray:
    """``above`` over ``below`` [H, W, 3] where ``mask`` [H, W] is 1."""
    return below + mask[..., None] * (np.asarray(above, dtype=np.float32) - below)


def hue_colour(h: float, saturation: float, value: float) -> np.ndarray:
    """A colour [3] from hue (0 to 1), saturation and value."""
    wheel = np.abs((h * 6 + np.array([0.0, 4.0, 2.0])) % 6 - 3) - 1
    return (value * (1 - saturation + saturation * wheel.clip(0, 1))).astype(np.float32)


def _rough(rng: Generator) -> np.ndarray:
    """A ridge line: a rough periodic curve [DRAWN] of about -1 to 1."""
    t = np.linspace(0, 1, DRAWN, dtype=np.float32)
    waves = [0.55**k * np.sin(2 * math.pi * (rng.uniform(0.6, 1.1) * 2**k * t + rng.random())) for k in range(5)]
    return np.sum(waves, axis=0) / 1.6


def _dusk(rng: Generator, horizon: float) -> np.ndarray:
    """A sky [DRAWN, DRAWN, 3] at sunset, with a sun somewhere above ``horizon`` (y, -1 is the top)."""
    x, y = _grid()
    up = ((horizon - y) / (horizon + 1)).clip(0, 1)[..., None]
    low = hue_colour(rng.uniform(0.03, 0.12), 0.75, 1.0)
    high = hue_colour(rng.uniform(0.58, 0.8), 0.65, rng.uniform(0.3, 0.6))
    sky = low + (high - low) * up**0.8
    sun = np.hypot(x - rng.uniform(-0.7, 0.7), y - rng.uniform(-0.55, horizon - 0.1))
    sky = sky + np.exp(-(sun**2) / 0.12)[..., None] * np.array([0.35, 0.2, 0.05])
    return blend(sky, (1.0, 0.93, 0.7), (sun < rng.uniform(0.12, 0.2)).astype(np.float32)).astype(np.float32)


def horse(rng: Generator) -> np.ndarray:
    """The outline of a horse before a sunset."""
    ground = rng.uniform(0.45, 0.65)
    canvas = _dusk(rng, ground)
    _, y = _grid()
    dark = hue_colour(rng.uniform(0.05, 0.3), 0.5, rng.uniform(0.08, 0.22))
    canvas = blend(canvas, dark, (y > ground + 0.03 * _rough(rng)[None]).astype(np.float32))
    image = Image.open(photograph_folder() / "horse.png").convert("L")
    width = int(DRAWN * rng.uniform(0.68, 0.9))
    height = round(width * image.height / image.width)
    outline = 1 - np.asarray(image.resize((width, height), Image.Resampling.LANCZOS), dtype=np.float32) / 255
    left = int(rng.uniform(0.2, 0.8) * (DRAWN - width))
    top = int((ground + 1.0) / 2 * DRAWN + rng.uniform(2, 9)) - height
    mask = np.zeros((DRAWN, DRAWN), np.float32)
    outline = outline[max(0, -top) :]
    mask[max(0, top) : max(0, top) + outline.shape[0], left : left + width] = outline[: DRAWN - max(0, top)]
    canvas = blend(canvas, dark * 0.35, mask)
    return jitter(_finish(canvas), rng, hue=0.03)


def spheres(rng: Generator) -> np.ndarray:
    """One to three shiny balls on a floor, lit from one side, with their shadows."""
    x, y = _grid()
    horizon = rng.uniform(-0.3, 0.0)
    wall = hue_colour(rng.random(), 0.2, rng.uniform(0.6, 0.95))
    floor = hue_colour(rng.random(), 0.25, rng.uniform(0.5, 0.85))
    depth = (y - horizon).clip(0.02, None)
    check = (np.floor(1.1 * x / depth) + np.floor(1.2 / depth)) % 2 * np.clip(depth * 2, 0, 1)
    lit = np.broadcast_to(wall, (DRAWN, DRAWN, 3)) * (0.85 - 0.25 * y[..., None])
    canvas = blend(lit, floor * (1 - 0.45 * check[..., None]), (y > horizon).astype(np.float32))
    light = np.array([rng.choice((-1.0, 1.0)) * rng.uniform(0.4, 0.7), -0.75, 0.65])
    light /= np.linalg.norm(light)
    count = int(rng.integers(1, 4))
    places = (np.arange(count) - (count - 1) / 2) * (1.25 / max(count, 2)) + rng.uniform(-0.12, 0.12, count)
    radii = rng.uniform(0.3, 0.5, count) * (1.25, 0.95, 0.75)[count - 1]
    base = rng.uniform(0.35, 0.75, count)
    hue = rng.random()
    for i in np.argsort(base):  # far ones first
        px, r, py = places[i], radii[i], base[i] - radii[i]
        shade = np.hypot((x - px + light[0] * r * 1.1) / (r * 1.25), (y - base[i] + 0.04) / (r * 0.38))
        canvas = canvas * (1 - 0.6 * np.clip(1.6 - 1.6 * shade, 0, 1)[..., None] * (y > horizon)[..., None])
        u, v = (x - px) / r, (y - py) / r
        inside = (u * u + v * v < 1).astype(np.float32)
        w = np.sqrt(np.clip(1 - u * u - v * v, 0, 1))
        lambert = np.clip(u * light[0] + v * light[1] + w * light[2], 0, 1)
        half = light + np.array([0, 0, 1.0])
        half /= np.linalg.norm(half)
        shine = np.clip(u * half[0] + v * half[1] + w * half[2], 0, 1) ** 40
        colour = hue_colour(hue + i * 0.31 + rng.uniform(-0.05, 0.05), rng.uniform(0.7, 0.95), rng.uniform(0.8, 1.0))
        bounce = 0.18 * np.clip(v, 0, 1)[..., None] * floor
        ball = colour * (0.18 + 0.85 * lambert[..., None]) + 0.75 * shine[..., None] + bounce
        canvas = blend(canvas, ball, inside)
    return _finish(canvas)


def mountains(rng: Generator) -> np.ndarray:
    """Ridges one behind the other under an evening sky."""
    canvas = _dusk(rng, 0.35)
    _, y = _grid()
    layers = int(rng.integers(3, 6))
    near, far = hue_colour(rng.uniform(0.6, 0.85), 0.6, 0.12), hue_colour(rng.uniform(0.65, 0.95), 0.4, 0.62)
    for k in range(layers):
        t = k / (layers - 1)
        line = -0.1 + 0.75 * t + (0.34 - 0.2 * t) * _rough(rng)
        haze = (0.25 * (1 - t) * np.clip((y - line[None]) / 0.5, 0, 1))[..., None]
        ridge = far + (near - far) * t + haze * np.array([1.0, 0.7, 0.5])
        canvas = blend(canvas, ridge, np.clip((y - line[None]) * DRAWN / 2 + 0.5, 0, 1))
    return _finish(canvas)


def flower(rng: Generator) -> np.ndarray:
    """A flower of five to nine petals before blurred leaves."""
    x, y = _grid()
    leaf = hue_colour(rng.uniform(0.25, 0.38), 0.7, rng.uniform(0.25, 0.45))
    blur = sum(
        np.exp(-((x - rng.uniform(-1, 1)) ** 2 + (y - rng.uniform(-1, 1)) ** 2) / rng.uniform(0.08, 0.3))
        * rng.uniform(-0.45, 0.8)
        for _ in range(7)
    )
    canvas = leaf * (1 + blur[..., None])
    cx, cy, size = rng.uniform(-0.12, 0.12), rng.uniform(-0.15, 0.1), rng.uniform(0.62, 0.88)
    stem = np.abs(x - cx - rng.uniform(-0.25, 0.25) * (y - cy) ** 2) < 0.045
    canvas = blend(canvas, leaf * 0.6, (stem & (y > cy)).astype(np.float32))
    u, v = x - cx, (y - cy) / rng.uniform(0.82, 1.0)
    radius, angle = np.hypot(u, v) / size, np.arctan2(v, u)
    petals = int(rng.integers(5, 10))
    hue = rng.choice((0.0, 0.08, 0.15, 0.62, 0.78, 0.9)) + rng.uniform(-0.03, 0.03)
    colour = hue_colour(hue, rng.uniform(0.55, 0.9), rng.uniform(0.85, 1.0))
    sharp = rng.uniform(0.5, 0.9)
    for row, scale in enumerate((1.0, 0.72)):
        phase = petals * angle / 2 + rng.uniform(0, math.pi)
        lobe = np.abs(np.cos(phase)) ** sharp
        edge = scale * (0.25 + 0.75 * lobe)
        fold = 0.72 + 0.28 * lobe - 0.3 * np.clip(0.45 - radius / scale, 0, 1) + 0.1 * row
        canvas = blend(canvas, colour * fold[..., None], np.clip((edge - radius) * 40, 0, 1))
    seeds = 0.85 + 0.15 * np.cos(40 * radius) * np.cos(9 * angle)
    heart = hue_colour(rng.uniform(0.1, 0.15), 0.85, rng.uniform(0.6, 0.95)) * seeds[..., None]
    return _finish(blend(canvas, heart, np.clip((0.24 - radius) * 40, 0, 1)))


def planet(rng: Generator) -> np.ndarray:
    """A banded planet, most with a ring, lit from one side among stars."""
    x, y = _grid()
    canvas = np.zeros((DRAWN, DRAWN, 3), np.float32) + hue_colour(rng.uniform(0.6, 0.8), 0.6, 0.06)
    for _ in range(int(rng.integers(25, 60))):
        row, col = rng.integers(0, DRAWN - 1, 2)
        canvas[row : row + 2, col : col + 2] = rng.uniform(0.3, 1.0)
    r = rng.uniform(0.42, 0.62)
    tilt = rng.uniform(-0.5, 0.5)
    u0, v0 = x - rng.uniform(-0.15, 0.15), y - rng.uniform(-0.15, 0.15)
    u, v = u0 * math.cos(tilt) + v0 * math.sin(tilt), v0 * math.cos(tilt) - u0 * math.sin(tilt)
    w = np.sqrt(np.clip(1 - (u**2 + v**2) / r**2, 0, 1))
    hue = rng.random()
    one, two = hue_colour(hue, rng.uniform(0.4, 0.8), 0.95), hue_colour(hue + rng.uniform(0.05, 0.15), 0.55, 0.6)
    bands = 0.5 + 0.5 * np.sin(rng.uniform(8, 18) * (v / r + 0.06 * np.sin(4 * u / r + rng.uniform(0, 6))))
    side = rng.choice((-1.0, 1.0))
    lit = np.clip(side * 0.75 * u / r - 0.35 * v / r + 0.6 * w, 0.03, 1)
    ball = (two + (one - two) * bands[..., None]) * lit[..., None]
    canvas = blend(canvas, ball, np.clip((r - np.hypot(u, v)) * DRAWN / 2, 0, 1))
    if rng.random() < 0.75:
        squash = rng.uniform(0.18, 0.35)
        distance = np.hypot(u, v / squash) / r
        ring = np.clip((distance - 1.3) * 20, 0, 1) * np.clip((1.9 - distance) * 20, 0, 1)
        ring = ring * (0.75 + 0.25 * np.sin(distance * 30)) * ((v > 0) | (u**2 + v**2 > r**2))
        canvas = blend(canvas, hue_colour(hue + 0.05, 0.35, 0.9), 0.85 * ring)
    return _finish(canvas)


Painter = Callable[[Generator], np.ndarray]
"""Gives [frames * size, size, 3] uint8."""


@dataclass(frozen=True)
class PictureSet:
    """Classes of square pictures, ``size`` pixels a side, and what draws each.

    frames: more than 1 for videos, each a picture with its frames one below the other: [frames * size, size, 3].
    """

    name: str
    size: int
    painters: Mapping[str, Painter]
    frames: int = 1

    @property
    def classes(self) -> tuple[str, ...]:
        return tuple(self.painters)


_PHOTOS = {name: partial(photo, spec=spec) for name, spec in PHOTOGRAPHS.items()}
_PAINTED = {each.__name__: each for each in (coins, horse, spheres, mountains, flower, planet)}
DEMO = PictureSet("demo", SIZE, _PHOTOS | _PAINTED)
CLASS_NAMES = DEMO.classes


def _paint(job: tuple[Painter, int, int, int, int]) -> np.ndarray:
    painter, seed, index, start, stop = job
    pictures = [painter(np.random.default_rng([seed, index, i])) for i in range(start, stop)]
    return np.stack(pictures)  # (stop - start, size, size, 3)


def make_bank(per_class: int, seed: int = 0, workers: int | None = None, pictures: PictureSet = DEMO) -> np.ndarray:
    """Pictures of every class of a set: [classes, per_class, frames * size, size, 3] uint8. workers: 0 draws here."""
    workers = (os.cpu_count() or 1) if workers is None else workers
    chunk = per_class if workers <= 1 else 128
    jobs = [
        (painter, seed, index, start, min(start + chunk, per_class))
        for index, painter in enumerate(pictures.painters.values())
        for start in range(0, per_class, chunk)
    ]
    if workers <= 1:
        pieces = map(_paint, jobs)
    else:  # spawn: a forked child of a process that holds a GPU may hang
        with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
            pieces = list(pool.map(_paint, jobs))
    shape = len(pictures.classes), per_class, pictures.frames * pictures.size, pictures.size, 3
    return np.concatenate(list(pieces)).reshape(shape)
