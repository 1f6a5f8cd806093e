"""Draws merged tokens of a film and of a sound: `python -m lab.vit.orders`, no model needed.

The keys are the patches' own pixels, as a transformer's first block nearly sees them. Above the camera moves over a
photograph for some frames; below a spectrogram of a few steady tones, a rising one and clicks, time to the right.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from shared_tome import ToMeConfig, match_tokens
from shared_tome.core.grid import Grid
from shared_tome.vit.picture import draw_groups

from ..models.data import photograph_folder
from .picture import ENLARGED, GAP

PATCH = 4
FRAMES, SIDE = 4, 64
RATE, SECONDS = 8000, 2.0


def film(folder: Path) -> Tensor:
    """[3, FRAMES, SIDE, SIDE], 0 to 1: a window that wanders over a photograph."""
    with Image.open(folder / "astronaut.png") as image:
        small = image.convert("RGB").resize((2 * SIDE, 2 * SIDE), Image.Resampling.LANCZOS)
    pixels = torch.from_numpy(np.array(small)).permute(2, 0, 1).float() / 255  # (3, 2 * SIDE, 2 * SIDE)
    return torch.stack([pixels[:, :SIDE, 24 + 4 * t : 24 + 4 * t + SIDE] for t in range(FRAMES)], dim=1)


def spectrogram() -> Tensor:
    """[1, 64, 256], 0 to 1: loudness by frequency (high ones above) and time."""
    t = torch.arange(int(RATE * SECONDS)) / RATE
    sound = sum(torch.sin(2 * math.pi * f * t) * (t % 1 < 0.7) for f in (500, 1250, 1900))
    sound = sound + torch.sin(2 * math.pi * (2300 * t + 300 * t**2))
    sound[:: RATE // 2] += 40.0
    window = torch.hann_window(128)
    loud = torch.stft(sound, 128, hop_length=len(t) // 256, window=window, return_complex=True).abs()[1:, :256]
    level = (loud.flip(0) + 1e-3).log10()  # (64, 256)
    return ((level - level.min()) / (level.max() - level.min()))[None]


def patches(picture: Tensor) -> Tensor:
    """[C, frames, H, W] -> each patch's pixels [1, N, C * PATCH**2], less their mean so that angles differ."""
    found = F.unfold(picture.transpose(0, 1), PATCH, stride=PATCH)  # (frames, C * PATCH**2, N / frames)
    rows = found.transpose(1, 2).flatten(0, 1)
    return (rows - rows.mean(dim=0))[None]


def drawn(picture: Tensor, grid: Grid, stride: tuple[int, int], ratio: float) -> Tensor:
    """The groups of [C, frames, H, W], enlarged: [3, frames, H, W]."""
    config = ToMeConfig(method="merge", ratio=ratio, stride=stride, partition="fixed_2d", min_tokens=0)
    groups = match_tokens(patches(picture), grid, config).groups[0]
    return draw_groups(_enlarged(picture), groups, (picture.shape[1], *grid[-2:]))


def _enlarged(picture: Tensor) -> Tensor:
    large = picture.repeat_interleave(ENLARGED, dim=2).repeat_interleave(ENLARGED, dim=3)
    return large.expand(3, -1, -1, -1)


def sheet(folder: Path) -> Image.Image:
    """Film, its groups, sound, its groups: a row each."""
    frames, sound = film(folder), spectrogram()[:, None]
    grid = (FRAMES, SIDE // PATCH, SIDE // PATCH)
    sound_grid = tuple(size // PATCH for size in sound.shape[-2:])
    rows = []
    for row in (_enlarged(frames), drawn(frames, grid, (2, 2), 0.75)):
        rows.append(torch.cat([F.pad(frame, (0, GAP, 0, GAP), value=1.0) for frame in row.unbind(1)], dim=2))
    for row in (_enlarged(sound), drawn(sound, sound_grid, (4, 1), 0.75)):
        rows.append(F.pad(row[:, 0], (0, rows[0].shape[2] - row.shape[3], 0, GAP), value=1.0))
    pixels = torch.cat(rows, dim=1)[:, :-GAP, :-GAP]
    return Image.fromarray((pixels * 255).round().byte().permute(1, 2, 0).numpy())


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m lab.vit.orders", description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("docs/images/vit-video-sound.png"))
    parser.add_argument("--photos", type=Path, help="folder of the photographs (default: scikit-image's)")
    args = parser.parse_args(argv)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    sheet(args.photos or photograph_folder()).save(args.out, optimize=True)


if __name__ == "__main__":
    main()
