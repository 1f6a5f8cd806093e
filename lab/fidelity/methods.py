"""The variants that are measured, by name, and the sets in which they are measured together."""

from __future__ import annotations

import math
from dataclasses import dataclass

from shared_tome import ToMeConfig

from .reuse import Hold, Reuse


@dataclass(frozen=True)
class Variant:
    """One thing to measure.

    family: a line of the plots. timed: whether its step is timed. strict: in float32 whatever the others are in.
    tail: one of tails.MODES in place of the config's method, for transformers; its work is 1 - ratio.
    one_draw: the draws of the first step in all steps. steps: in place of the sampler's own (0: these).
    reuse, hold: of outputs of earlier steps (reuse.py). tiles: that many by that many tiles of the picture, each of
    which attends to itself at level 0 (0: no tiles); strips: to as many keys in the order of the rows instead.
    """

    name: str
    family: str
    config: ToMeConfig
    timed: bool = True
    strict: bool = False
    tail: str = ""
    one_draw: bool = False
    steps: int = 0
    reuse: Reuse | None = None
    hold: Hold | None = None
    tiles: int = 0
    strips: bool = False

    @property
    def is_merged(self) -> bool:
        return not self.config.is_off


@dataclass(frozen=True)
class Catalogue:
    """All variants by name, and the names of each set, in the order in which they are measured."""

    variants: dict[str, Variant]
    sets: dict[str, list[str]]


BASE = {"levels": "0", "min_tokens": 0, "own_token": False}
"""What all variants set that do not say otherwise, whatever the core's defaults are."""
OWN = "own token kept"
UNMERGED = "unmerged"
BASELINE = "tomesd 0.5"
"""What gains are counted from."""
TOMESD = {"method": "merge", "proportional": False, "reduce": "mean"}
# What a name begins with: the family, and the options beside the ratio.
KINDS: dict[str, tuple[str, dict[str, object]]] = {
    "sample": ("sample", {}),
    "downsample": ("ToDo", {"method": "downsample"}),
    "tomesd": ("tomesd", TOMESD),
    "merge": ("merge, proportional", {"method": "merge"}),
    "merge_keys pick": ("merge_keys, pick", {"method": "merge_keys", "reduce": "pick"}),
    "merge_keys mean": ("merge_keys, mean", {"method": "merge_keys"}),
    "merge_queries": ("merge_queries", {"method": "merge_queries"}),
    "prune": ("prune", {"method": "prune"}),
    "multires": ("multires", {"method": "multires"}),
    "mean tail": ("whole and mean tiles", {}),
    "dropped tail": ("whole tiles", {}),
}
TAILS = {"mean tail": "mean", "dropped tail": "drop"}


def variant_of(name: str) -> Variant:
    """By its name: "sample 0.75 from 0.2, own token kept", "downsample 4x4" (the cell's sides)."""
    if name.startswith(UNMERGED):
        # In float32: how far rounding alone takes the pictures. No row can be told from the unmerged one beyond that.
        strict = name != UNMERGED
        return Variant(name, UNMERGED, ToMeConfig(**BASE, ratio=0.0), not strict, strict)
    if name in PAPER:
        config = ToMeConfig(**{**BASE, "ratio": 0.5, **TOMESD, **PAPER[name]})
        return Variant(name, "the papers' tables", config, timed=False)
    whole, *marks = name.split(", ")
    head, _, start = whole.partition(" from ")
    kind, _, amount = head.rpartition(" ")
    family, more = KINDS[kind]
    sides = tuple(map(int, amount.split("x"))) if "x" in amount else ()
    cell = {"ratio": 1 - 1 / math.prod(sides), "stride": sides} if sides else {"ratio": float(amount)}
    own, one_draw = OWN in marks, "one draw" in marks
    config = ToMeConfig(**{**BASE, **more, **cell, "start": float(start or 0), "own_token": own})
    family += (f", {OWN}" if own else "") + (f" from {start}" if start else "")
    tail = TAILS.get(kind, "")
    return Variant(name, "one draw" if one_draw else family, config, not tail, tail=tail, one_draw=one_draw)


def sample_name(ratio: float, start: float = 0.0, own: bool = False) -> str:
    """The variant of `sample` with these options."""
    return f"sample {ratio:g}" + (f" from {start:g}" if start else "") + (f", {OWN}" if own else "")


# Shares of the attention's work that are left.
WORKS = (0.10, 0.16, 0.23, 0.33, 0.50)
# The same options with own tokens: (ratio, start); all presets are among them.
OWN_KEY = ((0.75, 0.0), (0.75, 0.2), (0.9375, 0.0), (0.9375, 0.1), (0.9375, 0.2), (0.5, 0.0), (0.984375, 0.0))


