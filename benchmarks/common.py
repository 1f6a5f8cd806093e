"""What the benchmarks share: timing, the machine's description, output."""

from __future__ import annotations

import csv
import datetime
import io
import json
import platform
import statistics
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.utils.benchmark import Timer

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


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


def _first_line(command: list[str]) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parent, check=False)
    except OSError:
        return ""
    return done.stdout.strip().partition("\n")[0]


def microseconds(call: Callable[[], Any], *, graph: bool = False, min_time: float = 0.2) -> dict[str, float]:
    """The time of one call: {"median", "p20", "p80"} in microseconds, after warming up.

    graph: as a captured CUDA graph, so without the gaps between launches that eager running leaves.
    """
    call()
    if graph:
        call = _captured(call)
    timer = Timer("call()", globals={"call": call}, num_threads=torch.get_num_threads())
    # The timer synchronises the GPU around each block of calls; ten blocks give a spread.
    number = max(1, round(min_time / 10 / timer.timeit(1).mean))
    times = [1e6 * timer.timeit(number).mean for _ in range(10)]
    steps = statistics.quantiles(times, n=5, method="inclusive")
    return {"median": statistics.median(times), "p20": steps[0], "p80": steps[-1]}


def _captured(call: Callable[[], Any]) -> Callable[[], None]:
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph.replay


def as_csv(rows: list[dict[str, Any]]) -> str:
    """The rows as CSV text, floats to two places."""
    text = io.StringIO()
    if rows:
        writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(_rounded(rows))
    return text.getvalue()


def save(rows: list[dict[str, Any]], out: Path | None) -> None:
    """Write the rows to a CSV file, if one is named."""
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(as_csv(rows), encoding="utf-8")


def show(rows: list[dict[str, Any]], as_json: bool) -> None:
    """The rows on stdout, as one JSON list or as CSV."""
    sys.stdout.write(json.dumps(_rounded(rows), indent=1) + "\n" if as_json else as_csv(rows))


def _rounded(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{key: round(value, 2) if isinstance(value, float) else value for key, value in row.items()} for row in rows]
