"""What drawn attentions lack, kept from an exact step for the steps behind it (the option exact_every).

At an exact step a layer is worked out whole and drawn. The whole output goes out, and whole less drawn is kept. The
steps behind it draw the same tokens and add what was kept. Window attentions of transformers do so in DiTFastAttn
(Yuan et al., arXiv 2406.08552, section 3.1).
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..config import ToMeConfig
from ..core.grid import Grid

# Why nothing is kept, for people.
TWICE = (
    "exact every has no effect in this sampling: in a step the model is called several times for what ToMe cannot tell "
    "apart (tiles, context windows, perturbed attention, prompts joined by AND)"
)
UNKNOWN = "exact every has no effect: nothing tells here which step it is"
UNSEEN = "exact every has no effect in this sampling: ToMe cannot see an attention (it sees PyTorch's in every host)"
COMPILED = "exact every has no effect in a graph (torch.compile, CUDA graphs)"
TRANSFORMER = "exact every has no effect on transformers, where nothing was gained by it (docs/quality.md)"
ALONE = "each merged step was exact (exact every), because no other came behind it: take more steps, or a lower start"
MOVING = (
    "each merged step was exact (exact every), because each stage of a moving ratio begins exact: take more steps, or "
    "set ratio at the end to -1"
)


def why_no_effect(config: ToMeConfig, transformer: bool = False) -> str | None:
    """Why the option does nothing with the other options, or on a transformer; None: it is off, or does something."""
    if not config.exact_every:
        return None
    if transformer:
        return TRANSFORMER
    if config.keeps_exact:
        return None
    return f"exact every has no effect with method {config.method}: it is for sample and downsample"


def exact_told(every: int) -> str:
    """What is said of a layer that is not merged because of it."""
    ending = {2: "nd", 3: "rd"}.get(every, "th")
    return f"exact in every {every}{ending} step"


class Residuals:
    """Of one sampling, and owned by what the host has for it. Safe to be used from several threads.

    every: from one exact step to the next. say: called once with why nothing is kept from then on (why_off).
    """

    def __init__(self, every: int, say: Callable[[str], None]):
        self.every, self._say = every, say
        self.is_on = True
        self.why_off: str | None = None
        self._kept: dict[tuple, Tensor] = {}
        self._period: tuple | None = None  # the same from one exact step to the next
        self._first: int | None = None  # merged step
        self._exact, self._draw = 0, 0  # that step's number, and its draw's
        self._evaluation: Hashable = None
        self._seen: set[Hashable] = set()  # in this evaluation
        self._has_kept = self._has_added = self._has_moved = False
        self._lock = threading.RLock()  # Python may free a prompt in the midst, and `forget` is asked for by that

    @classmethod
    def of(cls, config: ToMeConfig, say: Callable[[str], None]) -> Residuals | None:
        """None where the options ask for nothing, or for what cannot be, which is said."""
        if (why := why_no_effect(config)) is not None:
            say(why)
        return cls(config.exact_every, say) if config.keeps_exact else None

    def call(
        self, step: int | None, draw: Any, evaluation: Hashable, names: Sequence[Hashable], alike: Hashable = None
    ) -> ResidualCall | None:
        """One call of the model that is merged; None where nothing is kept.

        Args:
            step: its number; None: not known. draw: the number of the step's draw, as ModelCall takes it.
            evaluation: what tells one time that the sampler asks the model from the next, however many calls it takes.
            names: of the parts of the batch, equally many rows each, in their order. No two parts of an evaluation may
                have one name: a name that comes again could be another part of the picture.
            alike: what else drawn outputs hang on (the ratio of a step).
        """
        if not self.is_on:
            return None
        if step is None:
            self.turn_off(UNKNOWN)
            return None
        with self._lock:
            if evaluation != self._evaluation:
                self._evaluation = evaluation
                self._seen.clear()
            known = len(self._seen)
            self._seen.update(names)
            twice = len(self._seen) < known + len(names)
            self._first = step if self._first is None else self._first
            period = (step - self._first) // self.every, alike
            if period != self._period:
                self._kept.clear()
                self._has_moved |= self._period is not None and self._period[1] != alike
                self._period, self._exact, self._draw = period, step, draw
            kept = {name for _, name, *_ in list(self._kept)}
            exact = step == self._exact or kept.isdisjoint(names)
            made = ResidualCall(self, self._draw, tuple(names), exact, step == self._exact)
        if twice:
            self.turn_off(TWICE)
        return None if twice else made

    def turn_off(self, why: str) -> None:
        """Nothing is kept or added any more."""
        with self._lock:
            was_on, self.is_on = self.is_on, False
            self.why_off = why if was_on else self.why_off
            self._kept.clear()
        if was_on:
            self._say(why)

    def forget(self) -> None:
        """Steps behind the options' end, or another model: the next merged step is exact."""
        with self._lock:
            self._kept.clear()
            self._period = None

    def end(self) -> None:
        """The sampling is over, in whatever way: the memory is given back."""
        with self._lock:
            unused = self.is_on and self._has_kept and not self._has_added
            self.is_on = False
            self._kept.clear()
        if unused:
            self._say(self.why_alone)

    @property
    def had_no_effect(self) -> bool:
        """Whether it went off before anything was kept."""
        return self.why_off is not None and not self._has_kept

    @property
    def why_alone(self) -> str:
        """Why each merged step was exact, where each was."""
        return MOVING if self._has_moved else ALONE

    def find(self, keys: Sequence[tuple]) -> list[Tensor | None]:
        with self._lock:
            return [self._kept.get(key) for key in keys]

    def added(self) -> None:
        """Something that was kept is used."""
        self._has_added = True

    def keep(self, found: dict[tuple, Tensor]) -> None:
        with self._lock:
            if self.is_on:
                self._kept.update(found)
                self._has_kept = True


