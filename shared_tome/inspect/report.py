"""What ToMe did in a run, for people and for programs: a tally that any host fills, and the report made from it.

A host keeps a `Tally` for each run of a sampler, tells it of each call of the model and of each layer, and makes a
`Report` at the end. Nothing here is asked for unless somebody wants a report.
"""

from __future__ import annotations

import dataclasses
import math
import threading
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from ..autotune.decision_log import DecisionLog
from ..autotune.paying import Decision, Given
from ..config import ToMeConfig
from ..core.grid import Grid, level_of
from ..merging.plan import Plan
from ..merging.residual import exact_told
from .reasons import NO_WHOLE_TOKEN, capped, counted, resolutions, why_no_step


@dataclass(frozen=True)
class Layer:
    """One attention layer of a run.

    where: its block as the log names it. part: which attention of that block. level, grid: None where unknown.
    number: its place among the layers of its grid, or None where it was left alone. before, after: tokens; after is
    the fewest and the most over the run. calls: of the model. reason: why it was left alone, or "". saves_us: what
    merging saves a call of it, where that was measured (autotune/layer.py).
    """

    where: str
    part: int
    level: int | None
    grid: Grid | None
    number: int | None
    before: int | None
    after: tuple[int, int] | None
    calls: int
    reason: str = ""
    saves_us: float | None = None


@dataclass(frozen=True)
class StepTime:
    """What a step takes: milliseconds, medians of `rounds` measurements by turns, after a warm-up.

    calls: of the model in a step. step: the one that was measured, from 0. ratio: what held there. choosing: of
    multires, the share of its attentions' time in which tiles are chosen; None: not measured.
    """

    without: float
    merged: float
    rounds: int
    calls: int
    step: int
    ratio: float
    device: str
    choosing: float | None = None

    @property
    def speedup(self) -> float:
        return self.without / self.merged


@dataclass(frozen=True)
class Report:
    """All that is known of one run.

    steps: that were run, merged_steps: in which something was merged; of_steps: that the sampler was to run, or None.
    decisions: what autotune decided, as the option takes it; follows: whether any of it was set.
    """

    config: ToMeConfig
    steps: int
    of_steps: int | None
    merged_steps: int
    calls: int
    layers: tuple[Layer, ...]
    time: StepTime | None = None
    notes: tuple[str, ...] = ()
    decisions: str = ""
    follows: bool = False

    @property
    def merged(self) -> tuple[Layer, ...]:
        return tuple(layer for layer in self.layers if not layer.reason)

    @property
    def left_alone(self) -> tuple[Layer, ...]:
        return tuple(layer for layer in self.layers if layer.reason)

    def line(self) -> str:
        """The shortest form, for a log or a picture's text: "sample 0.75, level 0: 4096 to 1024 tokens in 5 layers"."""
        parts = [f"{self.config.method} {self._ratio()}"]
        for group in _alike(self.merged):
            parts.append(f"{_place(group[0])}: {_change(group[0])} in {counted(len(group), 'layer')}")
        if not self.merged:
            parts.append("nothing was merged")
        if self.time is not None:
            parts.append(f"{self.time.without:.4g} to {self.time.merged:.4g} ms a step")
        return ", ".join(parts)

    def text(self) -> str:
        """Lines for people; they read as Markdown too."""
        config, choosing = self.config, None if self.time is None else self.time.choosing
        lines = [f"ToMe: method {config.method}, ratio {self._ratio()}, seed {config.seed}", self._steps()]
        lines += [*resolutions(config, choosing), ""]
        skipped = self.steps and not self.layers and not self.merged_steps
        why = f": {why_no_step(config, 'this run')}" if skipped else ""
        lines.append("Merged:" if self.merged else f"Nothing was merged{why}.")
        for group in _alike(self.merged):
            first = group[0]
            lines.append(
                f"- {_place(first)}: {_change(first)} (-{100 * (1 - first.after[0] / first.before):.0f}%), "
                f"{counted(len(group), 'layer')}{_saves(first)}: {_names(group)}"
            )
        if self.left_alone:
            lines += ["", "Left alone:"]
        for group in _alike(self.left_alone):
            first = group[0]
            size = "" if first.before is None else f", {counted(first.before, 'token')}"
            lines.append(f"- {_place(first)}{size}, {counted(len(group), 'layer')}: {first.reason} ({_names(group)})")
        if self.time is not None:
            lines += ["", self._time()]
        if self.decisions:
            lines += ["", f"Decisions{' (as set)' if self.follows else ''}: {self.decisions}"]
        notes = [note for note in (capped(config), *self.notes) if note]
        if notes:
            lines += ["", "Note:", *(f"- {note}" for note in notes)]
        return "\n".join(lines)

    def _ratio(self) -> str:
        return f"{self.config.ratio:g}" + (f" to {self.config.ratio_end:g}" if self.config.ratio_end >= 0 else "")

    def _steps(self) -> str:
        part = self.of_steps and self.of_steps != self.steps
        steps = f"{self.steps} of {counted(self.of_steps, 'step')}" if part else counted(self.steps, "step")
        config = self.config
        limits = f", from start {config.start:g} to end {config.end:g}" if config.start > 0 or config.end < 1 else ""
        return f"{steps}, merged in {self.merged_steps}{limits}; {counted(self.calls, 'call')} of the model"

    def _time(self) -> str:
        time = self.time
        calls = f", {time.calls} calls" if time.calls != 1 else ""
        return (
            f"A step{calls}: {time.without:.4g} ms without, {time.merged:.4g} ms with ToMe: {time.speedup:.2f}x "
            f"(step {time.step} at ratio {time.ratio:g}, median of {time.rounds}, {time.device})"
        )

    def to_dict(self) -> dict[str, Any]:
        """For JSON: numbers and words alone."""
        told = dataclasses.asdict(self)
        told = {
            "options": told.pop("config"),
            "ratio_cap": self.config.ratio_cap,
            "capped": bool(capped(self.config)),
        } | told
        told["decisions_as_set"], told["notes"] = told.pop("follows"), told.pop("notes")
        if self.time is not None:
            names = {"without": "without_ms", "merged": "with_ms"}
            time = told["time"] | {"speedup": self.time.speedup}
            told["time"] = {names.get(key, key): value for key, value in time.items()}
        return told


