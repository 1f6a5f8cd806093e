"""The "ToMe" node."""

from __future__ import annotations

from typing import Any

from comfy_api.latest import io

from ..shared_tome import ToMeConfig
from ..shared_tome.config import Widget
from .clip_vision import ToMeCLIPVision
from .log import logger
from .patch import apply_to_model


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
        return io.Combo.Input(widget.name, options=list(option.choices), **common)
    if isinstance(widget.default, bool):
        return io.Boolean.Input(widget.name, **common)
    numbers = {"min": option.minimum, "max": option.maximum, "step": option.step}
    if isinstance(widget.default, int):
        return io.Int.Input(widget.name, **numbers, **common)
    mode = io.NumberDisplay.slider if widget.name == "ratio" else None
    return io.Float.Input(widget.name, **numbers, round=0.001, display_mode=mode, **common)


class ToMe(io.ComfyNode):
    """Token Merging: Bolya and Hoffman, arXiv 2303.17604, and what this project found to be better."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="ToMe",
            display_name="ToMe",
            category="model/patch/unet",
            description="Token Merging: the same picture in less time, by attention over fewer tokens. No training.",
            search_aliases=["token merging", "tomesd", "speed", "faster", "todo", "token downsampling"],
            inputs=[
                io.Model.Input("model", tooltip="The model to speed up. The original is not changed."),
                *(_input(widget) for widget in ToMeConfig.widgets()),
            ],
            outputs=[io.Model.Output(tooltip="The model with merged tokens.")],
        )

    @classmethod
    def execute(cls, model: Any, **values: Any) -> io.NodeOutput:
        config = ToMeConfig.from_widgets(**values)
        if config.ratio > config.ratio_cap:
            logger.info(
                "[ToMe] ratio %g is more than method %s can take at stride %dx%d: %g is what it does",
                config.ratio, config.method, *config.stride, config.ratio_cap,
            )  # fmt: skip
        return io.NodeOutput(apply_to_model(model, config))


NODES: list[type[io.ComfyNode]] = [ToMe, ToMeCLIPVision]
