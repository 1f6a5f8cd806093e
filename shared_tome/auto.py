"""levels "auto" on a GPU: whether merging a layer pays there, measured once and kept in a file.

What a layer takes whole and merged depends on the GPU, the attention kernel and the host's processor, and no rule of
thumb holds for all. So at its first use a layer of that shape is run a few times on made-up tokens, both ways,
everything that merging needs included. The outcome is kept for the device, and with it the picture that a seed gives
on it. Large layers always pay and are not measured; nor is anything on other devices.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import logging
import math
import os
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .attention import attend_tokens
from .config import ToMeConfig
from .grid import Grid

log = logging.getLogger("ToMe")

# The folder of the file; an empty name keeps nothing.
FOLDER = "TOME_CACHE"
# 0 measures nothing: every layer with at least min_tokens is merged.
SWITCH = "TOME_MEASURE"
FORM = 4  # of the file; one of another form is written anew
# From here on attention takes so long that merging pays on any device (docs/speed.md).
ALWAYS = 16384
# Merging must save this share of the layer: what is measured scatters by a few percent.
MARGIN = 0.03
# A picture with guidance. Never the rows of the call: hosts split batches as memory and GPUs allow, and a picture in a
# batch is to be that which it is alone. More rows pay sooner, so this is on the safe side.
ROWS = 2
_SWITCHES = {1: "flash", 2: "mem_efficient", 3: "cudnn"}  # torch.backends.cuda.*_sdp_enabled, by torch's numbers
_REPEATS, _ROUNDS = 16, 5  # 16: about as many layers as share a draw or a split (call.py)

# attention(q, k, v, heads, scale=None): [B, N, H * d], [B, M, H * d] twice -> [B, N, H * d]
Attention = Callable[..., Tensor]
# Of tokens x [B, N, C] that may be written to: what runs the host's own block on them, or None where there is none.
Block = Callable[[Tensor], "Callable[[], Any] | None"]


def ways(config: ToMeConfig, keeps_own: bool) -> list[str]:
    """The options that a layer's times depend on, in words."""
    how = [config.method, f"{config.ratio:.4f}"]
    if config.kind.matches:
        how += ["x".join(map(str, config.stride)), config.partition, config.reduce, f"share {config.share_match}"]
    return [*how, f"proportional {config.proportional}", *(["own"] if keeps_own else [])]


@dataclass(frozen=True)
class Case:
    """A layer that is measured: the grid of its tokens, channels, heads, and how it would be merged.

    attention: the name of the function; kernels: those of torch's that it would try, in its order, where an adapter
    knows them.
    """

    grid: Grid
    channels: int
    heads: int
    dtype: torch.dtype
    config: ToMeConfig
    attention: str = "torch"
    kernels: tuple[str, ...] = ()

    @property
    def keeps_own(self) -> bool:
        return bool(self.kernels) and self.config.keeps_own

    @functools.cached_property
    def key(self) -> str:
        """What tells it from other layers on one device."""
        grid = "x".join(map(str, self.grid))
        shape = [grid, f"{self.channels}/{self.heads}", str(self.dtype).removeprefix("torch.")]
        how = ways(self.config, self.keeps_own)
        return ", ".join([*shape, " ".join([self.attention, *self.kernels]), *how])


@dataclass(frozen=True)
class Verdict:
    """What was measured, microseconds of one layer: on the GPU whole and merged, and what merging takes the
    processor longer, which counts where steps wait for it.

    block_us, block_cpu_us: the layer's whole block unmerged, of the GPU and of the processor; 0 where not known.
    """

    full_us: float
    merged_us: float
    cpu_us: float
    block_us: float = 0.0
    block_cpu_us: float = 0.0

    def pays(self, waits: bool = True) -> bool:
        """Whether the layer is to be merged. waits: for the processor, as steps without a compiled graph do."""
        return self.saves_us > MARGIN * self.full_us and not (waits and self._waits)

    @property
    def _waits(self) -> bool:
        """Whether the processor would need longer for a merged block than the GPU does for an unmerged one; where no
        block is known, longer than is saved."""
        if self.block_us > 0.0:
            return self.block_cpu_us + self.cpu_us >= self.block_us
        return self.cpu_us >= self.saves_us

    @property
    def saves_us(self) -> float:
        return self.full_us - self.merged_us

    @functools.cached_property
    def reason(self) -> str:
        """Why a layer is left alone, for people."""
        if self.block_us > 0.0 and self._waits and self.saves_us > MARGIN * self.full_us:
            return (
                f"merging does not pay here: a block takes the processor {self.block_cpu_us:.0f} us and the GPU "
                f"{self.block_us:.0f}, so its steps wait for the processor"
            )
        return (
            f"merging does not pay here: it saves {self.saves_us:.0f} of {self.full_us:.0f} us and takes the processor "
            f"{self.cpu_us:.0f} us longer"
        )


