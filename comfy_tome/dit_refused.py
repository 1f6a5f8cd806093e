"""Models of ComfyUI and Forge that ToMe does not serve, and why: what is said, and the table of docs/models.md."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

_NO_DENOISER = "it finds things in a picture and denoises none"
_NO_GRID = "its tokens are a shape in space and lie on no grid of a picture or video"


@dataclass(frozen=True)
class Refused:
    """name: for people. classes: below comfy.ldm, in another node's folder, or below backend.nn in Forge. reason: why
    ToMe leaves it alone."""

    name: str
    classes: tuple[str, ...]
    reason: str


REFUSED: tuple[Refused, ...] = (
    Refused(
        "ACE-Step 1.0",
        ("ace.model.ACEStepTransformer2DModel",),
        "its self-attention is linear, so fewer keys save nothing",
    ),
    Refused(
        "Stable Cascade",
        ("cascade.stage_c.StageC", "cascade.stage_b.StageB"),
        "nothing to gain: for 1024x1024 pixels it attends to 1,024 tokens at most",
    ),
    Refused(
        "SeedVR2",
        ("seedvr.model.NaDiT",),
        "nothing to gain: it attends in windows of at most 3,240 tokens, and no node can reach them",
    ),
    Refused("Hunyuan3D 2", ("hunyuan3d.model.Hunyuan3Dv2", "hunyuan3dv2_1.hunyuandit.HunYuanDiTPlain"), _NO_GRID),
    Refused("TripoSplat", ("triposplat.model.LatentSeqMMFlowModel",), _NO_GRID),
    Refused("SAM 3", ("sam3.detector.SAM3Model",), _NO_DENOISER),
    Refused("RT-DETR", ("rt_detr.rtdetr_v4.RTv4",), _NO_DENOISER),
    Refused("Depth Anything 3", ("depth_anything_3.model.DepthAnything3Net",), _NO_DENOISER),
)
# Of other nodes, as read in their source: they need kernels of their own on a GPU.
OF_NODES: tuple[Refused, ...] = (
    Refused(
        "Nunchaku's Flux (ComfyUI-nunchaku)",
        ("wrappers.flux.ComfyFluxWrapper",),
        "whole blocks run in Nunchaku's own kernels, where no node can reach an attention",
    ),
    Refused(
        "Nunchaku's Qwen-Image (ComfyUI-nunchaku)",
        ("models.qwenimage.NunchakuQwenImageTransformer2DModel",),
        "its attentions do not get the options through which a node reaches them",
    ),
)
# Of Forge Neo.
OF_FORGE: tuple[Refused, ...] = (
    Refused(
        "Nunchaku's Flux (Forge Neo)",
        ("svdq.SVDQFluxTransformer2DModel",),
        "whole blocks run in Nunchaku's own kernels, where no attention is met",
    ),
    Refused(
        "Nunchaku's Qwen-Image and Z-Image (Forge Neo)",
        (
            "svdq.NunchakuQwenImageTransformer2DModel",
            "svdq.patch_nunchaku_zimage.<locals>.NunchakuZImage2DModel",
        ),
        "they run on a GPU with Nunchaku's own kernels alone, with which ToMe was not tried",
    ),
)
_ROWS = [(f".{name}", row) for row in (*REFUSED, *OF_NODES, *OF_FORGE) for name in row.classes]


def refused(model: Any) -> Refused | None:
    """The row of a diffusion model that is known and not served, or None."""
    for kind in type(model).__mro__:
        for end, row in _ROWS:
            if f"{kind.__module__}.{kind.__qualname__}".endswith(end):
                return row
    return None
