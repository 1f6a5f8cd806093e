"""The panel under txt2img and img2img."""

from __future__ import annotations

import html
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import gradio as gr
from modules.ui_components import InputAccordion

from ..shared_tome.methods import AUTO, CUSTOM, METHODS, PRESETS, idle_options
from ..shared_tome.options import Widget
from .infotext import LABELS, older, paste_function
from .options import NAMES, PRESET_OPTIONS, WIDGETS, control, preset_of

try:
    from modules.infotext_utils import PasteField
except ImportError:  # older hosts take plain pairs
    PasteField = None
try:
    from modules.ui_gradio_extensions import webpath
except ImportError:
    webpath = None


_QUIET = {"queue": False, "show_progress": "hidden", "api_name": False}
# Controls that have no meaning with some choice of the others: they are grey with it.
_MARKED = tuple(
    name for name in NAMES if name == "seed" or any(name in idle_options(method) for method in (AUTO, *METHODS))
)
# What may be refused where it is switched on: it stays until it is off, as in ComfyUI's page (web/tome.js).
_SWITCHES = tuple(widget.name for widget in WIDGETS if widget.name in _MARKED and widget.default is False)
_MARKS = ("method", "seed_rule", *_SWITCHES)


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
        told = gr.HTML(value="", elem_id=elem_id("older"))  # of a pasted text
        preset = _make_preset(elem_id, start)
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
        more = link("What each option does, and how to choose") or "docs/settings.md says more of each option"
        gr.HTML(value=more, elem_id=elem_id("help"))
    _connect(preset, [made[name] for name in PRESET_OPTIONS])
    for name in _MARKS:
        made[name].change(_mark_idle, [made[name] for name in _MARKS], [made[name] for name in _MARKED], **_QUIET)
    controls = [made[widget.name] for widget in WIDGETS]
    for made_control in (preset, *controls):
        # The page's ui-config.json would keep today's start values for ever and overrule the Settings.
        made_control.do_not_save_to_config = True
    fields = [_paste_field(made[name], paste_function(name)) for name in ("enabled", *LABELS)]
    return controls, [*fields, _paste_field(told, _tell_older)]


def _make_preset(elem_id: Callable[[str], str], start: dict[str, Any]) -> Any:
    """A control that sets others and shows what they are. Not one of the script's own: the options are the truth."""
    return gr.Radio(
        choices=[*PRESETS, CUSTOM],
        value=preset_of(*(start[name] for name in PRESET_OPTIONS)),
        label="Preset",
        info="Sets method, ratio, start and own token. Balanced is the default; Quality is nearest, Fast fastest.",
        elem_id=elem_id("preset"),
    )


def _connect(preset: Any, options: list[Any]) -> None:
    """Only a person's choice sets the options, so that the two ways cannot chase each other."""
    preset.input(_choose_preset, [preset, *options], [preset, *options], **_QUIET)
    for option in options:  # moved by hand, by a preset or by a pasted text
        option.change(preset_of, options, [preset], **_QUIET)


def _is_idle(name: str, values: Mapping[str, Any]) -> bool:
    """Whether nobody looks at a control. values: at least of _MARKS."""
    if name == "seed":
        return values["seed_rule"] != "fixed"
    return name in idle_options(values["method"]) and not (name in _SWITCHES and values[name])


def _mark_idle(*values: Any) -> list[Any]:
    """What _MARKED become. values: of _MARKS."""
    given = dict(zip(_MARKS, values, strict=True))
    return [gr.update(interactive=not _is_idle(name, given)) for name in _MARKED]


def _choose_preset(name: str, *values: Any) -> list[Any]:
    """What the control and PRESET_OPTIONS become. To choose CUSTOM changes nothing."""
    chosen = PRESETS[name].options if name in PRESETS else {}
    values = [chosen.get(option, value) for option, value in zip(PRESET_OPTIONS, values, strict=True)]
    return [preset_of(*values), *values]


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
        info=widget.option.line,
        elem_id=elem_id(widget.name),
        visible=visible,
        interactive=not _is_idle(widget.name, start),
        **arguments,
    )


def _tell_older(parameters: Mapping[str, Any]) -> str:
    """What the panel says of a pasted text of another version; the next one takes it away."""
    line = older(parameters)
    return f"<p>{html.escape(f'The pasted text was {line}.')}</p>" if line else ""


def link(words: str) -> str:
    """A link to the page of all options, among the extension's files that the host serves; "" where it serves none."""
    page = Path(__file__).absolute().parents[1] / "docs" / "settings.md"  # a folder that is a link stays one
    if webpath is None or not page.is_file():
        return ""
    return f'<a href="{html.escape(webpath(str(page)))}" target="_blank">{words}</a>'


def _paste_field(component: Any, function: Callable[[Mapping[str, Any]], Any]) -> Any:
    # No `api=` here: the host would look for a field of that name in its own requests.
    return PasteField(component, function) if PasteField is not None else (component, function)


def paste_names() -> list[str]:
    """The names by which the host sends values on from one tab to the other."""
    return list(LABELS.values())
