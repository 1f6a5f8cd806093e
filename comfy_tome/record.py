"""What is kept of a sampler's run for ToMe Map and ToMe Report, and only where a ToMe Record node asks for it.

The record travels as one entry of the model's transformer_options, so that ToMe's wrappers find it wherever the nodes
stand. Choices of methods that match nothing are worked out again from seed, step and layer; of those that match, one
number a token is kept on the CPU.
"""

from __future__ import annotations

import dataclasses
import math
import threading
from collections import deque
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..shared_tome import ToMeConfig
from ..shared_tome.grid import Grid
from ..shared_tome.plan import Plan
from ..shared_tome.report import CallTally, StepTime, Tally
from .log import say_once
from .model_call import find_options, step_of

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
                self._runs.append(Run(config, sigmas))
            return self._runs[-1]


@dataclass(frozen=True)
class StepFacts:
    """What held in the calls of one step: options with that step's ratio, the latent's size and its own grid.

    seeds: one an image, where a host has them; none: the options' own.
    """

    config: ToMeConfig
    latent: tuple[int, int]
    full: Grid
    seeds: tuple[int, ...] = ()


@dataclass(frozen=True)
class LastCall:
    """All that is needed to run a call of the model once more."""

    patcher: Any
    model: Any
    args: tuple
    kwargs: dict[str, Any]
    step: int
    ratio: float


class Run:
    """One run of a sampler."""

    def __init__(self, config: ToMeConfig, sigmas: Tensor | None):
        self.config, self._sigmas = config, sigmas
        self.tally = Tally(config, None if sigmas is None else len(sigmas) - 1)
        self.compiled = False
        self.images = 1
        self.facts: dict[int, StepFacts] = {}
        self.last: LastCall | None = None
        self.time: StepTime | None = None
        self.is_full = False
        self._owners: dict[tuple[int, Grid, int], Tensor] = {}
        self._bytes = 0
        self._lock = threading.Lock()

    def has(self, sigmas: Tensor | None, step: int, spread: bool) -> bool:
        """Whether a call with these noise levels is of this run. spread: over several GPUs, each with a copy."""
        if sigmas is self._sigmas or sigmas is None:
            return True
        if not spread or self._sigmas is None or sigmas.shape != self._sigmas.shape:
            return False
        return step >= max(self.tally.steps, default=0) and bool(torch.equal(sigmas.cpu(), self._sigmas.cpu()))

    def note(self, step: int, facts: StepFacts) -> None:
        """What holds in a step; of several areas of a picture the largest counts."""
        with self._lock:
            known = self.facts.get(step)
            if known is None or math.prod(facts.latent) >= math.prod(known.latent):
                self.facts[step] = facts

    def keep(self, step: int, grid: Grid, number: int, owner: Tensor) -> None:
        """A layer's owners [images, N]; the first of a step stays."""
        with self._lock:
            if (step, grid, number) in self._owners:
                return
            if self._bytes + owner.nbytes > _MOST_BYTES:
                self.is_full = True
                return
            self._owners[step, grid, number] = owner
            self._bytes += owner.nbytes

    def owner(self, step: int, grid: Grid, number: int) -> Tensor | None:
        """What was kept of a layer in a step, [images, N] int32, or None."""
        return self._owners.get((step, grid, number))


class CallRecord(CallTally):
    """What one call of the model tells its run. ToMe's patches fill it; it is made for the call and ends with it.

    rows: of the batch, those of the prompted images; None where this call has none.
    """

    def __init__(self, run: Run, step: int, rows: slice | None, full: Grid):
        super().__init__(run.tally, full)
        self.run, self.step = run, step
        self._rows = rows
        self._plans: list[tuple[Grid, int, Plan]] = []

    def lies_on(self, full: Grid) -> None:
        """The grid from which levels are counted, where it is not the latent's own size."""
        facts = self.run.facts[self.step]
        if facts.latent == self.full:  # else of an area of the picture, and the whole is known already
            self.run.note(self.step, dataclasses.replace(facts, full=full))
        self.full = full

    def layer(self, where: str, grid: Grid, plan: Plan | None, part: int = 0) -> int:
        number = super().layer(where, grid, plan, part)
        if plan is not None and self.run.config.kind.matches and self._rows is not None:
            self._plans.append((grid, number, plan))
        return number

    def end(self) -> None:
        """Take what was chosen to the CPU: after the call, so that a GPU is waited for once."""
        for grid, number, plan in self._plans:
            rows = slice(0, 1) if plan.groups.stride(0) == 0 else self._rows
            owner = plan.index[rows].gather(1, plan.groups[rows]).to(torch.int32)
            self.run.keep(self.step, grid, number, owner.cpu())


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
    run.compiled = is_compiled(executor, options)
    if run.compiled:
        say_once(COMPILED)
    run.note(step, StepFacts(now, latent, latent))
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
