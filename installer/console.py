"""What people see: one line a stage with its seconds, and errors that say what to do."""

from __future__ import annotations

import errno
import signal
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path


class SetupError(Exception):
    """Something outside our hands went wrong: the message says what, `hint` what to do about it."""

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.hint = hint


HINTS = {
    ("ENOSPC", "EDQUOT"): "The disk is full. Free some space, then run this again.",
    ("EACCES", "EPERM"): "Check who owns the folder, and its rights. On Windows, also close the programs that use it.",
    ("EROFS",): "That disk is read-only. Use a folder that can be written.",
    ("ENAMETOOLONG",): "The path is too long. Use a folder with a shorter path.",
    ("EEXIST", "ENOTEMPTY"): "Something stands there already. Move it away, then run this again.",
    ("ENOTDIR",): "A file stands where a folder is needed. Move the file away, then run this again.",
    ("EISDIR",): "A folder stands where a file is needed. Move the folder away, then run this again.",
    ("ENOENT",): "A part of that path is missing. Check the path.",
    ("ELOOP",): "Links on that path lead in a circle. Mend the links.",
    ("EBUSY", "ETXTBSY"): "Another program uses it. Close that program, then run this again.",
}


def failed(what: str, error: OSError) -> SetupError:
    """`what` failed because the system refused it: the reason, and a hint that fits the reason."""
    reason = error.strerror or str(error)
    if error.filename and str(error.filename) not in what:
        reason += f": {error.filename}"
    name = "EBUSY" if getattr(error, "winerror", None) in (32, 33) else errno.errorcode.get(error.errno or 0)
    hint = next((hint for names, hint in HINTS.items() if name in names), "Check that place, then run this again.")
    return SetupError(f"{what}: {reason}", hint)


@contextmanager
def or_failed(what: str) -> Iterator[None]:
    """Raises SetupError where the system refuses something in the block; see failed."""
    try:
        yield
    except OSError as error:
        raise failed(what, error) from error


def say(text: str = "") -> None:
    """Print a line at once, also into a pipe."""
    print(text, flush=True)


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines of a Markdown table whose columns stand below each other."""
    widths = [max(len(row[column]) for row in (head, *rows)) for column in range(len(head))]
    return [
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |"
        for row in (head, ["-" * width for width in widths], *rows)
    ]


def deliver(table: str, write: Callable[[], Iterable[Path]], out: Path) -> None:
    """Say a table, then write the results into `out` and say where they are. Raises SetupError where that fails."""
    say()
    say(table)  # before anything is written: a full disk must not cost the numbers
    with or_failed(f"the results could not be written to {out}"):
        written = write()
    say()
    say("\n".join(f"  {path}" for path in written))


def complain(error: SetupError | OSError) -> None:
    """Print an error and its hint on stderr."""
    if isinstance(error, OSError):
        error = failed("the system refused an operation", error)
    print(f"\nToMe: {error}", file=sys.stderr)
    if error.hint:
        print(f"{error.hint}", file=sys.stderr)
    sys.stderr.flush()


def exit_status(work: Callable[[], int | None], stopped: str = "Stopped.") -> int:
    """Do the work of a program and return its exit status; an error and Ctrl-C (`stopped`) are told in a line."""
    for name in ("SIGTERM", "SIGHUP", "SIGBREAK"):
        number = getattr(signal, name, None)
        if number and signal.getsignal(number) is signal.SIG_DFL:  # nohup ignores SIGHUP: so do we then
            signal.signal(number, lambda number, _: sys.exit(128 + number))  # a kill cleans up as Ctrl-C does
    try:
        return work() or 0
    except (SetupError, OSError) as error:
        complain(error)
        return 1
    except KeyboardInterrupt:
        say(f"\n{stopped}")
        return 130


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
    except BaseException as error:
        stopped = isinstance(error, (KeyboardInterrupt, SystemExit))
        current.close("stopped after " if stopped else "failed after ")
        raise
    current.close("")
