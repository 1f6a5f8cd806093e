"""How long a call takes on a GPU."""

from __future__ import annotations

import functools
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

from .paying import Decision

_REPEATS, _ROUNDS = 16, 5  # 16: about as many layers as share a draw or a split (call.py)
_CALLS = 2  # of a step, which follow each other as a sampler's do


def compared(
    full: Callable[[], Any], merged: Callable[[], Any], device: torch.device, repeats: int = _REPEATS
) -> Decision:
    """The decision of a layer, or of more than one, run whole and merged."""
    whole, less = times_of(full, device, repeats), times_of(merged, device, repeats)
    return Decision(whole[0], less[0], max(0.0, less[1] - whole[1]))


def times_of(call: Callable[[], Any], device: torch.device, repeats: int = _REPEATS) -> tuple[float, float]:
    """(microseconds on the GPU, of the processor) of one call: the median of some rounds, and the least.

    The GPU is kept busy while the calls are queued, so the gaps between launches do not count.
    """
    stream = torch.cuda.current_stream(device)
    with torch.cuda.device(device):
        for _ in range(3):
            call()  # kernels are compiled and loaded
        stream.synchronize()
        start = time.perf_counter()
        for _ in range(repeats):
            call()
        busy = 2.0 * (time.perf_counter() - start)
        gpu, cpu = [], []
        for _ in range(_ROUNDS):
            first, last = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            stream.synchronize()
            torch.cuda._sleep(int(min(busy, 0.05) * 2e9))  # cycles; no GPU runs faster than 2 GHz by much
            first.record(stream)
            start = time.perf_counter()
            for _ in range(repeats):
                call()
            cpu.append(time.perf_counter() - start)
            last.record(stream)
            last.synchronize()
            gpu.append(first.elapsed_time(last) * 1e-3)
    # What disturbs a processor only adds to its time.
    return tuple(1e6 * taken / repeats for taken in (statistics.median(gpu), min(cpu)))


def seconds(call: Callable[[], Any], device: torch.device, calls: int = _CALLS) -> float:
    """Of one call as a sampler waits for it, the mean of some in a row: the processor's time and the device's."""
    _wait(device)
    start = time.perf_counter()
    for _ in range(calls):
        call()
    _wait(device)
    return (time.perf_counter() - start) / calls


seconds_of_one = functools.partial(seconds, calls=1)
"""The same of a call by itself, of which there may have been none before."""


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
