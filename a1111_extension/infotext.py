"""What a picture's text says of ToMe, and how it comes back by "send to txt2img"."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..shared_tome.config import Widget
from .options import WIDGETS, Settings, by_name, is_valid

_ALWAYS = ("ratio", "method")
_SILENT = ("enabled", "map")  # the first shows by the others; a map changes no picture
REPORT = "ToMe report"
LABELS = {
    widget.name: f"ToMe {widget.option.label[:1].lower() + widget.option.label[1:]}".replace("mLP", "MLP")
    for widget in WIDGETS
    if widget.name not in _SILENT
}
_TOLD = [widget for widget in WIDGETS if widget.name in LABELS]
_OWN_TOKEN = by_name()["own_token"]


def write(parameters: dict[str, Any], settings: Settings) -> None:
    """Put ToMe's options into p.extra_generation_params: ratio, method, and all that is not the default."""
    erase(parameters)
    if settings.is_off:
        return
    values = values_of(settings)
    for widget in _TOLD:
        _put(parameters, widget, values[widget.name])


def write_own_token(parameters: dict[str, Any], kept: bool) -> None:
    """Tell whether queries kept their own tokens. Where none could, the picture is the one without the option."""
    if LABELS["ratio"] in parameters:  # not where all of ToMe was left out
        _put(parameters, _OWN_TOKEN, kept)


def _put(parameters: dict[str, Any], widget: Widget, value: Any) -> None:
    if widget.name in _ALWAYS or value != widget.default:
        parameters[LABELS[widget.name]] = value
    else:
        parameters.pop(LABELS[widget.name], None)


def erase(parameters: dict[str, Any]) -> None:
    """Take them out again."""
    for label in (*LABELS.values(), REPORT):
        parameters.pop(label, None)


def values_of(settings: Settings) -> dict[str, Any]:
    """Settings as named values."""
    values: dict[str, Any] = {"enabled": settings.enabled}
    for widget in _TOLD:
        name, _, part = widget.name.rpartition("_")
        if hasattr(settings.config, widget.name):
            values[widget.name] = getattr(settings.config, widget.name)
        elif part in ("x", "y"):
            values[widget.name] = getattr(settings.config, name)["xy".index(part)]
        else:
            values[widget.name] = getattr(settings, widget.name)
    return values


def read(parameters: Mapping[str, Any]) -> dict[str, Any] | None:
    """Named values from a parsed infotext, with defaults for what it leaves out; None where ToMe was not on.

    A value that this version does not know becomes the default.
    """
    if LABELS["ratio"] not in parameters:
        return None
    values: dict[str, Any] = {"enabled": True}
    for widget in _TOLD:
        value = _parsed(parameters.get(LABELS[widget.name]), widget.default)
        values[widget.name] = value if is_valid(widget.name, value) else widget.default
    return values


def paste_function(name: str) -> Any:
    """For the host's paste fields: parsed infotext -> the value of one option, or None to leave it."""

    def paste(parameters: Mapping[str, Any]) -> Any:
        values = read(parameters)
        if values is None:
            # A picture made without ToMe is made again without it.
            return False if name == "enabled" else None
        return values[name]

    return paste


def _parsed(text: Any, default: Any) -> Any:
    if text is None:
        return default
    try:
        if isinstance(default, bool):
            return {"true": True, "false": False}[str(text).lower()]
        return type(default)(text)
    except (KeyError, ValueError):
        return default