class ResidualCall:
    """One call of the model. draw: the number of its draw, for ModelCall. exact: whether all of it is whole."""

    def __init__(self, owner: Residuals, draw: Any, names: tuple[Hashable, ...], exact: bool, renews: bool):
        self._owner, self.draw, self._names, self.exact = owner, draw, names, exact
        self._renews = renews  # at an exact step; else exact for want of what was kept
        self._layers: dict[Hashable, tuple[list[tuple], list[Tensor | None]] | None] = {}  # None: worked out

    @property
    def is_on(self) -> bool:
        return self._owner.is_on

    @property
    def told(self) -> str:
        """What is said of a layer that is exact."""
        return exact_told(self._owner.every)

    def turn_off(self, why: str) -> None:
        """See Residuals."""
        self._owner.turn_off(why)

    def begin(self, layer: Hashable, x: Tensor, grid: Grid) -> bool:
        """A layer is about to be worked out: whether its output will be the whole one, for all rows.

        layer: its name in the model. x: its tokens [B, N, C] on the grid; what is kept holds for their grid, shape,
        dtype and device.
        """
        if layer in self._layers:  # two layers of one name
            self.turn_off(TWICE)
        if not self.is_on:
            return False
        names = self._names if x.shape[0] % len(self._names) == 0 else (self._names,)
        shape = (x.shape[0] // len(names), *x.shape[1:])
        keys = [(layer, name, grid, shape, x.dtype, x.device) for name in names]
        found = [None] * len(keys) if self._renews else self._owner.find(keys)
        self._layers[layer] = keys, found
        return all(part is None for part in found)

    def attend(self, layer: Hashable, drawn: Callable[[], Tensor], whole: Callable[[], Tensor]) -> Tensor:
        """The output [B, ...] of a layer that was begun, from what works it out drawn and whole."""
        known = self._layers.get(layer)
        if known is None:  # the attention runs twice in the layer
            self.turn_off(UNSEEN)
        if known is None or not self.is_on:
            return drawn()
        (keys, found), self._layers[layer] = known, None
        if all(part is not None for part in found):
            self._owner.added()
            return drawn() + (found[0] if len(found) == 1 else torch.cat(found))
        full, coarse = whole(), drawn()
        lost = (full - coarse).detach().chunk(len(keys))
        self._owner.keep({key: part for key, part, old in zip(keys, lost, found, strict=True) if old is None})
        if all(old is None for old in found):
            return full
        # Each row is what it is in a call of its own, however the host splits the batch.
        rows = zip(full.chunk(len(keys)), coarse.chunk(len(keys)), found, strict=True)
        return torch.cat([whole if old is None else drawn + old for whole, drawn, old in rows])

    def end(self, layer: Hashable) -> None:
        """A layer is over. Where it was begun and `attend` was not asked, its attention cannot be seen."""
        if self._layers.get(layer) is not None:
            self.turn_off(UNSEEN)
