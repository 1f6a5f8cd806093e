"""All verdicts of a device, in a file that other processes may write too.

A file that is damaged, or that cannot be read or written, costs a measurement and never a picture: it counts as none.
"""

from __future__ import annotations

import contextlib
import errno
import json
import logging
import math
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path

import torch

from ..core.failures import is_out_of_memory
from .paying import Decision

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None
    import msvcrt

log = logging.getLogger("ToMe")

# The folder of the file; an empty name keeps nothing.
FOLDER = "TOME_CACHE"
FORM = 6  # of the file; one of another form is written anew
MOST = 1000  # verdicts that a file keeps, the newest
# Seconds until what failed for reasons of the moment is measured again; to wait for another process that writes.
RETRY, PATIENCE = 60.0, 2.0
# Bytes of a file that we wrote; a larger one is not read.
_LARGEST = 2**24
# Between what is measured and its surroundings in a decision's name.
BETWEEN = " | "


class NotNow(Exception):
    """What was to be measured cannot be run as it is at this moment: nothing follows from it for later."""


class DecisionStore:
    """Safe to use from several threads and processes, which all get the same decision of a name.

    path: None keeps them in memory alone.
    """

    def __init__(self, path: Path | None):
        self.path = path
        self._lock = threading.RLock()  # around what is known
        self._measuring = threading.RLock()  # measurements side by side would disturb each other
        self._known: dict[str, Decision] | None = None
        self._again: dict[str, float] = {}  # when what failed is tried again, by the monotonic clock
        self._said: set[str] = set()

    def get(self, key: str, measured: Callable[[], Decision]) -> Decision | None:
        """What is known of a layer; what is not is measured, by one thread at a time, and kept.

        None where measuring fails, which is said once. It is not tried again in this process; where memory ran out or
        the model could not be run now (NotNow), it is, in a later picture.
        """
        found = self.known(key)
        if found is not None or self._waits(key):
            return found
        with self._measuring:
            found = self._known_since(key)
            if found is not None or self._waits(key):
                return found
            try:
                made = measured().rounded()
            except Exception as error:  # whatever a foreign attention raises
                self._fail(key, error)
                return None
            return self._keep(key, made)

    def known(self, key: str) -> Decision | None:
        """What is known of a layer, measured by this process or an earlier one."""
        with self._lock:
            if self._known is None:
                self._known = self._read()
            return self._known.get(key)

    def _waits(self, key: str) -> bool:
        """Whether it failed and is not yet to be tried again."""
        return time.monotonic() < self._again.get(key, 0.0)

    def _known_since(self, key: str) -> Decision | None:
        """The same, with what other processes have written by now."""
        with self._lock:
            self._known = {**(self._known or {}), **self._read()}
            return self._known.get(key)

    def _fail(self, key: str, error: Exception) -> None:
        passes = is_out_of_memory(error) or isinstance(error, NotNow)
        self._again[key] = time.monotonic() + RETRY if passes else math.inf
        what, when = key.partition(BETWEEN)[0], "; it is tried again later" if passes else ""
        self._say(f"{what}: not measured ({type(error).__name__}: {error}), so merged{when}")

    def _keep(self, key: str, made: Decision) -> Decision:
        """Write it, with what others have written since. Where another process was first, its decision holds."""
        with self._lock:
            try:
                with contextlib.nullcontext(False) if self.path is None else _alone(self.path) as alone:
                    held = self._read()
                    self._known = {**self._known, key: made, **held}
                    if alone:
                        self._write({**held, **self._known})
            except (OSError, ValueError) as error:
                self._known.setdefault(key, made)
                self._say(f"what was measured cannot be kept in {self.path} ({error})")
                self.path = None
            return self._known[key]

    def _read(self) -> dict[str, Decision]:
        try:
            if self.path is None or not self.path.is_file():
                return {}
            if self.path.stat().st_size > _LARGEST:
                raise ValueError("it is larger than any that ToMe writes")
            held = json.loads(self.path.read_text(encoding="utf-8"))
            if held["form"] != FORM:
                return {}
            found = {key: Decision(**numbers) for key, numbers in held["layers"].items()}
            for decision in found.values():
                if not all(isinstance(x, (int, float)) and math.isfinite(x) for x in asdict(decision).values()):
                    raise ValueError(f"a time that is none: {decision}")
            return found
        except OSError as error:
            self._say(f"{self.path} cannot be read ({error}); its layers are measured anew")
        except Exception as error:  # a parser may raise what it likes: too deep, too long a number
            self._say(f"{self.path} is damaged ({type(error).__name__}: {error}) and is written anew")
        return {}

    def _write(self, decided: dict[str, Decision]) -> None:
        newest = dict(list(decided.items())[-MOST:])
        text = json.dumps({"form": FORM, "layers": {key: asdict(one) for key, one in newest.items()}}, indent=1)
        made = self.path.with_name(f"{self.path.name}.{os.getpid()}-{id(self):x}.tmp")
        try:
            made.write_text(text, encoding="utf-8")
            _replace(made, self.path)
        finally:
            with contextlib.suppress(OSError):
                made.unlink(missing_ok=True)

    def _say(self, line: str) -> None:
        if line not in self._said:
            self._said.add(line)
            log.warning("[ToMe] %s", line)


