"""ToMe for scripts: diffusers pipelines and U-Nets, ldm's models. tomesd's two verbs, with tomesd's arguments.

    from shared_tome import apply_patch, remove_patch

    apply_patch(pipe, ratio=0.5)                                  # what tomesd does
    apply_patch(pipe, config=ToMeConfig(method="sample", ratio=0.75))   # faster and closer to the unmerged picture

Sources: Bolya and Hoffman, Token Merging for Fast Stable Diffusion (arXiv 2303.17604). Module hooks do the work
(hooks.py); the host's classes and forwards stay what they are.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from ..config import ToMeConfig
from ..hooks.served import find_served, served_as
from .hooks import Attachment, served_blocks
from .joint import JOINT, JointAttachment

_NAME = "_shared_tome"  # the attribute of the patched module that keeps its attachment
_LEVELS = {1: "0", 2: "0,1", 4: "0,1,2", 8: "0,1,2,3"}
# diffusers'; those of ldm, of generative-models (sgm) and of ControlNet's repository (cldm). See served.served_as.
UNETS = ("UNet2DConditionModel", "UNetControlNetXSModel", "openaimodel.UNetModel", "cldm.ControlledUnetModel")
SERVED = (
    "diffusers pipelines with a U-Net (SD 1.x, SD 2.x, SDXL) and UNet2DConditionModel; diffusers' Flux and SD3 "
    "pipelines and transformers; ldm's LatentDiffusion, DiffusionWrapper and UNetModel"
)


def apply_patch(
    model: Any,
    ratio: float = 0.5,
    max_downsample: int = 1,
    sx: int = 2,
    sy: int = 2,
    use_rand: bool = True,
    merge_attn: bool = True,
    merge_crossattn: bool = False,
    merge_mlp: bool = False,
    config: ToMeConfig | None = None,
    **options: Any,
) -> Any:
    """Merge the model's tokens from now on, in place. A second call replaces the first.

    With tomesd's arguments alone it does what tomesd does: method "merge" with plain means, without proportional
    attention, whatever the size of the layer; with use_rand off the outputs equal tomesd's. A config is faster and
    stays closer to the unmerged picture: `config=ToMeConfig(method="sample", ratio=0.75)`.

    Args:
        model: a pipeline, U-Net or latent diffusion model, see SERVED.
        ratio: the share of the tokens that goes, at most 1 - 1 / (sx * sy).
        max_downsample: 1, 2, 4 or 8: layers that are halved up to 0, 1, 2 or 3 times. SDXL's attention begins at 2.
        sx, sy: width and height of the cell that keeps one token.
        use_rand: a random token of each cell (from the seed and never from the global generator); otherwise the
            top left one.
        merge_attn, merge_crossattn, merge_mlp: which of a block's three parts are merged. Flux and SD3 have the first
            alone.
        config: replaces all of the arguments above and reaches every method.
        options: further options of ToMeConfig by name (seed=..., method=..., proportional=...), on top of both.
    Returns:
        the model.
    Raises:
        ValueError: an argument out of range, or a model that is not served.
    """
    if config is None:
        if max_downsample not in _LEVELS:
            raise ValueError(f"max_downsample must be one of 1, 2, 4, 8, got {max_downsample!r}")
        config = ToMeConfig(
            **{
                "ratio": ratio,
                "stride": (sx, sy),
                "method": "merge",
                "partition": "random_2d" if use_rand else "fixed_2d",
                "levels": _LEVELS[max_downsample],
                "cross_attention": merge_crossattn,
                "mlp": merge_mlp,
                "proportional": False,
                "min_tokens": 0,
                **options,
            }
        )
    else:
        config = config.replace(**options)
        merge_attn = True
    denoiser = find_denoiser(model)
    if any(type(module).__name__ == "ToMeBlock" for module in denoiser.modules()):
        raise ValueError("tomesd has patched this model; call tomesd.remove_patch(model) first")
    joint = served_as(denoiser, JOINT) is not None
    for name in ("cross_attention", "mlp"):
        if joint and getattr(config, name):
            raise ValueError(
                f"{name} needs a model with a U-Net; {type(denoiser).__name__} is served at its attention to text and "
                "image alone"
            )
    remove_patch(model)
    pipe = model if model is not denoiser else None
    attachment = (JointAttachment if joint else Attachment)(denoiser, config, pipe, merge_attn)
    setattr(denoiser, _NAME, attachment)
    return model


def remove_patch(model: Any) -> Any:
    """Undo apply_patch: the model is what it was, without a hook. Does nothing where there is none."""
    denoiser = _denoiser(model)
    attachment = getattr(denoiser, _NAME, None)
    if attachment is not None:
        attachment.detach(denoiser)
        delattr(denoiser, _NAME)
    return model


def find_denoiser(model: Any) -> nn.Module:
    """The network inside a pipeline or latent diffusion model. Raises ValueError where there is none that is served."""
    found = _denoiser(model)
    names = [type(part).__name__ for part in (model, found) if part is not None]
    what = " with ".join(dict.fromkeys(names))
    if found is None or served_as(found, (*UNETS, *JOINT)) is None:
        raise ValueError(f"ToMe does not know {what}. It serves {SERVED}")
    if served_as(found, JOINT) is None and not any(served_blocks(found)):
        raise ValueError(f"ToMe knows none of the attention layers in {what}. It serves {SERVED}")
    return found


def _denoiser(model: Any) -> nn.Module | None:
    """The served network; the first that is found, where none is served."""
    for path in (("unet",), ("transformer",), ("model", "diffusion_model"), ("diffusion_model",), ()):
        found = model
        for name in path:
            found = getattr(found, name, None)
        if isinstance(found, nn.Module):
            found = getattr(found, "_orig_mod", found)  # as torch.compile wraps it
            return find_served(found, (*UNETS, *JOINT)) or found
    return None
