"""The ratio of one call of the model in ComfyUI, asked of the GPU no more often than it may change."""

from __future__ import annotations

from typing import Any

from ..shared_tome import ToMeConfig
from ..shared_tome.core.schedule import config_at, is_settled
from .model_call import progress_of
from .outcome import Outcome


def config_now(config: ToMeConfig, options: dict[str, Any], base: Any, outcome: Outcome) -> ToMeConfig:
    """The config with the ratio of this call.

    To know the noise level the processor waits for all that it has queued on the GPU. So the level is asked only until
    the ratio can change no more.

    Args:
        options: the call's transformer_options. base: the BaseModel that is called. outcome: the sampling's.
    """

    def ask() -> float:
        progress, at_a_step = progress_of(options, base)
        if outcome.falls and at_a_step:
            outcome.passed = progress
        return progress

    if config.is_scheduled and is_settled(config, outcome.passed):
        return config_at(config, lambda: outcome.passed)
    return config_at(config, ask)
