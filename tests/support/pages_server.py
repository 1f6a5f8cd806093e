"""One real ComfyUI server for the tests of its page and those of the workflows."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

TESTS = Path(__file__).resolve().parents[1]
REPO = TESTS.parent
MODELS = TESTS / "workflows" / "small_models.py"
PICTURE = 160  # pixels a side


@contextmanager
def started(base: Path) -> Iterator[Any]:
    """The client of a server with this pack, the demo's model, small models under the official names and a picture with
    a mask to load. base: the server's own folder. Skipped where COMFYUI_DIR names none."""
    named = os.environ.get("COMFYUI_DIR")
    if not named or not (Path(named) / "comfy").is_dir():
        pytest.skip("COMFYUI_DIR does not name a ComfyUI (`python install.py test` brings one)")
    sys.path.insert(0, str(REPO))
    from installer.server import ComfyServer, put_pack

    (base / "custom_nodes").mkdir()
    run = f"import runpy\nNODE_CLASS_MAPPINGS = runpy.run_path({str(MODELS)!r})['NODE_CLASS_MAPPINGS']\n"
    (base / "custom_nodes" / MODELS.name).write_text(run, encoding="utf-8")
    put_pack(base / "custom_nodes", REPO / "installer" / "compare" / "nodes", "tome-compare")
    (base / "input").mkdir()
    pixels = np.random.default_rng(0).integers(0, 255, (PICTURE, PICTURE, 4), dtype=np.uint8)
    pixels[..., 3] = 255
    pixels[48:112, 48:112, 3] = 0  # the mask
    Image.fromarray(pixels, "RGBA").save(base / "input" / "example.png")
    with ComfyServer(Path(named), base, environment={"TOME_DEMO": "1"}) as client:
        yield client
