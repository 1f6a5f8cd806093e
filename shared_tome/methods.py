"""The methods, presets and the other choices that options are made of, each with what it does in words."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

MAX_SEED = 2**64 - 1
MAX_LEVEL = 3
# `sample` and `downsample` keep at least one token of each 64 (an 8x8 cell): beyond that the measured
# pictures fall apart, and a single key for the whole image is never what somebody wants.
MAX_RUN = 64
# `multires` keeps one token of each 4x4 cell where it keeps least.
QUARTER = 16


@dataclass(frozen=True)
class Method:
    """What a method does with the two sides of an attention layer.

    queries, keys: whether they are merged. matches: whether similar tokens are looked for.
    reduce: forces how a merged token gets its value (None: the option `reduce` decides).
    fills: tokens that went come back as zeros instead of as a copy.
    """

    queries: bool
    keys: bool
    matches: bool
    summary: str
    reduce: str | None = None
    fills: bool = False


METHODS: dict[str, Method] = {
    "sample": Method(
        False,
        True,
        False,
        "keys and values from one random real token of each cell, another one in every layer and step",
        "pick",
    ),
    "multires": Method(
        False,
        True,
        False,
        "for transformers: keys stay whole where a query looks, and are drawn coarser elsewhere",
        "pick",
    ),
    "merge": Method(True, True, True, "similar tokens become one, for queries, keys and values (the ToMe paper)"),
    "merge_queries": Method(True, False, True, "only queries are merged (what ComfyUI's own node does)"),
    "merge_keys": Method(False, True, True, "only keys and values are merged"),
    "downsample": Method(False, True, False, "keys and values from the top-left token of each cell (ToDo)", "pick"),
    "prune": Method(
        True, True, True, "similar tokens are dropped and come back as zeros (for comparison)", "pick", True
    ),
}
AUTO_MOST = 0.84
"""The highest ratio that auto takes on transformers."""
AUTO = "auto"
"""In place of a method: the nearest to the unmerged picture that is known for the model (ToMeConfig.resolved)."""
PARTITIONS = {
    "random_2d": "a random token of each cell",
    "fixed_2d": "the top-left token of each cell",
    "random": "anywhere in the image",
    "alternate": "every other token (the vision transformer paper's)",
}
REDUCES = {"mean": "the mean of the merged tokens", "pick": "the destination's own value"}


@dataclass(frozen=True)
class Preset:
    """A point of the measured frontier (docs/quality.md): what to expect of it, and the options that make it."""

    summary: str
    options: dict[str, Any]


PRESETS: dict[str, Preset] = {
    "Quality": Preset(
        "nearest to the unmerged picture, fine texture included",
        {"method": AUTO, "ratio": 0.75, "start": 0.2, "own_token": True},
    ),
    "Balanced": Preset("the default, near and fast", {"method": AUTO, "ratio": 0.75, "start": 0.0, "own_token": True}),
    "Fast": Preset(
        "much faster on large pictures; lettering and fine texture change",
        {"method": AUTO, "ratio": 0.9375, "start": 0.1, "own_token": True},
    ),
}
CUSTOM = "Custom"
"""What a user interface calls options that are no preset."""
LEVELS = ("auto", "0", "0,1", "0,1,2", "0,1,2,3", "1", "1,2", "1,2,3", "2", "2,3", "3")


UNET_ALONE = ("levels", "cross_attention", "mlp", "exact_every")
"""Options that have no meaning for a transformer: it has one resolution, is served at its self-attention, and gained
nothing by exact steps."""


def idle_options(method: str) -> tuple[str, ...]:
    """The names of the widgets that change nothing with a method, whatever the model; for AUTO with both that it may
    stand for."""
    if method == AUTO:
        return tuple(name for name in idle_options("sample") if name in idle_options("multires"))
    kind, idle = METHODS[method], []
    if method in ("sample", "multires"):
        idle += ["stride_x", "stride_y"]
    if not kind.matches:
        idle += ["partition", "cross_attention", "mlp", "share_match"]
    if kind.reduce is not None:
        idle.append("reduce")
    if not kind.keys or kind.fills:
        idle.append("proportional")
    if method != "sample":  # multires has it always
        idle.append("own_token")
    if method != "multires":
        idle += ["whole", "half"]
    if method not in ("sample", "downsample"):
        idle.append("exact_every")
    return tuple(idle)
