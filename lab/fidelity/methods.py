"""The variants that are measured, by name, and the sets in which they are measured together.

Most are configs of the core. Where the lab asks what another choice would give (other draws, other orders, other
metrics, shared matches), a few lines here change that one thing in the core's ModelCall.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from shared_tome import ModelCall, Plan, ToMeConfig
from shared_tome.core.curve import curve_order
from shared_tome.core.grid import Grid
from shared_tome.core.noise import key
from shared_tome.core.sampling import kept_count, walk_rows, walk_table
from shared_tome.merging.plan import SamplePlan

from .apart import apart
from .guided import guided_cells, merged_on_top

Make = Callable[[ToMeConfig, Grid, torch.device, Tensor, int, dict], ModelCall]
"""(config of this step, full grid, device, seed [b], step, memory of the run) -> the call.

The memory has "steps", how many the run has, and whatever a variant puts there.
"""


def plain(config: ToMeConfig, full: Grid, device: torch.device, seed: Tensor, step: int, memory: dict) -> ModelCall:
    """The core as it is."""
    return ModelCall(config, full, device, seed, step)


@dataclass(frozen=True)
class Variant:
    """One thing to measure.

    family: a line of the plots. make: see Make. per_row: each row of the batch has its own random choice, instead of
    one for the prompted and the unprompted row of a picture. timed: whether its time means anything (what only asks a
    question is written plainly, not fast). strict: in float32 whatever the others are in.
    """

    name: str
    family: str
    config: ToMeConfig
    make: Make = plain
    per_row: bool = False
    timed: bool = True
    strict: bool = False

    @property
    def is_merged(self) -> bool:
        return not self.config.is_off


# -- sample: other draws and orders ------------------------------------------------------------------------------


class Draw(ModelCall):
    """`sample` with another draw. Here: the core's walk; subclasses say `words` and `order`."""

    def __init__(self, config: ToMeConfig, full: Grid, device: torch.device, seed: Tensor, step: int, memory: dict):
        super().__init__(config, full, device, seed, step)
        self.memory = memory

    def words(self, grid: Grid, layer: int) -> tuple[Tensor, int]:
        """(seed of the permutations, which of a permutation's tokens to take)."""
        return self.seed, self.step + layer

    def order(self, grid: Grid) -> Tensor:
        return curve_order(grid, self.seed.device)

    def _sample(self, batch: int, grid: Grid, layer: int) -> Plan:
        tokens = grid[0] * grid[1]
        kept = kept_count(tokens, int(tokens * self.config.ratio))
        seed, turn = self.words(grid, layer)
        walk = walk_table(grid, kept, seed, self.order(grid))
        return SamplePlan(batch, grid, walk_rows(walk, tokens, turn, 0, 1))


class Independent(Draw):
    """A draw for each layer and step that knows nothing of the others."""

    def words(self, grid: Grid, layer: int) -> tuple[Tensor, int]:
        return key(self.seed, self.step, layer), 0


class OnceAStep(Draw):
    """An independent draw for each step, the same in all its layers."""

    def words(self, grid: Grid, layer: int) -> tuple[Tensor, int]:
        return key(self.seed, self.step), 0


class Once(Draw):
    """One draw for the whole run."""

    def words(self, grid: Grid, layer: int) -> tuple[Tensor, int]:
        return self.seed, 0


class WalkSteps(Draw):
    """The walk goes on from step to step; all layers of a step take the same token."""

    def words(self, grid: Grid, layer: int) -> tuple[Tensor, int]:
        return self.seed, self.step


class WalkLayers(Draw):
    """The walk goes on from layer to layer; each step has new permutations."""

    def words(self, grid: Grid, layer: int) -> tuple[Tensor, int]:
        return key(self.seed, self.step), layer


