"""From a ModelPatcher to a merged clone: which models are served, what may not be combined."""

from __future__ import annotations

from typing import Any

from ..shared_tome import ToMeConfig
from .dit import DiTPatch
from .dit_models import SERVED, dit_model, unwrapped
from .log import logger
from .model_call import APPLY_MODEL, KEY
from .outcome import OUTER_SAMPLE, say_outcome
from .unet import UNetPatch


def apply_to_model(model: Any, config: ToMeConfig) -> Any:
    """A clone of the ModelPatcher with ToMe on it; with nothing to merge, a clone without.

    Raises ValueError, before any sampling: the model is merged already, or is of a kind that is not served, or not
    with these options.
    """
    merger = find_merger(model)
    if merger is not None:
        raise ValueError(
            f"this model is already merged by {merger}; ToMe cannot stand after it. Remove one of the two nodes."
        )
    has_unet = check_served(model)
    if not has_unet:
        check_dit_options(model, config)
    clone = model.clone()
    if not config.is_off:
        clone.add_wrapper_with_key(APPLY_MODEL, KEY, UNetPatch(config) if has_unet else DiTPatch(config))
        clone.add_wrapper_with_key(OUTER_SAMPLE, KEY, say_outcome)
        clone.set_attachments(KEY, config)
    return clone


def find_merger(model: Any) -> str | None:
    """The name of the node that already merges this model's tokens, or None."""
    if model.get_wrappers(APPLY_MODEL, KEY):
        return "another ToMe node"
    patches = model.model_options.get("transformer_options", {}).get("patches", {})
    for patch in patches.get("attn1_patch", ()):
        module = getattr(patch, "__module__", None) or type(patch).__module__
        if "tome" in module.rsplit(".", 1)[-1].lower():
            if module.endswith("nodes_tomesd"):
                return "ComfyUI's own node TomePatchModel"
            return f"a node of {module}"
    return None


def check_served(model: Any) -> bool:
    """Whether it is a U-Net's model rather than a transformer's. Raises ValueError for any other."""
    from comfy.ldm.modules.diffusionmodules.openaimodel import UNetModel

    diffusion_model = unwrapped(model.get_model_object("diffusion_model"))
    if not isinstance(diffusion_model, UNetModel) and dit_model(diffusion_model) is None:
        raise ValueError(
            f"ToMe serves models with a U-Net (SD 1.x, SD 2.x, SDXL, SVD and what is built on them) and {SERVED}; "
            f"this one is {type(model.model).__name__} with {type(diffusion_model).__name__}"
        )
    return isinstance(diffusion_model, UNetModel)


def check_dit_options(model: Any, config: ToMeConfig) -> None:
    """Raises ValueError for what only a U-Net has."""
    name = dit_model(unwrapped(model.get_model_object("diffusion_model"))).name
    for option in ("cross_attention", "mlp"):
        if getattr(config, option):
            raise ValueError(f"{option} needs a model with a U-Net; {name} is served at its self-attention alone")
    levels = config.level_set
    if levels is not None and 0 not in levels:
        raise ValueError(f"{name} has one resolution, level 0; levels {config.levels!r} would merge nothing")
    if levels is not None and levels != {0}:
        logger.info("[ToMe] %s has one resolution: of levels %s there is 0 alone", name, config.levels)
