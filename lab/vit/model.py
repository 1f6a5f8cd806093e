"""A task that is not too easy, and the small vision transformer that learns it.

Naming one of the lab's pictures (lab/models/data.py) is too easy to tell methods apart. Here one of the twelve classes
lies small, often grey, at any place and partly covered, on a picture of any class with less contrast, under noise.
Nothing is downloaded. Held-out pictures are put together from drawings that are not trained on.

The model is timm's, 12 blocks of 192 channels and 3 heads, 4x4 patches of 64x64 pictures: 256 patch tokens and a class
token, 5.4M parameters: DeiT-Ti's body on pictures that can be made in seconds.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from installer import shims

from ..models.data import CLASS_NAMES, SIZE, make_bank
from ..models.optimize import load_tensors, save_tensors

TRAIN_SEED, HELD_OUT_SEED = 303, 404
SMALLEST, LARGEST = 0.16, 0.45  # the subject's side, as a share of the picture's
COVERED = (0.35, 0.7)  # the cover's side, as a share of the subject's
NOISE = (0.1, 0.35)  # standard deviation; pictures go from -1 to 1
DULL = 0.6  # the background's contrast
GREY = 0.5  # the share of subjects without colour, which would tell most classes


class Task:
    """The lab's pictures on a device, and new ones put together from them. workers: as for data.make_bank."""

    def __init__(self, per_class: int, seed: int, device: str = "cpu", workers: int | None = None):
        bank = torch.from_numpy(make_bank(per_class, seed, workers))
        self.bank = bank.flatten(0, 1).permute(0, 3, 1, 2).contiguous().to(device)  # (K * per_class, 3, H, W)
        self.per_class = per_class

    def __len__(self) -> int:
        return len(self.bank)

    def classes(self, subjects: Tensor) -> Tensor:
        return subjects // self.per_class

    def draw(self, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """New pictures [count, 3, H, W] and their classes [count], all chance from the generator."""
        subjects = torch.randint(len(self), (count,), generator=generator, device=generator.device)
        return self.compose(subjects, generator), self.classes(subjects).to(self.bank.device)

    def every(self, seed: int = 0) -> tuple[Tensor, Tensor]:
        """Each drawing as the subject once: pictures [K * per_class, 3, H, W], classes. Alike on every device."""
        subjects = torch.arange(len(self))
        pictures = self.compose(subjects, torch.Generator().manual_seed(seed))
        return pictures, self.classes(subjects).to(self.bank.device)

    def compose(self, subjects: Tensor, generator: torch.Generator) -> Tensor:
        """A picture for each subject (a drawing's number) [n]: [n, 3, H, W], about -1 to 1."""
        count, device = len(subjects), self.bank.device
        chance = torch.rand(12, count, generator=generator, device=generator.device)
        others = torch.randint(len(self), (count,), generator=generator, device=generator.device)
        noise = torch.randn(count, 3, SIZE, SIZE, generator=generator, device=generator.device)
        chance, noise = chance.to(device), noise.to(device)
        side = SMALLEST + (LARGEST - SMALLEST) * chance[0]
        centre = (2 * chance[1:3] - 1) * (1 - side)  # (2, n), x and y from -1 to 1
        drawn = self._pixels(subjects)
        # Pooled once, since sampling to 10 to 29 pixels would skip some.
        small = F.avg_pool2d(drawn, 2)
        grey = (chance[11] < GREY)[:, None, None, None]
        small = torch.where(grey, small.mean(dim=1, keepdim=True), small)
        theta = torch.zeros(count, 2, 3, device=device)
        theta[:, 0, 0] = theta[:, 1, 1] = 1 / side
        theta[:, :, 2] = -(centre / side).T
        where = F.affine_grid(theta, [count, 3, SIZE, SIZE], align_corners=False)  # (n, H, W, 2), in the subject
        placed = F.grid_sample(small, where, padding_mode="border", align_corners=False)
        inside = (where.abs() < 1).all(dim=-1)[:, None]
        background = self._pixels(others) * DULL
        pictures = torch.where(inside, placed, background)
        middle = 1.4 * chance[3:5] - 0.7  # (2, n), in the subject
        half = COVERED[0] + (COVERED[1] - COVERED[0]) * chance[5]
        covered = ((where - middle.T[:, None, None]).abs() < half[:, None, None, None]).all(dim=-1)[:, None]
        colour = 2 * chance[6:9].T[:, :, None, None] - 1
        pictures = torch.where(covered & inside, colour, pictures)
        contrast = (0.7 + 0.5 * chance[9])[:, None, None, None]
        level = (NOISE[0] + (NOISE[1] - NOISE[0]) * chance[10])[:, None, None, None]
        return pictures * contrast + noise * level

    def _pixels(self, numbers: Tensor) -> Tensor:
        return self.bank[numbers.to(self.bank.device)].float() / 127.5 - 1


CLASSES = len(CLASS_NAMES)


@dataclass(frozen=True)
class Shape:
    """What is built. size and patch in pixels."""

    size: int = SIZE
    patch: int = 4
    channels: int = 192
    depth: int = 12
    heads: int = 3
    classes: int = CLASSES

    @property
    def tokens(self) -> int:
        """Patches, without the class token."""
        return (self.size // self.patch) ** 2


def build(shape: Shape, drop_path: float = 0.0) -> nn.Module:
    """timm's VisionTransformer with fresh weights from the global generator. Reads the class token alone."""
    shims.install()  # timm imports torchvision, of which a vision transformer needs nothing
    from timm.models.vision_transformer import VisionTransformer

    return VisionTransformer(
        img_size=shape.size,
        patch_size=shape.patch,
        num_classes=shape.classes,
        embed_dim=shape.channels,
        depth=shape.depth,
        num_heads=shape.heads,
        global_pool="token",
        drop_path_rate=drop_path,
    )


def save(path: Path, model: nn.Module, shape: Shape, training: dict[str, Any]) -> None:
    """Weights in float16; shape and training in the metadata."""
    metadata = {"shape": json.dumps(asdict(shape)), "training": json.dumps(training)}
    save_tensors(path, {k: v.half() for k, v in model.state_dict().items()}, metadata)


def load(path: Path | str) -> tuple[nn.Module, Shape, dict[str, Any]]:
    """The model in float32 for evaluation, its shape, and what `save` was told of its training."""
    state, metadata = load_tensors(path)
    shape = Shape(**json.loads(metadata["shape"]))
    model = build(shape).eval()
    model.load_state_dict({name: value.float() for name, value in state.items()})
    return model, shape, json.loads(metadata["training"])
