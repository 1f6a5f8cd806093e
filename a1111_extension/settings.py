"""The page "ToMe" in the host's Settings: what the panel starts with."""

from __future__ import annotations

import html
from typing import Any

import gradio as gr
from modules import shared

from ..shared_tome.config import Option, Widget
from .notes import logger
from .options import RATIO_STEP, WIDGETS, control, is_valid

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
        "One line: what was merged where, how many tokens there were before and after, what was left alone and why.",
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
        info = info.info(html.escape(widget.option.help))
        shared.opts.add_option(_key(widget), info if widget is _REPORT else info.needs_reload_ui())


def start_values(is_img2img: bool) -> dict[str, Any]:
    """What the panel starts with, by name. A value that is out of range in the host's file is passed over."""
    values = {}
    for widget in WIDGETS:
        values[widget.name] = _saved(widget, is_valid)
    ratio = _saved(_IMG2IMG_RATIO, lambda name, value: value == -1.0 or is_valid("ratio", value))
    if is_img2img and ratio >= 0.0:
        values["ratio"] = ratio
    return values


def report_kind() -> str:
    """Whether a report is wanted now: NO_REPORT, LOG_REPORT or TEXT_REPORT."""
    return _saved(_REPORT, lambda name, value: value in _REPORT.option.choices)


def _saved(widget: Widget, valid: Any) -> Any:
    value = getattr(shared.opts, _key(widget), widget.default)
    if valid(widget.name, value):
        return value
    logger.info("[ToMe] the setting %s is %r, which is not possible; %r is used", _key(widget), value, widget.default)
    return widget.default
