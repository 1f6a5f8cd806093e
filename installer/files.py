"""Files and folders, handled so that a link is never followed and an error is one line."""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import stat
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import IO, Any

from .console import SetupError, failed


def user_path(name: str | os.PathLike[str]) -> Path:
    """A path that a person typed, absolute, "~" expanded. Raises SetupError when it cannot be."""
    try:
        return Path(name).expanduser().absolute()
    except RuntimeError as error:
        raise SetupError(f"the home folder in {name} is not known", "Write the whole path.") from error
    except OSError as error:
        raise failed("the folder that this command runs in is gone", error) from error


def exists(place: Path) -> bool:
    """Whether `place` is there, links followed. Raises OSError where the system does not let us look."""
    try:
        os.stat(place)
    except (FileNotFoundError, NotADirectoryError):
        return False
    return True


def is_link(place: Path) -> bool:
    """Whether `place` is a link, or a junction of Windows, wherever it leads."""
    return os.path.islink(place) or _is_junction(place)


def _is_junction(place: Path) -> bool:
    if sys.platform != "win32":
        return False
    try:
        tag = getattr(os.lstat(place), "st_reparse_tag", 0)
    except OSError:
        return False
    return tag == 0xA0000003  # IO_REPARSE_TAG_MOUNT_POINT


def target(place: Path) -> str:
    """Where a link leads, in words."""
    try:
        return os.readlink(place)
    except OSError:
        return "somewhere else"


def unlink(place: Path) -> None:
    """Remove a file, a link or a junction, never what it leads to."""
    if _is_junction(place):
        os.rmdir(place)
    else:
        place.unlink()


def delete(place: Path) -> None:
    """Remove a file or a folder with all that is in it, read-only or not. Links are removed, not followed."""
    if is_link(place):
        unlink(place)
    elif place.is_dir():
        _allow(place)
        for entry in list(place.iterdir()):
            delete(entry)
        place.rmdir()
    else:
        if os.name == "nt":
            os.chmod(place, stat.S_IWRITE)  # Windows deletes no read-only file
        place.unlink()


def move(place: Path, to: Path) -> None:
    """Rename a file, a folder (read-only or not) or a link on the same disk. Raises OSError."""
    if not is_link(place) and place.is_dir():
        _allow(place)  # else it cannot get another parent
    os.rename(place, to)


def _allow(folder: Path) -> None:
    with suppress(OSError):  # what is another user's may be allowed all the same
        os.chmod(folder, stat.S_IMODE(os.lstat(folder).st_mode) | stat.S_IRWXU)


def make_folder(place: Path) -> Path:
    """Make a folder, and those above it, and return it. Raises SetupError when something is in the way."""
    try:
        place.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        blocking = next((above for above in (place, *place.parents) if os.path.lexists(above)), place)
        if is_link(blocking) and not blocking.exists():
            what = f"{blocking} is a link to {target(blocking)}, which is not there"
            raise SetupError(what, "Remove that link, or make the folder that it leads to.") from error
        if not blocking.is_dir():
            raise SetupError(f"{blocking} is a file, not a folder", "Move that file away.") from error
        raise failed(f"the folder {place} could not be made", error) from error
    return place


def put(place: Path, text: str) -> None:
    """Write a file, at once and in whole: one that stands there stays until the new one is ready. Raises OSError."""
    fresh = place.with_name(f"{place.name}.new")
    fresh.write_text(text, encoding="utf-8", newline="\n")
    fresh.replace(place)


def told(file: Path) -> dict[str, Any]:
    """What a file of JSON holds; empty where it is not there, damaged, or no object."""
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def walk(
    folder: Path,
    skip: Callable[[Path], bool] = lambda path: False,
    follow: bool = False,
    above: frozenset[Path] = frozenset(),
) -> Iterator[Path]:
    """All below `folder` that is no folder, by name. Links count as files, unless `follow`. above: where it lies."""
    above |= {folder.resolve()}
    for path in sorted(folder.iterdir()):
        if skip(path):
            continue
        if not path.is_dir() or (is_link(path) and not follow):
            yield path
        elif path.resolve() not in above:  # else a link leads back up
            yield from walk(path, skip, follow, above)


def digest(file: Path, copy_to: Path | None = None) -> str:
    """The SHA-256 of a file's bytes, which are written to `copy_to` on the way."""
    found = hashlib.sha256()
    with file.open("rb") as source, copy_to.open("xb") if copy_to else nullcontext() as copy:
        while block := source.read(2**20):
            found.update(block)
            if copy is not None:
                copy.write(block)
    return found.hexdigest()


def free_name(place: Path) -> Path:
    """`place`-1, or the first number after it that nothing has."""
    names = (place.with_name(f"{place.name}-{number}") for number in itertools.count(1))
    return next(name for name in names if not os.path.lexists(name))


@contextmanager
def alone(file: Path) -> Iterator[None]:
    """Hold a lock on `file` while the block runs. The system frees it, whatever ends this process.

    Raises SetupError at once where another process holds it.
    """
    handle = _locked(file)
    try:
        yield
    finally:
        with suppress(OSError):
            if os.name == "nt":
                handle.close()  # Windows deletes no open file
            file.unlink()
        handle.close()


def _locked(file: Path) -> IO[str]:
    while True:
        make_folder(file.parent)
        try:
            handle = file.open("a", encoding="utf-8")
        except FileNotFoundError:
            continue  # the process before us has just removed the folder
        except OSError as error:
            raise failed(f"{file} could not be written", error) from error
        try:
            _lock(handle)
        except (BlockingIOError, PermissionError) as error:
            handle.close()
            busy = f"another install.py is at work in {file.parent}"
            raise SetupError(busy, "Wait until it is done, then run this again.") from error
        except OSError:
            return handle  # some network disks have no locks
        with suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(handle.fileno()), os.stat(file)):
                return handle
        handle.close()  # the process before us removed this file as it ended


def _lock(handle: IO[str]) -> None:
    if sys.platform == "win32":
        import msvcrt

        msvcrt.locking(handle.fileno(), msvcrt.LK_NBLCK, 1)
    else:
        import fcntl

        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
