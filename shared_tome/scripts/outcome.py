"""One line a run in which a script's model merged nothing: why, and what to change."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Hashable
from typing import Any

from torch import Tensor

from ..config import ToMeConfig
from ..core.grid import Grid
from ..inspect.reasons import NO_WHOLE_TOKEN, what_to_change, why_no_step, why_not_served
from ..merging.call import ModelCall
from .steps import Steps


class CallOutcome:
    """Of one call of the model. merged: whether any layer was; left: reasons, and the layers' tokens for each."""

    def __init__(self) -> None:
        self.merged = False
        self.left: dict[str, dict[str, None]] = {}

    def leave(self, model: ModelCall, grid: Grid, reason: str | None = None) -> None:
        """Layers on a grid are left alone. reason: None where the options say so."""
        reason = reason or why_not_served(model.config, grid, model.full) or NO_WHOLE_TOKEN
        self.left.setdefault(reason, {})[f"{grid[0]}x{grid[1]} tokens"] = None

    def __str__(self) -> str:
        reasons = "; ".join(f"{reason} ({', '.join(where)})" for reason, where in self.left.items())
        return reasons + what_to_change(self.left)


class Outcome:
    """Of the runs of one model. A pipeline's scheduler tells its runs apart; without one all calls are one run.

    say: called with the line.
    """

    def __init__(self, config: ToMeConfig, steps: Steps, say: Callable[[str], None]):
        self._config, self._steps, self._say = config, steps, say
        self._run: weakref.ref | None = None  # the timesteps of the run
        self._said: set[str] = set()
        self._why: dict[Hashable, str] = {}  # by kind of call: its layers may have no hooks that tell it again
        self._skipped = self._reached = False  # steps at ratio 0, and others
        self._is_watched = True  # whether each call at another ratio comes here
        self._reached_in: Tensor | None = None  # the timesteps of the last run with such a call

    def __reduce__(self) -> tuple:
        return Outcome, (self._config, self._steps, self._say)  # a copy's runs are its own

    def timesteps(self) -> Tensor | None:
        """All of the pipeline's run, as its scheduler has them."""
        found = getattr(getattr(self._steps.pipe, "scheduler", None), "timesteps", None)
        return found if isinstance(found, Tensor) else None

    def skip(self, timestep: Any, ratio_at: Callable[[Tensor], float]) -> None:
        """A step at ratio 0 is left alone. ratio_at: of one of the pipeline's timesteps."""
        self._skipped = True
        if self._config.is_off:
            self._tell("ratio is 0" if self._config.ratio == 0.0 else self._no_step())
        elif self._is_new() and all(ratio_at(known) == 0.0 for known in self.timesteps().cpu()):
            self._tell(self._no_step())
        elif self._is_watched and self._steps.is_last(timestep) and self._reached_in is not self.timesteps():
            self._tell(self._no_step())  # the run began behind those steps (strength)

    def reach(self, is_watched: bool) -> None:
        """A step is to be merged. is_watched: neither compiled nor captured, so that each such call comes here."""
        self._reached, self._is_watched = True, self._is_watched and is_watched
        if is_watched:
            self._reached_in = self.timesteps()

    def end_call(self, kind: Hashable, call: CallOutcome) -> None:
        """kind: what calls whose layers are left alone for the same reasons have in common."""
        if call.merged:
            return
        if call.left:
            self._why[kind] = str(call)
        if kind in self._why:
            self._tell(self._why[kind])

    def end(self) -> None:
        """The model is called no more."""
        if self._skipped and not self._reached and not self._config.is_off and self.timesteps() is None:
            self._tell(self._no_step())

    def _no_step(self) -> str:
        why = why_no_step(self._config, "the run")
        return why + what_to_change([why])

    def _is_new(self) -> bool:
        """Whether this is another run of a pipeline than the one before."""
        timesteps = self.timesteps()
        if timesteps is None or (self._run is not None and self._run() is timesteps):
            return False
        self._run = weakref.ref(timesteps)
        self._said.clear()
        return True

    def _tell(self, why: str) -> None:
        self._is_new()
        if why not in self._said:
            self._said.add(why)
            self._say(f"nothing is merged: {why}")
