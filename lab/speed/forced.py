"""ComfyUI's own EasyCache and LazyCache that skip the steps they are told to.

With random weights the rule's own decision means nothing. So the node's code runs, with all that it looks at and
keeps, and only its threshold is another in each step: above or below whatever it finds.
"""

from __future__ import annotations

import math
from typing import Any

import torch

START, END = 0.15, 0.95
"""The nodes' own start_percent and end_percent."""


class TooManyError(ValueError):
    """The rule could not skip so many steps."""


def skippable(kind: str, steps: int) -> list[int]:
    """The steps that the rule could skip: after those it learns from, before `end_percent`. A step at `start_percent`
    itself is left out, since rounding decides whether it counts."""
    first = next(step for step in range(steps + 2) if step > START * steps + 1e-6)
    learns = 2 if kind == "EasyCache" else 1  # LazyCache has seen the step before the start
    return [step for step in range(first + learns, steps) if step < END * steps]


def skipped(kind: str, steps: int, share: float) -> list[int]:
    """The steps to skip, spread evenly over those that can be, so that a share of all steps is.

    Raises TooManyError where the rule could not skip as many.
    """
    can, count = skippable(kind, steps), round(share * steps)
    if not 0 <= count <= len(can):
        raise TooManyError(f"{kind} can skip {len(can)} of {steps} steps, so not a share of {share:g}")
    return [can[int((i + 0.5) * len(can) / count)] for i in range(count)]


def cached(model: Any, kind: str, skips: list[int]) -> tuple[Any, list[int]]:
    """A clone of a ModelPatcher with the node on it, and the steps, counted from 0, that the last sampling skipped."""
    from comfy_extras import nodes_easycache

    done: list[int] = []

    class Forced(getattr(nodes_easycache, f"{kind}Holder")):
        """The step is the number of noise levels seen so far; each call asks is_past_end_timestep first."""

        level, step = None, -1
        _total: Any = 0.0

        @property
        def cumulative_change_rate(self) -> Any:
            return self._total

        @cumulative_change_rate.setter
        def cumulative_change_rate(self, value: Any) -> None:
            # Random weights may give what is no number, which is below no threshold.
            self._total = value.nan_to_num() if isinstance(value, torch.Tensor) else value

        @property
        def reuse_threshold(self) -> float:
            return math.inf if self.step in skips else -math.inf

        @reuse_threshold.setter
        def reuse_threshold(self, value: float) -> None:
            pass

        def is_past_end_timestep(self, timestep: Any) -> bool:
            level = timestep[0].item()
            if level != self.level:
                self.level, self.step = level, self.step + 1
            return super().is_past_end_timestep(timestep)

        def apply_cache_diff(self, *args: Any, **kwargs: Any) -> Any:
            if self.step not in done:
                done.append(self.step)
            return super().apply_cache_diff(*args, **kwargs)

        def clone(self) -> Any:  # before each sampling
            done.clear()
            return make()

    def make() -> Forced:
        return Forced(0.2, START, END, 8, False, False, output_channels=model.model.latent_format.latent_channels)

    clone = getattr(nodes_easycache, f"{kind}Node").execute(model, 0.2, START, END, False).args[0]
    clone.model_options["transformer_options"]["easycache"] = make()
    return clone, done
