"""Axes for the host's "X/Y/Z plot"."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from modules import scripts

from ..shared_tome.methods import PRESETS
from .options import PRESET_OPTIONS, by_name, preset_options, settings_from

# On p, and always a new dict: the plot copies p for each picture, and a copy shares what it holds.
OVERRIDES = "tome_overrides"


def overrides_of(p: Any) -> dict[str, Any]:
    """The values that a plot has chosen for this picture, by name. Any of them switches ToMe on."""
    return getattr(p, OVERRIDES, {})


def _apply(*names: str, parse: Callable[[Any], tuple] = lambda value: (value,)) -> Callable:
    def apply(p: Any, value: Any, values: Any) -> None:
        changes = dict(zip(names, parse(value), strict=True))
        setattr(p, OVERRIDES, {**overrides_of(p), "enabled": True, **changes})

    return apply


def _confirm(*names: str, parse: Callable[[Any], tuple] = lambda value: (value,)) -> Callable:
    """Raises RuntimeError before the first picture is made."""

    def confirm(p: Any, values: list[Any]) -> None:
        for value in values:
            try:
                settings_from({"enabled": True, **dict(zip(names, parse(value), strict=True))})
            except ValueError as error:
                raise RuntimeError(f"ToMe: {error}") from None

    return confirm


def _stride(text: str) -> tuple[int, int]:
    """ "2" or "2x4" (width x height)."""
    parts = [part.strip() for part in str(text).lower().split("x")]
    if len(parts) > 2 or not all(part.isdecimal() for part in parts):
        raise ValueError(f"a stride is a number or two with an x, as in 2x4; got {text!r}")
    return int(parts[0]), int(parts[-1])


def _preset(name: str) -> tuple:
    return tuple(preset_options(name)[option] for option in PRESET_OPTIONS)


def add_axes() -> None:
    """Called by the host before it builds its page."""
    grid = next((data.module for data in scripts.scripts_data if data.script_class.__module__ == "xyz_grid.py"), None)
    if grid is None:
        return
    options = by_name()
    axes = [
        ("preset", str, PRESET_OPTIONS, {"choices": lambda: list(PRESETS), "parse": _preset}),
        ("ratio", float, ("ratio",), {}),
        ("hires_ratio", float, ("hires_ratio",), {}),
        ("method", str, ("method",), {"choices": lambda: list(options["method"].option.choices)}),
        ("stride", str, ("stride_x", "stride_y"), {"parse": _stride}),
        ("start", float, ("start",), {}),
    ]
    there = {option.label for option in grid.axis_options}
    for name, kind, names, more in axes:
        label = f"[ToMe] {options[names[0]].option.label if len(names) == 1 else name.capitalize()}"
        parse = {"parse": more.pop("parse")} if "parse" in more else {}
        if label not in there:
            axis = grid.AxisOption(label, kind, _apply(*names, **parse), confirm=_confirm(*names, **parse), **more)
            grid.axis_options.append(axis)
