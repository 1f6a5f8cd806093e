"""Whether merging pays in whole steps of a model (shared_tome/autotune/step.py), in A1111 and in Forge and reForge.

What is run is the model's own call without other extensions' hooks, patches and control networks, so nobody else sees a
call more. Where another extension has replaced a part of the model itself, nothing is run.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..comfy_tome.model_call import step_of_options
from ..comfy_tome.unet_model import layers_of
from ..shared_tome import ModelCall, ToMeConfig
from ..shared_tome.autotune.detached import about_model, detached_model
from ..shared_tome.autotune.paying import Decision, Judge
from ..shared_tome.autotune.step import Ways, decision_of, is_timed, rows_of
from ..shared_tome.autotune.store import NotNow
from ..shared_tome.autotune.verdicts import Verdict, Verdicts, verdict_of
from ..shared_tome.core.grid import Grid, grid_at
from ..shared_tome.hooks.guard import anothers_part
from .block import HOSTS, is_left_behind, package_of
from .sampling import Sampling

# By what A1111's LoRA knows a layer, and what it keeps there: it writes networks into the weights on the way, by each
# layer's own forward. A copy's weights are the model's, so a copy is to be none of its layers.
_NETWORKS = ("network_layer_name", "network_current_names", "network_weights_backup", "network_bias_backup")
# By what names Forge and reForge call their attention.
_ATTENTIONS = ("attention_function", "optimized_attention")

# call(x, options, run): run(options) with ToMe's options. x: the latent that is run.
RunMerged = Callable[[Tensor, dict[str, Any], Callable[[dict[str, Any]], Any]], Any]


class WholeSteps:
    """What is known of a model's steps in a sampling pass: asked for once of a kind, and again where it is not known.

    sampling: the pass, which is told.
    """

    def __init__(self, sampling: Sampling):
        self._sampling, self._verdicts = sampling, Verdicts()

    def of_unet(
        self, call: ModelCall, model: nn.Module, x: Tensor, measured: Callable[[ToMeConfig], Decision | None]
    ) -> Verdict:
        """Of a call of a U-Net; not asked for where the options leave out all layers. Else: see verdict."""
        layers = layers_of(model)
        if layers and not any(call.serves(grid_at(call.full, level)) for level, _, _ in layers):
            return Verdict()
        return self.verdict(call.config, call.full, x, measured)

    def verdict(
        self, config: ToMeConfig, grid: Grid, x: Tensor, measured: Callable[[ToMeConfig], Decision | None]
    ) -> Verdict:
        """Of a call. Where nothing of it is merged, the reason is said once.

        config: that holds in the call. grid: of the latent, or a transformer's tokens. x: the latent. measured: what is
        known of steps that are merged by a config, see decision_on_copies and decision_on_model.
        """

        def timed(config: ToMeConfig) -> Decision | None:
            return measured(config) if is_timed(config, x.device) else None

        def ask() -> Verdict:
            return verdict_of(self._sampling.decided, config, grid, timed)

        verdict = self._verdicts.of((grid, config.ratio, x.dtype), ask)
        if verdict.unpaid is not None:
            self._sampling.notes.say(f"{verdict.unpaid}; nothing is merged", shown=False)
        return verdict


def decision_on_copies(
    model: nn.Module,
    x: Tensor,
    args: tuple,
    kwargs: dict[str, Any],
    config: ToMeConfig,
    attach: Callable[[nn.Module, Judge], Any],
) -> Decision | None:
    """What is known of the times of steps in A1111; None: not measured, or not to be.

    Copies without hooks are run, which share the weights.

    Args:
        x, args, kwargs: of the model's call, x [B, C, H, W] among them, whose first row is what is run.
        attach: puts ToMe's hooks on a copy, by a judge of its layers.
    """

    def copied() -> nn.Module:
        made = detached_model(model, is_left_behind, without=_NETWORKS)
        if made is None:
            raise NotNow("another extension works on the model itself")
        return made

    def both() -> Ways:
        _refuse_anothers(model)
        if any(weight.device != x.device for weight in model.parameters()):
            raise NotNow("the model's weights are moved to the GPU in parts")
        (given, named), whole = rows_of((args, kwargs), x.shape[0]), copied()

        def merged(judge: Judge) -> Callable[[], Any]:
            made = copied()
            attach(made, judge)
            return lambda: made(*given, **named)

        return lambda: whole(*given, **named), merged

    return _decision(model, x.dtype, x, tuple(x.shape[-2:]), config, both, _attentions(model))


def decision_on_model(
    base: Any,
    args: dict[str, Any],
    grid: Grid,
    rows: int,
    config: ToMeConfig,
    merged: Callable[[Judge], RunMerged],
    kernels: tuple[str, ...] = (),
    about: Sequence[str] = (),
) -> Decision | None:
    """The same for Forge and reForge, whose LoRA is in the weights already: the model itself is run.

    Args:
        base: what the patcher holds; args: of the host's model_function_wrapper, whose first row is run `rows` times.
        grid: the step is known by.
        merged: what calls the model with its layers merged, by a judge of them.
        kernels: see layer.decision_on. about: what else the times depend on, in words; of a U-Net its attentions.
    """
    model, x = base.diffusion_model, args["input"]

    def both() -> Ways:
        if "apply_model" in vars(base):
            raise NotNow("another extension stands in the place of the model's call")
        _refuse_anothers(model, hooks=True)
        options = args["c"].get("transformer_options", {})
        c = {name: value for name, value in args["c"].items() if name not in ("control", "control_model")}
        row, noise, c = rows_of((x, args["timestep"], c), x.shape[0], rows)

        def run(options: dict[str, Any]) -> Any:
            return base.apply_model(row, noise, **{**c, "transformer_options": options})

        def less(judge: Judge) -> Callable[[], Any]:
            call = merged(judge)
            return lambda: call(row, step_of_options(options), run)

        return lambda: run(step_of_options(options)), less  # anew each time: the model writes into it

    return _decision(model, _dtype_of(base, x), x, grid, config, both, about or _attentions(model), kernels)


def _decision(
    model: nn.Module,
    dtype: torch.dtype,
    x: Tensor,
    grid: Grid,
    config: ToMeConfig,
    both: Callable[[], Ways],
    about: Sequence[str],
    kernels: tuple[str, ...] = (),
) -> Decision | None:
    words = [about_model(model, x.device, is_left_behind), *about]
    opts = getattr(sys.modules.get("modules.shared"), "opts", None)
    words += ["attention in float32"] if getattr(opts, "upcast_attn", False) else []
    return decision_of(model, dtype, x.device, grid, config, both, kernels=kernels, about=", ".join(words))


def _dtype_of(base: Any, x: Tensor) -> torch.dtype:
    """What a model of Forge, or else of reForge, computes in, whatever it is given."""
    found = getattr(base, "computation_dtype", None) or getattr(base, "manual_cast_dtype", None)
    return found or getattr(base.diffusion_model, "dtype", x.dtype)


def _attentions(model: nn.Module) -> list[str]:
    """What attends in Forge and reForge, which the codes of a model's layers do not tell."""
    names = {type(module).__module__ for module in model.modules() if hasattr(module, "to_q")}
    return names_of(getattr(sys.modules.get(name), kind, None) for name in names for kind in _ATTENTIONS)


def names_of(functions: Iterable[Any]) -> list[str]:
    """The names of those that are functions."""
    return sorted({f"{one.__module__}.{one.__qualname__}" for one in functions if hasattr(one, "__qualname__")})


def _refuse_anothers(model: nn.Module, hooks: bool = False) -> None:
    """Raises NotNow where a part of the model, or its forward, is another extension's: it may count or keep what it
    sees. hooks: whether a part with hooks counts as such."""
    if (part := anothers_part(model, hooks, is_left_behind)) is not None:
        raise NotNow(f"another extension works on the model's {type(part).__name__}")
    hosts = HOSTS | {package_of(type(model))}
    for kind in {type(module) for module in model.modules()}:
        if not {package_of(kind), package_of(kind.forward)} <= hosts:
            raise NotNow(f"another extension works on the model's {kind.__name__}")