class Verdicts:
    """All verdicts of a device, in a file that other processes may write too. Safe to use from several threads.

    path: None keeps them in memory alone. A damaged file counts as none and is written anew.
    """

    def __init__(self, path: Path | None):
        self.path = path
        self._lock = threading.RLock()
        self._known: dict[str, Verdict] | None = None
        self._failed: set[str] = set()

    def get(self, key: str, measured: Callable[[], Verdict]) -> Verdict | None:
        """What is known of a layer; what is not is measured, by one thread at a time, and kept.

        None where measuring fails, which is said once and not tried again in this process.
        """
        with self._lock:
            if self.known(key) is None and key not in self._failed:
                try:
                    self._known[key] = measured()
                except Exception as error:  # short of memory, or whatever a foreign attention raises
                    self._failed.add(key)
                    log.warning("[ToMe] %s: not measured (%s: %s), so merged", key, type(error).__name__, error)
                else:
                    self._write()
            return self._known.get(key)

    def known(self, key: str) -> Verdict | None:
        """What is known of a layer, measured by this process or an earlier one."""
        with self._lock:
            if self._known is None:
                self._known = self._read()
            return self._known.get(key)

    def _read(self) -> dict[str, Verdict]:
        if self.path is None or not self.path.is_file():
            return {}
        try:
            held = json.loads(self.path.read_text(encoding="utf-8"))
            if held["form"] != FORM:
                return {}
            found = {key: Verdict(**numbers) for key, numbers in held["layers"].items()}
            for verdict in found.values():
                if not all(isinstance(x, (int, float)) and math.isfinite(x) for x in asdict(verdict).values()):
                    raise ValueError(f"a time that is none: {verdict}")
            return found
        except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
            log.warning("[ToMe] %s is damaged (%s) and is written anew", self.path, error)
            return {}

    def _write(self) -> None:
        """With what others have written since: two ComfyUIs may share the file."""
        if self.path is None:
            return
        self._known = {**self._read(), **self._known}
        rounded = {key: {n: round(x, 2) for n, x in asdict(v).items()} for key, v in sorted(self._known.items())}
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            handle, name = tempfile.mkstemp(dir=self.path.parent, suffix=".tmp")
            with os.fdopen(handle, "w", encoding="utf-8") as file:
                json.dump({"form": FORM, "layers": rounded}, file, indent=1)
            os.replace(name, self.path)
        except OSError as error:
            log.warning("[ToMe] what was measured cannot be kept in %s (%s)", self.path, error)
            self.path = None


def folder() -> Path | None:
    """The user's cache folder for ToMe, or None where nothing is to be kept."""
    if FOLDER in os.environ:
        return Path(os.environ[FOLDER]) if os.environ[FOLDER] else None
    if os.name == "nt":
        base = os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local"
    elif sys.platform == "darwin":
        base = Path.home() / "Library" / "Caches"
    else:
        base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "tome"


# One for each device of this process; a measurement's outcome is a fact about the machine, not state of a call.
_verdicts: dict[str, Verdicts] = {}
_lock = threading.Lock()


def verdicts_of(device: torch.device) -> Verdicts:
    """The verdicts of a device, read the first time."""
    name = f"{torch.cuda.get_device_name(device)}, torch {torch.__version__}"
    with _lock:
        if name not in _verdicts:
            base = folder()
            file = "".join(c if c.isalnum() or c in ".+-" else "_" for c in name) + ".json"
            _verdicts[name] = Verdicts(None if base is None else base / file)
        return _verdicts[name]


def measures(config: ToMeConfig, grid: Grid, device: torch.device) -> bool:
    """Whether a layer on this grid is one that is measured."""
    return config.levels == "auto" and math.prod(grid) < ALWAYS and may_measure(device)


def may_measure(device: torch.device) -> bool:
    """Whether anything is measured on this device."""
    return device.type == "cuda" and os.environ.get(SWITCH, "1") != "0"


def verdict_on(
    grid: Grid,
    channels: int,
    heads: int,
    dtype: torch.dtype,
    device: torch.device,
    config: ToMeConfig,
    attention: Attention | None = None,
    kernels: tuple[str, ...] = (),
    block: Block | None = None,
) -> Verdict | None:
    """What is known of a layer's times on a device, or None where nothing is or can be measured.

    attention: the host's (None: torch's). kernels: those of torch's that it tries, in its order, where queries can keep
    their own tokens by them (joint.JointCall); none where they cannot. block: the block that the layer is in. Never
    called where torch.compile traces.
    """
    case = _case(grid, channels, heads, dtype, config, name_of(attention, device), kernels)
    return known_or_measured(case.key, device, lambda: measure(case, device, attention, block))


def known_on(
    grid: Grid,
    channels: int,
    heads: int,
    dtype: torch.dtype,
    device: torch.device,
    config: ToMeConfig,
    attention: Attention | None = None,
    kernels: tuple[str, ...] = (),
) -> Verdict | None:
    """verdict_on of what has been measured before; measures nothing."""
    case = _case(grid, channels, heads, dtype, config, name_of(attention, device), kernels)
    return verdicts_of(device).known(case.key)


