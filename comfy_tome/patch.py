"""From a ModelPatcher to a merged clone: which models are served, what may not be combined."""

from __future__ import annotations

from typing import Any

from ..shared_tome import ToMeConfig
from .unet import KEY, UNetPatch

_APPLY_MODEL = "apply_model"  # comfy.patcher_extension.WrappersMP.APPLY_MODEL


def apply_to_model(model: Any, config: ToMeConfig) -> Any:
    """A clone of the ModelPatcher with ToMe on it; with nothing to merge, a clone without.

    Raises ValueError, before any sampling: the model is merged already, or is of a kind that is not served.
    """
    merger = find_merger(model)
    if merger is not None:
        raise ValueError(
            f"this model is already merged by {merger}; ToMe cannot stand after it. Remove one of the two nodes."
        )
    check_served(model)
    clone = model.clone()
    if not config.is_off:
        clone.add_wrapper_with_key(_APPLY_MODEL, KEY, UNetPatch(config))
        clone.set_attachments(KEY, config)
    return clone


def find_merger(model: Any) -> str | None:
    """The name of the node that already merges this model's tokens, or None."""
    if model.get_wrappers(_APPLY_MODEL, KEY):
        return "another ToMe node"
    patches = model.model_options.get("transformer_options", {}).get("patches", {})
    for patch in patches.get("attn1_patch", ()):
        module = getattr(patch, "__module__", None) or type(patch).__module__
        if "tome" in module.rsplit(".", 1)[-1].lower():
            if module.endswith("nodes_tomesd"):
                return "ComfyUI's own node TomePatchModel"
            return f"a node of {module}"
    return None


def check_served(model: Any) -> None:
    """Raises ValueError for a model without a U-Net whose attention ToMe can reach."""
    from comfy.ldm.modules.diffusionmodules.openaimodel import UNetModel

    diffusion_model = model.get_model_object("diffusion_model")
    diffusion_model = getattr(diffusion_model, "_orig_mod", diffusion_model)  # as torch.compile wraps it
    if not isinstance(diffusion_model, UNetModel):
        raise ValueError(
            f"ToMe serves models with a U-Net (SD 1.x, SD 2.x, SDXL, SVD and what is built on them); this one is "
            f"{type(model.model).__name__} with {type(diffusion_model).__name__}"
        )
