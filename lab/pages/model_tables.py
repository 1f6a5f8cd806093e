"""The models that ComfyUI's node serves and those that it leaves alone: one table, and one line for other pages.

The rows are the code's own (comfy_tome/dit_models.py, dit_refused.py). Which of ComfyUI's `supported_models` has which
diffusion model is in comfyui-models.csv, which tests/comfyui/listed.py makes from a real ComfyUI.
"""

from __future__ import annotations

from collections.abc import Iterable

from installer.inprocess import pack_module

from ..store import RESULTS, markdown, read

LISTED = RESULTS / "comfyui-models.csv"
UNET = "modules.diffusionmodules.openaimodel.UNetModel"
_NAMES = "SD 1.x, SD 2.x, SDXL, SVD's spatial layers and what is built on them"


def served() -> str:
    """The transformers that ComfyUI's node serves."""
    return f"{', '.join(row.name for row in pack_module('comfy_tome.dit_models').DIT_MODELS)}.\n"


def models() -> str:
    """Every model of ComfyUI's supported_models: served, or left alone and why."""
    rows = read(LISTED)
    listed: dict[str, list[str]] = {}
    for row in rows:
        listed.setdefault(row["diffusion"], []).append(row["supported"])

    def names(classes: Iterable[str]) -> str:
        return ", ".join(f"`{kind.rpartition('.')[2]}`" for kind in classes)

    def line(name: str, classes: Iterable[str], outcome: str, forge: Iterable[str] = ()) -> list[str]:
        of_comfyui = [supported for kind in classes for supported in listed.get(kind, ())]
        return [name, ", ".join(of_comfyui), names(classes), names(forge), outcome]

    body = [line(_NAMES, [UNET], "served", ["IntegratedUNet2DConditionModel"])]
    for row in pack_module("comfy_tome.dit_models").DIT_MODELS:
        body.append(line(row.name, row.classes, "served", row.forge))
    left_alone = pack_module("comfy_tome.dit_refused")
    for row in (*left_alone.REFUSED, *left_alone.OF_NODES):
        body.append(line(row.name, row.classes, f"not served: {row.reason}"))
    body += [line(row.name, (), f"not served: {row.reason}", row.classes) for row in left_alone.OF_FORGE]
    head = ["model", "in ComfyUI's `supported_models`", "diffusion model", "in Forge and Forge Neo", "ToMe"]
    return markdown(head, body) + f"\nComfyUI {rows[0]['comfyui']}.\n"
