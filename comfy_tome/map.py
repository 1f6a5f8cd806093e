"""ToMe Map's picture, with what it says in ComfyUI where nothing was recorded."""

from __future__ import annotations

from functools import partial

from ..shared_tome import maps
from ..shared_tome.maps import NoMap, choose

__all__ = ["EMPTY", "NoMap", "choose", "draw_maps"]

EMPTY = (
    "Nothing was recorded. Either the model that was sampled has",
    "no ToMe node, or one at ratio 0, or ComfyUI took the picture",
    "from its cache: change the sampler's seed and queue again.",
)

draw_maps = partial(maps.draw_maps, empty=EMPTY)
