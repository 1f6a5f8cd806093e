"""The variants that are measured, by name, and the sets in which they are measured together."""

from __future__ import annotations

from dataclasses import dataclass, field

from shared_tome import ToMeConfig

from .reuse import Hold, Reuse


@dataclass(frozen=True)
class Variant:
    """One thing to measure.

    family: a line of the plots. timed: whether its step is timed. strict: in float32 whatever the others are in.
    tail: one of tails.MODES in place of the config's method, for transformers; its work is 1 - ratio.
    one_draw: the draws of the first step in all steps. steps: in place of the sampler's own (0: these).
    reuse, hold: of outputs of earlier steps (reuse.py).
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

    @property
    def is_merged(self) -> bool:
        return not self.config.is_off


@dataclass
class Catalogue:
    """All variants by name, and the names of each set, in the order in which they were added."""

    variants: dict[str, Variant] = field(default_factory=dict)
    sets: dict[str, list[str]] = field(default_factory=dict)

    def add(
        self,
        sets: str,
        name: str,
        family: str,
        timed: bool = True,
        strict: bool = False,
        tail: str = "",
        one_draw: bool = False,
        **options,
    ) -> None:
        """sets: names of sets, with spaces. options: of the config."""
        if name in self.variants:
            raise ValueError(f"two variants are named {name!r}")
        config = ToMeConfig(**{**BASE, **options})
        self.variants[name] = Variant(name, family, config, timed, strict, tail, one_draw)
        for one in sets.split():
            self.sets.setdefault(one, []).append(name)


BASE = {"levels": "0", "min_tokens": 0, "own_token": False}
"""What all variants set that do not say otherwise, whatever the core's defaults are."""
OWN = "own token kept"
UNMERGED = "unmerged"
BASELINE = "tomesd 0.5"
"""What gains are counted from."""
TOMESD = {"method": "merge", "proportional": False, "reduce": "mean"}
# What decides the defaults, the most telling rows first; the first eight and two of OWN_KEY are the set "few".
KEY = (
    UNMERGED,
    BASELINE,
    "sample 0.75",
    "sample 0.9375",
    "sample 0.75 from 0.2",
    "sample 0.9375 from 0.2",
    "downsample 2x2",
    "downsample 4x4",
    "sample 0.9375 from 0.1",
    "sample 0.75 from 0.1",
    "tomesd 0.5 from 0.2",
    "downsample 4x4 from 0.2",
    "sample 0.5",
    "sample 0.984375 from 0.2",
    "merge 0.5",
    "merge_keys pick 0.75",
)
# The same with own tokens: (ratio, start); all presets are among them.
OWN_KEY = ((0.75, 0.0), (0.75, 0.2), (0.9375, 0.0), (0.9375, 0.1), (0.9375, 0.2), (0.5, 0.0), (0.984375, 0.0))


def catalogue() -> Catalogue:
    c = Catalogue()
    c.add("frontier main starts paper own", UNMERGED, "unmerged", ratio=0.0)
    c.add("frontier main starts paper own", BASELINE, "tomesd", ratio=0.5, **TOMESD)
    # How far rounding alone takes the pictures: no row can be told from the unmerged one beyond that.
    c.add("floor", "unmerged, float32", "unmerged", ratio=0.0, strict=True, timed=False)
    _frontier(c)
    for ratio, start in OWN_KEY:
        family = f"sample, {OWN}" + (f" from {start:g}" if start else "")
        c.add("own", sample_name(ratio, start, own=True), family, ratio=ratio, start=start, own_token=True)
    _starts(c)
    _paper(c)
    _transformers(c)
    own = c.sets["own"][2:]
    c.sets["key"], c.sets["few"] = [*KEY, *own], [*KEY[:8], own[0], sample_name(0.9375, own=True)]
    return c


