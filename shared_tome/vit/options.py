"""The options of vit.apply_patch."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Integral, Real

SCHEDULES = ("constant", "falling")
RESTORES = ("last", "all", "none")


@dataclass(frozen=True)
class Options:
    """The arguments of vit.apply_patch."""

    r: int | Sequence[int] | None = None
    ratio: float | None = None
    schedule: str = "constant"
    proportional: bool = True
    restore: str = "last"
    trace: bool = False

    def check(self, depth: int) -> None:
        """Raises ValueError naming what is out of range for that many blocks."""
        if (self.r is None) == (self.ratio is None):
            raise ValueError(f"give r or ratio, one of the two, got r={self.r!r} and ratio={self.ratio!r}")
        number = isinstance(self.ratio, Real) and not isinstance(self.ratio, bool)  # numpy's are real, too
        if self.ratio is not None and not (number and 0.0 <= self.ratio < 1.0):
            raise ValueError(f"ratio must lie in 0 to 1, without 1, got {self.ratio!r}")
        for name, choices in (("schedule", SCHEDULES), ("restore", RESTORES)):
            if getattr(self, name) not in choices:
                raise ValueError(f"{name} must be one of {', '.join(choices)}, got {getattr(self, name)!r}")
        for name in ("proportional", "trace"):
            if getattr(self, name) not in (True, False):
                raise ValueError(f"{name} must be true or false, got {getattr(self, name)!r}")
        if self.r is None:
            return
        numbers = tuple(self.r) if isinstance(self.r, Sequence) else (self.r,)
        if any(isinstance(n, bool) or not isinstance(n, Integral) or n < 0 for n in numbers):
            raise ValueError(f"r must be a whole number from 0 on, or a list of them, got {self.r!r}")
        if not isinstance(self.r, Integral) and len(numbers) != depth:
            raise ValueError(f"r must have one number for each of the {depth} blocks, got {len(numbers)}")

    def per_block(self, depth: int, tokens: int) -> tuple[int, ...]:
        """How many of that many tokens (without the prefix) go in each block, before each block's own limit."""
        if self.r is not None and not isinstance(self.r, Integral):
            return tuple(map(int, self.r))
        total = int(self.r) * depth if self.r is not None else int(tokens * self.ratio)
        return spread_total(total, depth, self.schedule)


@functools.lru_cache(maxsize=256)
def spread_total(total: int, depth: int, schedule: str) -> tuple[int, ...]:
    """`total` over the blocks in whole numbers: evenly, or falling in a straight line to 0. The sum is exact."""
    weights = [1.0] * depth
    if schedule == "falling" and depth > 1:
        weights = [2.0 * (depth - 1 - i) / (depth - 1) for i in range(depth)]
    edges, way = [0], 0.0
    for weight in weights:
        way += weight
        edges.append(int(total * way / depth + 0.5))
    return tuple(b - a for a, b in zip(edges, edges[1:], strict=False))
