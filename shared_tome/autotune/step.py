"""Whether merging pays in a model's whole step on a GPU, measured at its first call (layer.py).

A layer that saves the GPU time takes the processor some, and steps often wait for the processor alone: then nothing is
gained, however much each layer saves. Python, the host's code and the machine decide, so a step is run both ways. Where
large layers keep the GPU busy, the processor's time for the small ones does not show. So where that would decide about
a layer, a third way counts: all layers merged that save the GPU time.
"""

from __future__ import annotations

import functools
import statistics
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ..config import ToMeConfig
from ..core.grid import Grid
from . import timing
from .layer import ROWS, Attention, Decision, known_or_measured, may_measure, name_of, ways
from .paying import MARGIN, Given, Judge

# A step that takes longer, in seconds, keeps a GPU busy whatever the processor does (docs/speed.md).
LONG = 0.3
_ROUNDS = 4
# Walking through a model takes longer than a step may. A fact about a model, not state of a call.
_sizes: weakref.WeakKeyDictionary[nn.Module, int] = weakref.WeakKeyDictionary()


def is_timed(config: ToMeConfig, device: torch.device) -> bool:
    """Whether whole steps are measured at all: with levels "auto" on a GPU."""
    return config.levels == "auto" and may_measure(device)


def decision_of(
    model: nn.Module,
    dtype: torch.dtype,
    device: torch.device,
    grid: Grid,
    config: ToMeConfig,
    both: Callable[[], tuple[Callable[[], Any], Callable[[Judge], Callable[[], Any]]]],
    attention: Attention | None = None,
    kernels: tuple[str, ...] = (),
    about: str = "",
) -> Decision | None:
    """What is known of the times of a model's steps, microseconds of one; None where they cannot be measured.

    A step longer than LONG pays and is busy, and none that is merged is run: its time is 0.

    Args:
        dtype: what the model computes in, whatever it is given. grid: the latent's. config: how it is merged.
        both: gives what runs a step whole, and what makes of a judge what runs one that is merged by it; may raise,
            which is logged once, and store.NotNow where another call of the same model may do.
        attention, kernels, about: see layer.decision_on.
    """
    if model not in _sizes:
        _sizes[model] = sum(parameter.numel() for parameter in model.parameters())
    what = f"a step of {type(model).__name__} of {_sizes[model]} parameters"
    key = _key(what, grid, dtype, " ".join([name_of(attention, device), *kernels]), about, config)

    def measure() -> Decision:
        with torch.no_grad():
            return _compared(*both(), device)

    return known_or_measured(key, device, measure)


# ComfyUI asks in each step (see layer._case).
@functools.lru_cache(maxsize=256)
def _key(what: str, grid: Grid, dtype: torch.dtype, attention: str, about: str, config: ToMeConfig) -> str:
    """What tells a step from others on one device."""
    more = [f"from {config.min_tokens} tokens"]
    more += [name for name in ("cross_attention", "mlp") if getattr(config, name)]
    shape = ["x".join(map(str, grid)), str(dtype).removeprefix("torch.")]
    return ", ".join([what, *shape, attention, *([about] if about else []), *ways(config, config.keeps_self), *more])


def why_left_alone(decision: Decision | Given) -> str:
    """Why nothing is merged, for people."""
    if isinstance(decision, Given):
        return decision.reason
    whole, merged = decision.full_us / 1e3, decision.merged_us / 1e3
    return f"merging does not pay here: a step takes {whole:.1f} ms without and {merged:.1f} ms with it"


def rows_of(given: Any, batch: int) -> Any:
    """What a call of `batch` rows is given, with its first row ROWS times instead: a picture with guidance.

    given: a tensor, plain dicts, lists and tuples of such; all else is passed on.
    """
    if isinstance(given, Tensor):
        alike = given.dim() > 0 and given.shape[0] == batch
        return given[:1].expand(ROWS, *given.shape[1:]).contiguous() if alike else given
    if type(given) is dict:
        return {name: rows_of(value, batch) for name, value in given.items()}
    if type(given) in (list, tuple):
        return type(given)(rows_of(value, batch) for value in given)
    return given


def _compared(whole: Callable[[], Any], merged: Callable[[Judge], Callable[[], Any]], device: torch.device) -> Decision:
    """They take turns. Of the whole step the least time, since what disturbs a processor only adds to it; of a merged
    one the median: where it waits for the processor it must pay with what disturbs it, too.

    merged: see decision_of. A second one is run, without regard to the processor, where that merges more layers.
    """
    whole()  # kernels are chosen, compiled and loaded
    first = timing.seconds(whole, device)
    if first > LONG:
        return Decision(1e6 * first, 0.0, 0.0, busy=True)
    judge = Judge()
    calls = [whole, merged(judge)]
    for _ in range(2):
        calls[1]()  # and layers measured
    if judge.matters:
        calls.append(merged(Judge(waits=False)))
        calls[2]()
    times: list[list[float]] = [[first], *([] for _ in calls[1:])]
    for _ in range(_ROUNDS):
        for call, taken in reversed(list(zip(calls, times, strict=True))):
            taken.append(timing.seconds(call, device))
    least, (waiting, *more) = 1e6 * min(times[0]), (1e6 * statistics.median(taken) for taken in times[1:])
    found = Decision(least, waiting, 0.0)
    # Merging more must save as much again as merging at all, since it costs likeness.
    if more and (waiting if found.pays() else least) - more[0] > MARGIN * least:
        return Decision(least, more[0], 0.0, busy=True)
    return found
