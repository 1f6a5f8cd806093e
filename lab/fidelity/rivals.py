"""What people use in place of merging, alone and with each preset, as variants of one model: for frontier.py."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace

from shared_tome import ToMeConfig
from shared_tome.methods import PRESETS

from .methods import BASE, UNMERGED, Variant
from .reuse import Hold, Reuse

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
TAILS = (0.84, 0.9, 0.77, 0.67)
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
        tails = [_choice(f"mean tail {r:g}", "pooled tail", config.replace(ratio=r), tail="mean") for r in TAILS]
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
