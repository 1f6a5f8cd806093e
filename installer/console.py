"""What people see: one line a stage with its seconds, and errors that say what to do."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager


class SetupError(Exception):
    """Something outside our hands went wrong: the message says what, `hint` what to do about it."""

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.hint = hint


def say(text: str = "") -> None:
    """Print a line at once, also into a pipe."""
    print(text, flush=True)


def complain(error: SetupError) -> None:
    """Print an error and its hint on stderr."""
    print(f"\nToMe: {error}", file=sys.stderr)
    if error.hint:
        print(f"{error.hint}", file=sys.stderr)
    sys.stderr.flush()


class Stage:
    """A stage under way; `note` shows a passing detail where the output is a terminal."""

    def __init__(self, title: str) -> None:
        self.title = title
        self.result = ""
        self.started = time.monotonic()
        self._live = sys.stdout.isatty()

    def note(self, text: str) -> None:
        if self._live:
            print(f"\r\x1b[2K  {self.title} ... {text[:70]}", end="", flush=True)

    def close(self, outcome: str) -> None:
        seconds = time.monotonic() - self.started
        clear = "\r\x1b[2K" if self._live else ""
        detail = f": {self.result}" if self.result else ""
        say(f"{clear}  {self.title}{detail} ({outcome}{seconds:.1f} s)")


@contextmanager
def stage(title: str) -> Iterator[Stage]:
    """Show `title` while the block runs and its seconds when it is done."""
    current = Stage(title)
    current.note("")
    try:
        yield current
    except BaseException:
        current.close("failed after ")
        raise
    current.close("")
