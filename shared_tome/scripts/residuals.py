"""What some exact steps leave for the others (merging/residual.py) in the runs of a script's U-Net."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..config import ToMeConfig
from ..merging.residual import COMPILED, ResidualCall, Residuals
from . import base
from .steps import Steps


class RunResiduals:
    """Of one model, a run at a time. A pipeline's scheduler tells its runs apart.

    What is kept goes with the run's last call, with the prompt that its pipeline holds (after an error, or where a
    part is run), with the next run, or with the hooks.
    """

    def __init__(self, steps: Steps, say: Callable[[str], None]):
        self._steps, self._say = steps, say
        self._now: Residuals | None = None
        self._run = 0  # its number (Steps.runs)
        self._prompt: weakref.ref | None = None  # the last call's
        self._tied: weakref.finalize | None = None  # to a prompt

    def __reduce__(self) -> tuple:
        return RunResiduals, (self._steps, self._say)  # a copy's run is its own

    def call(self, config: ToMeConfig, timestep: Any, x: Tensor, prompt: Any, compiled: bool) -> ResidualCall | None:
        """A call of the model; None where nothing is kept. config: of this step; x: the latent [B, C, H, W]; compiled:
        whether torch.compile runs it, or its blocks."""
        if not config.keeps_exact:
            return None
        if compiled or base.captures(x.device):
            self._say(COMPILED)
            return None
        entry, run = self._steps.entry(timestep), self._steps.runs
        if self._now is None or self._run != run:
            self.end()
            self._now, self._run, self._tied = Residuals(config.exact_every, self._say), run, None
        if config.ratio == 0.0:
            self._now.forget()
            return None
        self._tie(prompt)
        if entry is None:
            return self._now.call(None, 0, None, ("rows",))
        draw = self._steps.step(timestep, torch.device("cpu")).to(x.device)
        return self._now.call(self._steps.number, draw, entry, ("rows",), config.ratio)

    def _tie(self, prompt: Any) -> None:
        """What is kept goes with a prompt that comes again: a pipeline's own. A new one in each call ends nothing."""
        if not isinstance(prompt, Tensor) or (self._tied is not None and self._tied.alive):
            return
        if self._prompt is not None and self._prompt() is prompt:
            self._tied = weakref.finalize(prompt, self._now.forget)  # a run may go on with another one
            self._tied.atexit = False
        self._prompt = weakref.ref(prompt)

    def end_call(self, failed: bool) -> None:
        """The model has given its output, or raised."""
        if self._now is not None and (failed or self._steps.is_over):
            self.end()

    def end(self) -> None:
        """What was kept goes."""
        if self._now is not None:
            self._now.end()
            self._now = None
