"""Crops of the photographs that ship inside the scikit-image package (``skimage.data``), varied in place, scale, tilt
and colour."""

from __future__ import annotations

from functools import lru_cache
from importlib.util import find_spec
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
    """A photograph scaled, with a margin mirrored from its edges, tilted by ``tilt`` degrees; and the margin.

    Scaling once makes the many crops that follow several times cheaper.
    """
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
