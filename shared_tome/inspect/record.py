"""What a host keeps of a sampler's run for maps and reports, and only where somebody asks for it.

Choices of methods that match nothing are worked out again from seed, step and layer (maps.py); of those that match,
one number a token is kept on the CPU; of multires two bits for each pair of tiles and head.
"""

from __future__ import annotations

import dataclasses
import math
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .. import kernels
from ..autotune.layer import Decision
from ..autotune.timing import times_of
from ..config import ToMeConfig
from ..core.grid import Grid
from ..core.resolutions import packed
from ..merging.plan import MultiresPlan, Plan
from .report import CallTally, StepTime, Tally


@dataclass(frozen=True)
class StepFacts:
    """What held in the calls of one step: options with that step's ratio, the latent's size and its own grid.

    seeds: one an image, where a host has them; none: the options' own. draw: the number of its draw; None: the step's.
    """

    config: ToMeConfig
    latent: tuple[int, int]
    full: Grid
    seeds: tuple[int, ...] = ()
    draw: int | None = None


class Run:
    """One run of a sampler.

    sigmas: its list of noise levels, by which a host that does not announce a run knows one. most_bytes: of kept
    choices. images: in the batch. devices: on which calls of a step ran side by side. last: what a host needs to run
    a call once more. is_full: not all choices were kept. passed_by: why ToMe was not asked in it, where it was not.
    """

    def __init__(self, config: ToMeConfig, sigmas: Tensor | None = None, most_bytes: int = 2**29):
        self.config, self._sigmas, self._most_bytes = config, sigmas, most_bytes
        self.tally = Tally(config, None if sigmas is None else len(sigmas) - 1)
        self.compiled = False
        self.passed_by: str | None = None
        self.devices: set[torch.device] = set()  # one, or those that share a batch
        self.images = 1
        self.facts: dict[int, StepFacts] = {}
        self.last: Any = None
        self.time: StepTime | None = None
        self.is_full = False
        self.timer: ChoosingTimer | None = None  # of a run that is made to be timed
        self._owners: dict[tuple[int, Grid, int], dict[int, Tensor]] = {}
        self._bytes = 0
        self._lock = threading.Lock()

    def has(self, sigmas: Tensor | None, step: int, spread: bool) -> bool:
        """Whether a call with these noise levels is of this run. spread: over several GPUs, each with a copy."""
        if sigmas is self._sigmas or sigmas is None:
            return True
        if not spread or self._sigmas is None or sigmas.shape != self._sigmas.shape:
            return False
        return step >= max(self.tally.steps, default=0) and bool(torch.equal(sigmas.cpu(), self._sigmas.cpu()))

    def note(self, step: int, facts: StepFacts) -> None:
        """What holds in a step; of several areas of a picture the largest counts."""
        with self._lock:
            known = self.facts.get(step)
            if known is None or math.prod(facts.latent) >= math.prod(known.latent):
                self.facts[step] = facts

    def keep(self, step: int, grid: Grid, number: int, owner: Tensor, images: Sequence[int] | None = None) -> None:
        """A layer's owners [rows, N], or what multires chose [rows, ...]; the first of an image and step stay.

        images: whose rows these are; None: all images in their order, or one row for all of them.
        """
        with self._lock:
            known = self._owners.setdefault((step, grid, number), {})
            rows = dict(zip(range(len(owner)) if images is None else images, owner, strict=True))
            new = {image: row for image, row in rows.items() if image not in known}
            size = sum(row.nbytes for row in new.values())
            if self._bytes + size > self._most_bytes:
                self.is_full = True
                return
            known.update(new)
            self._bytes += size

    def owner(self, step: int, grid: Grid, number: int) -> Tensor | None:
        """What was kept of a layer in a step, or None: owners [images or 1, N] int32; of multires the resolutions that
        were chosen, packed [images, H, query tiles, .] (core/resolutions.py)."""
        known = self._owners.get((step, grid, number))
        return torch.stack([known[image] for image in sorted(known)]) if known else None


