"""The trainer's tests need torch and Pillow; those of the demo model also a ComfyUI, named by COMFYUI_DIR."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import tiny  # noqa: F401  more choices of `lab.models.train --config`


@pytest.fixture(scope="session")
def in_comfyui(run_in_comfyui) -> dict:
    """What in_comfyui.py found."""
    return json.loads(run_in_comfyui(str(Path(__file__).with_name("in_comfyui.py"))).splitlines()[-1])


@pytest.fixture(scope="session")
def dit_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small DiT's file (small_dit.py)."""
    from small_dit import save_small

    return save_small(tmp_path_factory.mktemp("dit") / "model.safetensors")


@pytest.fixture
def flow2(monkeypatch: pytest.MonkeyPatch) -> str:
    """A sampler of two steps."""
    from lab.models import samplers

    monkeypatch.setitem(samplers.SAMPLERS, "flow2", samplers.Sampler(samplers.ddim, 2, "Euler, 2 steps"))
    return "flow2"


@pytest.fixture
def dit_bench(dit_file: Path, flow2: str):
    from lab.fidelity.bench import Bench

    return Bench(dit_file, "cpu", images=2, seeds=1, batch=2)