class Tally:
    """Counts of one run, and what was decided in it. Safe to fill from several threads."""

    def __init__(self, config: ToMeConfig, of_steps: int | None = None):
        self.config, self.of_steps, self.decided = config, of_steps, DecisionLog()
        self._lock = threading.Lock()
        self._layers: dict[tuple, Layer] = {}
        self._steps: dict[int, float] = {}
        self._merged_in: dict[int, bool] = {}  # of the steps whose layers were told: whether one was merged
        self.calls = 0
        self._asked: list[tuple[int, float]] = []
        self.why_not_exact: str | None = None  # why the option exact_every went off, where it did

    def ask(self, step: int, ratio: float) -> None:
        """One call that the model is asked for; `call` says that it was run. For hosts where a cache may answer."""
        with self._lock:
            self._asked.append((step, ratio))

    def settle(self) -> None:
        """Where layers were met but no call was counted, the model does not tell its runs: all asked calls count."""
        if not self.calls and self._layers:
            for step, ratio in self._asked:
                self.call(step, ratio)

    def call(self, step: int, ratio: float) -> None:
        """One call of the model that is run. ratio: what holds there, 0 where nothing is merged."""
        with self._lock:
            self.calls += 1
            self._steps[step] = max(ratio, self._steps.get(step, 0.0))

    def not_exact(self, step: int, ratio: float) -> None:
        """A call that was counted at ratio 0, as an exact one, was merged after all: exact every went off in it."""
        with self._lock:
            self._steps[step] = max(ratio, self._steps.get(step, 0.0))

    def add(self, layer: Layer, step: int | None, nth: int = 0) -> None:
        """One layer of a call. step: None where not known; nth: of those merged at this place in the call, from 0. Its
        number is that of a call in which none before it is left alone: another node may take one in some calls."""
        key = (layer.where, layer.part, layer.grid, nth, layer.reason)
        with self._lock:
            known = self._layers.get(key)
            if known is not None:
                after = layer.after and (min(known.after[0], layer.after[0]), max(known.after[1], layer.after[1]))
                number = layer.number if known.number is None else max(known.number, layer.number)
                layer = dataclasses.replace(layer, after=after, number=number, calls=known.calls + 1)
            self._layers[key] = layer
            if step is not None:
                self._merged_in[step] = self._merged_in.get(step, False) or not layer.reason

    def layers(self) -> tuple[Layer, ...]:
        """In the order in which the model ran them first."""
        with self._lock:
            return tuple(self._layers.values())

    @property
    def steps(self) -> list[int]:
        """That were run, from 0."""
        with self._lock:
            return sorted(self._steps)

    def report(self, time: StepTime | None = None, notes: Sequence[str] = ()) -> Report:
        """What has been counted so far."""
        layers = self.layers()
        if self.why_not_exact is not None:  # what was exact before that was known is merged in the calls behind
            exact = exact_told(self.config.exact_every)
            merged = {(layer.where, layer.part, layer.grid) for layer in layers if not layer.reason}
            layers = tuple(
                one for one in layers if one.reason != exact or (one.where, one.part, one.grid) not in merged
            )
            notes = (*notes, self.why_not_exact)
        with self._lock:
            steps = len(self._steps)
            merged = sum(ratio > 0 and self._merged_in.get(step, True) for step, ratio in self._steps.items())
            unanswered = len(self._asked) - self.calls
        if unanswered > 0:
            asked = counted(len(self._asked), "call")
            notes = (*notes, f"another node answered {unanswered} of {asked} without the model")
        if layers and all(layer.reason for layer in layers):
            merged = 0
        told = time, (*notes, *self.decided.notes()), self.decided.text, self.decided.follows
        return Report(self.config, steps, self.of_steps, merged, self.calls, layers, *told)


