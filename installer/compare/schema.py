"""What a compare.json may hold: the form, the ranges, and nothing that names a person. The standard library alone."""

from __future__ import annotations

import datetime
import math
import re
import statistics
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
ROUNDING = 1e-3  # how far numbers may be from what follows of the others
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
    if not all(_is(seed, int) for seed in found["seeds"]):
        yield f"seeds is {found['seeds']!r}, not whole numbers"
    if not all(isinstance(prompt, str) for prompt in found["prompts"] or ()):
        yield "prompts holds something that is no text"
    if found["model"]["sha256"] is not None and not re.fullmatch(r"[0-9a-f]{10,64}", found["model"]["sha256"]):
        yield f"model.sha256 is {found['model']['sha256']!r}, not a hash's digits"
    for part, name in (("machine", "device"), ("machine", "kind"), ("model", "family"), ("model", "dtype")):
        if not found[part][name].strip():
            yield f"{part}.{name} is empty"
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
    bases = {row["size"]: row["all_seconds"] for row in found["results"] if row["variant"] == "unmerged"}
    for number, row in enumerate(found["results"]):
        if not re.fullmatch(r"[1-9]\d*x[1-9]\d*", row["size"], re.ASCII):
            yield f"results[{number}].size is {row['size']!r}, not WIDTHxHEIGHT"
        outside = [name for name, limits in RANGES.items() if row[name] is not None and not _lies_in(limits, row[name])]
        for name in outside:
            yield f"results[{number}].{name} is {row[name]}, not in {RANGES[name][0]:g} to {RANGES[name][1]:g}"
        if not outside:
            yield from _times(f"results[{number}].", row, bases.get(row["size"]), found["pictures"])


def _lies_in(limits: tuple[float, float], value: Any) -> bool:
    return (_is(value, int) or _is(value, float)) and limits[0] <= value <= limits[1]


def _times(where: str, row: dict[str, Any], base: list[Any] | None, pictures: int) -> Iterator[str]:
    """Whether the times of a row agree with each other. base: the unmerged row's of the same pictures."""
    times, limits = row["all_seconds"], RANGES["seconds"]
    if times is None:
        if row["seconds"] is not None or row["speedup"] is not None:
            yield f"{where}seconds and speedup are of no times: all_seconds is missing"
        return
    if len(times) != pictures or not all(_lies_in(limits, one) for one in times):
        yield f"{where}all_seconds is not {pictures} times in {limits[0]:g} to {limits[1]:g}, one a picture"
        return
    wanted = {"seconds": statistics.median(times)}
    if base is not None and len(base) == len(times) and all(_lies_in(limits, one) for one in base):
        wanted["speedup"] = statistics.median(one / other for one, other in zip(base, times, strict=True))
    for name, value in wanted.items():
        if row[name] is None or not math.isclose(row[name], value, rel_tol=ROUNDING):
            yield f"{where}{name} is {row[name]}, but {value:.5g} by all_seconds"


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
