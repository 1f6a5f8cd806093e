"""What a whole generation of each choice takes, as a share of the unmerged one's: frontier.csv's calls times steps.

A step that is merged takes m of one that is not, and its attention, without projections, a of it. So a generation whose
calls are shares w (whole), d (merged), b (exact and drawn) and h (attentions held) of the unmerged one's takes

    w + m d + (m + a) b + (1 - a) h

since what is drawn beside exact attention costs m - (1 - a). m and a of a model and size are measured: m by whole
generations (lab/results/speed/generations.csv, from lab.speed.generations), or where these are not there by steps
(steps.csv, dit-multires.csv); a is what "limit" saves (steps.csv, dit.csv), in U-Nets with the projections, which are
saved there too. A choice that was run as a whole generation, with as many steps skipped as its row says, has the time
that was measured. Where the unmerged generation's own time spreads by more than STEADY, steps are taken instead: what
is waited for there is the machine's processor. Decoding the latent, where it was measured, is added to both sides.
Pooled tails, which run nowhere here, have m = 1 - a (1 - work): at best.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from shared_tome.config import ToMeConfig
from shared_tome.methods import PRESETS

from ..fidelity.methods import UNMERGED
from ..store import Row, read
from .fidelity_tables import FOLDER
from .speed_tables import FOLDER as SPEED
from .speed_tables import MODELS

STEADY = 1.05
"""p80 over p20."""


@dataclass(frozen=True)
class Place:
    """Where a generation runs: a model and size of lab/results/speed, and the attention kernel."""

    model: str
    size: str
    attention: str = "cudnn"
    folder: Path = SPEED

    @property
    def title(self) -> str:
        return f"{MODELS[self.model]} {self.size.replace('1280x720, 81 frames', '720p')}"

    @property
    def is_unet(self) -> bool:
        return self.model.startswith("sd")

    def _rows(self, name: str) -> dict[str, Row]:
        """Of a CSV, by variant or choice, the rows of this place."""
        wanted = {"model": self.model, "backend": self.attention}
        wanted |= {"pixels": self.size.rstrip("²"), "mode": "graph"} if name == "steps" else {"size": self.size}
        rows = (row for row in read(self.folder / f"{name}.csv") if row["speedup"])
        return {row.get("variant") or row["choice"]: row for row in rows if wanted.items() <= row.items()}

    @cached_property
    def generations(self) -> dict[str, Row]:
        rows = self._rows("generations")
        base = rows.get(UNMERGED, {})
        return rows if not base.get("p20") or float(base["p80"]) <= STEADY * float(base["p20"]) else {}

    @cached_property
    def attention_share(self) -> float | None:
        """a, or None where it was not measured."""
        if self.is_unet:
            limit = self._rows("steps").get("limit")
            return None if limit is None else 1 - 1 / float(limit["speedup"])
        shares = (row["attention_share"] for row in self._rows("dit").values())
        return next(map(float, filter(None, shares)), None)

    @cached_property
    def _steps(self) -> dict[tuple[str, float], float]:
        """m by method and ratio, from steps."""
        if self.is_unet:
            found = self._rows("steps")
            names = {f"sample {ratio:g}, own token": ("sample", ratio) for ratio in (0.75, 0.9375)}
        else:
            found = self._rows("dit-multires")
            names = {f"multires {ratio:g}": ("multires", ratio) for ratio in (0.67, 0.77, 0.84)}
        return {key: 1 / float(found[name]["speedup"]) for name, key in names.items() if name in found}

    @cached_property
    def _measured(self) -> dict[tuple[str, float], float]:
        """m by method and ratio, from whole generations of the presets."""
        found = {}
        for name in sorted(PRESETS, key=lambda name: -PRESETS[name].options["start"]):
            row, config = self.generations.get(name), ToMeConfig(**PRESETS[name].options)
            if row is not None:
                steps = int(row["steps"])
                whole = math.ceil(config.start * steps) / steps
                config = config.resolved(multires=not self.is_unet)
                found[config.method, config.ratio] = (1 / float(row["speedup"]) - whole) / (1 - whole)
        return found

    def merged(self, method: str, ratio: float) -> float | None:
        """m; between two ratios that were measured on the line between them. None where nothing was measured."""
        share = self.attention_share
        if method.endswith(" tail"):
            return None if share is None else 1 - share * ratio
        if (method, ratio) in self._measured:
            return self._measured[method, ratio]
        m = between(sorted((at, m) for (name, at), m in self._steps.items() if name == method), ratio)
        return None if m is None else min(1.0, m)

    @cached_property
    def decoding(self) -> float:
        """In units of the unmerged sampling; 0 where it was not measured."""
        row = self.generations.get(UNMERGED)
        return float(row["decode_s"]) / float(row["seconds"]) if row and row["decode_s"] else 0.0

    def time(self, row: Row) -> float | None:
        """Of a row of frontier-*.csv, in units of the unmerged generation; None where it cannot be told."""
        sampling = self.sampling(row)
        return None if sampling is None else (sampling + self.decoding) / (1 + self.decoding)

    def sampling(self, row: Row) -> float | None:
        """The same without decoding."""
        whole, merged, both, held = calls_of(row)
        done = self.generations.get(row["variant"])
        if done is not None and done["steps"] == done["of_steps"]:
            ran = 1 - len(done["skipped"].split()) / int(done["steps"])
            if abs(ran - sum((whole, merged, both, held))) < 0.5 / int(done["steps"]) + 1e-6:
                return 1 / float(done["speedup"])
        m = self.merged(row["method"], float(row["ratio"])) if merged or both else 1.0
        a = self.attention_share if both or held else 0.0
        if m is None or a is None:
            return None
        return whole + m * merged + (m + a) * both + (1 - a) * held

    @property
    def source(self) -> str:
        """What the times are made of."""
        rows = self.generations or self._rows("steps" if self.is_unet else "dit-multires")
        one = next(iter(rows.values()), None)
        if one is None:
            return ""
        what = "whole generations" if self.generations else "steps"
        if self.generations and one["steps"] != one["of_steps"]:
            what += f" of {one['steps']} steps"
        if self.decoding:
            what += " with decoding"
        return f"{what}, {self.attention}, {one['machine']}, {one['date']}"


# The lab's models, and where what they say is shown.
PLACES = {
    "demo": [Place("sd15", "512²"), Place("sd15", "1024²"), Place("sd15", "2048²"), Place("sdxl", "1024²")],
    "dit": [Place("flux", "1024²"), Place("flux", "2048²"), Place("wan", "1280x720, 81 frames")],
}
PLACES |= {"lab": [*PLACES["demo"], Place("sdxl", "2048²")], "dit-fine": PLACES["dit"]}


def frontier_rows(model: str, folder: Path = FOLDER) -> list[Row]:
    """The rows of frontier-MODEL.csv; none where it was not measured."""
    return read(folder / f"frontier-{model}.csv")


def calls_of(row: Row) -> list[float]:
    """w, d, b and h of a row."""
    return [float(row[f"calls_{kind}"]) for kind in ("whole", "merged", "both", "held")]


def between(points: Sequence[tuple[float, float]], at: float) -> float | None:
    """On the line through points (x, y), x rising; None beyond them."""
    if not points or not points[0][0] <= at <= points[-1][0]:
        return None
    return float(np.interp(at, *zip(*points, strict=True)))


def best(points: dict[str, tuple[float, float]]) -> list[str]:
    """The names for which nothing is both faster and nearer, the fastest first. points: (time, PSNR)."""
    found, highest = [], -math.inf
    for name, (_, psnr) in sorted(points.items(), key=lambda item: (item[1][0], -item[1][1])):
        if psnr > highest:
            found.append(name)
            highest = psnr
    return found