def catalogue() -> Catalogue:
    """Sets of the lab's U-Nets; of transformers see _transformers."""
    sets = {
        "frontier": [
            *_each("sample", "0.75", "0.9375", "0.875", "0.5", "0.984375"),
            *_each("downsample", "2x2", "4x4"),
            *_each("tomesd", "0.75", "0.25", "0.6"),
            *_each("merge", "0.5", "0.75", "0.25", "0.6"),
            *(f"sample {ratio} from {start}" for start in (0.2, 0.4, 0.6) for ratio in (0.75, 0.9375)),
            *(f"merge_keys {reduce} {ratio}" for ratio in (0.5, 0.75) for reduce in ("pick", "mean")),
            *_each("merge_queries", "0.5", "0.25", "0.75"),
            "prune 0.5",
        ],
        # How few of the first steps have to be left alone, and whether what helps sample helps the others.
        "starts": [
            *(f"sample {ratio} from {start}" for start in (0.1, 0.2) for ratio in (0.9375, 0.75, 0.984375)),
            *(f"{name} from 0.2" for name in (BASELINE, "downsample 2x2", "downsample 4x4", "merge 0.5")),
        ],
        "paper": ["prune 0.5", *PAPER],
        "own": [sample_name(ratio, start, own=True) for ratio, start in OWN_KEY],
    }
    sets["main"] = [
        *_each("sample", "0.75", "0.9375", "0.5"),
        *_each("downsample", "2x2", "4x4"),
        *("tomesd 0.75", "merge 0.5", "sample 0.75 from 0.2", "sample 0.9375 from 0.2", "merge_keys pick 0.75"),
    ]
    # What decides the defaults, the most telling rows first.
    first = [
        *_each("sample", "0.75", "0.9375", "0.75 from 0.2", "0.9375 from 0.2"),
        *_each("downsample", "2x2", "4x4"),
    ]
    sets["key"] = [
        *first,
        *_each("sample", "0.9375 from 0.1", "0.75 from 0.1"),
        *("tomesd 0.5 from 0.2", "downsample 4x4 from 0.2"),
        *_each("sample", "0.5", "0.984375 from 0.2"),
        *("merge 0.5", "merge_keys pick 0.75", *sets["own"]),
    ]
    sets["few"] = [*first, sample_name(0.75, own=True), sample_name(0.9375, own=True)]
    sets = {name: [UNMERGED, BASELINE, *some] for name, some in sets.items()}
    sets |= {"floor": ["unmerged, float32"], **_transformers()}
    return Catalogue({name: variant_of(name) for some in sets.values() for name in some}, sets)


def _each(kind: str, *amounts: str) -> list[str]:
    return [f"{kind} {amount}" for amount in amounts]


def _transformers() -> dict[str, list[str]]:
    """Keys at three resolutions, and beside them at equal work what others do and this project's other methods.

    multires: all. multires-few: for another sampler. multires-levels: what U-Nets take as well. multires-video: with
    one draw for all steps.
    """
    default = sample_name(0.75, own=True)
    every, few, levels = [UNMERGED, default], [UNMERGED, default], [UNMERGED, BASELINE, default]
    for work in WORKS:
        name, tail = (f"{kind} {round(1 - work, 4):g}" for kind in ("multires", "mean tail"))
        dropped = [tail.replace("mean", "dropped")] if work == 0.23 else []
        every += [name, tail, *dropped, *(f"{name} from {start}" for start in (0.1, 0.2))]
        few += [name, tail] if 0.1 < work < 0.5 else []
        levels.append(name)
    every += ["merge 0.5", "multires 1", f"sample 0.75 from 0.2, {OWN}"]
    video = [*few, "merge 0.5", "multires 0.77, one draw", f"sample 0.75, one draw, {OWN}"]
    return {"multires": every, "multires-few": few, "multires-levels": levels, "multires-video": video}


PAPER = {
    "partition alternate": {"partition": "alternate"},
    "partition fixed 2x2": {"partition": "fixed_2d"},
    "partition random": {"partition": "random"},
    "partition fixed 2x4": {"partition": "fixed_2d", "stride": (4, 2)},
    "partition fixed 4x4": {"partition": "fixed_2d", "stride": (4, 4)},
    "partition random 2x4": {"stride": (4, 2)},
    "partition random 4x4": {"stride": (4, 4)},
    "self and cross": {"cross_attention": True},
    "self and MLP": {"mlp": True},
    "self, cross and MLP": {"cross_attention": True, "mlp": True},
    "levels 0,1": {"levels": "0,1"},
    "levels 0,1,2": {"levels": "0,1,2"},
    "ratio falling 0.75 to 0.25": {"ratio": 0.75, "ratio_end": 0.25},
    "ratio rising 0.25 to 0.75": {"ratio": 0.25, "ratio_end": 0.75},
    "last 60% of the steps": {"start": 0.4},
    "first 60% of the steps": {"end": 0.6},
    "prune 0.25": {"method": "prune", "ratio": 0.25},
    "prune 0.75": {"method": "prune", "ratio": 0.75},
    "tomesd 0.1": {"ratio": 0.1},
    "tomesd 0.4": {"ratio": 0.4},
    "tomesd 0.7": {"ratio": 0.7},
    "levels 0,1, sample 0.75": {"method": "sample", "ratio": 0.75, "levels": "0,1", "proportional": True},
    "levels 0,1,2, sample 0.75": {"method": "sample", "ratio": 0.75, "levels": "0,1,2", "proportional": True},
    "merge pick 0.5": {"proportional": True, "reduce": "pick"},
    "match shared by prompt and no prompt": {"share_match": True},
}
"""The rows of Bolya and Hoffman (arXiv 2303.17604), tables 1 to 3: what each changes of tomesd's rule at 0.5."""


CATALOGUE = catalogue()
