"""This version, and what of each version changed the picture that a seed gives; CHANGELOG.md has the same words."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from .config import ToMeConfig

COMFYUI, WEBUI, SCRIPTS = "ComfyUI", "AUTOMATIC1111 and Forge", "scripts"
_EVERYWHERE = COMFYUI, WEBUI, SCRIPTS
_VERSION = re.compile(r"\d{1,5}(?:\.\d{1,5}){1,3}", re.ASCII)


@dataclass(frozen=True)
class Change:
    """what: one clause. concerns: of which options; hosts: in which hosts."""

    version: str
    what: str
    concerns: Callable[[ToMeConfig], bool]
    hosts: tuple[str, ...] = _EVERYWHERE


def _draws(config: ToMeConfig) -> bool:
    return config.samples or (config.kind.matches and config.partition.startswith("random"))


CHANGES: tuple[Change, ...] = (
    Change(
        "0.2.0",
        "random choices go by noise levels instead of step numbers (other ones with uneven schedulers, with a denoise "
        "below 1 and in the last step)",
        _draws,
        (COMFYUI, SCRIPTS),
    ),
    Change(
        "0.2.0",
        "start, end and ratio at the end count noise instead of steps",
        lambda config: config.is_scheduled,
    ),
    Change(
        "0.2.0",
        "levels auto measures each layer and step anew, so that other layers may be merged",
        lambda config: config.levels == "auto" and not config.decisions,
    ),
    Change(
        "0.2.0",
        "share match shares a match only where both halves of a call are the same images",
        lambda config: config.share_match and config.kind.matches,
    ),
    Change(
        "0.2.0",
        "layers that other nodes or extensions replace, or whose tokens they change, are left alone, and those behind "
        "them keep their choices",
        lambda config: True,
        (COMFYUI, WEBUI),
    ),
    Change(
        "0.2.0",
        "an attention that the user chose (SageAttention, sparse attention) stays in use",
        lambda config: True,
        (COMFYUI,),
    ),
)


@functools.lru_cache(maxsize=1)
def version() -> str:
    """This version, as pyproject.toml beside this package has it; "" where the package was taken out alone."""
    try:
        text = (Path(__file__).resolve().parents[1] / "pyproject.toml").read_text(encoding="utf-8")
    except OSError:
        return ""
    found = re.search(r'^version = "([^"]+)"', text, re.MULTILINE)
    return "" if found is None else found[1]


def why_another_picture(saved: str, config: ToMeConfig, host: str) -> str | None:
    """What to say where a text or a workflow was saved with another version, which gave another picture for its seed;
    None: the same one, by all that is known.

    saved: its version; "" or what is no version: it names none, so it is older than those that name theirs.
    """
    ours, theirs = _numbers(version()), _numbers(saved)
    if not ours:
        return None
    who = f"saved with ToMe {saved}" if theirs else "saved without ToMe's version, so with 0.1.0 or by hand"
    if theirs > ours:
        return f"{who}, which is newer than this {version()}: what it changed is not known here"
    found = [
        change.what
        for change in CHANGES
        if theirs < _numbers(change.version) <= ours and host in change.hosts and change.concerns(config)
    ]
    if not found:
        return None
    return (
        f"{who}. The same seed may give another picture, and there is no way back to the older one: {'; '.join(found)}"
    )


def _numbers(text: str) -> tuple[int, ...]:
    """A version to be compared; () where it is none."""
    return tuple(map(int, text.split("."))) if _VERSION.fullmatch(text) else ()
