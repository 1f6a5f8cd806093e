"""The trainer's tests need torch and Pillow; those of the demo model also a ComfyUI, named by COMFYUI_DIR."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parents[3]
if str(REPO) not in sys.path:
    sys.path.insert(0, str(REPO))


@pytest.fixture(scope="session")
def in_comfyui() -> dict:
    """What in_comfyui.py found in a ComfyUI process of its own, so that its arguments disturb no other test."""
    folder = os.environ.get("COMFYUI_DIR")
    if not folder or not (Path(folder) / "comfy").is_dir():
        pytest.skip("COMFYUI_DIR does not name a ComfyUI (`python install.py test` brings one)")
    command = [sys.executable, str(Path(__file__).with_name("in_comfyui.py")), str(REPO), folder]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


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
