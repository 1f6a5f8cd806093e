"""From a recorded run and the picture that it made to a map (drawing.py draws it)."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..core.grid import Grid, grid_at, split_frames
from ..core.noise import fold_seed
from ..core.resolutions import HALVED, QUARTERED, WHOLE, resolution_of_tokens
from ..merging.match import match_tokens
from ..methods import MAX_LEVEL
from .drawing import Tokens, coverage, draw_map, owners, token_at
from .legend import draw_legend
from .reasons import counted, why_not_served
from .record import Run, StepFacts
from .report import Layer

logger = logging.getLogger("ToMe")


class NoMap(Exception):
    """There is nothing to draw. args: lines that say why."""


@dataclass(frozen=True)
class Chosen:
    """One layer in one step. owner: [images or 1, N], see drawing.owners; where: its block, or "".

    seen: of multires, what Run.owner has in its place; None for all that draws or matches alike for all queries.
    """

    run: Run
    facts: StepFacts
    level: int
    layer: int
    step: int
    grid: Grid
    owner: Tensor
    where: str
    seen: Tensor | None = None

    def caption(self) -> tuple[str, str]:
        """What the legend says."""
        config, tokens = self.facts.config, self.owner.shape[1]
        kept = int(self.owner[0].unique().numel())
        method = "sample" if config.method == "multires" else config.method  # which took its place
        share = 1 - kept / tokens
        return (
            f"{method} {config.ratio:g}: {tokens} to {counted(kept, 'token')} (-{100 * share:.0f}%)",
            self._place(),
        )

    def _place(self) -> str:
        """The layer and the step, for the legend."""
        where = f" ({self.where})" if self.where else ""
        steps = self.run.tally.of_steps
        of = f" of 0 to {steps - 1}" if steps else ""
        grid = "x".join(map(str, self.grid))
        return f"level {self.level} ({grid}), layer {self.layer}{where}, step {self.step}{of}"

    def of_query(self, row: int, token: int, head: int) -> tuple[Tensor, tuple[str, ...]]:
        """What a query token saw: how dark each token is [N] (drawing.Tokens.seen), and what the legend says.

        row: of the images. head: -1 is the mean of all. Raises NoMap where there is no such head.
        """
        kept = self.seen[row]  # (H, query tiles, .)
        if not -1 <= head < len(kept):
            raise NoMap(f"There is no head {head}: {_there(range(len(kept)))}.")
        found = resolution_of_tokens(kept if head == -1 else kept[head : head + 1], self.grid, token)
        shares = [float((found == one).float().mean()) for one in (WHOLE, HALVED, QUARTERED)]
        of = f"mean of {counted(len(kept), 'head')}" if head == -1 else f"head {head} of 0 to {len(kept) - 1}"
        config = self.facts.config
        words = "{:.0%} of the tokens whole, {:.0%} at half, {:.0%} at quarter resolution".format(*shares)
        lines = f"{config.method} {config.ratio:g}, {of}: the query sees {words}", self._place()
        return found.float().mean(0) / QUARTERED, lines


def choose(
    run: Run | None, level: int, layer: int, step: int, empty: Sequence[str] = ("Nothing was recorded.",)
) -> Chosen:
    """What a person asked for; -1 for level and step lets the run decide. Raises NoMap, without a run with `empty`."""
    if run is None:
        raise NoMap(*empty)
    merged = [number for number, facts in sorted(run.facts.items()) if facts.config.ratio > 0.0]
    if not merged:
        raise NoMap("Nothing was merged in any step.")
    if step == -1:
        step = merged[-1]
    if step not in run.facts:
        raise NoMap(f"Step {step} was not run: {_there(sorted(run.facts))}.")
    if step not in merged:
        raise NoMap(f"Nothing was merged in step {step}, but in {_span(merged)}.")
    facts = run.facts[step]
    known = run.tally.layers()
    level, grid, where = _compiled(facts, level) if run.compiled else _seen(known, level, layer)
    owner = run.owner(step, grid, layer)
    if owner is not None and facts.config.method == "multires":
        return Chosen(run, facts, level, layer, step, grid, owner[:, 0, 0], where, owner)
    # Of multires a choice may have been there and not be kept; else sample took its place.
    unseen = facts.config.method == "multires" and (run.compiled or run.is_full)
    if owner is None and (facts.config.kind.matches or unseen):
        if run.compiled:
            raise NoMap("Under torch.compile it cannot be seen", f"what {facts.config.method} chose.")
        if run.is_full:
            raise NoMap(f"Step {step} was not kept: the run was too long", "and large for the record's memory.")
        raise NoMap(f"Layer {layer} of level {level} was not merged in step {step}.")
    if owner is None:
        seed = torch.tensor([fold_seed(seed) for seed in facts.seeds or (facts.config.seed,)])
        metric = torch.zeros(len(seed), math.prod(grid), 1)  # of a choice that looks at nothing
        draw = step if facts.draw is None else facts.draw
        owner = owners(match_tokens(metric, grid, facts.config, seed=seed, step=draw, layer=layer))
    return Chosen(run, facts, level, layer, step, grid, owner, where)


def _compiled(facts: StepFacts, level: int) -> tuple[int, Grid, str]:
    """Level and grid where single layers were not seen: from the options alone. Raises NoMap."""
    config, full = facts.config, facts.full
    for now in range(MAX_LEVEL + 1) if level == -1 else [level]:
        grid = grid_at(full, now)
        why = why_not_served(config, grid, full)
        if why is None:
            return now, grid, ""
    raise NoMap("No level has enough tokens." if level == -1 else f"ToMe skipped level {level}: {why}.")


def _seen(layers: Sequence[Layer], level: int, layer: int) -> tuple[int, Grid, str]:
    """Level, grid and block of a merged layer. Raises NoMap."""
    merged = [one for one in layers if not one.reason]
    if not merged:
        raise NoMap("Nothing was merged in any layer.", *_reasons(layers))
    if level == -1:
        level = min(one.level for one in merged)
    there = [one for one in merged if one.level == level]
    if not there:
        left = [one for one in layers if one.level == level]
        raise NoMap(
            f"Nothing was merged at level {level}, but at {_span(sorted({one.level for one in merged}))}.",
            *_reasons(left),
        )
    # A level may have several grids, where an area of the picture was sampled alone: the largest is the picture's.
    grid = max((one.grid for one in there), key=math.prod)
    for one in there:
        if one.grid == grid and one.number == layer:
            several = any(other.where == one.where and other.part != one.part for other in there)
            return level, grid, f"{one.where}, transformer {one.part}" if several else one.where
    numbers = sorted(one.number for one in there if one.grid == grid)
    raise NoMap(f"Level {level} has no merged layer {layer}: {_there(numbers)}.")


def _reasons(layers: Iterable[Layer]) -> list[str]:
    """Why layers were left alone, each reason once."""
    return [f"{reason[0].upper()}{reason[1:]}." for reason in dict.fromkeys(one.reason for one in layers)]


def _there(numbers: Sequence[int]) -> str:
    return f"there is {numbers[0]} alone" if len(numbers) == 1 else f"there are {_span(numbers)}"


def _span(numbers: Sequence[int]) -> str:
    """Numbers in words: 0 to 4 where none is missing."""
    if len(numbers) > 2 and numbers[-1] - numbers[0] == len(numbers) - 1:
        return f"{numbers[0]} to {numbers[-1]}"
    return ", ".join(map(str, numbers))


def draw_maps(
    run: Run | None,
    image: Tensor,
    pictures: Iterable[int],
    *,
    level: int,
    layer: int,
    step: int,
    show: str,
    opacity: float,
    legend: bool,
    empty: Sequence[str] = ("Nothing was recorded.",),
    x: int = -1,
    y: int = -1,
    head: int = -1,
) -> Tensor:
    """Maps [P, H, W, 3] of some pictures of a batch [B, H, W, 3 or 4]: see draw_map for the rest.

    x, y, head: the query whose keys are shown where the method is multires, as a pixel of the picture (-1: the middle),
    and its head (-1: the mean of all). Where there is nothing to draw the picture says why; empty: lines for where
    there is no run. Raises ValueError for a pixel that the picture does not have.
    """
    image = image[..., :3].cpu().float()
    try:
        chosen = choose(run, level, layer, step, empty)
    except NoMap as why:
        logger.info("[ToMe] the map has nothing to draw: %s", " ".join(why.args))
        return torch.stack([draw_legend(image[number], why.args) for number in pictures])
    maps, covers = [], coverage(chosen.facts.latent, chosen.grid)
    for number in pictures:
        row, frame = _place(number, len(image), chosen)
        if chosen.seen is None:
            how = {"frame": frame, "covers": covers, "show": show, "opacity": opacity}
            lines = chosen.caption() if legend else ()
            maps.append(draw_map(image[number], chosen.owner[row], chosen.grid, **how, caption=lines))
            continue
        token = token_at(*_pixel(image, x, y), image.shape[1:3], chosen.grid, frame, covers)
        try:
            dark, lines = chosen.of_query(row, token, head)
        except NoMap as why:
            maps.append(draw_legend(image[number], why.args))
        else:
            tokens = Tokens(torch.arange(len(dark)), chosen.grid, frame, image[number], covers)
            maps.append(tokens.seen(dark, token, opacity, lines if legend else ()))
    return torch.stack(maps)


def _pixel(image: Tensor, x: int, y: int) -> tuple[int, int]:
    """A pixel of pictures [B, H, W, 3]. Raises ValueError where they have none there."""
    found = []
    for name, value, size in (("x", x, image.shape[2]), ("y", y, image.shape[1])):
        if not -1 <= value < size:
            raise ValueError(f"{name} must be -1 (the middle) or a pixel of the picture, 0 to {size - 1}, got {value}")
        found.append(size // 2 if value == -1 else value)
    return tuple(found)


def _place(number: int, pictures: int, chosen: Chosen) -> tuple[int, int]:
    """(row of owners, frame of the grid) of a picture. A latent frame stands for several of a video, but the first."""
    images, frames = chosen.run.images, split_frames(chosen.grid)[0]
    each = max(1, pictures // images)  # pictures made of one latent
    row, number = min(number // each, images - 1), number % each
    frame = 0 if number == 0 or each == 1 else 1 + (number - 1) * (frames - 1) // (each - 1)
    return min(row, len(chosen.owner) - 1), min(frame, frames - 1)
