"""The repository's root and tests/ on the path, and what runs in a real ComfyUI."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
for folder in (ROOT, ROOT / "tests"):
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))


@pytest.fixture(scope="session")
def run_in_comfyui() -> Callable[..., str]:
    """run_in_comfyui("-m", module, ...) -> what it says on stdout (support/forks.py)."""
    folder = os.environ.get("COMFYUI_DIR")
    if not folder or not (Path(folder) / "comfy").is_dir():
        pytest.skip("COMFYUI_DIR does not name a ComfyUI (`python install.py test` brings one)")
    from support import forks

    def run(*command: str) -> str:
        done = forks.in_comfyui(*command)
        assert done.returncode == 0, done.stderr[-3000:]
        return done.stdout

    return run