class WalkOn(Draw):
    """The walk never goes back: a step begins where the last one ended, instead of one further than it began."""

    def words(self, grid: Grid, layer: int) -> tuple[Tensor, int]:
        layers = self.memory.setdefault("layers", {})  # known from the first step on, where it counts for nothing
        layers[grid] = max(layers.get(grid, 0), layer + 1)
        return self.seed, self.step * layers[grid] + layer


class LayersFixed(Draw):
    """Each layer keeps its own token of a run in every step: layers complement each other, steps find what was."""

    def words(self, grid: Grid, layer: int) -> tuple[Tensor, int]:
        return self.seed, layer


class Held(Draw):
    """The walk goes on every fifth step only."""

    def words(self, grid: Grid, layer: int) -> tuple[Tensor, int]:
        return self.seed, self.step // 5 + layer


class Turning(Draw):
    """A walk that moves in a part of the steps alone."""

    share = 0.6

    @property
    def turning_point(self) -> int:
        """The first step of the second part."""
        return math.ceil(self.share * self.memory["steps"])


class FixedLate(Turning):
    """The walk moves in the first 60% of the steps and stands still after."""

    def words(self, grid: Grid, layer: int) -> tuple[Tensor, int]:
        return self.seed, min(self.step, self.turning_point) + layer


class MovingLate(Turning):
    """The walk stands still in the first 60% of the steps and moves after."""

    def words(self, grid: Grid, layer: int) -> tuple[Tensor, int]:
        return self.seed, max(0, self.step - self.turning_point) + layer