def name_of(attention: Attention | None, device: torch.device) -> str:
    """What tells an attention from others; torch's own, by the kernels that are switched on now, in its order."""
    if attention is not None:
        return getattr(attention, "__name__", type(attention).__name__)
    if device.type == "cuda":
        put_in_order(device)
    order = getattr(torch._C, "_get_sdp_priority_order", lambda: list(_SWITCHES))()  # torch 2.6
    names = (_SWITCHES[int(number)] for number in order if int(number) in _SWITCHES)
    return " ".join(["torch", *(name for name in names if getattr(torch.backends.cuda, f"{name}_sdp_enabled")())])


@functools.lru_cache(maxsize=8)
def put_in_order(device: torch.device) -> None:
    """torch puts its kernels into a device's order (cuDNN first on an H100) when it is first asked for one."""
    x = torch.empty(1, 1, 64, 64, device=device, dtype=torch.float16)
    with contextlib.suppress(AttributeError, RuntimeError):
        torch._fused_sdp_choice(x, x, x)


# A host asks for each call of a model; making the key takes longer than a small step has to spare.
@functools.lru_cache(maxsize=256)
def _case(
    grid: Grid,
    channels: int,
    heads: int,
    dtype: torch.dtype,
    config: ToMeConfig,
    attention: str,
    kernels: tuple[str, ...],
) -> Case:
    """The layer, with the options alone that its times depend on."""
    config = config.replace(start=0.0, end=1.0, ratio_end=-1.0, min_tokens=0, seed=0, cross_attention=False, mlp=False)
    return Case(grid, channels, heads, dtype, config, attention, kernels)


def known_or_measured(key: str, device: torch.device, measure: Callable[[], Verdict]) -> Verdict | None:
    """The verdict of a name on a device. None where it cannot be measured."""

    def measured() -> Verdict:
        verdict = measure()
        log.info(
            "[ToMe] %s: %s, measured on %s: %.0f us whole, %.0f merged, %.0f more of the processor; its block: %.0f us "
            "and %.0f of the processor",
            key,
            "pays" if verdict.pays() else "does not pay",
            torch.cuda.get_device_name(device),
            *asdict(verdict).values(),
        )
        return verdict

    # While a CUDA graph is captured nothing can be measured, nor may a layer be merged whose warm-up was not.
    captures = device.type == "cuda" and torch.cuda.is_current_stream_capturing()
    return None if captures else verdicts_of(device).get(key, measured)


def torch_attention(q: Tensor, k: Tensor, v: Tensor, heads: int, scale: float | None = None) -> Tensor:
    """torch's own, as an Attention."""
    q, k, v = (x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in (q, k, v))  # (B, H, ., d)
    return F.scaled_dot_product_attention(q, k, v, scale=scale).transpose(1, 2).flatten(2)


@torch.no_grad()
def measure(
    case: Case, device: torch.device, attention: Attention | None = None, block: Block | None = None
) -> Verdict:
    """Times of a layer on made-up tokens, projections included, and of its block."""
    from .call import ModelCall  # which asks this module
    from .joint import JointCall

    run = torch_attention if attention is None else attention
    generator = torch.Generator(device).manual_seed(0)

    def drawn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device=device).to(case.dtype)

    x = drawn(ROWS, math.prod(case.grid), case.channels)
    weight = drawn(case.channels, case.channels) * case.channels**-0.5
    call = ModelCall(case.config, case.grid, device, step=torch.zeros((), dtype=torch.int64, device=device))

    def full() -> Tensor:
        q, k, v = (F.linear(x, weight) for _ in range(3))
        return F.linear(run(q, k, v, case.heads), weight)

    joint = JointCall(True, case.kernels, lambda *_: None, own=True) if case.keeps_own else None

    def merged() -> Tensor:
        layer = call.attention(x, x, x, case.grid, own=joint is not None)
        if layer is None:  # the ratio takes away no whole token
            return full()
        q, k, v = (F.linear(part, weight) for part in (layer.q, layer.k, layer.v))
        if joint is not None:
            own = joint.attend(
                *(part.unflatten(-1, (case.heads, -1)).transpose(1, 2) for part in (q, k, v)), 0, layer.plan
            )
            if own is not None:  # (B, N, H, d)
                return F.linear(own.flatten(2), weight)
            k, v = layer.plan.merge(k), layer.plan.merge(v)
        if layer.bias is None:
            out = run(q, k, v, case.heads)
        else:

            def inner(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
                return run(q, k, v, case.heads, scale=scale)

            is_torchs = attention is None or bool(case.kernels)
            out = attend_tokens(q, k, v, case.heads, layer.bias, inner, is_torchs)
        return layer.unmerge(F.linear(out, weight))

    found, run_block = compared(full, merged, device), block and block(x.clone())
    if run_block is None:
        return found
    gpu, cpu = times_of(run_block, device)
    return dataclasses.replace(found, block_us=gpu, block_cpu_us=cpu)


def compared(
    full: Callable[[], Any], merged: Callable[[], Any], device: torch.device, repeats: int = _REPEATS
) -> Verdict:
    """The verdict of a layer, or of more than one, run whole and merged."""
    whole, less = times_of(full, device, repeats), times_of(merged, device, repeats)
    return Verdict(whole[0], less[0], max(0.0, less[1] - whole[1]))


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
