"""Screenshots for the documentation: small files, with nothing of the tool's inside."""

from __future__ import annotations

import io
from pathlib import Path

from PIL import Image

LIMIT = 200_000  # bytes


def save(data: bytes, file: Path) -> None:
    """Write the PNG `data` to `file`; with a palette of 256 colours where it is above LIMIT otherwise."""
    picture = Image.open(io.BytesIO(data)).convert("RGB")
    small = _packed(picture)
    if len(small) > LIMIT:
        small = _packed(picture.quantize(256, dither=Image.Dither.NONE))
    if len(small) > LIMIT:
        raise ValueError(f"{file.name} has {len(small)} bytes, more than {LIMIT}: take a smaller part of the page")
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(small)


def _packed(picture: Image.Image) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, "PNG", optimize=True)
    return buffer.getvalue()
