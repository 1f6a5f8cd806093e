"""What became of ToMe in one sampling; one line at its end where nothing was merged.

The node puts `say_outcome` around the sampler (OUTER_SAMPLE). It makes the sampling's Outcome and hands it to the
calls of the model in the sampler's own copy of transformer_options, so it ends with the sampling.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from ..shared_tome.curve import is_compiling
from .log import logger, say_once

OUTER_SAMPLE = "outer_sample"  # comfy.patcher_extension.WrappersMP.OUTER_SAMPLE
NEVER_ASKED = "another node runs the model in a way that does not call ToMe"
_OUTCOME = "ToMe outcome"
_NOTHING = "nothing was merged in this sampling"
_MOST_PLACES = 6


class Outcome:
    """What the calls of one sampling tell of themselves. Safe to fill from several threads."""

    def __init__(self) -> None:
        self.asked = False
        self._merged = False
        self._reasons: dict[str, dict[str, None]] = {}  # each with its places, in the order in which they came up

    def __deepcopy__(self, memo: dict) -> Outcome:
        return self  # copies of a model's options, for another GPU, tell the same sampling

    def merged(self) -> None:
        """A layer is merged. Not for what torch.compile traces: that is told before the call."""
        if not is_compiling():
            self._merged = True

    def left_alone(self, reason: str, where: str = "") -> None:
        """A call or a layer is left alone. where: the layer, its grid, or the model."""
        if not is_compiling():
            self._reasons.setdefault(reason, {}).setdefault(where)

    def line(self) -> str | None:
        """Why nothing was merged, or None where something was."""
        if self._merged:
            return None
        if not self.asked:
            return NEVER_ASKED
        return "; ".join(reason + _named(list(filter(None, places))) for reason, places in self._reasons.items())


def _named(places: list[str]) -> str:
    if not places:
        return ""
    more = len(places) - _MOST_PLACES
    return f" ({', '.join(places[:_MOST_PLACES])}{f' and {more} more' if more > 0 else ''})"


@contextmanager
def outcome_of(options: dict[str, Any]) -> Iterator[Outcome]:
    """The outcome of the sampling that a call of the model belongs to, from its transformer_options.

    A call outside a sampler has an outcome of its own, said when the call ends, once a process.
    """
    known = options.get(_OUTCOME)
    outcome = Outcome() if known is None else known
    outcome.asked = True
    yield outcome
    if known is None and (line := outcome.line()):
        say_once(line, "nothing was merged in this call of the model")


def say_outcome(executor: Any, *args: Any, **kwargs: Any) -> Any:
    """The wrapper around CFGGuider.outer_sample(noise, latent_image, sampler, sigmas, ...)."""
    options = executor.class_obj.model_options.setdefault("transformer_options", {})
    outcome = options[_OUTCOME] = Outcome()
    try:
        out = executor(*args, **kwargs)
    finally:
        options.pop(_OUTCOME, None)
    sigmas = args[3] if len(args) > 3 else kwargs["sigmas"]
    line = outcome.line()
    if line is not None and len(sigmas) > 1:  # else the sampler has no step
        logger.info("[ToMe] %s: %s", _NOTHING, line)
    return out
