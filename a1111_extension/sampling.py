"""What one sampling pass knows: its config, the images' seeds and where the sampler is. The same for all hosts."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..shared_tome import ModelCall, ToMeConfig
from ..shared_tome.autotune.decision_log import DecisionLog
from ..shared_tome.core.grid import Grid
from ..shared_tome.core.noise import fold_seed
from ..shared_tome.core.schedule import config_at
from ..shared_tome.inspect.reasons import counted
from ..shared_tome.inspect.record import CallRecord, Run, StepFacts
from ..shared_tome.inspect.report import CallTally
from ..shared_tome.merging.call import same_halves, shares_match
from ..shared_tome.merging.residual import TWICE, ResidualCall, Residuals
from .notes import Notes, Silence
from .seeds import RowCursor, Rows, period, prompt_counts, rows_of_step


class Sampling:
    """One sampling pass.

    Args:
        config: of this pass, with its schedule.
        seeds: one a image.
        report: whether layers are counted, keep_choices: whether what they chose is kept too, for a map.
        self_token_found: called with whether a layer's queries can keep their own tokens, where they are to.
    Attributes:
        run: what was counted and kept, None where neither is asked for.
        residual: what has some steps exact in the call that was begun last, None where nothing has.
        call_tally: what the layers of the call that was begun last are told to, None where nothing is.
        decided: what autotune decided of them.
    """

    def __init__(
        self,
        config: ToMeConfig,
        seeds: Sequence[int],
        notes: Notes,
        *,
        report: bool = False,
        keep_choices: bool = False,
        self_token_found: Callable[[bool], None] | None = None,
    ):
        self.config, self.notes = config, notes
        self.seeds = tuple(fold_seed(int(seed)) for seed in seeds) or (0,)
        self.step, self._by_steps = 0, 0.0
        self._rows = RowCursor(len(self.seeds))
        self._tensors: dict[tuple[Rows, torch.device], Tensor] = {}
        self.run = Run(config) if report or keep_choices else None
        self.decided = DecisionLog() if self.run is None else self.run.tally.decided
        self._residuals: Residuals | None = None  # of a U-Net that was met
        self._evaluation = 0  # how often the sampler has asked
        self.residual: ResidualCall | None = None
        self.call_tally: CallTally | None = None
        self._keep_choices = keep_choices
        self._exact: tuple[int, float] | None = None  # the last call's step and ratio, where it was to be exact
        self._reported: set[tuple[float, Grid, int, bool]] = set()
        self._self_token_found = self_token_found
        if self.run is not None:
            self.run.images = len(self.seeds)

    def tried(self, config: ToMeConfig) -> Sampling:
        """One with other options of which nobody is told anything, for steps that are only tried."""
        return Sampling(config, (0,), Silence())

    def begin_step(self, step: int, total: int, rows: int | None = None, cond: Any = None) -> None:
        """The sampler is about to call the model.

        Args:
            step, total: in calls of the denoiser. The host's own step number lags by one after the first step and
                stands still in samplers that call twice a step.
            rows: how many rows it made, cond: its conditioning, which tells the prompts of each image.
        """
        self._evaluation += 1
        self.step, self._by_steps = step, min(step / max(1, total), 1.0 - 1e-6)
        if self.run is not None:
            self.run.tally.of_steps = total
        if rows is None:
            self._rows.begin(None)
            return
        images = len(self.seeds)
        counts = prompt_counts(cond, images)
        if counts is None:
            counts = (max(1, rows // images - 1),) * images
        found = rows_of_step(rows, counts)
        if found is None:
            given = f"{counted(rows, 'row')} for {counted(images, 'image')}"
            self.notes.say(f"ToMe does not know whose rows these are ({given}); their choices go by row", shown=False)
        self._rows.begin(found)

    def call(
        self,
        x: Tensor,
        rows: Rows | None = None,
        progress: Callable[[], float] | None = None,
        names: Sequence[Hashable] = (),
    ) -> ModelCall | None:
        """The state of one call of the model, or None where nothing is merged now.

        x: the latent [B, C, H, W]; rows: their images, where the caller knows better than the step, and then names: of
        the parts of the batch (Residuals.call). progress: how far the model is by its noise level, 0 to 1, asked only
        for a schedule; None: by steps.
        """
        if rows is None:
            rows = self._rows.take(x.shape[0])  # even if not merged: the cursor has to move on
            names = () if self._rows.taken is None else (self._rows.taken,)
        config = self.begin(x, rows, progress, names)
        return None if config.ratio == 0.0 else self.call_on((x.shape[2], x.shape[3]), config, x, rows)

    def begin(
        self,
        x: Tensor,
        rows: Rows,
        progress: Callable[[], float] | None = None,
        names: Sequence[Hashable] | None = None,
    ) -> ToMeConfig:
        """A call of the model begins: the config that holds in it. x: the latent [B, C, ..., H, W]; names: None on a
        transformer; else: see call."""
        self._settle()
        config = config_at(self.config, progress or (lambda: self._by_steps))
        self.residual = self._residual(config, names)
        self.call_tally = None if self.run is None else self._tell(self.run, config, tuple(x.shape[-2:]), rows)
        return config

    def call_on(self, full: Grid, config: ToMeConfig, x: Tensor, rows: Rows) -> ModelCall:
        """The state of a call whose tokens at level 0 lie on the grid `full`; else: see begin."""
        batch, device = x.shape[0], x.device
        alike = batch % 2 == 0 and rows[: batch // 2] == rows[batch // 2 :]
        if alike and shares_match(config):  # tiles of one image have one number
            alike = same_halves(x)
        draw = self.step if self.residual is None else self.residual.draw
        return ModelCall(config, full, device, seed=self._seed(rows, device), step=draw, alike=alike)

    def _residual(self, config: ToMeConfig, names: Sequence[Hashable] | None) -> ResidualCall | None:
        if names is None or not config.exact_every:
            return None
        if self._residuals is None:
            self._residuals = Residuals.of(config, lambda why: self.notes.say(why, shown=False))
        if self._residuals is None:
            return None
        if config.ratio == 0.0:
            self._residuals.forget()
            return None
        if not names:
            self._residuals.turn_off(TWICE)
            return None
        step = self.step if self._evaluation else None
        return self._residuals.call(step, self.step, self._evaluation, names, config.ratio)

    def end(self) -> None:
        """The pass is over, in whatever way."""
        self._settle()
        if self._residuals is not None:
            self._residuals.end()
        if self._residuals is not None and self.run is not None:
            self.run.tally.why_not_exact = self._residuals.why_off

    def _settle(self) -> None:
        """Exact every may have gone off in the last call."""
        if self._exact is not None and not self.residual.is_on:
            self.run.tally.not_exact(*self._exact)
        self._exact = None

    @property
    def kept_exact(self) -> bool | None:
        """Whether the option exact_every had an effect; None: not known, or it is off."""
        if not self.config.exact_every or self.run is None or not self.run.tally.calls:
            return None
        return self._residuals is not None and not self._residuals.had_no_effect

    def images_of(self, batch: int) -> Rows:
        """The image of each row where a batch is whole batches of images one after another (Forge)."""
        return tuple(row % len(self.seeds) for row in range(batch))

    def parts(self, batch: int) -> list[tuple[slice, Rows, CallTally | None]]:
        """The rows of a batch that draw alike, with their images and whom to tell: all of them where the images have
        one seed, else each image's own. The batch: see images_of."""
        images, rows = len(self.seeds), self.images_of(batch)
        if len({self.seeds[row] for row in rows}) == 1:
            return [(slice(None), rows, self.call_tally)]
        found = []
        for image in range(min(images, batch)):
            # All images' layers are merged alike: one tells for all.
            call_tally = self.call_tally if image == 0 else None
            if isinstance(self.call_tally, CallRecord):
                call_tally = CallRecord(self.call_tally.run, self.step, [0], self.call_tally.full, [image])
            part = slice(image, None, images)
            found.append((part, rows[part], call_tally))
        return found

    def tell_self_token(self, refused: str | None) -> None:
        """A layer's queries are to keep their own tokens. refused: why they cannot; None: they can."""
        if refused is not None and self.config.wants_heads:
            self.notes.say(refused, shown=False)  # by default they are to: not a line under every picture
        if self._self_token_found is not None and self.config.keeps_self and self.config.method != "multires":
            self._self_token_found(refused is None)

    def another_model(self) -> None:
        """The calls to come are of another model: its layers are to be told too."""
        self._reported.clear()
        if self._residuals is not None:
            self._residuals.forget()

    def _tell(self, run: Run, config: ToMeConfig, full: Grid, rows: Rows) -> CallTally | None:
        exact, draw = (False, None) if self.residual is None else (self.residual.exact, self.residual.draw)
        run.tally.call(self.step, 0.0 if exact else config.ratio)
        self._exact = (self.step, config.ratio) if exact else None
        if not self._keep_choices:  # calls that are alike do the same: a report costs next to nothing
            kind = (config.ratio, full, len(rows), exact)
            known = kind in self._reported
            self._reported.add(kind)
            return None if known or config.ratio == 0.0 else CallTally(run.tally, full)
        shown = config.replace(ratio=0.0) if exact else config
        run.note(self.step, StepFacts(shown, full, full, self.seeds, draw))
        first: dict[int, int] = {}  # of each image's rows: that of its first prompt
        for row, image in enumerate(rows):
            first.setdefault(image, row)
        return CallRecord(run, self.step, list(first.values()), full, list(first))

    def _seed(self, rows: Rows, device: torch.device) -> Tensor:
        """[b] int64: one number a row, no longer than needed (rows that repeat share one choice)."""
        rows = tuple(row for row in rows)[: period([self.seeds[row] for row in rows])]
        if (rows, device) not in self._tensors:
            self._tensors[rows, device] = torch.tensor(
                [self.seeds[row] for row in rows], dtype=torch.int64, device=device
            )
        return self._tensors[rows, device]
