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
        self.call, self._about = call, about
        self._log = DecisionLog() if log is None else log
        self._decided: dict[tuple, Decision | Given | None] = {}  # by what the times depend on
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
        key = grid, x.shape[2], heads, x.dtype, kernels
        if key not in self._decided:
            if is_compiling():
                return self._log.layer(self.call.config, *key[:3])
            self._decide(key, x.device, attention, block, about)
        return self._decided[key]

    def _decide(
        self,
        key: tuple,
        device: torch.device,
        attention: Attention | None,
        block: BlockMaker | None = None,
        about: Callable[[], str] | None = None,
    ) -> None:
        *layer, dtype, kernels = key
        config = self.call.config
        found = self._log.layer(config, *layer)
        if found is None and layer[2] and measures(config, layer[0], device):
            about = self._about if about is None else about()
            found = decision_on(*layer, dtype, device, config, attention, kernels, block, about)
        self._decided[key] = found
        self._judge.meet(found)
        self._log.made_layer(config, *layer, found, self.why_not_paid(found) is None)

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
        for layer in _served_layers(self.call.config, self.call.full, layers):
            self._decide((*layer, dtype, kernels), self.call.seed.device, attention)

    def known(
        self, grid: Grid, channels: int, heads: int | None, dtype: torch.dtype, kernels: tuple[str, ...] = ()
    ) -> Decision | Given | None:
        """What `decision` or `look_ahead` found of such layers in this call."""
        return self._decided.get((grid, channels, heads, dtype, kernels))

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
    for layer in _served_layers(config, full, layers):
        known = log.layer(config, *layer)
        if known is None and measures(config, layer[0], device):
            known = known_on(*layer, dtype, device, config, attention, kernels, about)
        if judge.why_not_paid(known) is None:
            return None
        found[layer] = known
    for layer, known in found.items():
        log.made_layer(config, *layer, known, False)
    return {grid: known.reason for (grid, *_), known in found.items()}


def _served_layers(
    config: ToMeConfig, full: Grid, layers: Iterable[tuple[int, int, int]]
) -> Iterator[tuple[Grid, int, int]]:
    """(level, channels, heads) of layers -> (grid, channels, heads) of those that are served."""
    for level, channels, heads in layers:
        grid = grid_at(full, level)
        if config.ratio > 0.0 and serves_layer(config, grid, full):
            yield grid, channels, heads
