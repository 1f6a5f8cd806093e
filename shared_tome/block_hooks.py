"""Hooks on a model's blocks that go in calls where merging pays nowhere: even those that do nothing take the processor
time, which shows where steps wait for it."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator
from dataclasses import dataclass
from typing import Any


@dataclass
class Judged:
    """What became of the layers of one call. unpaid: served ones where merging does not pay; others: all but those and
    the ones that are not served."""

    unpaid: int = 0
    others: int = 0

    @property
    def pays_nowhere(self) -> bool:
        return self.unpaid > 0 and self.others == 0


class BlockHooks:
    """The handles, and in which kinds of calls merging pays nowhere. Keeps no model."""

    def __init__(self) -> None:
        self._handles: list[Any] = []
        self._idle: set[Hashable] = set()

    def is_idle(self, kind: Hashable) -> bool:
        """Whether merging pays nowhere in calls of this kind: what those that are judged alike have in common."""
        return kind in self._idle

    def judge(self, kind: Hashable, judged: Judged) -> None:
        """Remember what became of a whole call."""
        if judged.pays_nowhere:
            self._idle.add(kind)

    def on(self, put_on: Callable[[], Iterator[Any]]) -> None:
        """Put the hooks on, where they are not. put_on: registers one after the other and yields their handles."""
        if not self._handles:
            for handle in put_on():  # those before one that fails can still be taken off
                self._handles.append(handle)

    def off(self) -> None:
        """Take the hooks off."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
