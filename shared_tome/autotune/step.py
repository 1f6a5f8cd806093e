"""Whether merging pays in a model's whole step on a GPU, measured at its first call (layer.py).

A layer that saves the GPU time takes the processor some, and steps often wait for the processor alone: then nothing is
gained, however much each layer saves. Python, the host's code and the machine decide, so a step is run both ways. Where
large layers keep the GPU busy, the processor's time for the small ones does not show. So where that would decide about
a layer, a third way counts: all layers merged that save the GPU time.
"""

from __future__ import annotations

import functools
import logging
import statistics
import weakref
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from ..config import ToMeConfig
from ..core.grid import Grid
from . import timing
from .layer import ROWS, Attention, Decision, known_of, known_or_measured, may_measure, name_of, ways
from .paying import MARGIN, Judge

log = logging.getLogger("ToMe")

# A step that takes longer, in seconds, keeps a GPU busy whatever the processor does (docs/speed.md).
LONG = 0.3
_ROUNDS = 4
# Text and reference tokens of two steps that differ by less count as equally many: prompted and unprompted ones are to
# be decided alike.
_BESIDE = 1024
# Walking through a model takes longer than a step may. A fact about a model, not state of a call.
_sizes: weakref.WeakKeyDictionary[nn.Module, int] = weakref.WeakKeyDictionary()


# What runs a step whole, and what makes of a judge what runs one that is merged by it.
Ways = tuple[Callable[[], Any], Callable[[Judge], Callable[[], Any]]]


class Joined(Protocol):
    """Processes that run each step together, and so decide alike."""

    def gather(self, numbers: Sequence[float]) -> list[list[float]]:
        """What each process has, by rank; each of them calls this as often as the others, with as many numbers."""


def is_timed(config: ToMeConfig, device: torch.device) -> bool:
    """Whether whole steps are measured at all: with levels "auto" on a GPU."""
    return config.levels == "auto" and may_measure(device)


def decision_of(
    model: nn.Module,
    dtype: torch.dtype,
    device: torch.device,
    grid: Grid,
    config: ToMeConfig,
    both: Callable[[], Ways],
    attention: Attention | None = None,
    kernels: tuple[str, ...] = (),
    about: str = "",
    joined: Joined | None = None,
) -> Decision | None:
    """What is known of the times of a model's steps, microseconds of one; None where they cannot be measured.

    A step longer than LONG pays and is busy, and none that is merged is run: its time is 0.

    Args:
        dtype: what the model computes in, whatever it is given. grid: the latent's. config: how it is merged.
        both: gives the ways to run a step; may raise, which is logged once, and store.NotNow where another call of the
            same model may do.
        attention, kernels, about: see layer.decision_on.
        joined: the processes that run a step together; each of them is to ask, whether it can measure or not. None:
            there is one.
    """
    if model not in _sizes:
        _sizes[model] = sum(parameter.numel() for parameter in model.parameters())
    what = f"a step of {type(model).__name__} of {_sizes[model]} parameters"
    key = _key(what, grid, dtype, " ".join([name_of(attention, device), *kernels]), about, config)

    if joined is not None:
        return _decision_together(key, device, both if is_timed(config, device) else None, joined)

    def measure() -> Decision:
        with torch.no_grad():
            return _compared(*both(), device)

    return known_or_measured(key, device, measure)


