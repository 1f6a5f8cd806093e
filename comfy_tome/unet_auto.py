"""Whether merging pays in a U-Net's whole step in ComfyUI (shared_tome/step_auto.py).

What is run is the model's own call without a node's patches, wrappers or control networks, so nobody else sees a call
more; where another node has replaced or hooked a part of the model itself, nothing is run.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from ..shared_tome import ToMeConfig
from ..shared_tome.auto import Attention, Verdict
from ..shared_tome.step_auto import is_judged, rows_of, verdict_of
from .model_call import find_options, put_options

# What of a call's options tells the step, and is no node's.
_STEP = ("sample_sigmas", "sigmas")
# Where apply_model(x, t, ...) has its control network among what comes after t.
_CONTROL = 2


def verdict_on_step(
    base_model: Any,
    x: Tensor,
    t: Tensor,
    args: tuple,
    kwargs: dict[str, Any],
    config: ToMeConfig,
    merged: Callable[[dict[str, Any], Callable[[dict[str, Any], dict[str, Any]], Any]], Any],
    attention: Attention,
    kernels: tuple[str, ...],
) -> Verdict | None:
    """What is known of the times of a model's steps; None: not measured, or not to be.

    Args:
        base_model: comfy.model_base.BaseModel; x, t, args, kwargs: of its apply_model, whose first row is what is run.
        config: how it is merged. attention, kernels: see auto.verdict_on.
        merged: merged(options, run) calls run(options, more) with ToMe's options and further arguments.
    """
    if not is_judged(config, x.device) or find_options(args, kwargs)[1].get("optimized_attention_override"):
        return None  # a step by another attention than the picture's tells nothing

    def both() -> tuple[Callable[[], Any], Callable[[], Any]]:
        _refuse_anothers(base_model)
        plain = {name: value for name, value in find_options(args, kwargs)[1].items() if name in _STEP}
        given, named = put_options(args, kwargs, {})
        given = tuple(None if at == _CONTROL else value for at, value in enumerate(given))
        named = {name: value for name, value in named.items() if name != "control"}
        row, noise, given, named = rows_of((x, t, given, named), x.shape[0])

        def run(options: dict[str, Any], more: dict[str, Any]) -> Any:
            now, by_name = put_options(given, named, options)
            return base_model._apply_model(row, noise, *now, **by_name, **more)

        return lambda: run(plain, {}), lambda: merged(plain, run)

    return verdict_of(base_model.diffusion_model, x, tuple(x.shape[-2:]), config, both, attention, kernels)


def _refuse_anothers(base_model: Any) -> None:
    """Raises ValueError where a part of the model is not its class's own: it may count or keep what it sees."""
    if "_apply_model" in base_model.__dict__:
        raise ValueError("another node stands in the place of the model's call")
    for module in base_model.diffusion_model.modules():
        if "forward" in module.__dict__ or module._forward_hooks or module._forward_pre_hooks:
            raise ValueError(f"another node works on the model's {type(module).__name__}")
