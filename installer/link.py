"""Putting this repository into a ComfyUI or an AUTOMATIC1111, and taking it out again.

A link where the system gives one, else a copy with a marker file. Only a link to this repository
or a copy with our marker is ever removed or replaced.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

from .console import SetupError
from .paths import ROOT

MARKER = ".tome-copy.json"
LEFT_OUT = (
    ".git", ".venv", ".cache", ".ci", ".github", "tests", "out", "__pycache__", "*.pyc",
    ".pytest_cache", ".ruff_cache", ".hypothesis", ".mypy_cache", ".idea", ".vscode",
)  # fmt: skip


@dataclass(frozen=True)
class Host:
    """A program that loads extensions from a folder of its own."""

    title: str
    extensions: str
    name: str  # our folder's name there; ComfyUI serves no help pages from a name with a dot
    needs: tuple[str, ...]
    nested: tuple[str, ...]  # where ready-made bundles keep it
    restart: str


COMFYUI = Host(
    "ComfyUI", "custom_nodes", "comfyui-tome", ("main.py", "nodes.py", "comfy"), ("ComfyUI",),
    'Restart ComfyUI, then add the node "ToMe" between your model and the sampler.',
)  # fmt: skip
A1111 = Host(
    "AUTOMATIC1111, Forge or reForge", "extensions", "sd-webui-tome", ("webui.py", "launch.py", "modules"),
    ("webui", "stable-diffusion-webui"),
    'Restart the web UI, then open "ToMe" under txt2img or img2img.',
)  # fmt: skip


def find_host(folder: Path, host: Host) -> Path:
    """The host's own folder: `folder`, or the one inside a ready-made bundle.

    Raises SetupError when neither is one, naming what was looked for and is missing.
    """
    folder = folder.expanduser().absolute()
    for candidate in (folder, *(folder / name for name in host.nested)):
        if not _missing(candidate, host):
            return candidate
    if not folder.is_dir():
        raise SetupError(f"there is no folder {folder}", f"Name the folder that {host.title} lies in.")
    looked, missing = ", ".join(host.needs), ", ".join(_missing(folder, host))
    raise SetupError(
        f"{folder} is no {host.title}: looked for {looked}; missing: {missing}",
        f"Name the folder that holds {host.needs[0]}.",
    )


def _missing(folder: Path, host: Host) -> list[str]:
    return [name for name in host.needs if not (folder / name).exists()]


def add(folder: Path, host: Host, copy: bool = False, root: Path = ROOT) -> str:
    """Link (or copy) the repository `root` into a host and say what was done. Twice is harmless.

    Raises SetupError when `folder` is no host, or something of the user's stands in the way.
    """
    extensions = find_host(folder, host) / host.extensions
    place = extensions / host.name
    inside = _lies_in(root, extensions)
    if inside:
        return f"This repository lies in {inside} already. {host.restart}"
    other = _other_clone(extensions, place)
    if other:
        raise SetupError(f"{other} holds ToMe already", "Remove that one first: two would clash.")
    return f"{put(place, root, copy)}. {host.restart}"


def put(place: Path, root: Path = ROOT, copy: bool = False) -> str:
    """Make `place` a link to `root`, or a copy of it, and say which. Twice is harmless.

    Raises SetupError when something stands at `place` that was not put there by this function.
    """
    if _is_link(place):
        if not _same(place, root):
            another = f"{place} is a link to {_target(place)}, not to {root}"
            raise SetupError(another, "Remove that link first.")
        if not copy:
            return f"{place} is linked to {root} already"
        _unlink(place)
    elif place.exists() and not _is_copy(place):
        raise SetupError(f"{place} was there before and is not ours", "Move it away first.")
    place.parent.mkdir(exist_ok=True)
    if not copy and not place.exists() and _link(place, root):
        return f"Linked {place} to {root}"
    _copy(place, root)
    return f"Copied {root} to {place} (run this again after an update)"


def remove(folder: Path, host: Host, root: Path = ROOT) -> str:
    """Take out what `add` put in, and say what was done.

    Raises SetupError when what stands there was not put there by `add`.
    """
    place = find_host(folder, host) / host.extensions / host.name
    if _is_link(place):
        if not _same(place, root):
            raise SetupError(f"{place} is a link to {_target(place)}, not to {root}: left alone")
        _unlink(place)
        return f"Removed the link {place}. Restart {host.title}."
    if not place.exists():
        inside = _lies_in(root, place.parent)
        if inside:
            return f"This repository itself is {inside}: delete that folder yourself if you want it gone."
        return f"There is no {place}: nothing to remove."
    if not _is_copy(place):
        raise SetupError(f"{place} is not ours: left alone")
    shutil.rmtree(place)
    return f"Removed the copy {place}. Restart {host.title}."


def _lies_in(root: Path, extensions: Path) -> Path | None:
    """The entry of `extensions` that is the repository itself, not a link to it."""
    for entry in extensions.iterdir() if extensions.is_dir() else ():
        if not _is_link(entry) and entry.is_dir() and _same(entry, root):
            return entry
    return None


def _other_clone(extensions: Path, place: Path) -> Path | None:
    for entry in extensions.iterdir() if extensions.is_dir() else ():
        if entry == place or entry.suffix == ".disabled":
            continue
        if (entry / "comfy_tome").is_dir() and (entry / "shared_tome").is_dir():
            return entry
    return None


def _same(one: Path, two: Path) -> bool:
    try:
        return one.samefile(two)
    except OSError:  # a link whose target is gone
        return False


def _is_link(place: Path) -> bool:
    return place.is_symlink() or _is_junction(place)


def _is_junction(place: Path) -> bool:
    if sys.platform != "win32":
        return False
    try:
        tag = getattr(os.lstat(place), "st_reparse_tag", 0)
    except OSError:
        return False
    return tag == 0xA0000003  # IO_REPARSE_TAG_MOUNT_POINT


def _target(place: Path) -> str:
    try:
        return os.readlink(place)
    except OSError:
        return "somewhere else"


def _unlink(place: Path) -> None:
    if _is_junction(place):
        os.rmdir(place)  # removes the junction, never what it points to
    else:
        place.unlink()


def _link(place: Path, root: Path) -> bool:
    """Make a symlink, or on Windows, where those need a right, a junction. False: neither went."""
    try:
        place.symlink_to(root, target_is_directory=True)
        return True
    except (OSError, NotImplementedError):
        pass
    if sys.platform == "win32":
        try:
            import _winapi

            _winapi.CreateJunction(str(root), str(place))
            return True
        except (OSError, AttributeError, ImportError):
            pass
    return False


def _is_copy(place: Path) -> bool:
    return (place / MARKER).is_file()


def _copy(place: Path, root: Path) -> None:
    """Copy aside first, so that a copy cut short never stands where the host looks."""
    partial = place.with_name(f".{place.name}.partial")
    if partial.exists():
        shutil.rmtree(partial)
    try:
        shutil.copytree(root, partial, ignore=shutil.ignore_patterns(*LEFT_OUT))
        (partial / MARKER).write_text(json.dumps({"copied from": str(root)}), encoding="utf-8")
        if place.exists():
            shutil.rmtree(place)
        partial.rename(place)
    except OSError as error:
        shutil.rmtree(partial, ignore_errors=True)
        hint = "Check the folder's rights and the free space."
        raise SetupError(f"{place} could not be written: {error}", hint) from error