def _decision_together(
    key: str, device: torch.device, both: Callable[[], Ways] | None, joined: Joined
) -> Decision | None:
    """The same decision in all processes. both: None where this one measures nothing.

    What can fail in one process alone is done before the first step. What fails in a step is raised: the other
    processes are in the midst of it, and would take the next call's tensors for its own.
    """
    known, ready = None if both is None else known_of(key, device), None
    if both is not None and known is None:
        try:
            ready = both()
        except Exception as error:  # whatever a foreign model raises
            log.warning("[ToMe] %s: not measured (%s: %s), so merged", key, type(error).__name__, error)
    mine = [0.0] * 4 if known is None else [known.full_us, known.merged_us, known.cpu_us, known.busy]
    everyones = joined.gather([known is not None, ready is not None, *mine])
    found = next((Decision(*times, busy=bool(busy)) for knows, _, *times, busy in everyones if knows), None)
    if found is None and all(can for _, can, *_ in everyones):
        try:
            with torch.no_grad():
                found = _compared(*ready, device, lambda taken: max(x for (x,) in joined.gather([taken]))).rounded()
        except Exception:
            log.warning(
                "[ToMe] a step of %d processes failed while it was timed; with TOME_MEASURE=0 in each of them none is",
                len(everyones),
            )
            raise
    if found is not None and both is not None and known is None:
        known_or_measured(key, device, lambda: found)  # which keeps it
    return found


# ComfyUI asks in each step (see layer._case).
@functools.lru_cache(maxsize=256)
def _key(what: str, grid: Grid, dtype: torch.dtype, attention: str, about: str, config: ToMeConfig) -> str:
    """What tells a step from others on one device."""
    more = [f"from {config.min_tokens} tokens"]
    more += [name for name in ("cross_attention", "mlp") if getattr(config, name)]
    shape = ["x".join(map(str, grid)), str(dtype).removeprefix("torch.")]
    return ", ".join([what, *shape, attention, *([about] if about else []), *ways(config, config.keeps_self), *more])


def tokens_beside(tokens: int, masked: bool) -> str:
    """What a transformer's step is known by besides the image: so many tokens of text and references, in words."""
    return f"up to {-(-tokens // _BESIDE) * _BESIDE} tokens beside{', masked' if masked else ''}"


def rows_of(given: Any, batch: int, rows: int = ROWS) -> Any:
    """What a call of `batch` rows is given, with its first row `rows` times instead; ROWS: a picture with guidance.

    given: a tensor, plain dicts, lists and tuples of such; all else is passed on. A list of as many tensors as there
    are rows, none of which has all rows, has one for each row.
    """
    if _has_rows(given, batch):
        return given[:1].expand(rows, *given.shape[1:]).contiguous()
    if type(given) is dict:
        return {name: rows_of(value, batch, rows) for name, value in given.items()}
    if type(given) is list and len(given) == batch > rows:
        if all(isinstance(part, Tensor) and not _has_rows(part, batch) for part in given):
            return given[:1] * rows
    if type(given) in (list, tuple):
        return type(given)(rows_of(value, batch, rows) for value in given)
    return given


def _has_rows(given: Any, batch: int) -> bool:
    return isinstance(given, Tensor) and given.dim() > 0 and given.shape[0] == batch


def _compared(
    whole: Callable[[], Any],
    merged: Callable[[Judge], Callable[[], Any]],
    device: torch.device,
    slowest: Callable[[float], float] = float,
) -> Decision:
    """They take turns. Of the whole step the least time, since what disturbs a processor only adds to it; of a merged
    one the median: where it waits for the processor it must pay with what disturbs it, too.

    whole, merged: see Ways. A second merged one is run, without regard to the processor, where that merges more layers.
    slowest: makes of this process's time that of the slowest process.
    """
    first = slowest(timing.seconds_of_one(whole, device))  # kernels are chosen, compiled and loaded
    if first > LONG:  # else steps of many seconds would be run three times
        first = slowest(timing.seconds_of_one(whole, device))
    if first <= LONG:
        first = slowest(timing.seconds(whole, device))
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
            taken.append(slowest(timing.seconds(call, device)))
    least, (waiting, *more) = 1e6 * min(times[0]), (1e6 * statistics.median(taken) for taken in times[1:])
    found = Decision(least, waiting, 0.0)
    # Merging more must save as much again as merging at all, since it costs likeness.
    if more and (waiting if found.pays() else least) - more[0] > MARGIN * least:
        return Decision(least, more[0], 0.0, busy=True)
    return found