class Watcher:
    """To be a plan's `watch`. What it is told of the plan's first attention stays; see MultiresPlan."""

    kept: Tensor | None = None

    def see(self, *given: Any) -> None:
        """An attention is about to be computed of the arguments of kernels.attend_multires."""
        q, k, _, tiles, _, counts, _, scale, _ = given
        if self.kept is None:
            self.kept = packed(kernels.choose_multires(q, k, tiles, counts, scale), tiles, counts)


class ChoosingTimer:
    """Which share of the attentions' time on a GPU it takes to choose the tiles; each shape is timed once."""

    def __init__(self) -> None:
        self._times: dict[tuple, tuple[float, float]] = {}
        self._seen: list[tuple] = []

    def watch(self, plan: MultiresPlan) -> None:
        """Have the plan's attentions timed."""
        plan.watch = self.see

    def see(self, *given: Any) -> None:
        """As Watcher.see. Does nothing where there is no GPU."""
        q, k, _, tiles, _, counts, _, scale, mask = given
        if not q.is_cuda or torch.cuda.is_current_stream_capturing():
            return
        shape = tuple(q.shape), q.dtype, tiles.image, counts, mask is None
        self._seen.append(shape)
        if shape not in self._times:
            choosing = times_of(lambda: kernels.choose_multires(q, k, tiles, counts, scale), q.device)[0]
            self._times[shape] = choosing, times_of(lambda: kernels.attend_multires(*given), q.device)[0]

    @property
    def share(self) -> float | None:
        """Of all attentions that were seen, each as often as it was; None: none was timed."""
        times = [self._times[shape] for shape in self._seen]
        return sum(choosing for choosing, _ in times) / sum(whole for _, whole in times) if times else None


class CallRecord(CallTally):
    """What one call of the model tells its run. ToMe's patches fill it; it is made for the call and ends with it.

    rows: of the batch, those of the prompted images; None where this call has none. images: whose rows these are,
    where that is not all images in their order.
    """

    def __init__(
        self, run: Run, step: int, rows: slice | list[int] | None, full: Grid, images: Sequence[int] | None = None
    ):
        super().__init__(run.tally, full, step)
        self.run = run
        self._rows, self._images = rows, images
        self._plans: list[tuple[Grid, int, Plan]] = []
        self._watched: list[tuple[Grid, int, Watcher]] = []

    def lies_on(self, full: Grid) -> None:
        """The grid from which levels are counted, where it is not the latent's own size."""
        facts = self.run.facts[self.step]
        if facts.latent == self.full:  # else of an area of the picture, and the whole is known already
            self.run.note(self.step, dataclasses.replace(facts, full=full))
        self.full = full

    def layer(self, where: str, grid: Grid, plan: Plan | None, part: int = 0, decision: Decision | None = None) -> int:
        number = super().layer(where, grid, plan, part, decision)
        if plan is not None and self.run.config.kind.matches and self._rows is not None:
            self._plans.append((grid, number, plan))
        if isinstance(plan, MultiresPlan):
            self._watch(grid, number, plan)
        return number

    def _watch(self, grid: Grid, number: int, plan: MultiresPlan) -> None:
        """Have the plan's attention tell what it chooses."""
        if self.run.timer is not None:
            self.run.timer.watch(plan)
        elif self._rows is not None:
            watcher = Watcher()
            plan.watch = watcher.see
            self._watched.append((grid, number, watcher))

    def end(self) -> None:
        """Take what was chosen to the CPU: after the call, so that a GPU is waited for once."""
        for grid, number, plan in self._plans:
            rows, images = self._rows, self._images
            if plan.groups.stride(0) == 0:  # the same for all rows: of all images, or of the one that this call is for
                rows, images = slice(0, 1), images if images and len(images) == 1 else None
            owner = plan.index[rows].gather(1, plan.groups[rows]).to(torch.int32)
            self.run.keep(self.step, grid, number, owner.cpu(), images)
        for grid, number, watcher in self._watched:
            if watcher.kept is not None:  # else sample took its place
                self.run.keep(self.step, grid, number, watcher.kept[self._rows].cpu(), self._images)
