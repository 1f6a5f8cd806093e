"""Whether merging pays in a U-Net's whole step in a script (shared_tome/autotune/step.py).

A copy without foreign hooks is run, so that nobody else sees a call more.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from ..autotune.detached import about_model, bare_model
from ..autotune.layer import Verdict
from ..autotune.step import is_judged, rows_of, verdict_of
from ..config import ToMeConfig
from ..core.grid import Grid


def verdict_on_step(
    model: nn.Module,
    args: tuple,
    kwargs: dict[str, Any],
    batch: int,
    grid: Grid,
    config: ToMeConfig,
    merge: Callable[[nn.Module], Any],
) -> Verdict | None:
    """What is known of the times of a model's steps; None: not measured, or not to be.

    Args:
        args, kwargs: of a call, whose first row is what is run; batch: its rows. grid: the latent's.
        config: how it is merged. merge: has a copy of the model merge its tokens.
    """
    x = next(x for x in (*args, *kwargs.values()) if isinstance(x, Tensor))
    if not is_judged(config, x.device) or model.training:
        return None
    whole, merged = bare_model(model), bare_model(model)
    if whole is None or merged is None:
        return None

    def both() -> tuple[Callable[[], Any], Callable[[], Any]]:
        merge(merged)
        given, named = rows_of((args, kwargs), batch)
        return lambda: whole(*given, **named), lambda: merged(*given, **named)

    about = about_model(model, x.device)
    return verdict_of(model, x.dtype, x.device, grid, config, both, about=about)
