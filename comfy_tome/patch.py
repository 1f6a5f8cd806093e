"""From a ModelPatcher to a merged clone: which models are served, what may not be combined."""

from __future__ import annotations

from typing import Any

from ..shared_tome import ToMeConfig
from ..shared_tome.inspect.reasons import why_no_step
from ..shared_tome.merging.residual import why_no_effect
from .dit_models import SERVED, dit_model, unwrapped, why_not
from .dit_patch import DiTPatch
from .dit_refused import refused
from .log import logger, say_once
from .mergers import merger_in
from .model_call import APPLY_MODEL, DIFFUSION_MODEL, KEY
from .outcome import OUTER_SAMPLE, OutcomePatch, around_prediction
from .residuals import PREDICT_NOISE
from .shown import mark_on_node, show_on_node
from .unet import UNetPatch
from .unet_model import layers_of


def apply_to_model(model: Any, config: ToMeConfig, node: str | None = None, older: str | None = None) -> Any:
    """A clone of the ModelPatcher with ToMe on it; with nothing to merge, a clone without.

    node: the id of the node whose display tells what happens; None: there is none. older: what that says beside it, of
    a workflow of another version.
    Raises ValueError, before any sampling: the model is merged already, or is of a kind that is not served, or not
    with these options.
    """
    merger = find_merger(model)
    if merger is not None:
        raise ValueError(
            f"this model is already merged by {merger}; ToMe cannot stand after it. Remove one of the two nodes."
        )
    has_unet = check_served(model)
    mark_on_node(node, has_unet)
    if not has_unet:
        check_dit_options(model, config)
    else:
        tell_levels(model, config)
    clone = model.clone()
    if config.start == config.end and max(config.ratio, config.ratio_end) > 0.0:
        why = why_no_step(config, "a sampling")
        logger.info("[ToMe] nothing will be merged: %s", why)
        show_on_node(node, f"nothing will be merged: {why}")
    elif config.is_off:
        show_on_node(node, "nothing will be merged: ratio is 0")
    if not config.is_off:
        patch = UNetPatch(config) if has_unet else DiTPatch(config)
        clone.add_wrapper_with_key(APPLY_MODEL, KEY, patch)
        if has_unet:
            clone.add_wrapper_with_key(DIFFUSION_MODEL, KEY, patch.around_model)
        clone.add_wrapper_with_key(OUTER_SAMPLE, KEY, OutcomePatch(config, node, older))
        if (why := why_no_effect(config, transformer=not has_unet)) is not None:
            say_once(why)
        elif config.keeps_exact:
            clone.add_wrapper_with_key(PREDICT_NOISE, KEY, around_prediction)
        clone.set_attachments(KEY, config)
    return clone


def find_merger(model: Any) -> str | None:
    """The name of the node that already merges this model's tokens, or None."""
    if model.get_wrappers(APPLY_MODEL, KEY):
        return "another ToMe node"
    return merger_in(model.model_options.get("transformer_options", {}))


def check_served(model: Any) -> bool:
    """Whether it is a U-Net's model rather than a transformer's. Raises ValueError for any other."""
    from comfy.ldm.modules.diffusionmodules.openaimodel import UNetModel

    diffusion_model = unwrapped(model.get_model_object("diffusion_model"))
    if (known := refused(diffusion_model)) is not None:
        raise ValueError(f"ToMe does not serve {known.name}: {known.reason}")
    if not isinstance(diffusion_model, UNetModel) and dit_model(diffusion_model) is None:
        raise ValueError(
            f"ToMe serves models with a U-Net (SD 1.x, SD 2.x, SDXL, SVD and what is built on them) and {SERVED}; "
            f"this one is {type(model.model).__name__} with {type(diffusion_model).__name__}"
        )
    return isinstance(diffusion_model, UNetModel)


def check_dit_options(model: Any, config: ToMeConfig) -> None:
    """Raises ValueError for what only a U-Net has."""
    facts, levels = dit_model(unwrapped(model.get_model_object("diffusion_model"))), config.level_set
    if (why := why_not(facts, config)) is not None:
        raise ValueError(why)
    if levels is not None and levels != {0}:
        logger.info("[ToMe] %s has one resolution: of levels %s only 0 exists", facts.name, config.levels)


def tell_levels(model: Any, config: ToMeConfig) -> None:
    """Say which of the levels that were asked for a U-Net has no attention at (SDXL: level 0). Where it has none at any
    of them, each sampling says that nothing was merged."""
    levels, there = config.level_set, {level for level, _, _ in layers_of(model.get_model_object("diffusion_model"))}
    if levels is not None and there & levels and not levels <= there:
        there, served = (", ".join(map(str, sorted(found))) for found in (there, there & levels))
        logger.info(
            "[ToMe] this model has attention at levels %s: of levels %s it has only %s", there, config.levels, served
        )
