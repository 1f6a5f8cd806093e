"""What some exact steps leave for the others (shared_tome/merging/residual.py) in one sampling of ComfyUI's."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

from torch import Tensor

from ..shared_tome import ToMeConfig
from ..shared_tome.merging.residual import COMPILED, UNKNOWN, ResidualCall, Residuals
from .log import say_once
from .model_call import draw_of, level_now, place_now
from .record import is_compiled

PREDICT_NOISE = "predict_noise"  # comfy.patcher_extension.WrappersMP.PREDICT_NOISE


class SamplingResiduals(Residuals):
    """sampler, guider: of comfy.samplers. ComfyUI's own ask the model for the whole picture each time. Others may ask
    for a part of it, so only another noise level tells that they begin anew."""

    def __init__(self, config: ToMeConfig, sampler: Any, guider: Any):
        super().__init__(config.exact_every, say_once)
        self._is_own = _is_comfys(getattr(sampler, "sampler_function", sampler)) and _is_comfys(type(guider))
        self._asked = 0

    def ask(self) -> None:
        """The sampler asks the model anew."""
        self._asked += 1

    def call_of(self, config: ToMeConfig, options: dict[str, Any], draw: Tensor | int) -> ResidualCall | None:
        """A call of the model that is merged; None where nothing is kept.

        config: of this step. options: the call's transformer_options. draw: the number of its draw.
        """
        if not self.is_on:
            return None
        step = place_now(options) if self._asked else None
        if step is None:
            self.turn_off(UNKNOWN)
            return None
        # A part of the batch for each conditioning: how memory splits the batch does not matter. ComfyUI copies one
        # with an area, uuid included, to the other prompt.
        sides, uuids = options.get("cond_or_uncond") or ("all",), options.get("uuids") or ()
        names: list[Hashable] = list(zip(uuids, sides, strict=True) if len(uuids) == len(sides) else uuids or sides)
        evaluation = self._asked if self._is_own else level_now(options)
        return self.call(step, draw, evaluation, names, config.ratio)


def _is_comfys(code: Any) -> bool:
    return str(getattr(code, "__module__", "")).partition(".")[0] in ("comfy", "comfy_extras")


def residual_of(
    residuals: SamplingResiduals | None,
    config: ToMeConfig,
    options: dict[str, Any],
    x: Tensor,
    base: Any,
    executor: Any,
) -> ResidualCall | None:
    """What has some steps exact in a call of the model; None where each merged step is drawn alone.

    residuals: of the sampling. config: of this step. options: the call's transformer_options. x: the latent. base: the
    model that is sampled.
    """
    if residuals is None:
        if config.keeps_exact:  # outside of a sampler
            say_once(UNKNOWN)
        return None
    if is_compiled(executor, options):
        residuals.turn_off(COMPILED)
    if config.ratio == 0.0:
        residuals.forget()
        return None
    return residuals.call_of(config, options, draw_of(options, x.device, base))
