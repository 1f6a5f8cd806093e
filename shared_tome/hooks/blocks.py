"""Hooks on a model's blocks that go where merging does nothing: even then they take the processor time, which shows
where steps wait for it."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable
from dataclasses import dataclass, field
from typing import Any

from ..core.curve import is_compiling
from .portable import Portable


@dataclass
class LayersSeen:
    """What became of the layers of one call. unpaid: served ones where merging does not pay; others: all but those and
    the ones that are not served; alone, busy: the blocks of the former two and of the others."""

    unpaid: int = 0
    others: int = 0
    alone: set[Hashable] = field(default_factory=set)
    busy: set[Hashable] = field(default_factory=set)

    def leave(self, block: Hashable, unpaid: bool = False) -> None:
        """A layer of a block, counted as others', is not served or, unpaid, merging does not pay: so it will be in all
        calls that are alike."""
        self.others -= 1
        self.unpaid += unpaid
        if not is_compiling():
            self.busy.discard(block)
            self.alone.add(block)

    @property
    def pays_nowhere(self) -> bool:
        return self.unpaid > 0 and self.others == 0


class BlockHooks(Portable):
    """The handles of each block, and in which kinds of calls which blocks do without. Keeps no model."""

    def __init__(self) -> None:
        self._handles: dict[Hashable, list[Any]] = {}
        self._off: frozenset[Hashable] | None = None  # blocks without hooks while others have theirs; None: all
        self._idle: set[Hashable] = set()
        self._alone: dict[Hashable, frozenset[Hashable]] = {}

    def afresh(self) -> dict[str, Any]:
        return {"_idle": set(), "_alone": {}}

    def is_idle(self, kind: Hashable) -> bool:
        """Whether merging pays nowhere in calls of this kind: what those that are judged alike have in common."""
        return kind in self._idle

    def rest(self, kind: Hashable) -> None:
        """Merging is to do nothing in calls of this kind."""
        self._idle.add(kind)

    def remember(self, kind: Hashable, layers_seen: LayersSeen) -> None:
        """Remember what became of a whole call."""
        if layers_seen.pays_nowhere:
            self.rest(kind)
        elif not is_compiling():
            self._alone[kind] = frozenset((self._alone.get(kind, frozenset()) | layers_seen.alone) - layers_seen.busy)

    def on(
        self,
        blocks: Callable[[], Iterable[tuple[Hashable, Callable[[], list[Any]]]]],
        kind: Hashable = None,
        narrow: bool = True,
    ) -> None:
        """Put the hooks on, where they are not.

        blocks: each block, and what registers its hooks and returns their handles. kind: of the call to come, whose
        idle blocks need none; None: all have some. narrow: whether hooks may be taken off.
        """
        if is_compiling() and self._off is not None:
            return
        off = self._alone.get(kind, frozenset())
        if self._off is not None and not narrow:
            off &= self._off
        if off == self._off:
            return
        self._off = frozenset()  # those before one that fails can still be taken off
        for block, hook in blocks():
            if block in off:
                self._remove(block)
            elif block not in self._handles:
                self._handles[block] = hook()
        self._off = off

    def off(self) -> None:
        """Take the hooks off."""
        for block in list(self._handles):
            self._remove(block)
        self._off = None

    def _remove(self, block: Hashable) -> None:
        for handle in self._handles.pop(block, ()):
            handle.remove()
