"""Fixtures: one real ComfyUI for all workflows."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

REPO = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(REPO))
from installer.server import ComfyServer, put_pack

MODELS = Path(__file__).with_name("small_models.py")
PICTURE = 160  # pixels a side


@pytest.fixture(scope="session")
def client(tmp_path_factory) -> Iterator[Any]:
    """Of a real server with this pack, small models under the official names and a picture with a mask to load."""
    named = os.environ.get("COMFYUI_DIR")
    if not named or not (Path(named) / "comfy").is_dir():
        pytest.skip("COMFYUI_DIR does not name a ComfyUI (`python install.py test` brings one)")
    base: Path = tmp_path_factory.mktemp("comfyui")
    (base / "custom_nodes").mkdir()
    run = f"import runpy\nNODE_CLASS_MAPPINGS = runpy.run_path({str(MODELS)!r})['NODE_CLASS_MAPPINGS']\n"
    (base / "custom_nodes" / MODELS.name).write_text(run, encoding="utf-8")
    put_pack(base / "custom_nodes", REPO / "installer" / "compare" / "nodes", "tome-compare")
    (base / "input").mkdir()
    pixels = np.random.default_rng(0).integers(0, 255, (PICTURE, PICTURE, 4), dtype=np.uint8)
    pixels[..., 3] = 255
    pixels[48:112, 48:112, 3] = 0  # the mask
    Image.fromarray(pixels, "RGBA").save(base / "input" / "example.png")
    with ComfyServer(Path(named), base) as client:
        yield client


@pytest.fixture(scope="session")
def info(client: Any) -> dict[str, Any]:
    """What it tells of its nodes."""
    return client.get("/object_info")
