"""How far a sampler is, and which draw belongs there: told by noise levels alone.

A picture may be sampled in several parts (ComfyUI's KSampler (Advanced), a base model and a refiner). Each part knows
its own levels, not the others' and not the number of its first step. So nothing here counts steps. Percent is meant
as ComfyUI's nodes with `start_percent` mean it: the share of the model's time, 0 at its highest level.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

_STEPS = 999  # of a table: diffusion models are trained at 1,000 levels
_WHOLE = 3e-3  # off a whole number: more than rounding makes, and seldom by chance
_SAME = 1e-4  # levels that differ by less, relative to the level, are one


def percent_table(percent_to_sigma: Callable[[float], float]) -> Tensor:
    """[1000] float32, falling: the levels at 0, 1/999, 2/999 ... 1 of the model's time.

    percent_to_sigma: a host's. Hosts answer 0 and 1 with numbers beyond the model's levels, so these are not asked.
    """
    percents = [1e-7, *(number / _STEPS for number in range(1, _STEPS)), 1 - 1e-7]
    return torch.tensor([float(percent_to_sigma(percent)) for percent in percents], dtype=torch.float32)


def percent_of(levels: Tensor, table: Tensor) -> Tensor:
    """Noise levels [n] -> their percent [n], 0 to 1; linear between the table's entries.

    0 where a level is above the table; at most one entry behind 1 where it is below: a sampler's last level is 0.
    """
    # Only exact or correctly rounded operations: a level's percent does not depend on the levels beside it.
    below = torch.searchsorted(-table, -levels).clamp(1, _STEPS)
    above = table[below - 1]
    way = (above - levels) / (above - table[below]).clamp_min(1e-30)
    return (below - 1 + way.clamp(0.0, 2.0)) / _STEPS


def percent_of_level(level: Tensor, table: Tensor) -> float:
    """A noise level [] or [B] -> its percent, of the first row. Synchronises. Rounded, for comparisons with options."""
    level = level.detach().reshape(-1)[:1].to("cpu", torch.float32)
    return min(1.0, round(float(percent_of(level, table)), 4))


def percent_of_time(time: Any) -> float:
    """The same for a timestep, 999 to 0, that a model is called with: a number, or [] or [B]. Synchronises."""
    first = float(time.detach().reshape(-1)[0] if isinstance(time, Tensor) else time)
    return min(1.0, max(0.0, round(1.0 - first / _STEPS, 4)))


def percent_of_flow(level: float, shift: float) -> float:
    """The same for a flow's noise level, 1 to 0, that is shift * t / (1 + (shift - 1) * t) at the time t, 1 to 0.

    Source: Esser et al. 2024 (arXiv 2403.03206), equation 23. shift: above 0.
    """
    time = level / (shift - (shift - 1.0) * level)
    return min(1.0, max(0.0, round(1.0 - time, 4)))


@dataclass(frozen=True)
class Draws:
    """The draw's number for each of a sampler's levels.

    levels: [n], as the sampler has them, falling or (unsampling) rising. at: [n] int64, of calls at a level. between:
    [n] int64, of calls between the level before and this one, which some samplers make.
    """

    levels: Tensor
    at: Tensor
    between: Tensor

    @classmethod
    def of(cls, levels: Tensor, table: Tensor) -> Draws:
        """levels: [n] float32, n at least 2; table: percent_table.

        The number is percent / (percent of the next level - percent), rounded: 0, 1, 2 ... where steps are alike in
        time, which is what the walk through a run's tokens wants (sampling.py). The same holds for steps alike in
        the 7th root of the level (Karras et al. 2022, equation 5) and in its logarithm ("exponential"). Elsewhere it
        is mostly another number for each level. A level and the next are all that it takes: a part of a run has both.
        """
        share = (levels / table[0]).clamp(0.0, 1.0)
        logs = torch.where(share > 0.0, -share.log(), torch.nan)
        ways = torch.stack((percent_of(levels, table), 1.0 - share ** (1 / 7), logs))  # (3, n), rising from 0
        wide = (ways[:, 1:] - ways[:, :-1]).abs().clamp_min(1e-6)
        by_next, by_last = _whole(ways[:, :-1] / wide), _whole(ways[:, 1:] / wide)
        return cls(levels, torch.cat((by_next, by_last[-1:])), torch.cat((by_next[:1], by_last)))

    def to(self, device: torch.device) -> Draws:
        return Draws(self.levels.to(device), self.at.to(device), self.between.to(device))

    def number(self, level: Tensor) -> Tensor:
        """The number of a call at a level [], as a 0-d tensor on the device: no synchronisation."""
        place = place_of(self.levels, level).clamp_max(len(self.levels) - 1)[None]
        # Not by [place]: a single number would be asked of the device.
        found, at, between = (x.index_select(0, place)[0] for x in (self.levels, self.at, self.between))
        return torch.where((found - level).abs() <= _SAME * level, at, between)


def _whole(numbers: Tensor) -> Tensor:
    """[3, n] -> [n] int64: the first of three that is a whole number, else the first rounded."""
    rounded = numbers.round()
    is_whole = (numbers - rounded).abs() < _WHOLE
    found = rounded[0]
    for number, fits in zip(reversed(rounded), reversed(is_whole), strict=True):
        found = torch.where(fits, number, found)
    return found.long()


def place_of(levels: Tensor, level: Tensor) -> Tensor:
    """How many of a sampler's levels [n] come before a level []: a 0-d tensor on the device, no synchronisation."""
    if len(levels) < 2:
        return torch.zeros((), dtype=torch.int64, device=levels.device)
    falls = torch.sign(levels[0] - levels[-1])  # -1 where a sampler adds noise
    return (falls * (levels - level) > _SAME * level).sum()
