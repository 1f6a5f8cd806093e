"""A copy of this repository in a host: made aside, listed with its hashes, swapped in at the end.

A host loads every folder that lies in its extensions. What is made or kept aside there lies one folder
deeper, where AUTOMATIC1111 looks for nothing, in a folder whose name ends with what ComfyUI skips.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from fnmatch import fnmatch
from pathlib import Path, PurePosixPath

from . import files
from .console import SetupError, or_failed
from .paths import ROOT

MARKER = ".tome-copy.json"
PARTIAL, KEPT = ".partial.disabled", ".kept.disabled"
LEFT_OUT = (
    ".git", ".venv", ".cache", ".ci", ".github", "tests", "out", "__pycache__", "*.pyc", MARKER,
    ".pytest_cache", ".ruff_cache", ".hypothesis", ".mypy_cache", ".idea", ".vscode", ".DS_Store",
)  # fmt: skip


def is_copy(place: Path) -> bool:
    """Whether `place` was made by `install`, of this version or an earlier one."""
    return os.path.isfile(place / MARKER)


def tidy(place: Path, root: Path) -> list[str]:
    """Remove what an interrupted copy left beside `place`, and say so. Raises SetupError."""
    bench, before = place.with_name(place.name + PARTIAL), place.with_name(f".{place.name}.partial")
    left = [path for path in (bench, before) if os.path.lexists(path)]
    said = [f"Removed what an interrupted copy left: {path}" for path in left]
    if not left:
        return []
    with or_failed(f"{left[-1]}, left by an interrupted copy, could not be removed"), _aside(place) as bench:
        if before in left:
            said[-1] = _retire(before, root, place, bench) or said[-1]
    return said


def differences(place: Path, root: Path) -> list[str]:
    """What lies in the copy `place` and is not as ToMe put it there. A copy without a list is held against `root`."""
    if files.is_link(place) or not place.is_dir():
        return [place.name]
    listed, found = _listed(place), []
    try:
        if listed is None:
            listed = {path.relative_to(root).as_posix(): files.digest(path) for path in _sources(root, place)}
        for path in files.walk(place):
            name = path.relative_to(place).as_posix()
            by_itself = path.parent.name == "__pycache__" and path.suffix == ".pyc"
            if by_itself or path.name in (".DS_Store", "Thumbs.db") or name == MARKER:
                continue
            if files.is_link(path) or not path.is_file() or listed.get(name) != files.digest(path):
                found.append(name)
    except OSError as error:  # what cannot be read may be the user's
        found.append(str(error.filename or error))
    return found


def install(place: Path, root: Path, fresh: bool = True) -> str:
    """Put a copy of `root` at `place`, instead of the copy or the link that is there. fresh: False takes it out alone.

    Returns a line on what was kept of the old one, "" where nothing was the user's. Raises SetupError.
    """
    linked = files.is_link(place)
    if not linked:
        _refuse_from_inside(place, root)
    with or_failed(f"{place} could not be {'written' if fresh else 'removed'}"), _aside(place) as bench:
        new = _make(root, bench / "new", place) if fresh else None
        if linked:
            return _replace(place, bench / "old", new)
        return _retire(place, root, place, bench, new) if place.exists() else _replace(place, None, new)


def _retire(old: Path, root: Path, place: Path, bench: Path, new: Path | None = None) -> str:
    """Replace `old` by `new`. `old` is deleted where all of it is ToMe's; else it is kept, and a line says where."""
    theirs = differences(old, root)
    if not theirs:
        return _replace(old, bench / "old", new)
    shelf = files.make_folder(place.with_name(place.name + KEPT))
    kept = files.free_name(shelf / "copy")
    try:
        _replace(old, kept, new)
    finally:
        with suppress(OSError):
            shelf.rmdir()  # goes only where nothing was put
    listed = _listed(kept)
    if listed is None:
        why = "an earlier ToMe kept no list of its files"
    else:
        shown = _shortened(theirs, listed)
        more = f" and {len(shown) - 4} more" if len(shown) > 4 else ""
        why = f"not as ToMe put it there: {', '.join(shown[:4])}{more}"
    return f"Kept the old copy as {kept} ({why}). Delete it when you do not need it."


def _shortened(names: list[str], listed: dict[str, str]) -> list[str]:
    """`names`, where a folder stands for all that is in it if none of it is ToMe's."""
    ours = {str(above) for name in listed for above in PurePosixPath(name).parents}
    first = {}
    for name in names:
        path = PurePosixPath(name)
        above = [str(folder) for folder in reversed(path.parents) if str(folder) not in ours]
        first[above[0] if above else name] = None
    return list(first)


def _replace(place: Path, old: Path | None, new: Path | None) -> str:
    """Move `place` to `old` and `new` to `place`: both, or neither."""
    try:
        if old is not None:
            files.move(place, old)
        if new is not None:
            files.move(new, place)
    except BaseException:
        if old is not None and os.path.lexists(old) and not os.path.lexists(place):
            files.move(old, place)
        raise
    return ""


def _make(root: Path, into: Path, place: Path) -> Path:
    listed = {}
    for source in _sources(root, place):
        name = source.relative_to(root).as_posix()
        copied = into / name
        copied.parent.mkdir(parents=True, exist_ok=True)
        listed[name] = files.digest(source, copy_to=copied)
        if os.access(source, os.X_OK):
            copied.chmod(copied.stat().st_mode | 0o100)  # not the whole mode: the source may be read-only
    told = {"copied from": str(root), "files": listed}
    (into / MARKER).write_text(json.dumps(told, indent=1), encoding="utf-8")
    return into


def _sources(root: Path, place: Path) -> Iterator[Path]:
    """The files that are copied; never those of a host that lies in this repository."""
    around = place.parent.resolve()
    hosts = {around, *around.parents}

    def skip(path: Path) -> bool:
        return any(fnmatch(path.name, pattern) for pattern in LEFT_OUT) or path.resolve() in hosts

    return (path for path in files.walk(root, skip, follow=True) if path.is_file())


def _listed(place: Path) -> dict[str, str] | None:
    listed = files.told(place / MARKER).get("files")
    return listed if isinstance(listed, dict) else None


def _refuse_from_inside(place: Path, root: Path) -> None:
    """Never move or delete the folder that a command runs from."""
    here = place.resolve()
    with suppress(FileNotFoundError):  # a working folder that is gone already
        for folder in (root.resolve(), ROOT, Path.cwd().resolve()):
            if here in (folder, *folder.parents):
                raise SetupError(
                    f"this command runs from {folder}, which it would have to replace: nothing was changed",
                    "Go to the repository that the copy was made of, and run its install.py.",
                )


@contextmanager
def _aside(place: Path) -> Iterator[Path]:
    """A folder beside `place` that hosts do not load, for this process alone; gone whatever ends the block."""
    bench = place.with_name(place.name + PARTIAL)
    if files.is_link(bench):
        raise SetupError(f"{bench} is a link: nothing is removed through a link", "Remove that link.")
    lock = bench / "lock"
    try:
        with files.alone(lock):
            with or_failed(f"{bench}, left by an interrupted copy, could not be removed"):
                _clear(bench, lock)
            try:
                yield bench
            finally:
                with suppress(OSError):  # what stays is not loaded, and goes with the next command
                    _clear(bench, lock)
    finally:
        with suppress(OSError):
            bench.rmdir()


def _clear(bench: Path, lock: Path) -> None:
    for path in list(bench.iterdir()):
        if path != lock:
            files.delete(path)
