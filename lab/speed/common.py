"""What the benchmarks share: arguments, timing, the machine's description, a run that goes on where one stopped."""

from __future__ import annotations

import datetime
import importlib.metadata
import json
import os
import platform
import subprocess
import sys
from argparse import ArgumentParser, Namespace, RawDescriptionHelpFormatter
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.benchmark import Timer
from tqdm import tqdm

from shared_tome.autotune.layer import put_in_order
from shared_tome.autotune.timing import seconds
from shared_tome.methods import PRESETS

from ..store import Budget, Store, as_csv, rounded
from ..timing import columns, spread

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
    commit = commit or _first_line(["git", "rev-parse", "--short", "HEAD"]) or "unknown"
    today = datetime.date.today().isoformat()
    return {"machine": name, "driver": driver, "torch": torch.__version__, "date": today, "commit": commit}


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


# -- times -----------------------------------------------------------------------------------------------------------


def microseconds(
    call: Callable[[], Any],
    *,
    graph: bool = False,
    min_time: float = 0.2,
    generators: Sequence[torch.Generator] = (),
    together: int = 1,
) -> dict[str, float]:
    """The time of one call: {"median", "p20", "p80"} in microseconds, after warming up.

    graph: as a captured CUDA graph, so without the gaps between launches that eager running leaves.
    generators: what the call draws from; a captured graph must know them.
    together: calls in a row that are timed as one, since a graph's replay costs about as much as a small kernel.
    """

    def several() -> None:
        for _ in range(together):
            call()

    several()
    timed = captured(several, lambda: generators) if graph else several
    timer = Timer("call()", globals={"call": timed}, num_threads=torch.get_num_threads())
    # The timer synchronises the GPU around each block of calls; ten blocks give a spread, two serve for a try.
    blocks = 10 if min_time >= 0.01 else 2
    number = max(1, round(min_time / blocks / timer.timeit(1).mean))
    return spread([1e6 * timer.timeit(number).mean / together for _ in range(blocks)])


def speedup(base: Sequence[float], times: Sequence[float] | None) -> dict[str, str]:
    """How many times as fast as `base`, which was measured by turns with it: the median of the turns, p20 and p80.

    Turn against turn, so that a machine that is slower for a while is so for both. times: None where nothing could be
    measured.
    """
    found = spread([a / b for a, b in zip(base, times, strict=True)]) if times else None
    return {name: f"{x:.3f}" if found else "" for name, x in columns(found, "speedup", "speedup_").items()}


def step_columns(base: Sequence[float], times: Sequence[float] | None) -> dict[str, Any]:
    """A row's columns on the time of a step: milliseconds, and how many times as fast as `base`; seconds are given."""
    found = spread([1e3 * time for time in times]) if times else None
    return {**columns(found, "step_ms", "step_"), **speedup(base, times)}


def seconds_of(call: Callable[[], Any], device: str, repeats: int = 1) -> float:
    """How long one call takes, the GPU's work included. repeats: calls in a row that are timed together."""
    return seconds(call, torch.device(device), repeats)


def turn_of(call: Callable[[], Any], device: str, together: float = 0.05) -> Callable[[], list[float]]:
    """A turn for take_turns. Short calls run several in a row, about `together` seconds of them, as a sampler runs
    them: the launch of one then overlaps with the work of the one before."""
    repeats = min(20, max(1, round(together / seconds_of(call, device)))) if device == "cuda" else 1
    return lambda: [seconds_of(call, device, repeats)]


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


# -- a run -----------------------------------------------------------------------------------------------------------


