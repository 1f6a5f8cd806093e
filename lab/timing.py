"""One clock for the CPU and for GPUs, and what is told of many times."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch


class Moment:
    """Now, on the device's own clock. The difference of two is milliseconds, the GPU's work included."""

    def __init__(self, device: torch.device | str):
        self.event = torch.cuda.Event(enable_timing=True) if torch.device(device).type == "cuda" else None
        self.at = time.perf_counter()
        if self.event is not None:
            self.event.record()

    def __sub__(self, earlier: Moment) -> float:
        if self.event is None:
            return 1e3 * (self.at - earlier.at)
        self.event.synchronize()
        return earlier.event.elapsed_time(self.event)


def spread(times: Sequence[float]) -> dict[str, float]:
    """{"median", "p20", "p80"}."""
    return dict(zip(("median", "p20", "p80"), np.quantile(times, (0.5, 0.2, 0.8)).tolist(), strict=True))


def columns(found: dict[str, float] | None, median: str, stem: str = "") -> dict[str, Any]:
    """A row's columns of a spread, by the name of the median's; empty where nothing could be measured."""
    names = {"median": median, "p20": f"{stem}p20", "p80": f"{stem}p80"}
    return {name: found[key] if found else "" for key, name in names.items()}


def take_turns(
    turns: dict[Any, Callable[[], Sequence[Any]]], seconds: float, least: int = 5, most: int = 200
) -> dict[Any, list[Any]]:
    """What each turn measured, one after the other and round after round, so that a drift of the machine meets all;
    every second round the other way round, so that none always comes first.

    Rounds are begun until `seconds` have passed, at least `least` and at most `most` of them.
    """
    found: dict[Any, list[Any]] = {name: [] for name in turns}
    start = time.perf_counter()
    for done in range(most):
        if done >= least and time.perf_counter() - start >= seconds:
            break
        for name in list(turns)[:: -1 if done % 2 else 1]:
            found[name] += turns[name]()
    return found
