"""ToMe in ComfyUI's CLIP vision encoders (CLIP-ViT-L, H, G, SigLIP), which IP-Adapter, unCLIP, Wan and Redux use.

Model objects are shared between clones, so the hooks are on the model for the duration of one call, and for the thread
of that call. All hidden states that leave the encoder have all tokens, so what reads them needs no change. On a GPU an
encoder is timed at its first picture, whole and merged, and left alone where merging does not pay.
"""

from __future__ import annotations

import copy
import threading
from typing import Any

from comfy_api.latest import io

from ..shared_tome.autotune.layer import Decision
from ..shared_tome.vit.autotune import by_pixels, decision_of
from ..shared_tome.vit.hooks import VitAttachment
from ..shared_tome.vit.options import SCHEDULES, Options
from ..shared_tome.vit.towers import Tower, find_tower
from .log import say_once
from .schema import make


class MergedVision:
    """Stands where the encoder's model does: custom nodes call it themselves, not encode_image alone."""

    def __init__(self, model: Any, tower: Tower, options: Options):
        self._model, self._tower, self._options = model, tower, options

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        decision = self._decision(args, kwargs)
        if decision is not None and not decision.pays():
            say_once(decision.reason, type(self._model).__name__)
            return self._model(*args, **kwargs)
        return self._merged(*args, **kwargs)

    def _decision(self, args: tuple, kwargs: dict[str, Any]) -> Decision | None:
        """What is known of the times of this encoder's calls."""
        pixels, on = by_pixels(args, kwargs)
        return decision_of(self._model, self._tower, self._options, pixels, on)

    def _merged(self, *args: Any, **kwargs: Any) -> Any:
        attachment = VitAttachment(self._tower, self._options, thread=threading.get_ident())
        try:
            return self._model(*args, **kwargs)
        finally:
            attachment.detach()

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):  # not found here: while this object is copied there is no model yet
            raise AttributeError(name)
        return getattr(self._model, name)


def apply_to_clip_vision(clip_vision: Any, ratio: float, schedule: str, proportional: bool) -> Any:
    """A clone of the encoder that merges; the original is not changed.

    ratio: the share of the tokens that is gone after the last block.
    Raises ValueError for an encoder that is merged already or not served.
    """
    model = clip_vision.model
    if isinstance(model, MergedVision):
        raise ValueError("this CLIP vision model is already merged by another ToMe node; remove one of the two")
    try:
        tower = find_tower(model)
    except ValueError as error:
        raise ValueError(
            f"ToMe CLIP Vision serves CLIP and SigLIP encoders; this one is {type(model).__name__}"
        ) from error
    options = Options(ratio=ratio, schedule=schedule, proportional=proportional, restore="all")
    options.check(len(tower.blocks))
    clone = copy.copy(clip_vision)
    if ratio > 0.0:
        clone.model = MergedVision(model, tower, options)
    return clone


class ToMeCLIPVision(io.ComfyNode):
    """Token Merging: Your ViT But Faster, Bolya et al., arXiv 2210.09461."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return make(
            io.Schema,
            node_id="ToMeCLIPVision",
            display_name="ToMe CLIP Vision",
            category="model/patch",
            description="Token Merging in the image encoder: similar patches become one on the way through its layers. "
            "What it gives out keeps its shape.",
            search_aliases=["ToMe", "clip vision", "siglip", "ip-adapter", "redux"],
            inputs=[
                io.ClipVision.Input("clip_vision", tooltip="A CLIP or SigLIP image encoder. It is not changed."),
                io.Float.Input(
                    "ratio",
                    default=0.5,
                    min=0.0,
                    max=0.95,
                    step=0.05,
                    round=0.001,
                    display_mode=io.NumberDisplay.slider,
                    tooltip="The share of the tokens that is gone after the last layer. 0 changes nothing.",
                ),
                make(
                    io.Combo.Input,
                    "schedule",
                    options=list(SCHEDULES),
                    default=SCHEDULES[0],
                    optional=True,
                    advanced=True,
                    tooltip="constant: as many tokens fewer in each layer. falling: most in the first layers, none in "
                    "the last: faster, further from the unmerged result.",
                ),
                make(
                    io.Boolean.Input,
                    "proportional",
                    default=True,
                    optional=True,
                    advanced=True,
                    display_name="Proportional attention",
                    tooltip="A token that stands for several weighs as much as they did.",
                ),
            ],
            outputs=[io.ClipVision.Output(tooltip="The encoder with merged tokens.")],
        )

    @classmethod
    def execute(
        cls, clip_vision: Any, ratio: float, schedule: str = SCHEDULES[0], proportional: bool = True
    ) -> io.NodeOutput:
        return io.NodeOutput(apply_to_clip_vision(clip_vision, ratio, schedule, proportional))
