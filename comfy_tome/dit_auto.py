"""Which attentions of a diffusion transformer's call are merged: by what was measured of them, or by what is set."""

from __future__ import annotations

from collections.abc import Callable

from ..shared_tome import ToMeConfig
from ..shared_tome.autotune.decision_log import DecisionLog
from ..shared_tome.autotune.layer import may_measure, measures
from ..shared_tome.autotune.paying import Decision, Given, Judge
from ..shared_tome.core.curve import is_compiling
from ..shared_tome.core.grid import Grid
from .dit_attention import AttentionCall, fits_weights
from .dit_layout import Layout

# Text and reference tokens of two calls that differ by less count as equally many where a layer is judged.
_OTHERS = 256


class DiTDecisions:
    """Of one call of the model, with levels "auto". log: what is told of them, of the sampling. judge: by what is known
    of the call's whole step."""

    def __init__(self, config: ToMeConfig, layout: Layout, log: DecisionLog, judge: Judge):
        self._config, self._layout, self._log, self._judge = config, layout, log, judge
        self._known: dict[tuple, Decision | Given | None] = {}  # by the layer's shape

    def decision(self, call: AttentionCall, measure: Callable[[tuple], Decision | None]) -> Decision | Given | None:
        """What is set of a layer, or what measure(shape) found at its first use; None where nothing is."""
        shape = self._shape(call)
        if is_compiling():
            return self._given(shape)
        if shape not in self._known:
            found = self._given(shape)
            # Another attention may be slower however large the layer is.
            by_another = not fits_weights(call) and may_measure(call.k.device)
            if found is None and (by_another or measures(self._config, self._layout.grid, call.k.device)):
                found = measure(shape)
            self._known[shape] = found
            self._judge.meet(found)
            if found is not None or fits_weights(call):  # else it depends on whether its keys need weights
                *layer, others = _parts(shape)
                self._log.made_layer(self._config, *layer, found, self.why_not_paid(found) is None, others)
        return self._known[shape]

    def why_not_paid(self, found: Decision | Given | None) -> str | None:
        """Why a layer of this decision is left alone, or None."""
        return self._judge.why_not_paid(found)

    def known(self, call: AttentionCall) -> Decision | Given | None:
        """What `decision` found of such a layer."""
        shape = self._shape(call)
        return self._given(shape) or self._known.get(shape)

    def _given(self, shape: tuple) -> Given | None:
        return self._log.layer(self._config, *_parts(shape))

    def _shape(self, call: AttentionCall) -> tuple:
        """All of a layer that its times depend on, beside the options."""
        others = -(-(call.length - self._layout.tokens) // _OTHERS)
        of_keys = call.k.shape[1 if call.split else 2], call.d, call.k.dtype, call.split
        return (self._layout.grid, others, call.heads, *of_keys)


def _parts(shape: tuple) -> tuple[Grid, int, int, int]:
    """(grid, channels, heads, tokens beside the image) of a layer's shape."""
    grid, others, heads, _, d, *_ = shape
    return grid, heads * d, heads, others * _OTHERS
