"""What was decided of the steps and layers of a run, for the text that makes another run of the same decisions."""

from __future__ import annotations

from collections.abc import Iterable

from ..config import ToMeConfig
from ..core.grid import Grid
from ..decided import ALL, Decided, layer_name, ratio_name, step_name
from ..methods import AUTO
from .paying import Decision, Given


class DecisionLog:
    """Of one run. May be filled from several threads: each entry is one assignment.

    Where `decisions` names a step or a layer, `step` and `layer` answer with what is given, and nothing is measured.
    """

    def __init__(self) -> None:
        self.method: str | None = None  # what auto was taken for
        self._made: dict[tuple[str, float], bool] = {}
        self._grids: dict[str, None] = {}  # of the layers that were met
        self._unnamed: dict[str, None] = {}
        self._changed: dict[str, None] = {}
        self._set: Decided | None = None
        self.follows = False  # whether anything was done because it is set

    def __deepcopy__(self, memo: dict) -> DecisionLog:
        return self  # copies of a model's options, for another GPU, tell the same run

    def resolve(self, asked: ToMeConfig, resolved: ToMeConfig) -> None:
        """What auto was taken for."""
        if asked.method == AUTO:
            self.method = resolved.method

    def given(self, config: ToMeConfig, name: str) -> Given | None:
        """What `decisions` says of a step or layer at this ratio; None: nothing."""
        merged = config.decided.of(name, config.ratio)
        return None if merged is None else Given(merged)

    def step(self, config: ToMeConfig, full: Grid) -> Given | None:
        """What is given of the whole steps of a latent on this grid."""
        return self.given(config, step_name(full)) if config.decisions else None

    def layer(self, config: ToMeConfig, grid: Grid, channels: int, heads: int | None, others: int = 0) -> Given | None:
        """What is given of layers on a grid. others: see decided.layer_name."""
        return self.given(config, layer_name(grid, channels, heads, others)) if config.decisions else None

    def made_step(self, config: ToMeConfig, full: Grid, found: Decision | Given | None, merged: bool) -> None:
        """Whole steps were decided: found by a decision, or None where nothing was measured."""
        self._note(config, step_name(full), found, merged)

    def made_layer(
        self,
        config: ToMeConfig,
        grid: Grid,
        channels: int,
        heads: int | None,
        found: Decision | Given | None,
        merged: bool,
        others: int = 0,
    ) -> None:
        """Layers on a grid were decided."""
        if self._note(config, layer_name(grid, channels, heads, others), found, merged):
            self._grids[step_name(grid)] = None

    def all_merged(self, config: ToMeConfig) -> None:
        """Of a compiled model, whose layers tell nothing of themselves: nothing is measured there, so that what is not
        set is merged."""
        for name, ratio in (*config.decided.merged, (ALL, None)):
            if ratio in (None, ratio_name(config.ratio)):
                found = self.given(config, name)
                self._note(config, name, found, found is None or found.merged)

    def _note(self, config: ToMeConfig, name: str, found: Decision | Given | None, merged: bool) -> bool:
        if config.levels != "auto":  # named levels are merged whatever they cost
            return False
        key = name, ratio_name(config.ratio)
        if self._made.get(key, merged) != merged:
            self._changed[name] = None
        self._made[key] = merged
        if isinstance(found, Given):
            self.follows = True
        elif config.decided.merged and name != ALL:
            self._unnamed[name] = None
        self._set = config.decided if config.decisions else None
        return True

    def add(self, other: DecisionLog) -> None:
        """Take over what another run decided; where both did, the other is newer."""
        self.method, self.follows = other.method or self.method, other.follows
        self._made.update(other._made)

    @property
    def text(self) -> str:
        """The decisions, as the option takes them; "" where there was none."""
        ratios: dict[str, set[float]] = {}
        for name, ratio in list(self._made):
            ratios.setdefault(name, set()).add(ratio)
        merged = {
            (name, ratio if len(ratios[name]) > 1 else None): did for (name, ratio), did in list(self._made.items())
        }
        return Decided(self.method, merged).text

    @property
    def leaves_alone(self) -> bool:
        """Whether anything was decided not to be merged."""
        return not all(list(self._made.values()))

    @property
    def as_text(self) -> str:
        """The text as the end of a line, or ""."""
        return "" if not self.text else f"Decisions{' (as set)' if self.follows else ''}: {self.text}"

    def notes(self) -> list[str]:
        """What to say of a text that was set and does not fit, and of what was decided anew in the midst of the run."""
        found = []
        if self._unnamed:
            found.append(f"decisions does not name {_listed(self._unnamed)}, so this was decided here")
        if self._set is not None:
            met = {name for name, _ in self._made}
            absent = [name for name in self._set.names - met if "/" in name and name.split("/")[0] in self._grids]
            if absent:
                found.append(f"decisions names {_listed(sorted(absent))}, which this model does not have at this size")
        if self._changed:
            found.append(
                f"{_listed(self._changed)} changed from merged to left alone, or back, in the midst of the run (a "
                "first measurement failed, or a refiner differs): a run by its decisions gives another picture"
            )
        return found


def together(logs: Iterable[DecisionLog]) -> DecisionLog:
    """Of runs that make one picture."""
    found = DecisionLog()
    for log in logs:
        found.add(log)
    return found


_MOST = 4


def _listed(names: Iterable[str]) -> str:
    names = list(names)
    return ", ".join(names[:_MOST]) + (f" and {len(names) - _MOST} more" if len(names) > _MOST else "")
