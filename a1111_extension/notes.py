"""What a person is told: one line a reason in the log and under the picture."""

from __future__ import annotations

import logging
from typing import Any

logger = logging.getLogger("ToMe")


def set_up_log() -> None:
    """Make our lines visible where the host shows none of that level (A1111 sets up no logging, reForge warnings)."""
    shown = logging.root.handlers and logging.root.level <= logging.INFO
    if not shown and not logger.handlers:
        handler = logging.StreamHandler()
        handler.setFormatter(logging.Formatter("%(message)s"))
        logger.addHandler(handler)
        logger.setLevel(logging.INFO)
        logger.propagate = False


class Notes:
    """The notes of one generation; each is logged once and shown once.

    p: the host's processing object, whose `comment` puts a line under the picture (not into what the API gives back).
    """

    def __init__(self, p: Any = None):
        self._p = p
        self._said: set[str] = set()

    def say(self, message: str, shown: bool = True) -> None:
        """Log a line the first time it comes up; shown: under the picture too."""
        if message in self._said:
            return
        self._said.add(message)
        logger.info("[ToMe] %s", message)
        if shown:
            self.show(message)

    def show(self, message: str) -> None:
        """Put a line under the picture alone."""
        comment = getattr(self._p, "comment", None)
        if comment is not None:
            comment(f"ToMe: {message}")

    def has_said(self, reason: str) -> bool:
        """Whether a line that was logged begins with this reason."""
        return any(message.startswith(reason) for message in self._said)


class Silence(Notes):
    """Of a step that is only tried: what becomes of its layers is told in the steps to come."""

    def say(self, message: str, shown: bool = True) -> None:
        pass
