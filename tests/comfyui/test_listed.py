"""docs/models.md names every model of the ComfyUI that the tests run on, and the node says what the page says."""

from __future__ import annotations

import importlib
import re
import sys
from types import SimpleNamespace

import pytest
import torch

from . import host
from .listed import listed, version

sys.path.insert(0, str(host.REPO))
from installer.inprocess import pack_module
from lab.pages.option_tables import LISTED, UNET
from lab.store import read


def rows() -> dict[str, object]:
    """Each diffusion model that ToMe knows, below comfy.ldm, with its row; raises for one that two rows name."""
    found: dict[str, object] = {UNET: "U-Net"}
    served, refused = host.pack_module("dit_models").DIT_MODELS, host.pack_module("dit_refused").REFUSED
    for row in (*served, *refused):
        for kind in row.classes:
            assert kind not in found, f"{kind} has two rows"
            found[kind] = row
    return found


def test_every_model_that_comfyui_lists_has_a_row(comfy_nodes):
    import comfy.supported_models

    found, known = listed(), rows()
    assert len(found) == len(comfy.supported_models.models)
    new = {name: kind for name, kind in found.items() if kind not in known}
    assert not new, f"give these a row in comfy_tome/dit_models.py or dit_refused.py: {new}"
    page = {row["supported"]: row["diffusion"] for row in read(LISTED)}
    if version() == read(LISTED)[0]["comfyui"]:
        assert found == page, "run `python -m tests.comfyui.listed` and `python -m lab.pages`"


REFUSED = [(row, kind) for row in pack_module("comfy_tome.dit_refused").REFUSED for kind in row.classes]


@pytest.mark.parametrize(("row", "kind"), REFUSED, ids=[kind for _, kind in REFUSED])
def test_a_model_that_is_left_alone(comfy_nodes, row, kind):
    """By its real class; the node says what the page says."""
    module, _, name = f"comfy.ldm.{kind}".rpartition(".")
    model = object.__new__(getattr(importlib.import_module(module), name))
    patcher = SimpleNamespace(get_model_object=lambda _: model, model=None)
    with pytest.raises(ValueError) as refusal:
        host.pack_module("patch").check_served(patcher)
    assert str(refusal.value) == f"ToMe does not serve {row.name}: {row.reason}"
    lines = (host.REPO / "docs" / "models.md").read_text(encoding="utf-8").splitlines()
    assert [f"`{name}`" in line for line in lines if line.endswith(f"not served: {row.reason} |")].count(True) == 1
    assert host.pack_module("dit_models").dit_model(model) is None


@pytest.mark.parametrize("row", pack_module("comfy_tome.dit_refused").OF_NODES, ids=lambda row: row.name)
def test_a_model_of_another_node_that_is_left_alone(comfy_nodes, row):
    """By a class of the same name, in a module as ComfyUI names those of a node's folder. Qwen-Image's is a subclass of
    ComfyUI's own, which is served."""
    import comfy.ldm.qwen_image.model

    (path,) = row.classes
    module, _, name = path.rpartition(".")
    base = comfy.ldm.qwen_image.model.QwenImageTransformer2DModel if "Qwen" in name else torch.nn.Module
    kind = type(name, (base,), {"__module__": f"/ComfyUI/custom_nodes/ComfyUI-nunchaku.{module}"})
    model = object.__new__(kind)
    with pytest.raises(ValueError, match=re.escape(f"ToMe does not serve {row.name}: {row.reason}")):
        host.pack_module("patch").check_served(SimpleNamespace(get_model_object=lambda _: model, model=None))
    assert row.reason in (host.REPO / "docs" / "models.md").read_text(encoding="utf-8")
