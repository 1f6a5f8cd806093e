"""Whether merging pays in a U-Net's layers in ComfyUI (shared_tome/autotune/); in whole steps: whole_step.py."""

from __future__ import annotations

import torch

from ..shared_tome import ToMeConfig
from ..shared_tome.autotune.decisions import why_layers_left_alone
from ..shared_tome.autotune.layer import Attention
from ..shared_tome.autotune.paying import Judge
from ..shared_tome.core.grid import grid_at
from ..shared_tome.inspect.reasons import why_not_served
from .log import leave_alone
from .outcome import Outcome, tokens_of


def leaves_layers_alone(
    outcome: Outcome,
    config: ToMeConfig,
    full: tuple[int, int],
    device: torch.device,
    layers: list[tuple[int, int, int]],
    dtype: torch.dtype,
    attention: Attention,
    kernels: tuple[str, ...],
    about: str,
    judge: Judge,
) -> bool:
    """Whether no layer would be merged, by what is known of all of them: then the model runs as if ToMe were not there.
    Its patches take the processor time, which shows where steps wait for it.

    layers, dtype: see unet_model. judge: as for Decisions; the rest: see layer.decision_on.
    """
    if not layers:
        return False  # not a U-Net as they are known
    given = config, full, device, layers, dtype, attention, kernels, about
    reasons = why_layers_left_alone(*given, outcome.decided, judge)
    for grid, reason in (reasons or {}).items():
        leave_alone(None, reason, f"layers of {tokens_of(grid)}", grid=grid, outcome=outcome)
    if reasons == {}:
        for grid in sorted({grid_at(full, level) for level, _, _ in layers}, reverse=True):
            outcome.left_alone(why_not_served(config, grid, full), tokens_of(grid), grid)
    return reasons is not None
