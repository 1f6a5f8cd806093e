"""How long a step takes without and with ToMe: the last merged call of a run, run again in the model that made it.

After sampling, so that the picture cannot change; by turns, so that a GPU's changing clock meets both.
"""

from __future__ import annotations

import statistics
import time
from typing import Any

import torch

from ..shared_tome.report import StepTime
from .model_call import APPLY_MODEL, KEY, find_options, put_options
from .record import LastCall, Run

ROUNDS = 5
_BUDGET = 20.0  # seconds for all rounds; one round is always run


def measure(run: Run) -> StepTime:
    """Times of a step. Afterwards the run holds neither the call nor the model.

    Raises ValueError: nothing was merged, or the call cannot be run again; says why.
    """
    import comfy.model_management as management

    last, run.last = run.last, None
    if last is None:
        raise ValueError("nothing was merged")
    if last.patcher is None:
        raise ValueError("the model does not tell how it was loaded")
    try:
        management.load_models_gpu([last.patcher])
        last.patcher.pre_run()
        try:
            without, merged, rounds = _by_turns(last, management.throw_exception_if_processing_interrupted)
        finally:
            last.patcher.cleanup()
    except (RuntimeError, TypeError, AttributeError, KeyError, IndexError) as error:
        raise ValueError(f"{type(error).__name__}: {error}") from error
    # Calls on several GPUs run side by side.
    calls = max(1, round(run.tally.calls / max(1, len(run.tally.steps) * len(run.devices))))
    device = _name(last.args[0].device)
    return StepTime(1000 * without * calls, 1000 * merged * calls, rounds, calls, last.step, last.ratio, device)


def _by_turns(last: LastCall, check_interrupt: Any) -> tuple[float, float, int]:
    """(median seconds without, with, rounds)."""
    plain = _without(last)
    _seconds(last.model, *plain)  # kernels, graphs and memory are made in the first call
    took = _seconds(last.model, *plain) + _seconds(last.model, last.args, last.kwargs)
    times: tuple[list[float], list[float]] = ([], [])
    rounds = max(1, min(ROUNDS, int(_BUDGET / max(took, 1e-6))))
    for _ in range(rounds):
        check_interrupt()
        times[0].append(_seconds(last.model, *plain))
        times[1].append(_seconds(last.model, last.args, last.kwargs))
    return statistics.median(times[0]), statistics.median(times[1]), rounds


def _without(last: LastCall) -> tuple[tuple, dict[str, Any]]:
    """The same call without ToMe's wrapper; all that other nodes have put there stays."""
    args, options = find_options(last.args[2:], last.kwargs)
    wrappers = dict(options.get("wrappers", {}))
    wrappers[APPLY_MODEL] = {key: value for key, value in wrappers.get(APPLY_MODEL, {}).items() if key != KEY}
    args, kwargs = put_options(args, last.kwargs, {**options, "wrappers": wrappers})
    return (*last.args[:2], *args), kwargs


@torch.no_grad()
def _seconds(model: Any, args: tuple, kwargs: dict[str, Any]) -> float:
    device = args[0].device
    _finish(device)
    start = time.perf_counter()
    model.apply_model(*args, **kwargs)
    _finish(device)
    return time.perf_counter() - start


def _finish(device: torch.device) -> None:
    """Wait until the device has done all that it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif hasattr(getattr(torch, device.type, None), "synchronize"):
        getattr(torch, device.type).synchronize()


def _name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
