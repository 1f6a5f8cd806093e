"""How long a step takes without and with ToMe: the last merged call of a run, run again in the model that made it.

After sampling, so that the picture cannot change; by turns, so that a GPU's changing clock meets both.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from ..shared_tome.inspect.report import StepTime
from .model_call import APPLY_MODEL, DIFFUSION_MODEL, find_options, put_options, without_wrapper
from .record import RECORD, LastCall, Run, TimingRecord

ROUNDS = 5
_BUDGET = 20.0  # seconds for all rounds; one round is always run


CACHED = "another node answers from its cache"


def measure(run: Run) -> StepTime:
    """Times of a step. Afterwards the run holds nothing of the call.

    Raises ValueError: nothing was merged, or the call cannot be run again; says why.
    """
    import comfy.model_management as management

    last, run.last = run.last, None
    if last is None:
        merged = run.tally.report().merged_steps
        raise ValueError(
            "another node or the sampler runs the model itself, or the model is gone"
            if merged
            else "nothing was merged"
        )
    model = last.model()
    patcher = _patcher_of(last, model, management.current_loaded_models)
    if patcher is None:
        raise ValueError("the model does not tell how it was loaded")
    try:
        management.load_models_gpu([patcher])
        patcher.pre_run()
        try:
            watched = None if run.compiled else model.diffusion_model  # hooks would have it compiled anew
            without, merged, rounds = _by_turns(
                last, model, watched, management.throw_exception_if_processing_interrupted
            )
            choosing = None if run.compiled else _choosing(last, model, run)
        finally:
            patcher.cleanup()
    except (RuntimeError, TypeError, AttributeError, KeyError, IndexError) as error:
        raise ValueError(f"{type(error).__name__}: {error}") from error
    # Calls on several GPUs run side by side.
    calls = max(1, round(run.tally.calls / max(1, len(run.tally.steps) * len(run.devices))))
    device = _name(last.args[0].device)
    times = 1000 * without * calls, 1000 * merged * calls
    return StepTime(*times, rounds, calls, last.step, last.ratio, device, choosing)


def _patcher_of(last: LastCall, model: Any, loaded: list[Any]) -> Any:
    """The patcher that made the call, or the one by which its model is loaded now; None where there is neither."""
    found = None if last.patcher is None else last.patcher()
    if found is None and last.patcher is not None:
        found = next((one.model for one in loaded if getattr(one.model, "model", None) is model), None)
    return found


def _by_turns(last: LastCall, model: Any, watched: Any, check_interrupt: Any) -> tuple[float, float, int]:
    """(median seconds without, with, rounds). Raises ValueError where calls did not run all of the watched model."""
    plain, merged = _without(last), (last.args, last.kwargs)
    with _watch(watched) as ran:

        def seconds(call: tuple[tuple, dict[str, Any]]) -> float:
            ran.append(set())
            return _seconds(model, *call)

        seconds(plain)  # kernels, graphs and memory are made in the first call
        took = seconds(plain) + seconds(merged)
        times: tuple[list[float], list[float]] = ([], [])
        rounds = max(1, min(ROUNDS, int(_BUDGET / max(took, 1e-6))))
        for _ in range(rounds):
            check_interrupt()
            times[0].append(seconds(plain))
            times[1].append(seconds(merged))
            _check_ran(ran, watched)
    return statistics.median(times[0]), statistics.median(times[1]), rounds


_MARKS = 32  # modules that are watched, spread over the model


def _marks(model: Any) -> list[Any]:
    leaves = [one for one in model.modules() if not one._modules and one._parameters]
    return leaves[:: max(1, len(leaves) // _MARKS)]


@contextmanager
def _watch(model: Any) -> Iterator[list[set[int]]]:
    """Which of the marked modules each call ran: a list to append a set to before a call. model: None watches none."""
    ran: list[set[int]] = []
    marks = [] if model is None else _marks(model)
    handles = [
        mark.register_forward_hook(lambda *_, number=number: ran[-1].add(number)) for number, mark in enumerate(marks)
    ]
    try:
        yield ran
    finally:
        for handle in handles:
            handle.remove()


def _check_ran(ran: list[set[int]], model: Any) -> None:
    """Raises ValueError where a call did not run what another one did, or none ran a quarter of the model: EasyCache
    and its kind answer from what they remember."""
    if model is None:
        return
    most = set().union(*ran)
    if any(one != most for one in ran) or 4 * len(most) < len(_marks(model)):
        raise ValueError(CACHED)


def _choosing(last: LastCall, model: Any, run: Run) -> float | None:
    """The share of multires' attentions in which tiles are chosen, in one more merged call; None: not measured."""
    if run.config.method != "multires" or last.args[0].device.type != "cuda":
        return None
    timing = TimingRecord(run.config)
    args, options = find_options(last.args[2:], last.kwargs)
    args, kwargs = put_options(args, last.kwargs, {**options, RECORD: timing})
    _seconds(model, (*last.args[:2], *args), kwargs)
    return timing.timer.share


def _without(last: LastCall) -> tuple[tuple, dict[str, Any]]:
    """The same call without ToMe's wrappers; all that other nodes have put there stays."""
    args, options = find_options(last.args[2:], last.kwargs)
    options = without_wrapper(without_wrapper(options, APPLY_MODEL), DIFFUSION_MODEL)
    args, kwargs = put_options(args, last.kwargs, options)
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
