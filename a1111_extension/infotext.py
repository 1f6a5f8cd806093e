"""What a picture's text says of ToMe, and how it comes back by "send to txt2img"."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..shared_tome.changes import WEBUI, version, why_another_picture
from .notes import logger
from .options import WIDGETS, Settings, fit, settings_from

_ALWAYS = ("ratio", "method")
_SILENT = ("enabled", "map")  # the first shows by the others; a map changes no picture
REPORT, VERSION = "ToMe report", "ToMe version"
LABELS = {
    widget.name: f"ToMe {widget.option.label[:1].lower() + widget.option.label[1:]}".replace("mLP", "MLP")
    for widget in WIDGETS
    if widget.name not in _SILENT
}
_TEXTS = [widget for widget in WIDGETS if widget.name in LABELS]


def write(
    parameters: dict[str, Any],
    settings: Settings,
    merged: Mapping[bool, bool] | None = None,
    kept_self_token: bool | None = None,
    decisions: str | None = None,
    kept_exact: bool | None = None,
) -> None:
    """Put ToMe's options into p.extra_generation_params: ratio, method, all that is not the default, and its version.

    Args:
        merged: by whether it is the hires pass, whether a pass merged anything; one that is not there is not known yet.
            The text tells ratio 0 of a pass that merged nothing, and nothing of ToMe where none did.
        kept_self_token: whether queries kept their own tokens; None: not known. Where none could, the picture is the
            one without the option.
        decisions: what autotune decided of its layers; None: not known.
        kept_exact: whether exact_every had an effect; None: not known. Where it had none, the picture is the one
            without the option.
    """
    merged = merged or {}
    values = values_of(settings)
    if merged.get(False) is False:
        values.update(ratio=0.0, hires_ratio=settings.for_pass(True).ratio)
    if merged.get(True) is False:
        values["hires_ratio"] = 0.0
    if kept_self_token is not None:
        values["own_token"] = kept_self_token
    if decisions is not None:
        values["decisions"] = decisions
    if kept_exact is False:
        values["exact_every"] = 0
    told = [widget for widget in _TEXTS if widget.name in _ALWAYS or values[widget.name] != widget.default]
    texts = {**{LABELS[widget.name]: values[widget.name] for widget in told}, VERSION: version()}
    if settings.is_off or (merged and not any(merged.values())):
        texts = {}
    for label in (*LABELS.values(), VERSION):  # one that is there keeps its place
        if label in texts:
            parameters[label] = texts[label]
        else:
            parameters.pop(label, None)


def erase(parameters: dict[str, Any]) -> None:
    """Take them out again."""
    for label in (*LABELS.values(), REPORT, VERSION):
        parameters.pop(label, None)


def values_of(settings: Settings) -> dict[str, Any]:
    """Settings as named values."""
    values: dict[str, Any] = {"enabled": settings.enabled}
    for widget in _TEXTS:
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

    A value that is not possible, alone or beside the others, becomes the default.
    """
    found = _read(parameters)
    return None if found is None else found[0]


def _read(parameters: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, str]] | None:
    """What read gives, and why a value was not taken, by name."""
    if LABELS["ratio"] not in parameters:
        return None
    given = {name: parameters[label] for name, label in LABELS.items() if label in parameters}
    parsed = {widget.name: _parsed(given[widget.name], widget.default) for widget in _TEXTS if widget.name in given}
    return fit({"enabled": True, **parsed})


def paste_function(name: str) -> Any:
    """For the host's paste fields: parsed infotext -> the value of one option, or None to leave it."""

    def paste(parameters: Mapping[str, Any]) -> Any:
        found = _read(parameters)
        if found is None:
            # A picture made without ToMe is made again without it.
            return False if name == "enabled" else None
        values, refused = found
        if name == "enabled" and (line := older(parameters)):
            logger.info("[ToMe] the picture's text was %s", line)
        if name in refused:
            logger.info("[ToMe] from the picture's text: %s; %r is used", refused[name], values[name])
        return values[name]

    return paste


def older(parameters: Mapping[str, Any]) -> str:
    """What to say of a parsed infotext whose version gave another picture for its seed; "" where nothing is."""
    values = read(parameters)
    if values is None:
        return ""
    return why_another_picture(str(parameters.get(VERSION, "")), settings_from(values).config, WEBUI) or ""


def _parsed(text: Any, default: Any) -> Any:
    """The text as a value of the default's type, or itself where it is none."""
    try:
        if isinstance(default, bool):
            return {"true": True, "false": False}[str(text).lower()]
        return type(default)(text)
    except (KeyError, TypeError, ValueError):
        return text
