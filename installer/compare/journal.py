"""Finished generations, a line of JSON each, so that a comparison that was stopped goes on where it was."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from .. import files
from ..console import SetupError, failed, or_failed
from ..paths import COMPARED

SETTINGS = "settings"


class Journal:
    """The file of one comparison: its settings in the first line, then one line a generation.

    Raises SetupError where the file is of something else, or was made with other settings.
    """

    def __init__(self, folder: Path, settings: dict[str, Any]) -> None:
        self.path = folder / COMPARED[0]
        self.settings, self.records = _read(self.path)
        self.begun = bool(self.settings)
        if self.begun:
            check_same(self.path, self.settings, settings)
        self.settings = {**self.settings, **settings}

    def write_settings(self, **more: Any) -> None:
        """Write the file anew, after what was found out since (the machine, the variants) was held against it.

        Comes before the first `add`: a line that was cut off goes with it.
        """
        check_same(self.path, self.settings, more)
        self.settings |= more
        line = _line({SETTINGS: self.settings})
        lines = [line, *(_line({"key": key, **record}) for key, record in self.records.items())]
        with or_failed(f"{self.path} could not be written"):
            files.put(self.path, "".join(lines))

    def has(self, key: str) -> bool:
        return key in self.records

    def add(self, key: str, record: dict[str, Any]) -> None:
        """Write a line to the disk, whole: one that a crash cut off is dropped when the file is read."""
        with or_failed(f"{self.path} could not be written"):
            with self.path.open("ab") as file:
                file.write(_line({"key": key, **record}).encode())
                file.flush()
                os.fsync(file.fileno())
        self.records[key] = record


def _line(record: dict[str, Any]) -> str:
    return json.dumps(record, ensure_ascii=False, sort_keys=True) + "\n"


def _read(path: Path) -> tuple[dict[str, Any], dict[str, dict[str, Any]]]:
    """(settings, records by key) of whole lines; nothing where there is no file."""
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        return {}, {}
    except OSError as error:
        raise failed(f"{path} could not be read", error) from error
    *lines, _ = data.split(b"\n")  # what follows the last line's end was cut off
    try:
        found = [json.loads(line) for line in lines]
        settings = dict(found[0][SETTINGS]) if found else {}
        return settings, {one.pop("key"): one for one in found[1:]}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise SetupError(f"{path} is no journal of a comparison", "Name another folder with --out.") from error


def check_same(path: Path, there: dict[str, Any], now: dict[str, Any]) -> None:
    """Raise SetupError where what both tell differs, with the first difference."""
    for key in there.keys() & now.keys():
        if there[key] != now[key]:
            raise SetupError(
                f"{path.parent} holds a comparison with other settings: "
                f"{key} {_short(there[key])}, now {_short(now[key])}",
                "Name another folder with --out, or move that one away.",
            )


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) < 120 else f"{text[:117]}..."
