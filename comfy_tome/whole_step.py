"""Whether merging pays in whole steps of a model in ComfyUI (shared_tome/autotune/step.py), and what that depends on.

What is run is the model's own call without a node's patches, wrappers or control networks, so nobody else sees a call
more; where another node has replaced or hooked a part of the model itself, nothing is run.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

from torch import Tensor

from ..shared_tome import ToMeConfig
from ..shared_tome.autotune.paying import Decision, Judge
from ..shared_tome.autotune.step import Ways, decision_of, is_timed, rows_of
from ..shared_tome.autotune.store import NotNow
from ..shared_tome.core.grid import Grid
from ..shared_tome.hooks.guard import anothers_part
from .chosen import Chosen
from .model_call import find_options, put_options, step_of_options
from .unet_model import dtype_of

# Where apply_model(x, t, ...) has its control network among what comes after t.
_CONTROL = 2


def decision_on_step(
    base_model: Any,
    x: Tensor,
    t: Tensor,
    args: tuple,
    kwargs: dict[str, Any],
    grid: Grid,
    rows: int,
    config: ToMeConfig,
    merged: Callable[[dict[str, Any], Callable[[dict[str, Any], dict[str, Any]], Any], Judge], Any],
    chosen: Chosen,
    kernels: tuple[str, ...],
    about: str,
) -> Decision | None:
    """What is known of the times of a model's steps; None: not measured, or not to be.

    Args:
        base_model: comfy.model_base.BaseModel; x, t, args, kwargs: of its apply_model, whose first row is what is run,
            `rows` times. grid: the step is known by.
        config: how it is merged. chosen: its attention. kernels: see layer.decision_on. about: from about_model.
        merged: merged(options, run, judge) calls run(options, more) with ToMe's options and further arguments.
    """
    if not is_timed(config, x.device) or chosen.override is not None:
        return None  # a step by another attention than the picture's tells nothing

    def both() -> Ways:
        _refuse_anothers(base_model)
        plain = {**step_of_options(find_options(args, kwargs)[1]), **chosen.options}
        given, named = put_options(args, kwargs, {})
        given = tuple(None if at == _CONTROL else value for at, value in enumerate(given))
        named = {name: value for name, value in named.items() if name != "control"}
        row, noise, given, named = rows_of((x, t, given, named), x.shape[0], rows)

        def run(options: dict[str, Any], more: dict[str, Any]) -> Any:
            now, by_name = put_options(given, named, options)
            return base_model._apply_model(row, noise, *now, **by_name, **more)

        return lambda: run(plain, {}), lambda judge: lambda: merged(plain, run, judge)

    model = base_model.diffusion_model
    return decision_of(model, dtype_of(base_model), x.device, grid, config, both, chosen.host, kernels, about)


# Walking through a model takes longer than a step may. A fact about a model, not state of a call.
_stored: weakref.WeakKeyDictionary[Any, tuple[Any, str]] = weakref.WeakKeyDictionary()


def about_model(base_model: Any) -> str:
    """In words, what the times of a model's layers and steps depend on beside shapes and dtype: how its weights are
    stored, by which of ComfyUI's operations they are used, and whether all of them stay on the GPU."""
    model, dtype = base_model.diffusion_model, base_model.get_dtype()
    if model not in _stored or _stored[model][0] != dtype:
        _stored[model] = dtype, _how_stored(model)
    words = [_stored[model][1]]
    if getattr(base_model, "model_lowvram", False):
        words.append("partly elsewhere")
    if getattr(base_model, "dynamic_vbars", None):
        words.append("loaded on the way")
    if getattr(base_model, "lowvram_patch_counter", 0):
        words.append("patched on the way")
    return ", ".join(words)


def _how_stored(model: Any) -> str:
    """Names of dtypes, and of the classes and formats of quantized weights and of operations that use them."""
    dtypes, classes = set(), set()
    for module in model.modules():
        weight = getattr(module, "weight", None)
        if not isinstance(weight, Tensor):
            continue
        dtypes.add(str(weight.dtype).removeprefix("torch."))
        if weight.dim() == 2:  # of a linear layer: what is quantized
            operations = type(module).__qualname__.rpartition(".")[0]
            classes.update({type(weight.data).__name__, f"{type(module).__module__}.{operations}".rstrip(".")})
            # ComfyUI's own formats; ComfyUI-GGUF's.
            formats = getattr(module, "quant_format", None), getattr(weight, "tensor_type", None)
            classes.update(str(getattr(found, "name", found)) for found in formats if found is not None)
    return " ".join(["weights", *sorted(dtypes), *sorted(classes - {"Tensor"})])


def _refuse_anothers(base_model: Any) -> None:
    """Raises NotNow where a part of the model is not its class's own: it may count or keep what it sees."""
    if "_apply_model" in base_model.__dict__:
        raise NotNow("another node stands in the place of the model's call")
    if (part := anothers_part(base_model.diffusion_model)) is not None:
        raise NotNow(f"another node works on the model's {type(part).__name__}")
