"""Strips of pictures (measure.py --strips) one below the other, each with its name:

python -m lab.fidelity.side_by_side out/strips docs/images/quality-pictures-lab.jpg unmerged "tomesd 0.5" "sample 0.75"
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

LABEL, GAP = 190, 4  # pixels


def side_by_side(folder: Path, variants: Sequence[str], sampler: str = "ddim30", height: int = 140) -> Image.Image:
    """One row a variant, its strip scaled to this height. Raises FileNotFoundError where one was not measured."""
    strips = [Image.open(folder / f"{sampler} {variant}.png").convert("RGB") for variant in variants]
    strips = [
        strip.resize((round(strip.width * height / strip.height), height), Image.Resampling.LANCZOS) for strip in strips
    ]
    width = LABEL + max(strip.width for strip in strips)
    made = Image.new("RGB", (width, len(strips) * (height + GAP) - GAP), "white")
    draw = ImageDraw.Draw(made)
    font = ImageFont.load_default(16)
    for number, (variant, strip) in enumerate(zip(variants, strips, strict=True)):
        top = number * (height + GAP)
        made.paste(strip, (LABEL, top))
        draw.multiline_text((8, top + height // 2 - 10), variant.replace(", ", ",\n"), fill="black", font=font)
    return made


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="what measure.py --strips wrote")
    parser.add_argument("out", type=Path)
    parser.add_argument("variants", nargs="+", help="names of lab/fidelity/methods.py")
    parser.add_argument("--sampler", default="ddim30")
    parser.add_argument("--height", type=int, default=140, help="of a row, in pixels")
    args = parser.parse_args()
    side_by_side(args.folder, args.variants, args.sampler, args.height).save(args.out, quality=88)


if __name__ == "__main__":
    main()