class Arguments(ArgumentParser):
    """What all benchmarks have in common on the command line.

    half: the dtype on a GPU, where the CPU has float32; "" where there is no choice. rounds: seconds for the rounds of
    one job, and how many rounds are run in any case. comfyui: whether a ComfyUI is started. steps: of each run of its
    sampler; 0 where these are not timed.
    """

    def __init__(
        self, doc: str, half: str = "", rounds: tuple[float, int] | None = None, comfyui: bool = False, steps: int = 0
    ):
        super().__init__(description=doc, formatter_class=RawDescriptionHelpFormatter)
        self.steps, self.defaults = steps, {"dtype": (half, "float32")} if half else {}
        cuda, named = torch.cuda.is_available(), os.environ.get("COMFYUI_DIR")
        self.add_argument("--device", default="cuda" if cuda else "cpu", choices=["cpu", "cuda"])
        if half:
            self.add_argument("--dtype", choices=list(DTYPES), help=f"{half} on a GPU, float32 on the CPU")
        if rounds:
            self.add_argument("--seconds", type=float, default=rounds[0], help="time for the rounds of one job")
            self.add_argument("--least", type=int, default=rounds[1], help="rounds that are run in any case")
        if comfyui:
            self.add_argument("--comfyui", type=Path, default=named, required=named is None)
        if steps:
            self.add_argument("--steps", type=int, default=steps, help="of each run; the first two do not count")
        self.add_argument("--commit", help="where the tree is no git checkout")
        self.add_argument("--json", action="store_true", help="one JSON list on stdout instead of CSV")
        self.add_argument("--out", type=Path, help="a CSV file to write as well; rows in it are not measured again")
        self.add_argument("--minutes", type=float, help="begin nothing new after this time")

    def some_of(self, name: str, choices: Iterable[Any], gpu: Sequence[Any], cpu: Sequence[Any] = (), **more: Any):
        """Some of these. gpu, cpu: those where none is named; without cpu the same on both."""
        choices, gpu = choices and list(choices), list(gpu)
        told = f"default: {'all' if gpu == choices else ', '.join(map(str, gpu))}"
        told += f"; on the CPU {', '.join(map(str, cpu))}" if cpu else ""
        more["help"] = f"{more['help']} ({told})" if "help" in more else told
        self.defaults[self.add_argument(name, nargs="+", choices=choices, **more).dest] = (gpu, list(cpu or gpu))

    def parsed(self) -> Namespace:
        """With `on_gpu` and what nobody named; a ComfyUI that is named runs in this process from now on."""
        args = self.parse_args()
        args.on_gpu = args.device == "cuda"
        for name, (gpu, cpu) in self.defaults.items():
            setattr(args, name, getattr(args, name) or (gpu if args.on_gpu else cpu))
        if self.steps and args.steps < 3:
            self.error(f"--steps must be 3 or more, for two do not count, got {args.steps}")
        if "comfyui" in args:
            from installer import inprocess

            inprocess.start(Path(args.comfyui), ["--gpu-only"] if args.on_gpu else ["--cpu"], absent=["av"])
        return args


Job = dict[str, Any]
"""The columns that name what is measured together."""


def run_jobs(
    args: Namespace,
    jobs: Sequence[Job],
    measure: Callable[..., Iterable[dict[str, Any]]],
    names: Callable[[Job], Sequence[Any]] | None = None,
    model: Callable[[str], Any] | None = None,
    by: str = "variant",
    first: Sequence[Any] = ("unmerged",),
    packages: Sequence[str] = ("triton",),
    about: dict[str, str] | None = None,
) -> None:
    """Measures what the file lacks and shows all rows.

    names: what a job has in the column `by` (in several: tuples); None: args.variants. measure(job, names, args): the
    rows of a job for these names, without the job's own columns; before these the model where `model` makes one by its
    name. first: names that every job measures. about: columns in place of the machine's own.
    """
    told = by.split()
    store, budget = Store(args.out, (*jobs[0], *told)), Budget(args.minutes)
    stamp = {**machine(args.device, args.commit), "versions": versions(*packages), **(about or {})}
    with torch.no_grad():
        for job in tqdm(jobs, file=sys.stderr):
            own = names(job) if names else args.variants
            keys = {name: zip(told, name if told[1:] else (name,), strict=True) for name in own}
            wanted = [name for name, key in keys.items() if not store.has(**job, **dict(key))]
            if not wanted:
                continue
            if budget.spent:
                break
            given = (model(job["model"]),) if model else ()
            for row in measure(*given, job, list(dict.fromkeys([*first, *wanted])), args):
                store.add({**job, **row, **stamp})
            if args.on_gpu:
                torch.cuda.empty_cache()
    sys.stdout.write(json.dumps(rounded(store.rows), indent=1) + "\n" if args.json else as_csv(store.rows))


MARKS: dict[str, dict[str, Any]] = {
    "own token": {"own_token": True},
    "shared": {"share_match": True},
    "unweighted": {"proportional": False},
    "where it pays": {"levels": "auto"},
    "levels auto": {"levels": "auto"},
}


def options_of(name: str) -> dict[str, Any]:
    """Of a method, a ratio, a start and marks, or of a preset: "sample 0.9375 from 0.1", "merge 0.5, shared"."""
    whole, *marks = name.split(", ")
    found = dict(PRESETS[whole].options) if whole in PRESETS else {}
    if not found:
        head, _, start = whole.partition(" from ")
        method, ratio = head.split()
        found = {"method": method, "ratio": float(ratio), "start": float(start or 0), "own_token": method != "sample"}
    for mark in marks:
        found |= MARKS[mark]
    return found