class Lattice(Draw):
    """The same token of every square cell, another one in each layer and step: `downsample` whose offset walks.

    For grids and ratios whose runs are squares (of 2x2 or 4x4 tokens).
    """

    def turn(self, layer: int) -> int:
        return self.step + layer

    def _sample(self, batch: int, grid: Grid, layer: int) -> Plan:
        tokens = grid[0] * grid[1]
        kept = kept_count(tokens, int(tokens * self.config.ratio))
        side = math.isqrt(tokens // kept)
        if side**2 * kept != tokens or grid[0] % side or grid[1] % side:
            raise ValueError(f"a lattice needs square cells, got {tokens // kept} tokens on a grid of {grid}")
        places = dither_order(side)
        row, column = places[self.turn(layer) % len(places)]
        runs = self.order(grid).reshape(kept, side**2)
        there = (runs // grid[1] % side == row) & (runs % grid[1] % side == column)  # (M, L), one of each run
        return SamplePlan(batch, grid, runs.gather(1, there.int().argmax(1, keepdim=True)).T[None])


class LatticeByLayers(Lattice):
    """The same in every step."""

    def turn(self, layer: int) -> int:
        return layer


def dither_order(side: int) -> list[tuple[int, int]]:
    """(row, column) of a square's places, side a power of two, each far from those before it.

    Bayer, "An optimum method for two-level rendition of continuous-tone pictures" (1973).
    """
    if side == 1:
        return [(0, 0)]
    half = dither_order(side // 2)
    return [(2 * row + y, 2 * column + x) for y, x in ((0, 0), (1, 1), (0, 1), (1, 0)) for row, column in half]


class Raster(Draw):
    """Runs along the rows of the picture instead of along the curve: 1x4 strips instead of 2x2 cells."""

    def order(self, grid: Grid) -> Tensor:
        return torch.arange(grid[0] * grid[1], device=self.seed.device)


class Cells2x4(Draw):
    """Runs of eight as cells, 2 high and 4 wide, all alike, where the curve has some standing and some lying."""

    def order(self, grid: Grid) -> Tensor:
        index = torch.arange(grid[0] * grid[1], device=self.seed.device)
        cells = index.reshape(grid[0] // 2, 2, grid[1] // 4, 4)
        return cells.permute(0, 2, 1, 3).reshape(-1)


# -- matching: other metrics, shared matches ---------------------------------------------------------------------


class FewChannels(ModelCall):
    """Similarity on the first 32 channels."""

    def plan(self, metric: Tensor, grid: Grid) -> Plan | None:
        return super().plan(metric[..., :32], grid)


def few_channels(config, full, device, seed, step, memory) -> ModelCall:
    return FewChannels(config, full, device, seed, step)


class SharedMatch(ModelCall):
    """A match that serves several steps, or all layers of a step."""

    def __init__(self, config, full, device, seed, step, memory: dict, steps: int, layers: bool):
        super().__init__(config, full, device, seed, step)
        self.memory, self.period, self.all_layers = memory, step // steps, layers

    def plan(self, metric: Tensor, grid: Grid) -> Plan | None:
        layer = self._layers.get(grid, 0)
        place = (grid, 0 if self.all_layers else layer)
        if self.memory.get(place, (None,))[0] != self.period:
            self.memory[place] = (self.period, super().plan(metric, grid))
        self._layers[grid] = layer + 1
        return self.memory[place][1]


def shared(steps: int = 1, layers: bool = False) -> Make:
    def make(config, full, device, seed, step, memory) -> ModelCall:
        return SharedMatch(config, full, device, seed, step, memory, steps, layers)

    return make


# -- the variants -------------------------------------------------------------------------------------------------


@dataclass
class Catalogue:
    """All variants by name, and the names of each set, in the order in which they were added."""

    variants: dict[str, Variant] = field(default_factory=dict)
    sets: dict[str, list[str]] = field(default_factory=dict)

    def add(self, sets: str, name: str, family: str, **options) -> None:
        """sets: names of sets, with spaces. Options: those of Variant, the others go to the config."""
        own = {k: options.pop(k) for k in ("make", "per_row", "timed", "strict") if k in options}
        config = ToMeConfig(**{**BASE, **options})
        if name in self.variants:
            raise ValueError(f"two variants are named {name!r}")
        self.variants[name] = Variant(name, family, config, **own)
        for one in sets.split():
            self.sets.setdefault(one, []).append(name)


BASE = {"levels": "0", "min_tokens": 0, "own_token": False}
"""What all variants set that do not say otherwise, whatever the core's defaults are."""
OWN = "own token kept"
UNMERGED = "unmerged"
BASELINE = "tomesd 0.5"
"""What gains are counted from."""
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


# Against the loss of fine texture, the most promising first; the rest is the set "texture_more".
TEXTURE = (
    UNMERGED,
    BASELINE,
    "sample 0.75",
    "sample 0.75, layers fixed",
    "sample 0.75 until 0.8",
    "sample 0.75, lattice by layers",
    "downsample 2x2",
    "sample 0.75 from 0.1 until 0.9",
    "sample 0.75 until 0.9",
    "sample 0.75, fixed late",
    "sample 0.75, held 5 steps",
    "sample 0.5",
    "sample 0.75, lattice",
    "sample 0.75, once",
    "sample 0.75, moving late",
    "sample 0.9375",
    "sample 0.9375 until 0.8",
    "sample 0.9375, layers fixed",
    "sample 0.9375 from 0.1 until 0.9",
    "sample 0.9375, lattice by layers",
    "sample 0.9375 to 0.5",
    "sample 0.5 to 0.9375",
    "downsample 4x4",
    "sample 0.75, one draw, own token kept",
    "sample 0.75, lattice by layers, own token kept",
)


def catalogue() -> Catalogue:
    c = Catalogue()
    tomesd = {"method": "merge", "proportional": False, "reduce": "mean"}
    c.add("frontier sampling main starts paper", UNMERGED, "unmerged", ratio=0.0)
    c.add("frontier sampling main starts paper", BASELINE, "tomesd", ratio=0.5, **tomesd)
    # How far rounding alone takes the pictures: no row can be told from the unmerged one beyond that.
    c.add("floor", "unmerged, float32", "unmerged", ratio=0.0, strict=True, timed=False)
    _frontier(c, tomesd)
    _own(c)
    _sampling(c)
    _starts(c, tomesd)
    _paper(c, tomesd)
    _joint(c)
    _texture(c)
    _apart(c)
    _guided(c)
    own = c.sets["own"][2:]
    c.sets["key"], c.sets["few"] = [*KEY, *own], [*KEY[:8], own[0], sample_name(0.9375, own=True)]
    return c


def _frontier(c: Catalogue, tomesd: dict) -> None:
    for ratio in (0.75, 0.9375, 0.875, 0.5, 0.984375):
        sets = "frontier sampling main" if ratio in (0.5, 0.75, 0.9375) else "frontier sampling"
        c.add(sets, f"sample {ratio:g}", "sample", ratio=ratio)
    c.add("frontier main", "downsample 2x2", "ToDo", method="downsample", ratio=0.75)
    c.add("frontier main", "downsample 4x4", "ToDo", method="downsample", ratio=0.9375, stride=(4, 4))
    for ratio in (0.75, 0.25, 0.6):
        c.add(
            "frontier main" if ratio == 0.75 else "frontier",
            f"tomesd {ratio:g}",
            "tomesd",
            ratio=ratio,
            **tomesd,
        )
    for ratio in (0.5, 0.75, 0.25, 0.6):
        sets = "frontier main" if ratio == 0.5 else "frontier"
        c.add(sets, f"merge {ratio:g}", "merge, proportional", method="merge", ratio=ratio)
    for start in (0.2, 0.4, 0.6):
        for ratio in (0.75, 0.9375):
            sets = "frontier main" if start == 0.2 else "frontier"
            c.add(sets, f"sample {ratio:g} from {start:g}", f"sample from {start:g}", ratio=ratio, start=start)
    for ratio in (0.5, 0.75):
        pick = {"method": "merge_keys", "ratio": ratio}
        sets = "frontier main" if ratio == 0.75 else "frontier"
        c.add(sets, f"merge_keys pick {ratio:g}", "merge_keys, pick", reduce="pick", **pick)
        c.add("frontier", f"merge_keys mean {ratio:g}", "merge_keys, mean", **pick)
    for ratio in (0.5, 0.25, 0.75):
        c.add("frontier", f"merge_queries {ratio:g}", "merge_queries", method="merge_queries", ratio=ratio)
    c.add("frontier paper", "prune 0.5", "prune", method="prune", ratio=0.5)


def sample_name(ratio: float, start: float = 0.0, own: bool = False) -> str:
    """The variant of `sample` with these options."""
    return f"sample {ratio:g}" + (f" from {start:g}" if start else "") + (f", {OWN}" if own else "")


def _own(c: Catalogue) -> None:
    """Each query has its own token among the drawn ones."""
    c.sets["own"] = [UNMERGED, BASELINE]
    for ratio, start in OWN_KEY:
        family = f"sample, {OWN}" + (f" from {start:g}" if start else "")
        c.add("own", sample_name(ratio, start, own=True), family, ratio=ratio, start=start, own_token=True)


def _sampling(c: Catalogue) -> None:
    for ratio in (0.75, 0.9375):
        for make, word in (
            (Independent, "independent"),
            (WalkOn, "walk on"),
            (OnceAStep, "once a step"),
            (Once, "once"),
            (WalkSteps, "walk by steps"),
            (WalkLayers, "walk by layers"),
        ):
            sets = "sampling main" if make in (Independent, WalkLayers) else "sampling"
            c.add(sets, f"sample {ratio:g}, {word}", f"sample, {word}", ratio=ratio, make=make, timed=False)
        c.sets["sampling"] += [f"sample {ratio:g}, one draw, {OWN}", sample_name(ratio, own=True)]
    for ratio in (0.6, 0.7, 0.8):
        c.add("sampling", f"sample {ratio:g}", "sample", ratio=ratio)
        c.add("sampling", f"sample {ratio:g}, unweighted", "sample, unweighted", ratio=ratio, proportional=False)
    c.add("sampling", "sample 0.75, raster", "sample, raster", ratio=0.75, make=Raster, timed=False)
    c.add("sampling", "sample 0.875, cells 2x4", "sample, cells 2x4", ratio=0.875, make=Cells2x4, timed=False)
    for first, last in ((0.5, 0.9375), (0.9375, 0.5)):
        c.add(
            "sampling",
            f"sample {first:g} to {last:g}",
            "sample, sliding",
            ratio=first,
            ratio_end=last,
            timed=False,
        )


def _starts(c: Catalogue, tomesd: dict) -> None:
    """How few of the first steps have to be left alone, and whether what helps sample helps the others."""
    for start in (0.1, 0.05, 0.2):
        for ratio in (0.9375, 0.75, 0.984375):
            name = f"sample {ratio:g} from {start:g}"
            if name in c.variants:
                c.sets["starts"].append(name)
            else:
                c.add("starts", name, f"sample from {start:g}", ratio=ratio, start=start)
    late = {"start": 0.2}
    c.add("starts", "tomesd 0.5 from 0.2", "tomesd from 0.2", ratio=0.5, **tomesd, **late)
    c.add("starts", "downsample 2x2 from 0.2", "ToDo from 0.2", method="downsample", ratio=0.75, **late)
    four = {"method": "downsample", "ratio": 0.9375, "stride": (4, 4)}
    c.add("starts", "downsample 4x4 from 0.2", "ToDo from 0.2", **four, **late)
    c.add("starts", "merge 0.5 from 0.2", "merge, proportional from 0.2", method="merge", ratio=0.5, **late)
    for make, word in ((Independent, "independent"), (WalkLayers, "walk by layers")):
        options = {"ratio": 0.9375, "make": make, "timed": False, **late}
        c.add("starts", f"sample 0.9375 from 0.2, {word}", f"sample from 0.2, {word}", **options)


def _joint(c: Catalogue) -> None:
    """What only matters where text is in the same softmax: what weighing the kept tokens is worth."""
    c.sets["joint"] = [UNMERGED, BASELINE]
    for ratio in (0.75, 0.9375):
        c.sets["joint"].append(f"sample {ratio:g}")
        c.add("joint", f"sample {ratio:g}, unweighted", "sample, unweighted", ratio=ratio, proportional=False)
    for stride, ratio in ((2, 0.75), (4, 0.9375)):
        c.sets["joint"].append(f"downsample {stride}x{stride}")
        options = {"method": "downsample", "ratio": ratio, "stride": (stride, stride), "proportional": False}
        c.add("joint", f"downsample {stride}x{stride}, unweighted", "ToDo, unweighted", **options)


def _texture(c: Catalogue) -> None:
    """What could keep the finest texture: last steps left alone, draws that stay, the same token in every cell."""
    for ratio in (0.75, 0.9375):
        for start, end in ((0.0, 0.8), (0.0, 0.9), (0.1, 0.9)):
            when = f"from {start:g} until {end:g}" if start else f"until {end:g}"
            c.add("texture", f"sample {ratio:g} {when}", f"sample {when}", ratio=ratio, start=start, end=end)
        for make, word in (
            (LayersFixed, "layers fixed"),
            (LatticeByLayers, "lattice by layers"),
            (Lattice, "lattice"),
            (Held, "held 5 steps"),
            (FixedLate, "fixed late"),
            (MovingLate, "moving late"),
        ):
            c.add("texture", f"sample {ratio:g}, {word}", f"sample, {word}", ratio=ratio, make=make, timed=False)
    own = {"make": LatticeByLayers, "own_token": True, "timed": False}
    c.add("texture", f"sample 0.75, lattice by layers, {OWN}", f"sample, lattice by layers, {OWN}", ratio=0.75, **own)
    c.sets["texture_more"] = [name for name in c.sets["texture"] if name not in TEXTURE]
    c.sets["texture"] = list(TEXTURE)


def _apart(c: Catalogue) -> None:
    """Not the same draw for all queries of a layer."""
    c.sets["apart"] = [UNMERGED, BASELINE]
    for ratio in (0.75, 0.9375):
        c.sets["apart"] += [sample_name(ratio), sample_name(ratio, own=True)]
        for word, queries, heads, own in (
            ("heads apart", "same", True, False),
            ("queries apart", "apart", False, False),
            (f"one draw, {OWN}", "same", False, True),  # without, heads draw apart: that is the core's own way
            (f"queries and heads apart, {OWN}", "apart", True, True),
            (f"queries apart, {OWN}", "apart", False, True),
            ("queries and heads apart", "apart", True, False),
            ("each group its own", "own", False, False),
        ):
            options = {"ratio": ratio, "own_token": own, "make": apart(queries, heads, own), "timed": False}
            c.add("apart", f"sample {ratio:g}, {word}", f"sample, {word}", **options)


def _guided(c: Catalogue) -> None:
    """Whether anything that looks at the tokens is worth its time on top of sampling."""
    c.sets["guided"] = [UNMERGED, BASELINE, "sample 0.5", "sample 0.75", "sample 0.875", "sample 0.9375"]
    for ratio, share in ((0.5, 0.5), (0.75, 0.5), (0.75, 0.25)):
        name, options = f"sample {ratio:g}, queries merged {share:g}", {"make": merged_on_top(share)}
        c.add("guided", name, "sample, queries merged", ratio=ratio, **options)
    for ratio in (0.75, 0.9375):
        c.add("guided", f"sample {ratio:g}, guided cells", "sample, guided cells", ratio=ratio, make=guided_cells)
    c.sets["guided"] += ["merge_keys pick 0.5", "merge_keys pick 0.75", "merge_keys mean 0.75"]


def _paper(c: Catalogue, tomesd: dict) -> None:
    half = {"ratio": 0.5, **tomesd}

    def row(name: str, **options) -> None:
        c.add("paper", name, "the papers' tables", timed=False, **{**half, **options})

    row("partition alternate", partition="alternate")
    row("partition fixed 2x2", partition="fixed_2d")
    row("partition random", partition="random")
    row("partition random 2x2, each row its own", per_row=True)
    row("partition fixed 2x4", partition="fixed_2d", stride=(4, 2))
    row("partition fixed 4x4", partition="fixed_2d", stride=(4, 4))
    row("partition random 2x4", stride=(4, 2))
    row("partition random 4x4", stride=(4, 4))
    row("self and cross", cross_attention=True)
    row("self and MLP", mlp=True)
    row("self, cross and MLP", cross_attention=True, mlp=True)
    row("levels 0,1", levels="0,1")
    row("levels 0,1,2", levels="0,1,2")
    row("ratio falling 0.75 to 0.25", ratio=0.75, ratio_end=0.25)
    row("ratio rising 0.25 to 0.75", ratio=0.25, ratio_end=0.75)
    row("last 60% of the steps", start=0.4)
    row("first 60% of the steps", end=0.6)
    for name, ratio in (("prune 0.25", 0.25), ("prune 0.75", 0.75)):
        row(name, method="prune", ratio=ratio)
    for ratio in (0.1, 0.4, 0.7):
        row(f"tomesd {ratio:g}", ratio=ratio)
    row("levels 0,1, sample 0.75", method="sample", ratio=0.75, levels="0,1", proportional=True)
    row("levels 0,1,2, sample 0.75", method="sample", ratio=0.75, levels="0,1,2", proportional=True)
    row("merge pick 0.5", proportional=True, reduce="pick")
    row("match shared by prompt and no prompt", share_match=True)
    row("match shared by layers", make=shared(layers=True))
    row("match shared by 2 steps", make=shared(steps=2))
    row("match shared by 5 steps", make=shared(steps=5))
    row("metric of 32 channels", make=few_channels)


CATALOGUE = catalogue()
