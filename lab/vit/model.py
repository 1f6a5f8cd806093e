"""The small vision transformer: timm's, 12 blocks of 192 channels and 3 heads, 4x4 patches of 64x64 pictures.

256 patch tokens and a class token, 5.4M parameters: DeiT-Ti's body on pictures that can be made in seconds.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import nn

from installer import shims

from ..models.data import SIZE
from ..models.optimize import load_tensors, save_tensors
from .task import CLASSES


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
