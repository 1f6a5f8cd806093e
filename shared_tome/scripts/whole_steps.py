"""Whether merging pays in whole steps of a script's model (autotune/step.py), asked at the first call of each kind."""

from __future__ import annotations

import functools
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from ..autotune.detached import about_model, detached_model
from ..autotune.paying import Decision, Judge
from ..autotune.step import Ways, decision_of, is_timed, rows_of
from ..autotune.verdicts import Verdict, Verdicts, verdict_of
from ..config import ToMeConfig
from ..core.grid import Grid
from ..hooks.portable import Portable
from . import base
from .parallel import Shard, rejoin


@dataclass(frozen=True, eq=False)
class Step:
    """A call of the model whose whole step is asked about.

    config: that holds now. grid: the latent's. x: the latent [B, ...]. rows: how often its first row is run. about:
    what else its times depend on, in words. timed: whether it may be run at all. shard: this process's part, where
    several share the call.
    """

    model: nn.Module
    args: tuple
    kwargs: dict[str, Any]
    config: ToMeConfig
    grid: Grid
    x: Tensor
    rows: int
    about: str = ""
    timed: bool = True
    shard: Shard | None = None


class WholeSteps(Portable):
    """Of one model. owner: the hooks on it."""

    def __init__(self, owner: base.BaseAttachment):
        self._owner = owner
        self._verdicts = Verdicts()

    def afresh(self) -> dict[str, Any]:
        return {"_verdicts": Verdicts()}

    def is_known(self, kind: Hashable) -> bool:
        """Whether a kind of steps need not be asked about; those that are only tried never are."""
        return self._owner.judge is not None or self._verdicts.known(kind) is not None

    def waits(self, kind: Hashable) -> bool:
        """Whether such steps wait for the processor, as far as is known."""
        known = self._verdicts.known(kind)
        return known is None or known.judge.waits

    def why_not_paid(self, step: Step, kind: Hashable) -> str | None:
        """Why nothing of such steps is merged, or None; again after a while where one process could not measure it."""
        log = self._owner.decided
        if log.step(step.config, step.grid) is None and (base.captures(step.x.device) or base.compiles()):
            return None

        def ask() -> Verdict:
            return verdict_of(log, step.config, step.grid, functools.partial(self._decision, step))

        return self._verdicts.of(kind, ask, again=step.timed and step.shard is None).unpaid

    def _decision(self, step: Step, config: ToMeConfig) -> Decision | None:
        """What is known of the times of a model's steps, whatever their place in the schedule; None: not measured, or
        not to be. Copies without foreign hooks are run, so that nobody else sees a call more."""
        if not step.timed:
            return None
        model, x, joined = step.model, step.x, step.shard
        whole = detached_model(model, rejoin) if is_timed(config, x.device) and not model.training else None
        if whole is None and joined is None:
            return None

        def both() -> Ways:
            if whole is None:
                raise ValueError("another's code stands in the place of a part of the model")
            given, named = rows_of((step.args, step.kwargs), x.shape[0], step.rows)

            def merged(judge: Judge) -> Callable[[], Any]:
                made = detached_model(model, rejoin)  # which is whole's like
                self._owner.try_on(made, config, judge)
                return lambda: made(*given, **named)

            return lambda: whole(*given, **named), merged

        words = [about_model(model, x.device), *([step.about] if step.about else [])]
        words += [f"in {joined.count} processes"] if joined is not None else []
        return decision_of(model, x.dtype, x.device, step.grid, config, both, about=", ".join(words), joined=joined)
