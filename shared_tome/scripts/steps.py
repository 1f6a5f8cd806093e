"""Which step a script's sampler is at, told from the timestep that the model is called with."""

from __future__ import annotations

import weakref
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..core.curve import is_stand_in
from ..core.progress import percent_of_flow, percent_of_time

# Of diffusers. Each makes its noise levels from one shift, unless its configuration names one of the other ways.
_FLOWS = ("FlowMatchEulerDiscreteScheduler", "FlowMatchHeunDiscreteScheduler", "FlowMatchLCMScheduler")
_OTHER_WAYS = ("use_dynamic_shifting", "shift_terminal", "invert_sigmas")


class Clock(NamedTuple):
    """How a pipeline makes what its model gets of the scheduler's timesteps, rounding included.

    scale: what it divides them by (Flux: 1000). rounds_first: whether it takes the latent's dtype before that. rises:
    whether the model gets (scale - timestep) / scale (Z-Image).
    """

    scale: float = 1.0
    rounds_first: bool = True
    rises: bool = False


class Steps:
    """Follows one model.

    pipe: the pipeline whose scheduler knows the timesteps, where there is one. scale, rounds_first, rises: see Clock.
    """

    def __init__(self, pipe: Any = None, scale: float = 1.0, rounds_first: bool = True, rises: bool = False):
        self.scale, self.rounds_first, self.rises = scale, rounds_first, rises
        try:
            self._pipe = weakref.ref(pipe)
        except TypeError:  # None, or what cannot be referred to weakly
            self._pipe = lambda: pipe
        self._last: Tensor | None = None
        self._count: Tensor | None = None
        self._counted: weakref.ref | None = None  # the run's timesteps
        self._listed: list[float] = []  # as the model gets them
        self._at: int | None = None  # the place of its last call among them
        self.runs = 0  # that `entry` has seen begin

    def __deepcopy__(self, memo: dict) -> Steps:
        """Where a whole pipeline is copied, the copy of its model follows the copy of its scheduler."""
        pipe = self.pipe
        return Steps(memo.get(id(pipe), pipe), self.scale, self.rounds_first, self.rises)

    def __reduce__(self) -> tuple:
        return Steps, (None, self.scale, self.rounds_first, self.rises)  # a model is pickled without its pipeline

    @property
    def pipe(self) -> Any:
        """The pipeline, or None."""
        return self._pipe()

    def _timesteps(self, timestep: Any) -> Tensor | None:
        """All timesteps of this run, falling, rounded as the one that the model gets, or None."""
        found = self._of_scheduler()
        if found is None:
            return None
        rounds = isinstance(timestep, Tensor) and timestep.is_floating_point()
        if rounds and self.rounds_first:
            found = found.to(timestep.dtype)
        found = self.given(found)
        if rounds:
            found = found.to(timestep.dtype)
        return self._fall(found.float())

    def given(self, timesteps: Tensor) -> Tensor:
        """What the model gets for the scheduler's timesteps."""
        if self.rises:
            return (self.scale - timesteps) / self.scale
        return timesteps / self.scale if self.scale != 1.0 else timesteps

    def _fall(self, timesteps: Tensor) -> Tensor:
        """The model's timesteps in an order that falls in a run, exactly."""
        return -timesteps if self.rises else timesteps

    def _now(self, timestep: Any, device: torch.device) -> Tensor:
        return self._fall(_first(timestep, device))

    def _on_scheduler(self, now: Tensor) -> Tensor:
        """What the scheduler calls a timestep of _now; the pipeline may have rounded it."""
        return (1.0 + now if self.rises else now) * self.scale

    @property
    def number(self) -> int:
        """Of the call that `entry` was asked of last: how often the run's timestep has changed before it. Samplers that
        ask twice at a timestep are at one step then."""
        return sum(a != b for a, b in zip(self._listed[: self._at], self._listed[1:], strict=False))

    @property
    def is_over(self) -> bool:
        """Whether the call that `entry` was asked of last is the last of the run."""
        run = self._of_scheduler()
        return run is not None and self._at == len(run) - 1

    def tells(self, timestep: Any) -> bool:
        """Whether a pipeline tells the steps, so that a call need not be counted."""
        return timestep is not None and self._of_scheduler() is not None

    def _of_scheduler(self) -> Tensor | None:
        """All timesteps of this run as the pipeline's scheduler has them, or None."""
        scheduler = getattr(self.pipe, "scheduler", None)
        found = getattr(scheduler, "timesteps", None)
        return found if isinstance(found, Tensor) and getattr(scheduler, "num_inference_steps", None) else None

    def is_last(self, timestep: Any) -> bool:
        """Whether it is the last of a pipeline's run. Synchronises."""
        known = None if timestep is None else self._timesteps(timestep)
        if known is None or not len(known):
            return False
        return float(self._now(timestep, torch.device("cpu"))) == float(known[-1])

    def entry(self, timestep: Any) -> int | None:
        """The place among a pipeline's timesteps that this call of the model is for; to be asked at each. Synchronises.

        None where that is not known: no pipeline tells, or the model is not called once for each of them (tiles, cond
        and uncond in calls of their own). A run begins with any of them; another one of the same list where the noise
        rises and the list's does not.
        """
        known, run = None if timestep is None else self._timesteps(timestep), self._of_scheduler()
        if known is None:
            return None
        now, listed = float(self._now(timestep, torch.device("cpu"))), known.tolist()
        self._listed = listed
        goes_on = self._counted is not None and self._counted() is run
        following = [] if self._at is None else listed[self._at + 1 :]
        if goes_on and following[:1] == [now]:
            self._at += 1
        elif not goes_on or (self._at is not None and (now > listed[self._at] or len(listed) == 1)):
            self._counted, self.runs = weakref.ref(run), self.runs + 1
            self._at = max((place for place, one in enumerate(listed) if one == now), default=None)
        else:
            self._at = None
        return self._at

    def step(self, timestep: Any, device: torch.device) -> Tensor | int:
        """The number of the step as a 0-d tensor on the device, without a synchronisation.

        How many other timesteps are above this one, where they are known: the scheduler knows those of the whole run,
        of which a pipeline may run a part (strength, denoising_start, denoising_end). Otherwise counted: another
        timestep is the next step, a higher one the first step of another run.
        """
        if timestep is None:
            return 0
        now = self._now(timestep, device)
        known = self._timesteps(timestep)
        if known is not None:
            known = known.to(device)
            # Schedulers of samplers that call the model twice a step have a timestep twice.
            again = torch.nn.functional.pad(known[1:] == known[:-1], (1, 0))
            return ((known > now) & ~again).sum()
        if self._last is None or self._last.device != now.device:
            count = torch.zeros((), dtype=torch.int64, device=device)
        else:
            count = torch.where(now > self._last, 0, self._count + (now != self._last))
        if not (is_stand_in(now) or is_stand_in(count)):
            self._last, self._count = now, count
        return count

    def progress(self, timestep: Any) -> float:
        """How far the model is, 0 to 1. Synchronises; only a schedule asks.

        By the noise level, as ComfyUI's nodes with a start percent. By the timestep's place among all timesteps of the
        run where the scheduler shifts noise levels and does not tell by how much (Flux: by the picture's size): for
        evenly spread steps that is the same.
        """
        if timestep is None:
            return 0.0
        now, scheduler = self._now(timestep, torch.device("cpu")), getattr(self.pipe, "scheduler", None)
        known, shift = self._timesteps(timestep), flow_shift(scheduler)
        is_known = known is not None and len(known) > 0
        if shift is not None:
            exact = self._on_scheduler(now)
            if is_known:
                exact = self._of_scheduler().cpu()[(known.cpu() - now).abs().argmin()]
            return percent_of_flow(float(exact) / scheduler.config.num_train_timesteps, shift)
        if is_known and not hasattr(scheduler, "alphas_cumprod"):
            return int((known.cpu() > now).sum()) / len(known)
        return percent_of_time(self._on_scheduler(now))


def flow_shift(scheduler: Any) -> float | None:
    """What a flow's scheduler shifts its noise levels by (progress.percent_of_flow); None where it does not tell."""
    config = getattr(scheduler, "config", None)
    if getattr(config, "use_flow_sigmas", False):  # of other schedulers
        return float(config.flow_shift)
    if not any(cls.__name__ in _FLOWS for cls in type(scheduler).__mro__):
        return None
    if any(getattr(config, way, None) for way in _OTHER_WAYS):
        return None
    return float(scheduler.shift if hasattr(type(scheduler), "shift") else config.shift)  # set_shift changes the first


def _first(timestep: Any, device: torch.device) -> Tensor:
    """The first row's timestep, float32 []. Where each token has its own, those of given frames are 0."""
    if isinstance(timestep, Tensor):
        first = timestep.detach()[0].amax() if timestep.dim() > 1 else timestep.detach().reshape(-1)[0]
        return first.to(device, torch.float32)
    return torch.full((), float(timestep), dtype=torch.float32, device=device)
