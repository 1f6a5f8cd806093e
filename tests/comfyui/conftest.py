"""Fixtures: one real ComfyUI for the session, small models of its classes."""

from __future__ import annotations

import pytest

from . import host


@pytest.fixture(scope="session")
def comfy_nodes() -> dict:
    """Every node class by id, ours among them."""
    if host.comfyui_dir() is None:
        pytest.skip("COMFYUI_DIR does not name a ComfyUI (`python install.py test` brings one)")
    return host.start()


@pytest.fixture(scope="session")
def sd15(comfy_nodes):
    return host.small_unet("SD15")


@pytest.fixture(scope="session")
def sdxl(comfy_nodes):
    return host.small_unet("SDXL")


@pytest.fixture(scope="session")
def tome(comfy_nodes):
    """tome(model, ratio=..., **options) -> the merged clone, through the node itself."""
    defaults = {"ratio": 0.5, "stride_x": 2, "stride_y": 2, "method": "sample", "seed": 0, "min_tokens": 0}

    def apply(model, **options):
        return host.run_node(comfy_nodes["ToMe"], model=model, **{**defaults, **options})

    return apply
