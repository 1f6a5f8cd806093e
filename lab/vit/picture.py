"""Draws which patches became one token: `python -m lab.vit.picture --model out/vit/unmerged.safetensors`.

A row a photograph, then its tokens behind some of the blocks.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

import shared_tome.vit as vit
from shared_tome.vit.picture import draw_groups

from ..models.data import DEMO
from ..models.optimize import as_pictures
from .model import Shape, build, load

SUBJECTS = ("cat", "astronaut", "coffee", "coins")
SEED = 4
ENLARGED = 4  # pixels drawn for each of the picture's
GAP = 8


def photographs(size: int) -> Tensor:
    """Some of the lab's pictures [n, 3, size, size], -1 to 1."""
    pixels = np.stack([DEMO.painters[name](np.random.default_rng(SEED)) for name in SUBJECTS])
    pictures = as_pictures(torch.from_numpy(pixels))
    return pictures if size == pictures.shape[-1] else F.interpolate(pictures, size, mode="bicubic").clamp(-1, 1)


@torch.no_grad()
def columns(model: nn.Module, shape: Shape, pictures: Tensor, r: int, blocks: Sequence[int]) -> list[Tensor]:
    """The pictures, then their groups behind each of the blocks (1 is the first): each [n, 3, H, W], 0 to 1."""
    vit.apply_patch(model, r, restore="none", trace=True)
    try:
        model(pictures)
        steps = vit.trace(model).steps
    finally:
        vit.remove_patch(model)
    side = shape.size // shape.patch
    large = (pictures / 2 + 0.5).repeat_interleave(ENLARGED, dim=2).repeat_interleave(ENLARGED, dim=3)
    found = [large]
    for block in blocks:
        sources = steps[block - 1][:, 1:]  # without the class token
        found.append(torch.stack([draw_groups(*pair, (side, side), 1) for pair in zip(large, sources, strict=True)]))
    return found


def sheet(found: Sequence[Tensor]) -> Image.Image:
    """Columns of pictures [n, 3, H, W] side by side on white."""
    padded = [F.pad(column, (0, GAP, 0, GAP), value=1.0) for column in found]
    rows = torch.cat(padded, dim=3).permute(1, 0, 2, 3).flatten(1, 2)  # (3, n * H, columns * W)
    return Image.fromarray((rows[:, :-GAP, :-GAP] * 255).round().byte().permute(1, 2, 0).numpy())


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m lab.vit.picture", description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, help="a trained one (default: fresh weights)")
    parser.add_argument("--out", type=Path, default=Path("docs/images/vit-merged.png"))
    parser.add_argument("--r", type=int, default=16, help="tokens fewer in each block")
    parser.add_argument("--blocks", type=int, nargs="+", default=(2, 5, 8, 12))
    args = parser.parse_args(argv)
    if args.model is None:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model, shape = build(Shape()).eval(), Shape()
    else:
        model, shape, _ = load(args.model)
    pictures = photographs(shape.size)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    sheet(columns(model, shape, pictures, args.r, args.blocks)).save(args.out, optimize=True)


if __name__ == "__main__":
    main()
