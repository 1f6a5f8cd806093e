"""The page "ToMe" in the host's Settings: what the panel starts with."""

from __future__ import annotations

import html
from typing import Any

import gradio as gr
from modules import shared

from ..shared_tome.options import Option, Widget
from .notes import logger
from .options import RATIO_STEP, WIDGETS, by_name, control, fit
from .panel import link

_SECTION = ("tome", "ToMe")
_IMG2IMG_RATIO = Widget(
    "img2img_ratio",
    -1.0,
    Option(
        "Ratio in img2img",
        "What img2img's panel starts with. -1: the same.",
        minimum=-1.0,
        maximum=1.0,
        step=RATIO_STEP,
    ),
)
NO_REPORT, LOG_REPORT, TEXT_REPORT = "no", "in the log", "in the log and the picture's text"
_REPORT = Widget(
    "report",
    LOG_REPORT,
    Option(
        "Report after each picture",
        "One line, under the picture too: what was merged, what was left alone and why.",
        choices=(NO_REPORT, LOG_REPORT, TEXT_REPORT),
    ),
)
_ON_BY_DEFAULT = Widget("enabled", False, Option("On by default", "Whether the panel starts switched on."))


def _key(widget: Widget) -> str:
    return f"tome_{widget.name}"


def _page() -> list[Widget]:
    enabled, ratio, *others = WIDGETS
    return [_ON_BY_DEFAULT, ratio, _IMG2IMG_RATIO, *others, _REPORT]


def add_settings() -> None:
    """Called by the host when it builds its Settings."""
    for widget in _page():
        component, arguments = control(widget)
        info = shared.OptionInfo(
            widget.default, widget.option.label, getattr(gr, component), arguments, section=_SECTION
        )
        info = info.info(f"{html.escape(widget.option.line)} {link('More')}".rstrip())
        shared.opts.add_option(_key(widget), info if widget is _REPORT else info.needs_reload_ui())


def start_values(is_img2img: bool) -> dict[str, Any]:
    """What the panel starts with, by name. What is not possible in the host's file is passed over, and said."""
    saved = {widget.name: _saved(widget) for widget in WIDGETS}
    values, refused = fit(saved)
    for name, reason in refused.items():
        _say(by_name()[name], reason, values[name])
    ratio = _saved(_IMG2IMG_RATIO)
    if ratio == _IMG2IMG_RATIO.default:
        return values
    _, refused = fit({**values, "ratio": ratio})
    if refused:
        _say(_IMG2IMG_RATIO, refused.get("ratio", f"got {ratio!r}"), _IMG2IMG_RATIO.default)
    elif is_img2img:
        values["ratio"] = ratio
    return values


def report_kind() -> str:
    """Whether a report is wanted now: NO_REPORT, LOG_REPORT or TEXT_REPORT."""
    value = _saved(_REPORT)
    if value in _REPORT.option.choices:
        return value
    _say(_REPORT, f"got {value!r}", _REPORT.default)
    return _REPORT.default


def _saved(widget: Widget) -> Any:
    return getattr(shared.opts, _key(widget), widget.default)


def _say(widget: Widget, reason: str, used: Any) -> None:
    logger.info("[ToMe] the setting %s is not possible: %s; %r is used", _key(widget), reason, used)
