"""Putting this repository into a ComfyUI or an AUTOMATIC1111, and taking it out again.

A link where the system gives one, else a copy with a list of its files (`copies.py`). Only a link to this
repository or an unchanged copy of it is ever removed or replaced; a changed copy is kept aside.
"""

from __future__ import annotations

import os
import sys
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from . import copies, files
from .console import SetupError, or_failed
from .files import is_link
from .paths import ROOT


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
    folder = files.user_path(folder)
    name_it = f"Name the folder that {host.title} lies in."
    with or_failed(f"{folder} could not be read"):
        for candidate in (folder, *(folder / name for name in host.nested)):
            if not _missing(candidate, host):
                return candidate
        if not files.exists(folder):
            raise SetupError(f"there is no folder {folder}", name_it)
        if not folder.is_dir():
            raise SetupError(f"{folder} is a file, not a folder", name_it)
        looked, missing = ", ".join(host.needs), ", ".join(_missing(folder, host))
    raise SetupError(
        f"{folder} is no {host.title}: looked for {looked}; missing: {missing}",
        f"Name the folder that holds {host.needs[0]}.",
    )


def _missing(folder: Path, host: Host) -> list[str]:
    return [name for name in host.needs if not files.exists(folder / name)]


def add(folder: Path, host: Host, copy: bool = False, root: Path = ROOT) -> str:
    """Link (or copy) the repository `root` into a host and say what was done. Twice is harmless.

    A copy that was changed since is kept aside, and its place is said. Raises SetupError when `folder` is
    no host, or something of the user's stands in the way.
    """
    extensions = find_host(folder, host) / host.extensions
    place = extensions / host.name
    inside = _lies_in(root, extensions)
    if inside:
        return f"This repository lies in {inside} already. {host.restart}"
    tidied = copies.tidy(place, root)
    other = _other_clone(extensions, place)
    if other:
        raise SetupError(f"{other} holds ToMe already", "Remove that one first: two would clash.")
    return "\n".join([*tidied, f"{put(place, root, copy)}. {host.restart}"])


def put(place: Path, root: Path = ROOT, copy: bool = False) -> str:
    """Make `place` a link to `root`, or a copy of it, and say which. Twice is harmless.

    Raises SetupError when something stands at `place` that was not put there by this function.
    """
    if is_link(place):
        if not _same(place, root):
            another = f"{place} is a link to {files.target(place)}, not to {root}"
            raise SetupError(another, "Remove that link first.")
        if not copy:
            return f"{place} is linked to {root} already"
    elif os.path.lexists(place) and not copies.is_copy(place):
        raise SetupError(f"{place} was there before and is not from ToMe", "Move it away first.")
    files.make_folder(place.parent)
    if not copy and not os.path.lexists(place) and _link(place, root):
        return f"Linked {place} to {root}"
    kept = copies.install(place, root)
    return "\n".join(filter(None, [kept, f"Copied {root} to {place} (run this again after an update)"]))


def remove(folder: Path, host: Host, root: Path = ROOT) -> str:
    """Take out what `add` put in, and say what was done.

    Raises SetupError when what stands there was not put there by `add`.
    """
    place = find_host(folder, host) / host.extensions / host.name
    tidied = copies.tidy(place, root)
    return "\n".join([*tidied, *_remove(place, host, root)])


def _remove(place: Path, host: Host, root: Path) -> list[str]:
    if is_link(place):
        if not _same(place, root):
            raise SetupError(f"{place} is a link to {files.target(place)}, not to {root}: nothing was removed")
        with or_failed(f"the link {place} could not be removed"):
            files.unlink(place)
        return [f"Removed the link {place}. Restart {host.title}."]
    inside = _lies_in(root, place.parent)
    if inside:
        return [f"This repository itself is {inside}: delete that folder yourself if you want it gone."]
    if not os.path.lexists(place):
        return [f"There is no {place}: nothing to remove."]
    if not copies.is_copy(place):
        raise SetupError(f"{place} was not put there by ToMe: nothing was removed")
    kept = copies.install(place, root, fresh=False)
    done = f"Took the copy out of {place.parent}" if kept else f"Removed the copy {place}"
    return [*filter(None, [kept]), f"{done}. Restart {host.title}."]


def _lies_in(root: Path, extensions: Path) -> Path | None:
    """The entry of `extensions` that is the repository itself, not a link to it."""
    entries = (entry for entry in _entries(extensions) if not is_link(entry) and os.path.isdir(entry))
    return next((entry for entry in entries if _same(entry, root)), None)


def _other_clone(extensions: Path, place: Path) -> Path | None:
    others = (entry for entry in _entries(extensions) if entry != place and entry.suffix != ".disabled")
    parts = ("comfy_tome", "shared_tome")
    return next((entry for entry in others if all(os.path.isdir(entry / part) for part in parts)), None)


def _entries(extensions: Path) -> list[Path]:
    with or_failed(f"{extensions} could not be read"):
        return sorted(extensions.iterdir()) if os.path.isdir(extensions) else []


def _same(one: Path, two: Path) -> bool:
    try:
        return one.samefile(two)
    except OSError:  # a link whose target is gone
        return False


def _link(place: Path, root: Path) -> bool:
    """Make a symlink, or on Windows, where those need a right, a junction. False: neither went."""
    with suppress(OSError, NotImplementedError):
        place.symlink_to(root, target_is_directory=True)
        return True
    if sys.platform == "win32":
        with suppress(OSError, AttributeError, ImportError):
            import _winapi

            _winapi.CreateJunction(str(root), str(place))
            return True
    return False
