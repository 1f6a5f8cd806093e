"""What autotune decided, as a text: the option `decisions`.

    sample +128x128 +128x128/320/8 -64x64/640/8

A size alone is the whole step of a latent of that size, or of so many tokens of a transformer. A size with channels
and heads is a layer; a fourth number is the tokens beside the image, rounded up. + is merged, - is left alone. `@0.5`
behind a word: at that ratio alone. `+all`, `-all`: every step and layer that no other word names. In front a method may
stand: what auto was taken for.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping
from dataclasses import dataclass, field

from .methods import METHODS

ALL = "all"
_WORD = re.compile(
    r"([+-])(all|\d{1,6}(?:x\d{1,6}){1,2}(?:/\d{1,6}/\d{1,6}(?:/\d{1,7})?)?)(?:@(0?\.\d{1,6}|[01]))?", re.ASCII
)
# What people copy: signs as some pages show them (times, minus, dash), and the line's own beginning.
_SHOWN = str.maketrans({",": " ", ";": " ", "\u00d7": "x", "\u2212": "-", "\u2013": "-"})
_LEAD = re.compile(r"^\s*Decisions(?: \(as set\))?:")
_WANTED = (
    "words such as +128x128 (the steps of a latent of that size) and -64x64/640/8 (layers on that grid, with so many "
    "channels and heads), + for merged and - for left alone"
)


def step_name(grid: tuple[int, ...]) -> str:
    """The whole step of a latent, by its grid; of a transformer, by that of its tokens."""
    return "x".join(map(str, grid))


def layer_name(grid: tuple[int, ...], channels: int, heads: int | None, others: int = 0) -> str:
    """A layer, by the grid of its tokens. others: tokens beside the image's."""
    parts = [step_name(grid), str(channels), str(heads or 0), *([str(others)] if others else [])]
    return "/".join(parts)


def ratio_name(ratio: float) -> float:
    """A ratio as a text has it."""
    return round(ratio, 4)


@dataclass(frozen=True)
class Decided:
    """method: what auto stands for, or None. merged: by (name, ratio or None for any), whether it is merged."""

    method: str | None = None
    merged: Mapping[tuple[str, float | None], bool] = field(default_factory=dict)

    def of(self, name: str, ratio: float) -> bool | None:
        """Whether a step or a layer is merged at a ratio; None: nothing is said of it."""
        for key in ((name, ratio_name(ratio)), (name, None), (ALL, ratio_name(ratio)), (ALL, None)):
            if key in self.merged:
                return self.merged[key]
        return None

    @property
    def names(self) -> frozenset[str]:
        """The steps and layers that are named."""
        return frozenset(name for name, _ in self.merged if name != ALL)

    @functools.cached_property
    def text(self) -> str:
        """In one order: the method, large grids first, the step before its layers."""
        words = [] if self.method is None else [self.method]
        for name, ratio in sorted(self.merged, key=_place):
            at = "" if ratio is None else f"@{ratio:g}"
            words.append(f"{'+' if self.merged[name, ratio] else '-'}{name}{at}")
        return " ".join(words)


def _place(key: tuple[str, float | None]) -> tuple:
    name, ratio = key
    if name == ALL:
        return 0, (), (), ratio or 0.0
    grid, *rest = name.split("/")
    sides = [-int(side) for side in grid.split("x")]
    tokens = 1
    for side in sides:
        tokens *= -side
    return -tokens, tuple(sides), tuple(map(int, rest)), ratio or 0.0


@functools.lru_cache(maxsize=64)
def parse(text: str) -> Decided:
    """The text's meaning. Raises ValueError naming the word that has none."""
    words = _LEAD.sub("", text.translate(_SHOWN), count=1).split() if text else []
    method = words.pop(0) if words and words[0] in METHODS else None
    merged: dict[tuple[str, float | None], bool] = {}
    for word in words:
        found = _WORD.fullmatch(word)
        if found is None:
            raise ValueError(f"decisions must be {_WANTED}; got {word[:80]!r}")
        key = found[2], None if found[3] is None else ratio_name(float(found[3]))
        if merged.setdefault(key, found[1] == "+") != (found[1] == "+"):
            raise ValueError(f"decisions has {key[0]} as merged and as left alone")
    return Decided(method, merged)


def checked(value: object) -> str:
    """The option's value in one form. Raises ValueError."""
    if not isinstance(value, str):
        raise ValueError(f"decisions must be a text: {_WANTED}; got {value!r}")
    return parse(value).text
