"""Why something is not merged, and what else reports and logs say, in sentences for people."""

from __future__ import annotations

from collections.abc import Iterable

from ..config import ToMeConfig
from ..core.grid import Grid, level_of
from ..core.multires import shares_of
from ..core.schedule import serves_layer

NO_WHOLE_TOKEN = "the ratio takes away no whole token"
# How a reason begins, and what a person can change.
_CHANGES = {
    "fewer than min tokens": "make a larger picture, or lower min tokens",
    "its level is not one of levels": "set levels to auto",
    NO_WHOLE_TOKEN: "raise the ratio",
    "no step of": "lower start, raise end or take more steps",
    "start ": "lower start, raise end or take more steps",
    "the ratio is 0": "raise the ratios or take more steps",
    "the decisions that are set": "empty decisions",
    "merging does not pay here": "make a larger picture; levels other than auto are always merged",
}


def counted(number: int, noun: str) -> str:
    """A number with its noun: "1 step", "2 steps"."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def what_to_change(reasons: Iterable[str]) -> str:
    """What a person can change so that more is merged, as the end of a sentence; "" where nothing of that is known."""
    changes = dict.fromkeys(
        change for reason in reasons for start, change in _CHANGES.items() if reason.startswith(start)
    )
    return f". To change that: {'; '.join(changes)}" if changes else ""


def capped(config: ToMeConfig) -> str | None:
    """What to tell somebody who asked for more than the method can do, or None."""
    asked, most = max(config.ratio, config.ratio_end), config.ratio_cap
    if asked <= most:
        return None
    at = ""
    if config.kind.matches and config.partition == "alternate":
        at = " with partition alternate"
    elif not config.samples:
        at = f" at stride {'x'.join(map(str, config.stride))}"
    return f"ratio {asked:g} is more than method {config.method} can take{at}: {most:g} is what it does"


def resolutions(config: ToMeConfig, choosing: float | None = None) -> list[str]:
    """Lines for `multires`: the shares of the keys' tiles at each resolution, and that of the attentions' time in which
    they are chosen (None: not measured); else nothing."""
    if config.method != "multires":
        return []
    whole, half = shares_of(config)
    rest = 1.0 - whole - half
    line = f"Of the keys' tiles {whole:.0%} stay whole, {half:.0%} keep a quarter of their tokens, {rest:.0%} a 16th"
    cost = "not measured" if choosing is None else f"{choosing:.1%} of the time of these attentions"
    return [f"{line} (by hand)" if config.shares_by_hand else line, f"Choosing the tiles: {cost}"]


def why_not_served(config: ToMeConfig, grid: Grid, full: Grid) -> str | None:
    """Why a layer on this grid is left alone by the options, or None where it is merged (see serves_layer)."""
    if serves_layer(config, grid, full):
        return None
    levels = config.level_set
    if levels is not None and level_of(grid, full) not in levels:
        return f"its level is not one of levels {config.levels}"
    return f"fewer than min tokens {max(2, config.min_tokens)}"


def why_no_step(config: ToMeConfig, what: str) -> str:
    """Why nothing is merged where the ratio is 0 at each step (see ratio_at). what: whose steps, "this sampling"."""
    between = f"between start {config.start:g} and end {config.end:g}"
    if config.ratio_end < 0.0 or config.start == config.end:
        return f"no step of {what} lies {between}"
    moves = f"from {config.ratio:g} to {config.ratio_end:g}"
    return f"the ratio is 0 at each step of {what}: it moves {moves} {between}"
