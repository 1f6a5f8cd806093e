"""ToMe in Forge and reForge: how it gets around the calls of a pass's model. U-Nets: forge_unet.py; transformers:
forge_dit.py.

Their U-Net carries ComfyUI's attn1 patches but no wrappers around `apply_model`; the one hook that sees each call
with its transformer_options is `model_function_wrapper`. It takes a single function, so one that stands there
already is called by ours. Both programs put the unpatched U-Net back before each pass: nothing needs removing.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from torch import Tensor

from ..shared_tome.core.progress import percent_of_level, percent_table
from ..shared_tome.merging.residual import why_no_effect
from . import forge_dit, forge_unet
from .hooks import COMPILED, NotServed, is_compiled, served_blocks
from .sampling import Sampling

_WRAPPER = "model_function_wrapper"
_MARK = "is_tome"
_COMPILE_CONFIG = "_torch_compile_config"  # what Forge Neo's extension leaves on a model that it compiles


def is_forge(sd_model: Any) -> bool:
    """Whether the host is Forge or reForge."""
    return hasattr(sd_model, "forge_objects")


def patch(sd_model: Any, sampling: Sampling, called: Callable[[], None] = lambda: None) -> None:
    """Give this pass a merged clone of the U-Net; called twice, the second replaces the first.

    called: told after each call of the model.

    Raises NotServed: the model is a transformer that ToMe does not know here, or not with these options, or compiled.
    """
    unet = sd_model.forge_objects.unet.clone()
    base, facts = unet.model, None
    if next(served_blocks(base.diffusion_model), None) is None:
        facts = forge_dit.facts_of(sd_model, base.diffusion_model)
        forge_dit.check(facts, sampling.config)
        if (why := why_no_effect(sampling.config, transformer=True)) is not None:
            sampling.notes.say(why, shown=False)
    # reForge compiles the module itself; Forge Neo's own extension does so within each call of apply_model.
    if is_compiled(base.diffusion_model) or hasattr(base, _COMPILE_CONFIG):
        raise NotServed(COMPILED)
    inner = _without_ours(unet.model_options.get(_WRAPPER))
    sampling.another_model()
    if facts is None:
        merged = forge_unet.MergedUNet(base, sampling, alone=inner is None)
    else:
        merged = forge_dit.Merged(base, facts, sampling, alone=inner is None)
    unet.set_model_unet_function_wrapper(_wrapper(base, merged, inner, called))
    sd_model.forge_objects.unet = unet


def takes_multires(sd_model: Any) -> bool:
    """Whether `auto` stands for multires on this model."""
    return is_forge(sd_model) and forge_dit.takes_multires(sd_model.forge_objects.unet)


def unpatch(sd_model: Any) -> None:
    """Take our wrapper out of this pass's U-Net, if it is there."""
    objects = getattr(sd_model, "forge_objects", None)
    wrapper = objects.unet.model_options.get(_WRAPPER) if objects is not None else None
    if not getattr(wrapper, _MARK, False):
        return
    unet = objects.unet.clone()
    inner = _without_ours(wrapper)
    if inner is None:
        unet.model_options.pop(_WRAPPER, None)
    else:
        unet.set_model_unet_function_wrapper(inner)
    objects.unet = unet


def _without_ours(wrapper: Callable | None) -> Callable | None:
    while getattr(wrapper, _MARK, False):
        wrapper = wrapper.inner
    return wrapper


def _percent_to_sigma(model: Any) -> Callable[[float], float] | None:
    """The noise level at a share of the model's time: Forge keeps it in `predictor`, reForge in `model_sampling`."""
    for name in ("predictor", "model_sampling"):
        found = getattr(getattr(model, name, None), "percent_to_sigma", None)
        if found is not None:
            return found
    return None


def _wrapper(model: Any, merged: Callable[..., Tensor], inner: Callable | None, called: Callable[[], None]) -> Callable:
    """A plain function, because clone() copies objects deeply and would part them from the sampling's state.

    model: what the U-Net's patcher holds. merged: see forge_unet.MergedUNet, forge_dit.Merged.
    """
    percent_to_sigma = _percent_to_sigma(model)
    table: list[Tensor] = []  # asked for where there is a schedule

    def progress(level: Tensor) -> float:
        if not table:
            table.append(percent_table(percent_to_sigma))
        return percent_of_level(level, table[0])

    def tome_wrapper(apply_model: Callable, args: dict[str, Any]) -> Tensor:
        def run(args: dict[str, Any]) -> Tensor:
            if inner is not None:
                return inner(apply_model, args)
            return apply_model(args["input"], args["timestep"], **args["c"])

        out = merged(args, run, None if percent_to_sigma is None else functools.partial(progress, args["timestep"]))
        called()
        return out

    tome_wrapper.inner = inner
    setattr(tome_wrapper, _MARK, True)
    return tome_wrapper
