"""The small vision transformer's tests need timm and scikit-image's photographs."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[3]
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

from installer import shims

shims.install()
pytest.importorskip("timm", reason="timm is not installed, see requirements/test.txt")

from lab.vit.model import Shape, Task, build

SMALL = Shape(size=64, patch=8, channels=32, depth=4, heads=2)


@pytest.fixture(scope="session")
def task() -> Task:
    """Three drawings of each class."""
    return Task(3, 11, workers=0)


@pytest.fixture
def model() -> torch.nn.Module:
    """A small one whose keys tell tokens apart."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = build(SMALL).eval().requires_grad_(False)
        for name, weight in net.named_parameters():
            if name.endswith(("qkv.weight", "pos_embed", "cls_token", "head.weight")):
                weight.data = torch.randn_like(weight) * 0.3
    return net


@pytest.fixture
def pictures() -> torch.Tensor:
    return torch.randn(3, 3, 64, 64, generator=torch.Generator().manual_seed(0))
