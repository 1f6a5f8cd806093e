"""The variants that are measured, by name, and the sets in which they are measured together."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from shared_tome import ToMeConfig
from shared_tome.methods import PRESETS

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


THRESHOLDS = (0.2, 0.1, 0.3, 0.05, 0.5, 0.15, 0.02, 1.0)
"""Of the caches: ComfyUI's default first."""
SHARES = (0.75, 0.5, 0.9, 0.6, 0.4, 0.25)
"""Of the steps that are left."""
AGAIN = "unmerged again"
"""In other batches: how far rounding alone takes pictures, which are put together anew where a cache skips some."""
EXACT = "ToMe, exact every"
"""The family of the option exact_every: with Quality, whose method and start these rows have."""
EXACT_EVERY = " exact every "
"""In a choice's name, between the preset and the number."""
TAIL_RATIOS = (0.84, 0.9, 0.77, 0.67)
"""Ratios of the pooled-tail rule."""
TILES = (8, 4, 2)
"""A side, of HyperTile. ComfyUI's node (0.30.0) cuts the queries alone; as many keys follow the order of the rows."""
SETS = ("presets", "steps", "caches", "hold", "tails", "combined", "tiles")


def presets(transformer: bool) -> dict[str, ToMeConfig]:
    """The presets as they are on such a model, at level 0."""
    return {
        name: ToMeConfig(**{**BASE, **preset.options}).resolved(multires=transformer)
        for name, preset in PRESETS.items()
    }


def _choice(name: str, family: str, config: ToMeConfig | None = None, **more: object) -> Variant:
    """config: None merges nothing."""
    return Variant(name, family, config or ToMeConfig(**BASE, ratio=0.0), timed=False, **more)


def rivals(steps: int, transformer: bool, counts: Sequence[int] = (), sets: Iterable[str] = SETS) -> dict[str, Variant]:
    """All variants by name, the most telling first in each set.

    steps: of the sampler. counts: fewer ones; () takes SHARES. sets: some of SETS; unmerged is always there, twice.
    """
    counts = [count for count in counts or [round(share * steps) for share in SHARES] if 0 < count < steps]
    found: dict[str, list[Variant]] = {name: [] for name in SETS}

    found["presets"] = merged = [_choice(name, "ToMe", config) for name, config in presets(transformer).items()]
    fewer = [_choice(f"{count} steps", "fewer steps", steps=count) for count in counts]
    easy, lazy = (
        [_choice(f"{kind} {threshold:g}", kind, reuse=Reuse(kind, threshold)) for threshold in THRESHOLDS]
        for kind in ("EasyCache", "LazyCache")
    )
    found["steps"], found["caches"] = fewer, [*easy, *lazy]
    found["combined"] = [
        replace(other, name=f"{other.name} + {one.name}", family=f"{other.family} + {one.name}", config=one.config)
        for other in (*easy[:3], *fewer[:3], *lazy[:3], *easy[3:], *fewer[3:])
        for one in merged
    ]
    found["hold"] = holds(transformer)
    if not transformer:
        cut = [_choice(f"HyperTile {n}x{n}", "HyperTile", tiles=n) for n in TILES]
        found["tiles"] = [*cut, *(replace(one, name=f"{one.name} in ComfyUI", strips=True) for one in cut)]
    if transformer:
        config = ToMeConfig(**BASE)
        tails = [_choice(f"mean tail {r:g}", "pooled tail", config.replace(ratio=r), tail="mean") for r in TAIL_RATIOS]
        both = {"family": "EasyCache + pooled tail", "reuse": Reuse("EasyCache")}
        found["tails"] = [*tails, *(replace(tail, name=f"EasyCache 0.2 + {tail.name}", **both) for tail in tails[:2])]
    chosen = [
        _choice(UNMERGED, UNMERGED),
        _choice(AGAIN, UNMERGED),
        *(variant for name in SETS if name in sets for variant in found[name]),
    ]
    return {variant.name: variant for variant in chosen}


def holds(transformer: bool) -> list[Variant]:
    """Outputs held whole, and each attention's; keys are drawn between as they are best on such a model."""
    drawn = "multires 0.84" if transformer else "sample 0.75"
    method, ratio = drawn.split()
    config = ToMeConfig(**{**BASE, "method": method, "ratio": float(ratio), "own_token": True})
    found = []

    def residual(every: int, times: str) -> Variant:
        name, family = f"attention {times}, {drawn} + residual", "drawn + residual"
        if not transformer:  # where people can choose it
            name, family = f"Quality{EXACT_EVERY}{every}", EXACT
        return _choice(name, family, config, hold=Hold(every, "residual"))

    for every in (2, 3, 4, 6):
        times = f"1 of {every}"
        whole = {"start": 0.2, "end": 1.0, "every": every}
        found += [
            _choice(f"outputs {times}", "outputs reused", reuse=Reuse("output", **whole)),
            _choice(f"attention {times}", "attention held", hold=Hold(every, "held")),
            _choice(f"attention {times}, {drawn} between", "drawn between", config, hold=Hold(every, "drawn")),
            residual(every, times),
        ]
        if every == 2:
            found.append(_choice(f"differences {times}", "outputs reused", reuse=Reuse("difference", **whole)))
    return [*found, _choice(f"{drawn} from 0.2", "drawn from 0.2", config.replace(start=0.2))]
