"""What a compare.json may hold: the form, the ranges, and nothing that names a person. The standard library alone."""

from __future__ import annotations

import datetime
import re
from collections.abc import Iterator
from typing import Any

FORMAT, VERSION = "tome-compare", 1
SAME = 100.0  # what stands for an infinite PSNR, and for any above it

LONGEST = 300  # characters of a text

_TEXT, _NUMBER = (str,), (int, float)
_TOP = {
    "format": _TEXT, "version": (int,), "tome": _TEXT, "date": _TEXT, "machine": (dict,), "model": (dict,),
    "seeds": (list,), "prompts": (list, None), "pictures": (int,), "results": (list,), "notes": (list,),
}  # fmt: skip
_MACHINE = {
    "device": _TEXT, "kind": _TEXT, "memory_gib": _NUMBER, "torch": _TEXT, "comfyui": _TEXT, "system": _TEXT,
}  # fmt: skip
_MODEL = {"name": _TEXT, "sha256": (str, None), "family": _TEXT, "dtype": _TEXT, "workflow": (bool,)}
_ROW = {
    "size": _TEXT, "variant": _TEXT, "tome": (dict, None), "steps": (int, None), "seconds": (*_NUMBER, None),
    "all_seconds": (list, None), "speedup": (*_NUMBER, None), "first_seconds": (*_NUMBER, None),
    "peak_gib": (*_NUMBER, None), "skipped": (*_NUMBER, None), "psnr": (*_NUMBER, None), "ssim": (*_NUMBER, None),
    "lpips": (*_NUMBER, None),
}  # fmt: skip
RANGES = {
    "seconds": (1e-3, 1e5), "first_seconds": (1e-3, 1e5), "speedup": (0.01, 100), "peak_gib": (1e-3, 4096),
    "skipped": (0, 1), "psnr": (0, SAME), "ssim": (-1, 1), "lpips": (0, 5), "steps": (1, 10_000),
}  # fmt: skip
MEMORY = (0, 65_536)  # GiB of the device
_VERSIONS = re.compile(r"\d+\.\d+[\w.+-]*")
# A folder of somebody's, an address, or a name before an @.
_PRIVATE = re.compile(r"[A-Za-z]:[\\/]|\\\\|(^|[\s\"'(=,])(~|\.{0,2})/\w|\w/\w[^ ]*/|://|\w@\w", re.ASCII)


def problems(found: Any) -> list[str]:
    """What keeps a file from being a result of `install.py compare`; none where all is well."""
    if not isinstance(found, dict) or found.get("format") != FORMAT:
        return [f'format is not "{FORMAT}"']
    if found.get("version") != VERSION:
        return [f"version {found.get('version')!r} is not {VERSION}"]
    shapes = [*_shape("", found, _TOP)]
    if shapes:
        return shapes
    shapes += [*_shape("machine.", found["machine"], _MACHINE), *_shape("model.", found["model"], _MODEL)]
    for number, row in enumerate(found["results"]):
        shapes += _shape(f"results[{number}].", row, _ROW)
    return shapes or [*_values(found), *_private("", found)]


def _shape(where: str, found: Any, wanted: dict[str, tuple]) -> Iterator[str]:
    if not isinstance(found, dict):
        yield f"{where.rstrip('.')} is no object"
        return
    for name in sorted(found.keys() - wanted.keys()):
        yield f"{where}{name} is not known"
    for name, kinds in wanted.items():
        if name not in found:
            yield f"{where}{name} is missing"
        elif not any(found[name] is None if kind is None else _is(found[name], kind) for kind in kinds):
            yield f"{where}{name} is {found[name]!r}"


def _is(value: Any, kind: type) -> bool:
    return isinstance(value, kind) and (kind is bool or not isinstance(value, bool))


def _values(found: dict[str, Any]) -> Iterator[str]:
    for where, version in (
        ("tome", found["tome"]),
        *((f"machine.{x}", found["machine"][x]) for x in ("torch", "comfyui")),
    ):
        if not _VERSIONS.fullmatch(version):
            yield f"{where} is {version!r}, not a version"
    if not found["model"]["name"].strip() or re.search(r"[\\/]", found["model"]["name"]):
        yield f"model.name is {found['model']['name']!r}: a file's name alone is wanted"
    if not MEMORY[0] <= found["machine"]["memory_gib"] <= MEMORY[1]:
        yield f"machine.memory_gib is {found['machine']['memory_gib']}, not in {MEMORY[0]} to {MEMORY[1]}"
    try:
        datetime.datetime.strptime(found["date"], "%Y-%m-%d")
    except ValueError:
        yield f"date is {found['date']!r}, not YYYY-MM-DD"
    if not 1 <= found["pictures"] <= 10_000:
        yield f"pictures is {found['pictures']}, not in 1 to 10000"
    names = [(row["size"], row["variant"]) for row in found["results"]]
    if len(set(names)) < len(names):
        yield "results has a variant twice"
    sizes = {size for size, _ in names}
    for size in sizes:
        if (size, "unmerged") not in names:
            yield f"results has no unmerged row of {size}"
    if not sizes:
        yield "results is empty"
    for number, row in enumerate(found["results"]):
        if not re.fullmatch(r"[1-9]\d*x[1-9]\d*", row["size"], re.ASCII):
            yield f"results[{number}].size is {row['size']!r}, not WIDTHxHEIGHT"
        for name, (low, high) in RANGES.items():
            value = row[name]
            if value is not None and not low <= value <= high:
                yield f"results[{number}].{name} is {value}, not in {low:g} to {high:g}"
        if not all(_is(one, int) or _is(one, float) for one in row["all_seconds"] or ()):
            yield f"results[{number}].all_seconds holds something that is no number"


def _private(where: str, value: Any) -> Iterator[str]:
    """Texts that look like a path or an address. Prompts are the person's own choice."""
    if isinstance(value, dict):
        for name, one in value.items():
            yield from _private(f"a name in {where}", name)
            yield from _private(f"{where}.{name}" if where else name, one)
    elif isinstance(value, list):
        if where != "prompts":
            for number, one in enumerate(value):
                yield from _private(f"{where}[{number}]", one)
    elif isinstance(value, str):
        if _PRIVATE.search(value):
            yield f"{where} holds a path or an address: {value!r}"
        if len(value) > LONGEST or not value.isprintable() or set(value) & set("|<>`"):
            yield f"{where} cannot stand in a table: {value[:LONGEST]!r}"
