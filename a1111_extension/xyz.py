"""Axes for the host's "X/Y/Z plot"."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from modules import scripts

from ..shared_tome.methods import PRESETS
from ..shared_tome.options import Widget
from .options import WIDGETS, named, settings_from

# On p, and always a new dict: the plot copies p for each picture, and a copy shares what it holds.
OVERRIDES = "tome_overrides"
# A map changes no picture, and by default a number does not: each image has its own.
_NO_AXIS = ("enabled", "map", "seed", "seed_rule")

# What a value of an axis sets, by name. Raises ValueError.
Parse = Callable[[Any], Mapping[str, Any]]


def overrides_of(p: Any) -> dict[str, Any]:
    """The values that a plot has chosen for this picture, by name. Any of them switches ToMe on.

    As in a request, an option's own axis wins over the preset's, in whatever order they stand.
    """
    given = getattr(p, OVERRIDES, {})
    return named([given]) if given else {}


def _apply(parse: Parse) -> Callable:
    def apply(p: Any, value: Any, values: Any) -> None:
        setattr(p, OVERRIDES, {**getattr(p, OVERRIDES, {}), **parse(value)})

    return apply


def _confirm(parse: Parse) -> Callable:
    """Raises RuntimeError before the first picture is made."""

    def confirm(p: Any, values: list[Any]) -> None:
        for value in values:
            try:
                settings_from(named([parse(value)]))
            except ValueError as error:
                raise RuntimeError(f"ToMe: {error}") from None

    return confirm


def _stride(text: str) -> dict[str, int]:
    """ "2" or "2x4" (width x height)."""
    parts = [part.strip() for part in str(text).lower().split("x")]
    if len(parts) > 2 or not all(part.isdecimal() for part in parts):
        raise ValueError(f"a stride is a number or two with an x, as in 2x4; got {text!r}")
    return {"stride_x": int(parts[0]), "stride_y": int(parts[-1])}


def _of(widget: Widget) -> tuple[str, type, Parse, list[str] | None]:
    """An option's axis: label, type, parse and choices."""
    name, default = widget.name, widget.default
    if name == "stride_x":
        return "Stride", str, _stride, None
    if isinstance(default, bool):
        words = {"True": True, "False": False}
        return widget.option.label, str, lambda text: {name: words.get(text, text)}, list(words)
    choices = None if widget.option.choices is None else list(widget.option.choices)
    return widget.option.label, type(default), lambda value: {name: value}, choices


def add_axes() -> None:
    """Called by the host before it builds its page."""
    grid = next((data.module for data in scripts.scripts_data if data.script_class.__module__ == "xyz_grid.py"), None)
    if grid is None:
        return
    shown = [widget for widget in WIDGETS if widget.name not in (*_NO_AXIS, "stride_y")]
    axes = [("Preset", str, lambda name: {"preset": name}, list(PRESETS)), *map(_of, shown)]
    there = {option.label for option in grid.axis_options}
    for label, kind, parse, choices in axes:
        if (label := f"[ToMe] {label}") not in there:
            more = {} if choices is None else {"choices": lambda choices=choices: choices}
            axis = grid.AxisOption(label, kind, _apply(parse), confirm=_confirm(parse), **more)
            grid.axis_options.append(axis)
