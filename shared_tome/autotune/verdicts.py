"""What becomes of a model's steps by what is known of their times (step.py), or by what is set in its place."""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Callable, Hashable
from dataclasses import dataclass

from ..config import ToMeConfig
from ..core.grid import Grid
from .decision_log import DecisionLog
from .paying import Decision, Given, Judge
from .store import RETRY


@dataclass(frozen=True)
class Verdict:
    """Of steps of one kind. found: by what they are judged; None: nothing is known of them, so they are merged."""

    found: Decision | Given | None = None

    @property
    def unpaid(self) -> str | None:
        """Why nothing of such steps is merged, for people, or None."""
        found = self.found
        if found is None or found.pays():
            return None
        if isinstance(found, Given):
            return found.reason
        whole, merged = found.full_us / 1e3, found.merged_us / 1e3
        return f"merging does not pay here: a step takes {whole:.1f} ms without and {merged:.1f} ms with it"

    @property
    def judge(self) -> Judge:
        """A new one, of their layers."""
        return Judge(waits=self.found is None or not self.found.busy)

    @property
    def speedup(self) -> float | None:
        """How many times as fast a merged step was measured to be; None where none was run, or none is merged."""
        is_measured = isinstance(self.found, Decision) and self.found.merged_us > 0.0
        return self.found.full_us / self.found.merged_us if is_measured and self.unpaid is None else None


def verdict_of(
    log: DecisionLog,
    config: ToMeConfig,
    grid: Grid,
    measured: Callable[[ToMeConfig], Decision | None],
    is_told: bool = True,
) -> Verdict:
    """Steps of a latent on a grid, as they are set or as they were measured; told in the log.

    measured: gives what is known of steps that are merged by a config; asked only where they are not set. is_told:
    whether steps are told of which nothing is known.
    """
    found = log.step(config, grid)
    verdict = Verdict(measured(_kept(config)) if found is None else found)
    if is_told or verdict.found is not None:
        log.made_step(config, grid, verdict.found, verdict.unpaid is None)
    return verdict


# ComfyUI asks in each step.
@functools.lru_cache(maxsize=256)
def _kept(config: ToMeConfig) -> ToMeConfig:
    """What is measured is kept for steps in any place of a schedule, and for other texts of decisions."""
    return config.replace(start=0.0, end=1.0, exact_every=0, decisions="")


class Verdicts:
    """Of the steps of one model, by their kind: each is asked for once."""

    def __init__(self) -> None:
        self._known: dict[Hashable, tuple[Verdict, float]] = {}  # and until when, by the monotonic clock

    def known(self, kind: Hashable) -> Verdict | None:
        """None where a kind of steps is to be asked about."""
        verdict, until = self._known.get(kind, (None, 0.0))
        return verdict if time.monotonic() < until else None

    def of(self, kind: Hashable, ask: Callable[[], Verdict], again: bool = True) -> Verdict:
        """What is known, or else what `ask` says. again: whether to ask again after a while where nothing is known."""
        verdict = self.known(kind)
        if verdict is None:
            verdict = ask()
            lasts = RETRY if again and verdict.found is None else math.inf
            self._known[kind] = verdict, time.monotonic() + lasts
        return verdict
