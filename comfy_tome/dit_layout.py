"""How the tokens of one call of a transformer lie: which of an attention's are the image's."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from ..shared_tome.core.grid import Grid
from .dit_models import DiTModel
from .dit_tokens import CallArguments, in_patches, latent_shape, length


@dataclass(frozen=True)
class Layout:
    """How a call's tokens lie: `head` tokens, the image's, `tail` tokens (None: as many as are left over).

    alone: how many stand before the image in layers without text; None: there are none. others: lengths of attentions
    to other tokens. together: attention calls of one layer that want the same tokens. parts: some bring a part of the
    queries (DiTModel.parts). elsewhere: queries of each layer that never come. twice: blocks that hold two layers.
    """

    grid: Grid
    head: int | None
    tail: int | None
    alone: int | None = None
    others: tuple[int, ...] = ()
    together: int = 1
    parts: bool = False
    elsewhere: int = 0
    twice: tuple[int, ...] = ()

    @property
    def tokens(self) -> int:
        """How many of them are the image's, N."""
        return math.prod(self.grid)

    def beside(self, arguments: CallArguments) -> int:
        """About how many tokens stand beside the image's."""
        known = (self.head or 0) + (self.tail or 0)
        if self.head is None or self.tail is None:
            known += length(arguments, "c_crossattn") + in_patches(arguments.get("ref_latents"), 2, 2)
        return known

    @classmethod
    def of(cls, facts: DiTModel, model: Any, shape: tuple[int, ...], arguments: CallArguments) -> Layout | None:
        """The layout of a call, or None where its image tokens do not lie on a grid. shape: of the latent, as it
        comes to apply_model."""
        grid = facts.grid(model, latent_shape(shape, arguments), arguments)
        if grid is None:
            return None
        return cls(
            grid,
            None if facts.head is None else facts.head(model, arguments),
            None if facts.tail is None else facts.tail(model, arguments, grid),
            None if facts.alone is None else facts.alone(model, arguments),
            () if facts.others is None else facts.others(model, arguments),
            facts.calls(model),
            facts.parts,
            facts.elsewhere(model, arguments, grid),
            facts.twice(model),
        )

    def start(self, length: int, img_slice: list[int] | None = None) -> int | None:
        """Where the image begins among `length` tokens; None where these are not this call's tokens.

        img_slice: [end of the text, end], where the model tells it.
        """
        head, tail = self.head, self.tail
        if head is None:
            start = length - self.tokens - tail
            return start if start >= 0 else None
        if tail is None:
            return head if length >= head + self.tokens else None
        if length == head + self.tokens + tail:
            return head
        if self.alone is not None and length == self.alone + self.tokens + tail:
            return self.alone
        # Another node has added tokens: to the text, or behind the image. Only the model itself can tell which.
        if img_slice is not None and img_slice[1] == length >= img_slice[0] + self.tokens + tail:
            return img_slice[0]
        return None
