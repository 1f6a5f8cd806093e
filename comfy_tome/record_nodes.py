"""The nodes "ToMe Record", "ToMe Map" and "ToMe Report": what was merged, as a picture and in words."""

from __future__ import annotations

import json
from typing import Any

import torch
from comfy_api.latest import io, ui

from ..shared_tome.inspect.drawing import SHOWS
from ..shared_tome.inspect.maps import draw_maps
from ..shared_tome.inspect.report import Report
from .log import logger
from .measure import measure
from .record import COMPILED, RECORD, Record, Run
from .schema import make
from .shown import show_on_node

ToMeRecordType = io.Custom("TOME_RECORD")
EMPTY = (
    "Nothing was recorded. Either the model that was sampled has",
    "no ToMe node, or one at ratio 0, or ComfyUI took the picture",
    "from its cache: change the sampler's seed and queue again.",
)


def record_model(model: Any) -> tuple[Any, Record]:
    """A clone of the ModelPatcher that is recorded while it samples, and the record.

    Raises ValueError where another ToMe Record stands before.
    """
    clone = model.clone()
    options = clone.model_options.setdefault("transformer_options", {})
    if RECORD in options:
        raise ValueError("this model has a ToMe Record node already; connect ToMe Map and ToMe Report to that one")
    record = options[RECORD] = Record()
    return clone, record


def _which_run() -> io.Input:
    return make(
        io.Int.Input, "sampling", default=0, min=0, max=3, optional=True, advanced=True,
        tooltip="Where one model is sampled several times (hires pass, tiles): 0 is the last, 1 the one before it.",
    )  # fmt: skip


class ToMeRecord(io.ComfyNode):
    """Passes the model on and hands out the record that its samplers fill."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return make(
            io.Schema,
            node_id="ToMeRecord",
            display_name="ToMe Record",
            category="model/patch/unet",
            description="Records what ToMe merges while the model is sampled, for ToMe Map and ToMe Report. The "
            "picture stays the same.",
            search_aliases=["ToMe", "debug", "inspect"],
            inputs=[io.Model.Input("model", tooltip="A model with a ToMe node before or after this one.")],
            outputs=[
                io.Model.Output(tooltip="To the sampler."),
                ToMeRecordType.Output(display_name="record", tooltip="To ToMe Map and ToMe Report."),
            ],
        )

    @classmethod
    def execute(cls, model: Any) -> io.NodeOutput:
        return io.NodeOutput(*record_model(model))


class ToMeMap(io.ComfyNode):
    """Draws one layer's tokens over the finished picture."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        shows = "\n".join(f"{name}: {summary}." for name, summary in SHOWS.items())
        return make(
            io.Schema,
            node_id="ToMeMap",
            display_name="ToMe Map",
            category="image",
            description="Shows over the finished picture which tokens became one, or which were kept; of multires what "
            "one query saw whole and what coarser. Another level, layer, step or query needs no new sampling.",
            search_aliases=["ToMe", "visualize", "overlay"],
            inputs=[
                ToMeRecordType.Input("record", tooltip="From ToMe Record."),
                io.Image.Input("image", tooltip="The finished picture. The map has its size."),
                io.Combo.Input("show", options=list(SHOWS), default="groups", tooltip=shows),
                io.Int.Input(
                    "level", default=-1, min=-1, max=3,
                    tooltip="0 is the latent's own resolution, each further level half of it. -1: the finest merged.",
                ),
                io.Int.Input("layer", default=0, min=0, max=999, tooltip="The layers of a level, from 0."),
                io.Int.Input(
                    "step", default=-1, min=-1, max=9999,
                    tooltip="The sampler's step, from 0. -1: the last in which something was merged.",
                ),
                io.Float.Input(
                    "opacity", default=0.6, min=0.0, max=1.0, step=0.05, display_mode=io.NumberDisplay.slider,
                    tooltip="How strong the colours are.",
                ),
                make(
                    io.Int.Input, "picture", default=0, min=-1, max=4095, optional=True, advanced=True,
                    tooltip="Which picture of the batch, or frame of the video, from 0. -1: all.",
                ),
                make(
                    io.Boolean.Input, "legend", default=True, optional=True, advanced=True,
                    tooltip="What is shown, in the lower edge.",
                ),
                _which_run(),
                *(
                    make(
                        io.Int.Input, name, default=-1, min=-1, max=16383, optional=True, advanced=True,
                        tooltip=f"multires: the query whose keys are shown, {side} in pixels. -1: the middle.",
                    )
                    for name, side in (("x", "from the left"), ("y", "from the top"))
                ),
                make(
                    io.Int.Input, "head", default=-1, min=-1, max=999, optional=True, advanced=True,
                    tooltip="multires: the head of the attention whose choice is shown. -1: the mean of all.",
                ),
            ],
            outputs=[io.Image.Output(display_name="map")],
        )  # fmt: skip

    @classmethod
    def execute(
        cls, record: Record, image: torch.Tensor, show: str, level: int, layer: int, step: int, opacity: float,
        picture: int = 0, legend: bool = True, sampling: int = 0, x: int = -1, y: int = -1, head: int = -1,
    ) -> io.NodeOutput:  # fmt: skip
        if not len(image):
            raise ValueError("ToMe Map needs at least one picture, got none")
        if not -1 <= picture < image.shape[0]:
            raise ValueError(f"picture must be -1 (all) or in 0 to {image.shape[0] - 1}, got {picture}")
        pictures = range(image.shape[0]) if picture == -1 else [picture]
        run = record.run(sampling)
        return io.NodeOutput(
            draw_maps(
                run,
                image,
                pictures,
                show=show,
                level=level,
                layer=layer,
                step=step,
                opacity=opacity,
                legend=legend,
                empty=EMPTY,
                x=x,
                y=y,
                head=head,
            )  # fmt: skip
        )


