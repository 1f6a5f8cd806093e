"""Which layers of one call of a model are merged: those where merging pays, by what was measured of their times."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

import torch
from torch import Tensor

from ..config import ToMeConfig
from ..core.curve import is_compiling
from ..core.grid import Grid, grid_at
from ..core.schedule import serves_layer
from ..merging.call import ModelCall
from .decision_log import DecisionLog
from .layer import Attention, BlockMaker, decision_on, known_on, measures
from .paying import Decision, Given, Judge


class Decisions:
    """Of one call, owned by its adapter.

    call: its options and grid. about: what else of the model its layers' times depend on, in words (layer.Case). log:
    what is told of them, of the run; None: nobody asks. judge: None: nothing is known of the call's whole step.
    """

    def __init__(self, call: ModelCall, about: str = "", log: DecisionLog | None = None, judge: Judge | None = None):
        self.call, self.about = call, about
        self._log = DecisionLog() if log is None else log
        self._decided: dict[tuple, Decision | Given | None] = {}  # by _kind
        self._judge = Judge() if judge is None else judge

    def decision(
        self,
        x: Tensor,
        grid: Grid,
        heads: int | None,
        attention: Attention | None = None,
        kernels: tuple[str, ...] = (),
        block: BlockMaker | None = None,
        about: Callable[[], str] | None = None,
    ) -> Decision | Given | None:
        """What a layer on this grid takes whole and merged, measured at its first use (layer.py); None: not measured.
        Where the option `decisions` names such layers: what it says.

        x: its tokens [B, N, C]; heads: None where the host does not tell; attention: the host's; kernels, block: see
        layer.decision_on; about: tells what else this layer's times depend on. Inside a compiled graph only what
        `look_ahead` measured.
        """
        key = _kind(grid, x.shape[2], heads, x.dtype, kernels)
        if key not in self._decided and is_compiling():
            return self._log.layer(self.call.config, grid, x.shape[2], heads)
        if key not in self._decided:
            known = self._log.layer(self.call.config, grid, x.shape[2], heads)
            if known is None and heads and measures(self.call.config, grid, x.device):
                given = (grid, x.shape[2], heads, x.dtype, x.device, self.call.config, attention, kernels)
                known = decision_on(*given, block, self.about if about is None else about())
            self._keep(key, known)
        return self._decided[key]

    def _keep(self, key: tuple, found: Decision | Given | None) -> None:
        self._decided[key] = found
        self._judge.meet(found)
        grid, channels, heads, *_ = key
        merged = self.why_not_paid(found) is None
        self._log.made_layer(self.call.config, grid, channels, heads, found, merged)

    def why_not_paid(self, found: Decision | Given | None) -> str | None:
        """Why a layer of this decision is left alone although the options would have it merged, or None."""
        return self._judge.why_not_paid(found)

    def look_ahead(
        self,
        layers: Iterable[tuple[int, int, int]],
        dtype: torch.dtype,
        attention: Attention | None = None,
        kernels: tuple[str, ...] = (),
    ) -> None:
        """Measure before a compiled graph runs, in which nothing can be. layers: (level, channels, heads)."""
        self._judge = Judge(waits=False)
        config, device = self.call.config, self.call.seed.device
        for grid, channels, heads in _served_layers(config, self.call.full, layers):
            known = self._log.layer(config, grid, channels, heads)
            if known is None and measures(config, grid, device):
                given = (grid, channels, heads, dtype, device, config, attention, kernels)
                known = decision_on(*given, None, self.about)
            self._keep(_kind(grid, channels, heads, dtype, kernels), known)

    def known(
        self, grid: Grid, channels: int, heads: int | None, dtype: torch.dtype, kernels: tuple[str, ...] = ()
    ) -> Decision | Given | None:
        """What `decision` or `look_ahead` found of such layers in this call."""
        return self._decided.get(_kind(grid, channels, heads, dtype, kernels))

    @property
    def unpaid(self) -> tuple[tuple, ...]:
        """The kinds of layers that `look_ahead` found not to pay: a compiled graph depends on them."""
        return tuple(key for key, found in self._decided.items() if self.why_not_paid(found) is not None)


def why_layers_left_alone(
    config: ToMeConfig,
    full: Grid,
    device: torch.device,
    layers: Iterable[tuple[int, int, int]],
    dtype: torch.dtype,
    attention: Attention | None = None,
    kernels: tuple[str, ...] = (),
    about: str = "",
    log: DecisionLog | None = None,
    judge: Judge | None = None,
) -> dict[Grid, str] | None:
    """Why each grid's layers were found not to pay, where it is known before a call that none of these layers will be
    merged: the host need not be patched for it, and no ModelCall made, which asks the GPU for a few things. Else None.

    layers: (level, channels, heads). The rest as for Decisions and its decision.
    """
    log, judge = DecisionLog() if log is None else log, Judge() if judge is None else judge
    found: dict[tuple, Decision | Given] = {}
    for grid, channels, heads in _served_layers(config, full, layers):
        known = log.layer(config, grid, channels, heads)
        if known is None and measures(config, grid, device):
            known = known_on(grid, channels, heads, dtype, device, config, attention, kernels, about)
        if judge.why_not_paid(known) is None:
            return None
        found[grid, channels, heads] = known
    for layer, known in found.items():
        log.made_layer(config, *layer, known, False)
    return {grid: known.reason for (grid, *_), known in found.items()}


def _kind(grid: Grid, channels: int, heads: int | None, dtype: torch.dtype, kernels: tuple[str, ...]) -> tuple:
    """What tells layers of one call apart whose times differ."""
    return grid, channels, heads, dtype, kernels


def _served_layers(
    config: ToMeConfig, full: Grid, layers: Iterable[tuple[int, int, int]]
) -> Iterator[tuple[Grid, int, int]]:
    """(level, channels, heads) of layers -> (grid, channels, heads) of those that are served."""
    for level, channels, heads in layers:
        grid = grid_at(full, level)
        if config.ratio > 0.0 and serves_layer(config, grid, full):
            yield grid, channels, heads
