"""One line a reason: what was left alone and why, said once a process and not at every step.

The same reasons stand in ToMe Report and in the line at the end of a sampling that merged nothing (outcome.py):
`leave_alone` is the one way to all.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from ..shared_tome.core.curve import is_compiling

if TYPE_CHECKING:
    from ..shared_tome.core.grid import Grid
    from ..shared_tome.inspect.report import CallTally
    from .outcome import Outcome

logger = logging.getLogger("ToMe")
_said: set[str] = set()  # reasons logged already; nothing that is computed depends on it


def say_once(reason: str, where: str = "") -> None:
    """Log a reason the first time it comes up, with the place where it did.

    Silent while torch.compile traces: a log call would break the graph.
    """
    if is_compiling() or reason in _said:
        return
    _said.add(reason)
    logger.info("[ToMe] %s", f"{reason} ({where})" if where else reason)


def leave_alone(
    record: CallTally | None,
    reason: str,
    where: str,
    detail: str = "",
    grid: Grid | None = None,
    part: int = 0,
    outcome: Outcome | None = None,
) -> None:
    """Say why a layer is left alone: once to the log, each time to the call's record and the sampling's outcome, where
    there are any.

    where: the layer's block; detail: what only the log is to say beside it.
    """
    if is_compiling():
        return
    if record is not None:
        record.left_alone(reason, where, grid, part)
    if outcome is not None:
        outcome.left_alone(reason, where, grid)
    say_once(reason, f"{where}, {detail}" if detail else where)
