"""What is kept of a sampler's run for ToMe Map and ToMe Report, and only where a ToMe Record node asks for it.

The record travels as one entry of the model's transformer_options, so that ToMe's wrappers find it wherever the nodes
stand. What a run is, and what is kept of it: shared_tome/inspect/record.py.
"""

from __future__ import annotations

import threading
import weakref
from collections import deque
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ..shared_tome import ToMeConfig
from ..shared_tome.inspect.record import CallRecord, ChoosingTimer, Run, StepFacts
from .dit_tokens import latent_shape
from .log import say_once
from .model_call import DIFFUSION_MODEL, draw_of, find_options, step_of

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

    def passed_by(self, config: ToMeConfig, sigmas: Tensor, reason: str) -> None:
        """A run of a sampler in which ToMe was never asked, and why."""
        run = Run(config, sigmas, 0)
        run.passed_by = reason
        with self._lock:
            self._runs.append(run)


class TimingRecord(Record):
    """The record of one call that is run again to be timed (measure.py)."""

    def __init__(self, config: ToMeConfig) -> None:
        super().__init__()
        self._run = Run(config, None, 0)
        self.timer = self._run.timer = ChoosingTimer()

    def run_now(self, config: ToMeConfig, options: dict[str, Any], step: int) -> Run:
        return self._run


@dataclass(frozen=True)
class LastCall:
    """All that is needed to run a call of the model once more.

    The model is only referred to: a record outlives it in ComfyUI's cache, and must not keep it in memory. What the
    call was given (latents, prompts) stays until it is measured, the model goes or four more samplings were recorded:
    a report may ask for each of them.
    """

    model: weakref.ref
    patcher: weakref.ref | None
    args: tuple
    kwargs: dict[str, Any]
    step: int
    ratio: float


def begin(
    executor: Any,
    base: Any,
    x: Tensor,
    t: Tensor,
    args: tuple,
    kwargs: dict[str, Any],
    asked: ToMeConfig,
    now: ToMeConfig,
    draw: Tensor | int | None = None,
) -> CallRecord | None:
    """The record of a call of apply_model, or of a U-Net itself; None where nobody asked for one (the rule, and then it
    costs nothing).

    base: the model that is sampled. asked: the node's options; now: those of this step. draw: the number of its draw,
    where that is another step's. Synchronises once, to know the step.
    """
    args, options = find_options(args, kwargs)
    record = options.get(RECORD)
    if record is None:
        return None
    step = int(step_of(options, x.device))
    run = record.run_now(asked, options, step)
    chunks = options.get("cond_or_uncond") or [0]
    images = x.shape[0] // len(chunks)
    place = chunks.index(0) if 0 in chunks else None  # the prompted rows
    rows = None if place is None else slice(place * images, (place + 1) * images)
    shape = latent_shape(x.shape, kwargs)
    latent = shape[-2:] if len(shape) > 3 else (1, shape[-1])
    run.images = images
    run.devices.add(options.get("multigpu_thread_device", x.device))
    run.compiled = is_compiled(executor, options)
    if run.compiled:
        say_once(COMPILED)
    draw = draw_of(options, x.device, base) if draw is None else draw
    run.note(step, StepFacts(now, latent, latent, draw=int(draw)))
    whole = hasattr(executor.class_obj, "apply_model")  # else a node calls the U-Net itself
    if now.ratio > 0.0 and whole:
        _keep_call(run, base, (x, t, *args), kwargs, options, step, now.ratio)
    _count(run, options, step, now.ratio, whole)
    return CallRecord(run, step, rows, latent)


def is_compiled(executor: Any, options: dict[str, Any]) -> bool:
    """Whether torch.compile runs the model."""
    model = getattr(executor.class_obj, "diffusion_model", executor.class_obj)
    if COMPILE_KEY in options.get("wrappers", {}).get("apply_model", {}) or hasattr(model, "_orig_mod"):
        return True
    forward = getattr(model, "__dict__", {}).get("forward")
    return getattr(model, "_compiled_call_impl", None) is not None or hasattr(forward, "_torchdynamo_orig_callable")


def _count(run: Run, options: dict[str, Any], step: int, ratio: float, whole: bool) -> None:
    """Count the call of the model: where another node may answer in its place (EasyCache), only if it is run.

    whole: whether it is a call of apply_model, which such nodes are met behind.
    """
    run.tally.ask(step, ratio)
    wrappers = dict(options.get("wrappers", {}))
    others = {key: found for key, found in wrappers.get(DIFFUSION_MODEL, {}).items() if key != RECORD and found}
    if run.compiled or not others or not whole:
        run.tally.call(step, ratio)
        return

    def count(executor: Any, *args: Any, **kwargs: Any) -> Any:
        run.tally.call(step, ratio)
        return executor(*args, **kwargs)

    # Behind all others, in this call's own options.
    options["wrappers"] = {**wrappers, DIFFUSION_MODEL: {**others, RECORD: [count]}}


def _keep_call(
    run: Run, model: Any, args: tuple, kwargs: dict[str, Any], options: dict[str, Any], step: int, ratio: float
) -> None:
    """Keep the call for measuring, but not the record, nor a control network's lists: the model empties them.

    Nor a call that moves a cache on (Wan CausalAR): it cannot be made again.
    """
    if "ar_state" in options:
        return
    options = {key: value for key, value in options.items() if key != RECORD}
    if len(args) > 5:
        args = (*args[:4], None, options, *args[6:])
    else:
        args, kwargs = args[:4], {**kwargs, "control": None, "transformer_options": options}

    def forget(gone: weakref.ref) -> None:
        if run.last is not None and run.last.model is gone:
            run.last = None

    patcher = getattr(model, "current_patcher", None)
    patcher = None if patcher is None else weakref.ref(patcher)
    run.last = LastCall(weakref.ref(model, forget), patcher, args, dict(kwargs), step, ratio)
