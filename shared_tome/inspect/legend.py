"""The legend of a map: lines of text and signs on a dark band in the picture's lower edge. Needs Pillow."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

_BAND = 0.80  # how dark the band is
_LEAST = 8  # pixels, for letters that can be read
_SIGNS = {  # colours that the key line shows beside its words
    "colours": ((0.93, 0.48, 0.44), (0.42, 0.78, 0.55), (0.45, 0.62, 0.95)),
    "plain": ((0.80, 0.80, 0.80),),
    "dim": ((0.50, 0.50, 0.50),),
    "dark": ((0.22, 0.22, 0.22),),
}


def draw_legend(image: Tensor, lines: Sequence[str], keys: Sequence[tuple[str, str]] = ()) -> Tensor:
    """The image [H, W, 3], 0 to 1, with a band of text over its lower edge.

    lines: of text. keys: (sign, words): "colours", "dot", "plain", "dim" or "dark", and what it means.
    The letters are a 36th of the picture's shorter side, smaller where a line would not fit. A picture that is too
    small for letters of 8 pixels stays as it is.
    """
    height, width = image.shape[:2]
    size = max(_LEAST, round(min(height, width) / 36))
    while size > _LEAST and max(_widths(lines, keys, size)) > width - size:
        size -= 1
    band = _band(lines, keys, size, width)
    top = height - band.shape[0]
    if top < height // 2 or max(_widths(lines, keys, size)) > width - size:
        return image
    out = image.clone()
    below = out[top:] * (1 - _BAND)
    out[top:] = below + band[:, :, 3:] * (band[:, :, :3] - below)
    return out


def _band(lines: Sequence[str], keys: Sequence[tuple[str, str]], size: int, width: int) -> Tensor:
    """[h, width, 4], RGB and how much of it covers: the text and the signs."""
    from PIL import Image

    step = round(size * 1.45)
    canvas = Image.new("RGBA", (width, step * (len(lines) + bool(keys)) + size // 2), (255, 255, 255, 0))
    y = size // 3
    for place, line in enumerate(lines):
        shade = 255 if place == 0 else 215
        _write(canvas, line, size // 2, y, size, (shade,) * 3)
        y += step
    x = size // 2
    for sign, words in keys:
        x = _draw_sign(canvas, sign, x, y, size)
        x = _write(canvas, words, x, y, size, (215,) * 3) + size
    data = torch.frombuffer(bytearray(canvas.tobytes()), dtype=torch.uint8)
    return data.reshape(canvas.height, width, 4).float() / 255


def _draw_sign(canvas: Any, sign: str, x: int, y: int, size: int) -> int:
    """Draw a sign; where the words after it begin."""
    from PIL import ImageDraw

    draw = ImageDraw.Draw(canvas)
    side, top = round(size * 0.72), y + round(size * 0.22)
    if sign == "dot":
        draw.rectangle((x, top, x + side, top + side), fill=(107, 199, 140, 255))
        inner = max(1, side // 4)
        draw.ellipse((x + inner, top + inner, x + side - inner, top + side - inner), fill=(255, 255, 255, 255))
        return x + side + size // 3
    for colour in _SIGNS[sign]:
        fill = tuple(round(c * 255) for c in colour)
        draw.rectangle((x, top, x + side, top + side), fill=(*fill, 255), outline=(120, 120, 120, 255))
        x += side + 1
    return x + size // 3


def _write(canvas: Any, words: str, x: int, y: int, size: int, colour: tuple[int, int, int]) -> int:
    """Write words; where they end."""
    mask = _mask(words, size)
    canvas.paste((*colour, 255), (x, y, x + mask.width, y + mask.height), mask)
    return x + mask.width


def _widths(lines: Sequence[str], keys: Sequence[tuple[str, str]], size: int) -> list[int]:
    """Of each line of the legend, in pixels."""
    signs = {sign: len(_SIGNS.get(sign, (0,))) * round(size * 0.72 + 1) + size // 3 for sign, _ in keys}
    keyed = sum(signs[sign] + _mask(words, size).width + size for sign, words in keys)
    return [*(_mask(line, size).width for line in lines), keyed]


def _mask(words: str, size: int) -> Any:
    """The words in white on black, letters `size` pixels high."""
    from PIL import Image, ImageDraw, ImageFont

    try:
        font, factor = ImageFont.load_default(size), 1.0
    except TypeError:  # before Pillow 10.1 the default font has one size
        font, factor = ImageFont.load_default(), size / 11
    right, bottom = font.getbbox(words or " ")[2:]
    mask = Image.new("L", (max(1, round(right)), max(1, round(bottom))), 0)
    ImageDraw.Draw(mask).text((0, 0), words, font=font, fill=255)
    if factor == 1.0:
        return mask
    return mask.resize((max(1, round(mask.width * factor)), max(1, round(mask.height * factor))), Image.BICUBIC)