@contextlib.contextmanager
def _alone(path: Path) -> Iterator[bool]:
    """Keep other processes from writing the file meanwhile. False: another one would not let go of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    name = path.with_suffix(".lock")
    try:
        handle = os.open(name, os.O_RDWR | os.O_CREAT, 0o666)
    except PermissionError:  # another user's
        handle = os.open(name, os.O_RDONLY)
    locked = False
    try:
        until = time.monotonic() + PATIENCE
        while not (locked := _try_lock(handle)) and time.monotonic() < until:
            time.sleep(0.01)
        yield locked
    finally:
        if fcntl is None and locked:
            msvcrt.locking(handle, msvcrt.LK_UNLCK, 1)
        os.close(handle)  # which unlocks it elsewhere


def _try_lock(handle: int) -> bool:
    try:
        if fcntl is None:
            msvcrt.locking(handle, msvcrt.LK_NBLCK, 1)
        else:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        # Some file systems have no locks: there a file that two processes write at once keeps what one of them wrote.
        return error.errno not in (errno.EACCES, errno.EAGAIN, errno.EDEADLK)
    return True


def _replace(made: Path, path: Path) -> None:
    """os.replace; on Windows it fails while another process reads the file."""
    for _ in range(20):
        try:
            return os.replace(made, path)
        except PermissionError:
            if os.name != "nt":
                raise
            time.sleep(0.01)
    return os.replace(made, path)


def folder() -> Path | None:
    """The user's cache folder for ToMe; None where nothing is to be kept, or where the user has no home."""
    named = os.environ.get(FOLDER)
    if named is not None:
        return _expanded(named)
    if os.name == "nt":
        base = _expanded(os.environ.get("LOCALAPPDATA") or "~/AppData/Local")
    elif sys.platform == "darwin":
        base = _expanded("~/Library/Caches")
    else:
        base = _expanded(os.environ.get("XDG_CACHE_HOME") or "~/.cache")
    return None if base is None else base / "tome"


def _expanded(name: str) -> Path | None:
    """With the user's home in place of "~"; None where that is not known, as for a user without an entry."""
    name = os.path.expanduser(name)
    return None if not name or name.startswith("~") else Path(name)


# One for each device of this process; a measurement's outcome is a fact about the machine, not state of a call.
_decided: dict[str, DecisionStore] = {}
_lock = threading.Lock()


def store_of(device: torch.device) -> DecisionStore:
    """The verdicts of a device, read the first time."""
    name = f"{torch.cuda.get_device_name(device)}, torch {torch.__version__}"
    with _lock:
        if name not in _decided:
            base = folder()
            if base is None and os.environ.get(FOLDER) != "":
                log.warning(
                    "[ToMe] this user has no home folder, so what is measured is forgotten when the process ends; "
                    "name a folder in %s to keep it",
                    FOLDER,
                )
            file = "".join(c if c.isalnum() or c in ".+-" else "_" for c in name) + ".json"
            _decided[name] = DecisionStore(None if base is None else base / file)
        return _decided[name]