def _frontier(c: Catalogue) -> None:
    def row(main: bool, name: str, family: str, method: str, ratio: float, **options) -> None:
        c.add("frontier main" if main else "frontier", name, family, method=method, ratio=ratio, **options)

    for ratio in (0.75, 0.9375, 0.875, 0.5, 0.984375):
        row(ratio in (0.5, 0.75, 0.9375), f"sample {ratio:g}", "sample", "sample", ratio)
    row(True, "downsample 2x2", "ToDo", "downsample", 0.75)
    row(True, "downsample 4x4", "ToDo", "downsample", 0.9375, stride=(4, 4))
    for ratio in (0.75, 0.25, 0.6):
        row(ratio == 0.75, f"tomesd {ratio:g}", "tomesd", ratio=ratio, **TOMESD)
    for ratio in (0.5, 0.75, 0.25, 0.6):
        row(ratio == 0.5, f"merge {ratio:g}", "merge, proportional", "merge", ratio)
    for start in (0.2, 0.4, 0.6):
        for ratio in (0.75, 0.9375):
            name = sample_name(ratio, start)
            row(start == 0.2, name, f"sample from {start:g}", "sample", ratio, start=start)
    for ratio in (0.5, 0.75):
        row(ratio == 0.75, f"merge_keys pick {ratio:g}", "merge_keys, pick", "merge_keys", ratio, reduce="pick")
        row(False, f"merge_keys mean {ratio:g}", "merge_keys, mean", "merge_keys", ratio)
    for ratio in (0.5, 0.25, 0.75):
        row(False, f"merge_queries {ratio:g}", "merge_queries", "merge_queries", ratio)
    row(False, "prune 0.5", "prune", "prune", 0.5)
    c.sets["paper"].append("prune 0.5")


def sample_name(ratio: float, start: float = 0.0, own: bool = False) -> str:
    """The variant of `sample` with these options."""
    return f"sample {ratio:g}" + (f" from {start:g}" if start else "") + (f", {OWN}" if own else "")


def _starts(c: Catalogue) -> None:
    """How few of the first steps have to be left alone, and whether what helps sample helps the others."""
    for start in (0.1, 0.2):
        for ratio in (0.9375, 0.75, 0.984375):
            name = sample_name(ratio, start)
            if name in c.variants:
                c.sets["starts"].append(name)
            else:
                c.add("starts", name, f"sample from {start:g}", ratio=ratio, start=start)
    for name, family, options in (
        ("tomesd 0.5", "tomesd", {"ratio": 0.5, **TOMESD}),
        ("downsample 2x2", "ToDo", {"method": "downsample", "ratio": 0.75}),
        ("downsample 4x4", "ToDo", {"method": "downsample", "ratio": 0.9375, "stride": (4, 4)}),
        ("merge 0.5", "merge, proportional", {"method": "merge", "ratio": 0.5}),
    ):
        c.add("starts", f"{name} from 0.2", f"{family} from 0.2", start=0.2, **options)


# Shares of the attention's work that are left.
WORKS = (0.10, 0.16, 0.23, 0.33, 0.50)


def _transformers(c: Catalogue) -> None:
    """Keys at three resolutions, and beside them at equal work what others do and this project's other methods.

    multires: all. multires-few: for another sampler. multires-levels: what U-Nets take as well. multires-video: with
    one draw for all steps.
    """
    default = sample_name(0.75, own=True)
    c.sets["multires"] = [UNMERGED, default]
    c.sets["multires-few"] = [UNMERGED, default]
    c.sets["multires-levels"] = [UNMERGED, BASELINE, default]
    for work in WORKS:
        ratio = round(1 - work, 4)
        few = " multires-few" if 0.1 < work < 0.5 else ""
        every = f"multires multires-levels{few}"
        c.add(every, f"multires {ratio:g}", "multires", method="multires", ratio=ratio)
        c.add(f"multires{few}", f"mean tail {ratio:g}", "whole and mean tiles", tail="mean", ratio=ratio, timed=False)
        if work == 0.23:
            c.add("multires", f"dropped tail {ratio:g}", "whole tiles", tail="drop", ratio=ratio, timed=False)
        for start in (0.1, 0.2):
            name = f"multires {ratio:g} from {start:g}"
            c.add("multires", name, f"multires from {start:g}", method="multires", ratio=ratio, start=start)
    c.sets["multires"] += ["merge 0.5", "multires 1", f"sample 0.75 from 0.2, {OWN}"]
    c.add("", "multires 1", "multires", method="multires", ratio=1.0)
    c.sets["multires-video"] = [*c.sets["multires-few"], "merge 0.5"]
    same = {"sets": "multires-video", "family": "one draw", "one_draw": True}
    c.add(name="multires 0.77, one draw", method="multires", ratio=0.77, **same)
    c.add(name=f"sample 0.75, one draw, {OWN}", ratio=0.75, own_token=True, **same)


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


def _paper(c: Catalogue) -> None:
    for name, options in PAPER.items():
        c.add("paper", name, "the papers' tables", timed=False, **{"ratio": 0.5, **TOMESD, **options})


CATALOGUE = catalogue()
