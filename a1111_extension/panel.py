"""The panel under txt2img and img2img."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import gradio as gr
from modules.ui_components import InputAccordion

from ..shared_tome.config import Widget
from .infotext import LABELS, paste_function
from .options import WIDGETS, control

try:
    from modules.infotext_utils import PasteField
except ImportError:  # older hosts take plain pairs
    PasteField = None


def build(elem_id: Callable[[str], str], start: dict[str, Any], is_img2img: bool) -> tuple[list[Any], list[Any]]:
    """Make the controls.

    start: what they start with, by name.
    Returns:
        the controls in the order of options.WIDGETS, and the host's paste fields. Nothing outside is touched.
    """
    made: dict[str, Any] = {}
    basic = [widget for widget in WIDGETS[1:] if not _is_advanced(widget)]
    advanced = [widget for widget in WIDGETS[1:] if _is_advanced(widget)]
    with InputAccordion(start["enabled"], label="ToMe", elem_id=elem_id("enabled")) as made["enabled"]:
        for row in _rows(basic):
            with gr.Row():
                for widget in row:
                    # img2img has no hires pass; the control stays so that the API's list is one for both.
                    visible = not (is_img2img and widget.name == "hires_ratio")
                    made[widget.name] = _make(widget, elem_id, start, visible)
        with gr.Accordion("Advanced", open=False, elem_id=elem_id("advanced")):
            for row in _rows(advanced):
                with gr.Row():
                    for widget in row:
                        made[widget.name] = _make(widget, elem_id, start)
    controls = [made[widget.name] for widget in WIDGETS]
    for made_control in controls:
        # The page's ui-config.json would keep today's start values for ever and overrule the Settings.
        made_control.do_not_save_to_config = True
    return controls, [_paste_field(made[widget.name], widget.name) for widget in WIDGETS]


def _is_advanced(widget: Widget) -> bool:
    # Here the image's own seed counts, and the number only by a rule that is advanced itself.
    return widget.option.advanced or widget.name == "seed"


def _rows(widgets: list[Widget], length: int = 2) -> list[list[Widget]]:
    return [widgets[i : i + length] for i in range(0, len(widgets), length)]


def _make(widget: Widget, elem_id: Callable[[str], str], start: dict[str, Any], visible: bool = True) -> Any:
    component, arguments = control(widget)
    return getattr(gr, component)(
        value=start[widget.name],
        label=widget.option.label,
        info=widget.option.help,
        elem_id=elem_id(widget.name),
        visible=visible,
        **arguments,
    )


def _paste_field(component: Any, name: str) -> Any:
    function = paste_function(name)
    # No `api=` here: the host would look for a field of that name in its own requests.
    return PasteField(component, function) if PasteField is not None else (component, function)


def paste_names() -> list[str]:
    """The names by which the host sends values on from one tab to the other."""
    return list(LABELS.values())