class ToMeReport(io.ComfyNode):
    """Says what was merged, and what it gained."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return make(
            io.Schema,
            node_id="ToMeReport",
            display_name="ToMe Report",
            category="utilities",
            description="What ToMe merged in which layer, what it left alone and why, and the time of a step without "
            "and with it, measured on this very model.",
            search_aliases=["ToMe", "speed", "benchmark", "debug"],
            is_output_node=True,
            inputs=[
                ToMeRecordType.Input("record", tooltip="From ToMe Record."),
                io.AnyType.Input(
                    "after", tooltip="The sampler's latent or the picture, so that the report is written after it."
                ),
                io.Boolean.Input(
                    "measure_time", default=True, optional=True, display_name="Measure time",
                    tooltip="Runs the model's last merged call some more times, by turns without and with ToMe. Takes "
                    "about as long as a dozen steps, 20 seconds at most unless one step is longer.",
                ),
                _which_run(),
            ],
            outputs=[
                io.String.Output(display_name="text"),
                io.String.Output(display_name="json"),
            ],
            hidden=[io.Hidden.unique_id],
        )  # fmt: skip

    @classmethod
    def execute(cls, record: Record, after: Any, measure_time: bool = True, sampling: int = 0) -> io.NodeOutput:
        run = record.run(sampling)
        if run is None:
            text, data = " ".join(EMPTY), {"recorded": False, "why": " ".join(EMPTY)}
        else:
            report = make_report(run, measure_time)
            text, data = report.text(), {"recorded": True, **report.to_dict()}
            logger.info("[ToMe] %s", report.line())
        # Only ComfyUI's own text node shows what `ui` holds.
        show_on_node(getattr(cls.hidden, "unique_id", None), text, everywhere=True)
        return io.NodeOutput(text, json.dumps(data, indent=2), ui=ui.PreviewText(text))


def make_report(run: Run, measure_time: bool) -> Report:
    """The report of a run; measures once, and what it measured on is let go of then."""
    run.tally.settle()
    notes = [note for note in (COMPILED if run.compiled else None, run.passed_by) if note]
    if measure_time and run.time is None:
        try:
            run.time = measure(run)
        except ValueError as error:
            notes.append(f"the time was not measured: {error}")
    return run.tally.report(run.time, notes)


NODES: list[type[io.ComfyNode]] = [ToMeRecord, ToMeMap, ToMeReport]
