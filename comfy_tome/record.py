"""What is kept of a sampler's run for ToMe Map and ToMe Report, and only where a ToMe Record node asks for it.

The record travels as one entry of the model's transformer_options, so that ToMe's wrappers find it wherever the nodes
stand. What a run is, and what is kept of it: shared_tome/record.py.
"""

from __future__ import annotations

import threading
from collections import deque
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ..shared_tome import ToMeConfig
from ..shared_tome.record import CallRecord, Run, StepFacts
from .log import say_once
from .model_call import draw_of, find_options, step_of

RECORD = "ToMe record"
COMPILED = "under torch.compile ToMe Record sees no single layers, and nothing of what methods that match chose"
COMPILE_KEY = "torch.compile"  # comfy_api.torch_helpers.torch_compile.COMPILE_KEY
_RUNS = 4  # samplings that a record holds: a picture's passes
_MOST_BYTES = 2**29  # of kept choices in a run


class Record:
    """The last few runs of samplers with one model. A node's output, so it lives as long as ComfyUI's cache of it."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._runs: deque[Run] = deque(maxlen=_RUNS)

    def __deepcopy__(self, memo: dict) -> Record:
        return self  # copies of a model's options, for another GPU, fill the same record

    def run(self, back: int = 0) -> Run | None:
        """The last run, or one of those before it; None where there is none."""
        with self._lock:
            return self._runs[-1 - back] if back < len(self._runs) else None

    def run_now(self, config: ToMeConfig, options: dict[str, Any], step: int) -> Run:
        """The run that a call belongs to. Each sampler makes its own list of noise levels."""
        sigmas = options.get("sample_sigmas")
        with self._lock:
            if not self._runs or not self._runs[-1].has(sigmas, step, "multigpu_thread_device" in options):
                self._runs.append(Run(config, sigmas, _MOST_BYTES))
            return self._runs[-1]


@dataclass(frozen=True)
class LastCall:
    """All that is needed to run a call of the model once more."""

    patcher: Any
    model: Any
    args: tuple
    kwargs: dict[str, Any]
    step: int
    ratio: float


def begin(
    executor: Any, x: Tensor, t: Tensor, args: tuple, kwargs: dict[str, Any], asked: ToMeConfig, now: ToMeConfig
) -> CallRecord | None:
    """The record of a call of apply_model, None where nobody asked for one (the rule, and then it costs nothing).

    asked: the node's options; now: those of this step. Synchronises once, to know the step.
    """
    args, options = find_options(args, kwargs)
    record = options.get(RECORD)
    if record is None:
        return None
    step = int(step_of(options, x.device))
    run = record.run_now(asked, options, step)
    run.tally.call(step, now.ratio)
    chunks = options.get("cond_or_uncond") or [0]
    images = x.shape[0] // len(chunks)
    place = chunks.index(0) if 0 in chunks else None  # the prompted rows
    rows = None if place is None else slice(place * images, (place + 1) * images)
    latent = tuple(x.shape[-2:]) if x.dim() > 3 else (1, x.shape[-1])
    run.images = images
    run.devices.add(options.get("multigpu_thread_device", x.device))
    run.compiled = is_compiled(executor, options)
    if run.compiled:
        say_once(COMPILED)
    draw = int(draw_of(options, x.device, executor.class_obj))
    run.note(step, StepFacts(now, latent, latent, draw=draw))
    if now.ratio > 0.0:
        run.last = _last_call(executor, x, t, args, kwargs, options, step, now.ratio)
    return CallRecord(run, step, rows, latent)


def is_compiled(executor: Any, options: dict[str, Any]) -> bool:
    """Whether torch.compile runs the model."""
    compiled = COMPILE_KEY in options.get("wrappers", {}).get("apply_model", {})
    return compiled or hasattr(executor.class_obj.diffusion_model, "_orig_mod")


def _last_call(
    executor: Any, x: Tensor, t: Tensor, args: tuple, kwargs: dict[str, Any], options: dict[str, Any], step, ratio
) -> LastCall:
    """The call without the record, and without what a control network adds: the model empties those lists."""
    options = {key: value for key, value in options.items() if key != RECORD}
    if len(args) > 3:
        args = (*args[:2], None, options, *args[4:])
    else:
        args, kwargs = args[:2], {**kwargs, "control": None, "transformer_options": options}
    model = executor.class_obj
    return LastCall(getattr(model, "current_patcher", None), model, (x, t, *args), dict(kwargs), step, ratio)
