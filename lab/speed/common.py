"""What the benchmarks share: timing, the machine's description, output that a later run goes on with."""

from __future__ import annotations

import datetime
import importlib.metadata
import json
import platform
import statistics
import subprocess
import sys
import time
from argparse import ArgumentParser
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.benchmark import Timer

from shared_tome.autotune.layer import put_in_order

from ..store import Store, as_csv, rounded, save

__all__ = ["Store", "save"]  # kept beside what writes rows
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
BACKENDS = {
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "math": SDPBackend.MATH,
}


def priority(backend: str) -> list[SDPBackend]:
    """The attention kernels to try: `backend` first, then the others for heads that it does not take."""
    first = [] if backend == "default" else [BACKENDS[backend]]
    return first + [kernel for kernel in BACKENDS.values() if kernel not in first]


def attention_by(backend: str) -> Any:
    """A context in which torch's attention runs by `priority(backend)`."""
    if torch.cuda.is_available():
        put_in_order(torch.device("cuda"))  # or the first attention undoes what is chosen here
    return sdpa_kernel(priority(backend), set_priority=True)


def machine(device: str, commit: str | None = None) -> dict[str, str]:
    """Columns that say where and with what a row was measured."""
    if device == "cuda":
        name = torch.cuda.get_device_name()
        driver = _first_line(["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"])
    else:
        name, driver = f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads", ""
    return {
        "machine": name,
        "driver": driver,
        "torch": torch.__version__,
        "date": datetime.date.today().isoformat(),
        "commit": commit or _first_line(["git", "rev-parse", "--short", "HEAD"]) or "unknown",
    }


def versions(*packages: str) -> str:
    """The packages that are there, with their versions, in one cell."""
    found = []
    for package in packages:
        try:
            found.append(f"{package} {importlib.metadata.version(package)}")
        except importlib.metadata.PackageNotFoundError:
            continue
    if torch.cuda.is_available():
        found.append(f"cudnn {torch.backends.cudnn.version()}")
    return ", ".join(found)


def _first_line(command: list[str]) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parent, check=False)
    except OSError:
        return ""
    return done.stdout.strip().partition("\n")[0]


def microseconds(
    call: Callable[[], Any],
    *,
    graph: bool = False,
    min_time: float = 0.2,
    generators: Sequence[torch.Generator] = (),
) -> dict[str, float]:
    """The time of one call: {"median", "p20", "p80"} in microseconds, after warming up.

    graph: as a captured CUDA graph, so without the gaps between launches that eager running leaves.
    generators: what the call draws from; a captured graph must know them.
    """
    call()
    if graph:
        call = captured(call, lambda: generators)
    timer = Timer("call()", globals={"call": call}, num_threads=torch.get_num_threads())
    # The timer synchronises the GPU around each block of calls; ten blocks give a spread, two serve for a try.
    blocks = 10 if min_time >= 0.01 else 2
    number = max(1, round(min_time / blocks / timer.timeit(1).mean))
    return spread([1e6 * timer.timeit(number).mean for _ in range(blocks)])


def spread(times: Sequence[float]) -> dict[str, float]:
    """{"median", "p20", "p80"}."""
    if len(times) == 1:
        return {"median": times[0], "p20": times[0], "p80": times[0]}
    fifths = statistics.quantiles(times, n=5, method="inclusive")
    return {"median": statistics.median(times), "p20": fifths[0], "p80": fifths[-1]}


# Columns of a row: what they are of `spread`.
SPEEDUPS = {"speedup": "median", "speedup_p20": "p20", "speedup_p80": "p80"}


def speedup(base: Sequence[float], times: Sequence[float]) -> dict[str, str]:
    """How many times as fast as `base`, which was measured by turns with it: the median of the turns, p20 and p80.

    Turn against turn, so that a machine that is slower for a while is so for both.
    """
    found = spread([a / b for a, b in zip(base, times, strict=True)])
    return {name: f"{found[key]:.3f}" for name, key in SPEEDUPS.items()}


def step_columns(base: Sequence[float], times: Sequence[float] | None) -> dict[str, Any]:
    """A row's columns on the time of a step: milliseconds, and how many times as fast as `base`; seconds are given.

    times: None where nothing could be measured; the columns are empty then.
    """
    if not times:
        return dict.fromkeys(("step_ms", "step_p20", "step_p80", *SPEEDUPS), "")
    time = spread(times)
    found = {f"step_{name}": 1e3 * time[key] for name, key in (("ms", "median"), ("p20", "p20"), ("p80", "p80"))}
    return {**found, **speedup(base, times)}


def seconds_of(call: Callable[[], Any], device: str, repeats: int = 1) -> float:
    """How long one call takes, the GPU's work included. repeats: calls in a row that are timed together."""
    if device == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(repeats):
        call()
    if device == "cuda":
        torch.cuda.synchronize()
    return (time.perf_counter() - start) / repeats


def turn_of(call: Callable[[], Any], device: str, together: float = 0.05) -> Callable[[], list[float]]:
    """A turn for take_turns. Short calls run several in a row, about `together` seconds of them, as a sampler runs
    them: the launch of one then overlaps with the work of the one before."""
    repeats = min(20, max(1, round(together / seconds_of(call, device)))) if device == "cuda" else 1
    return lambda: [seconds_of(call, device, repeats)]


def take_turns(
    turns: dict[str, Callable[[], Sequence[Any]]], seconds: float, least: int = 5, most: int = 200
) -> dict[str, list[Any]]:
    """What each turn measured, one after the other and round after round, so that a drift of the machine meets all;
    every second round the other way round, so that none always comes first.

    Rounds are begun until `seconds` have passed, at least `least` and at most `most` of them.
    """
    found: dict[str, list[Any]] = {name: [] for name in turns}
    start = time.perf_counter()
    for done in range(most):
        if done >= least and time.perf_counter() - start >= seconds:
            break
        for name in list(turns)[:: -1 if done % 2 else 1]:
            found[name] += turns[name]()
    return found


def captured(call: Callable[[], Any], generators: Callable[[], Sequence[torch.Generator]] = list) -> Callable[[], None]:
    """Replays one call as a CUDA graph. generators: what the call draws from, asked for after warming up."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    for generator in generators():
        graph.register_generator_state(generator)
    with torch.cuda.graph(graph):
        call()
    return graph.replay


class Budget:
    """How long a run may go on. minutes: None for as long as it takes."""

    def __init__(self, minutes: float | None):
        self._end = None if minutes is None else time.monotonic() + 60 * minutes

    @property
    def spent(self) -> bool:
        return self._end is not None and time.monotonic() > self._end


def add_output_options(parser: ArgumentParser, resumes: bool = True) -> None:
    """What all benchmarks have in common on the command line."""
    parser.add_argument("--commit", default=None, help="where the tree is no git checkout")
    parser.add_argument("--json", action="store_true", help="one JSON list on stdout instead of CSV")
    kept = "; rows that are in it are not measured again" if resumes else ""
    parser.add_argument("--out", type=Path, help=f"a CSV file to write as well{kept}")
    if resumes:
        parser.add_argument("--minutes", type=float, default=None, help="begin nothing new after this time")


def show(rows: list[dict[str, Any]], as_json: bool) -> None:
    """The rows on stdout, as one JSON list or as CSV."""
    sys.stdout.write(json.dumps(rounded(rows), indent=1) + "\n" if as_json else as_csv(rows))
