"""The "ToMe" node."""

from __future__ import annotations

from typing import Any

from comfy_api.latest import io

from ..shared_tome import ToMeConfig
from ..shared_tome.changes import COMFYUI, version, why_another_picture
from ..shared_tome.inspect.reasons import capped
from ..shared_tome.methods import AUTO, CUSTOM, METHODS, PRESETS, idle_options
from ..shared_tome.options import Widget
from .clip_vision import ToMeCLIPVision
from .compare import ToMeCompare
from .log import logger, say_once
from .patch import apply_to_model
from .record_nodes import NODES as RECORD_NODES
from .schema import make


def _input(widget: Widget) -> io.Input:
    """The widget of one option. All but the first few are optional, so that older workflows keep running."""
    option = widget.option
    common = {
        "display_name": option.label,
        "tooltip": option.help,
        "default": widget.default,
        "advanced": option.advanced or None,
        "optional": option.advanced,
    }
    if option.choices is not None:
        return make(io.Combo.Input, widget.name, options=list(option.choices), **common)
    if isinstance(widget.default, bool):
        return make(io.Boolean.Input, widget.name, **common)
    if isinstance(widget.default, str):
        return make(io.String.Input, widget.name, **common)
    numbers = {"min": option.minimum, "max": option.maximum, "step": option.step}
    if isinstance(widget.default, int):
        # By itself the page gives whatever is called seed a control that draws another one after each picture.
        after = {"control_after_generate": False} if widget.name == "seed" else {}
        return make(io.Int.Input, widget.name, **numbers, **after, **common)
    if widget.name != "ratio":
        return make(io.Float.Input, widget.name, **numbers, round=0.001, **common)
    # The page shows as many digits as `step` has and would make 0.94 of 0.9375; a dragged slider moves by `round`.
    numbers |= {"step": 0.0005, "round": option.step}
    extra = {"tome_presets": _presets(), "tome_folded": _folded()}
    return make(
        io.Float.Input, widget.name, **numbers, display_mode=io.NumberDisplay.slider, extra_dict=extra, **common
    )


def _presets() -> dict[str, Any]:
    """What web/tome.js makes its control "preset" of."""
    help = "Sets " + ", ".join(next(iter(PRESETS.values())).options) + ".\n"
    return {
        "presets": {name: preset.options for name, preset in PRESETS.items()},
        "custom": CUSTOM,
        "label": "Preset",
        "help": help + "\n".join(f"{name}: {preset.summary}." for name, preset in PRESETS.items()),
    }


def _folded() -> dict[str, Any]:
    """What web/tome.js makes its button of, and which options have no meaning for a method."""
    return {
        "more": "More options",
        "fewer": "Fewer options",
        "help": "What most people leave as it is. In brackets: how many of these options are not at their default.",
        "idle": {method: idle_options(method) for method in (AUTO, *METHODS)},
    }


class ToMe(io.ComfyNode):
    """Token Merging: Bolya and Hoffman, arXiv 2303.17604, and what this project found to be better."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return make(
            io.Schema,
            node_id="ToMe",
            display_name="ToMe",
            category="model/patch/unet",
            description="Token Merging: the same picture in less time, by attention over fewer tokens. No training.",
            search_aliases=["token merging", "tomesd", "speed", "faster", "todo", "token downsampling"],
            inputs=[
                io.Model.Input("model", tooltip="The model to speed up. The original is not changed."),
                *(_input(widget) for widget in ToMeConfig.widgets()),
                make(
                    io.String.Input,
                    "version",
                    default=version(),
                    optional=True,
                    extra_dict={"hidden": True},
                    tooltip="The version of ToMe that this workflow was saved with; web/tome.js keeps it.",
                ),
            ],
            outputs=[io.Model.Output(tooltip="The model with merged tokens.")],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(cls, model: Any, version: str = "", **values: Any) -> io.NodeOutput:
        config = ToMeConfig.from_widgets(**values)
        cap = capped(config)
        if cap is not None:
            logger.info("[ToMe] %s", cap)
        older = why_another_picture(version, config, COMFYUI)
        if older is not None:
            older = f"this workflow was {older}"
            say_once(older)
        return io.NodeOutput(apply_to_model(model, config, getattr(cls.hidden, "unique_id", None), older))


NODES: list[type[io.ComfyNode]] = [ToMe, ToMeCLIPVision, *RECORD_NODES, ToMeCompare]
