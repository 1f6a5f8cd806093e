"""Whether merging pays in a U-Net's whole step in a script on a GPU, measured at its first call (auto.py).

A layer that saves the GPU time takes the processor some, and a script's steps often wait for the processor alone: then
nothing is gained, however much each layer saves. Python, the host's code and the machine decide, so a step is run both
ways. It is a copy without foreign hooks that runs, so nobody else sees a call more.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from .auto import ROWS, Verdict, known_or_measured, may_measure, name_of, ways
from .bare import bare_model
from .config import ToMeConfig
from .grid import Grid

# A step that takes longer, in seconds, keeps a GPU busy whatever the processor does (docs/speed.md).
LONG = 0.3
_ROUNDS, _CALLS = 5, 2


def verdict_of(
    model: nn.Module,
    args: tuple,
    kwargs: dict[str, Any],
    batch: int,
    grid: Grid,
    config: ToMeConfig,
    merge: Callable[[nn.Module], Any],
) -> Verdict | None:
    """What is known of the times of a model's steps, microseconds of one; None: not measured, or not to be.

    Args:
        args, kwargs: of a call, whose first row is what is run, twice as a picture with guidance; batch: its rows.
        grid: the latent's. config: how it is merged. merge: has a copy of the model merge its tokens.
    """
    x = next(x for x in (*args, *kwargs.values()) if isinstance(x, Tensor))
    if config.levels != "auto" or not may_measure(x.device) or model.training:
        return None
    whole, merged = bare_model(model), bare_model(model)
    if whole is None or merged is None:
        return None

    def measure() -> Verdict:
        merge(merged)
        given, named = _rows((args, kwargs), batch)
        with torch.no_grad():
            return _compared(lambda: whole(*given, **named), lambda: merged(*given, **named), x.device)

    return known_or_measured(_key(model, grid, config, x), x.device, measure)


def why_left_alone(verdict: Verdict) -> str:
    """Why nothing is merged, for people."""
    whole, merged = verdict.full_us / 1e3, verdict.merged_us / 1e3
    return (
        f"merging does not pay here: a step takes {whole:.1f} ms without and {merged:.1f} ms with it; nothing is merged"
    )


def _key(model: nn.Module, grid: Grid, config: ToMeConfig, x: Tensor) -> str:
    size = sum(parameter.numel() for parameter in model.parameters())
    shape = f"{'x'.join(map(str, grid))}, {str(x.dtype).removeprefix('torch.')}, {name_of(None, x.device)}"
    more = [name for name in ("cross_attention", "mlp") if getattr(config, name)]
    what = f"a step of {type(model).__name__} of {size} parameters"
    return ", ".join([what, shape, *ways(config, config.keeps_own), *more])


def _rows(given: Any, batch: int) -> Any:
    """What a call is given, with its first row ROWS times in place of `batch` rows."""
    if isinstance(given, Tensor):
        alike = given.dim() > 0 and given.shape[0] == batch
        return given[:1].expand(ROWS, *given.shape[1:]).contiguous() if alike else given
    if isinstance(given, dict):
        return {name: _rows(value, batch) for name, value in given.items()}
    if isinstance(given, (list, tuple)):
        return type(given)(_rows(value, batch) for value in given)
    return given


def _compared(whole: Callable[[], Any], merged: Callable[[], Any], device: torch.device) -> Verdict:
    """Both take turns; of each the least time, since what disturbs a processor only adds to it."""
    for call in (whole, whole, merged, merged):  # kernels are chosen, compiled and loaded; layers are measured
        call()
    times: tuple[list[float], list[float]] = [], []
    for _ in range(_ROUNDS):
        for call, taken in zip((whole, merged), times, strict=True):
            taken.append(_seconds(call, device))
        if times[0][0] > LONG:
            break
    return Verdict(1e6 * min(times[0]), 1e6 * min(times[1]), 0.0)


def _seconds(call: Callable[[], Any], device: torch.device) -> float:
    """Of one call, where some follow each other as a sampler's do."""
    _wait(device)
    start = time.perf_counter()
    for _ in range(_CALLS):
        call()
    _wait(device)
    return (time.perf_counter() - start) / _CALLS


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
