"""One line a reason: what was left alone and why, said once a process and not at every step."""

from __future__ import annotations

import logging

from ..shared_tome.curve import is_compiling

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