class CallTally:
    """The layers of one call of the model, told to a tally.

    full: the latent's own grid, from which levels count. step: of the sampler; None where these layers stand for those
    of other steps too.
    """

    def __init__(self, tally: Tally, full: Grid, step: int | None = None):
        self.full, self.step = full, step
        self._tally = tally
        self._counts: Counter[tuple] = Counter()  # of layers, by their grid and by their place

    def lies_on(self, full: Grid) -> None:
        """The grid from which levels are counted, where it is not the latent's own size."""
        self.full = full

    def layer(
        self, where: str, grid: Grid, plan: Plan | None, part: int = 0, decision: Decision | Given | None = None
    ) -> int:
        """The next layer on a grid, and its number, which counts as ModelCall does.

        plan: None where nothing is to go. decision: what was measured of it.
        """
        number = self.count(grid)
        if plan is None:
            self.left_alone(NO_WHOLE_TOKEN, where, grid, part)
        else:
            saves, kept, before = None if decision is None else decision.saves_us, plan.kept, math.prod(grid)
            level = level_of(grid, self.full)
            layer = Layer(where, part, level, grid, number, before, (kept, kept), 1, saves_us=saves)
            self._tally.add(layer, self.step, self.count((where, part, grid)))
        return number

    def count(self, what: Grid | tuple) -> int:
        """The number of the next layer on a grid (for one that had a plan and is left alone all the same), or at a
        place: (block, part, grid)."""
        self._counts[what] += 1
        return self._counts[what] - 1

    def left_alone(self, reason: str, where: str, grid: Grid | None = None, part: int = 0) -> None:
        """A layer that was not merged, and why."""
        level, before = (None, None) if grid is None else (level_of(grid, self.full), math.prod(grid))
        self._tally.add(Layer(where, part, level, grid, None, before, None, 1, reason), self.step)


def _alike(layers: Iterable[Layer]) -> list[list[Layer]]:
    """Layers of which the same is to be said, together."""
    groups: dict[tuple, list[Layer]] = {}
    for layer in layers:
        groups.setdefault((layer.level, layer.grid, layer.after, layer.reason, layer.saves_us), []).append(layer)
    return list(groups.values())


def _place(layer: Layer) -> str:
    if layer.grid is None:
        return "no grid"
    grid = "x".join(map(str, layer.grid))
    return f"grid {grid}" if layer.level is None else f"level {layer.level} ({grid})"


def _change(layer: Layer) -> str:
    least, most = layer.after
    after = counted(most, "token")
    return f"{layer.before} to {after}" if least == most else f"{layer.before} to {least}...{after}"


def _saves(layer: Layer) -> str:
    return "" if layer.saves_us is None else f", each saves {layer.saves_us:.0f} us"


def _names(layers: Iterable[Layer]) -> str:
    """Their blocks, each once: "input block 1, 2, output block 9"."""
    names = list(dict.fromkeys(layer.where for layer in layers))
    said, last = [], None
    for name in names:
        kind, _, number = name.rpartition(" ")
        said.append(number if kind and kind == last else name)
        last = kind
    return ", ".join(said)
