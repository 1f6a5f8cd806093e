"""Which row of a batch belongs to which image, and so which seed it takes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

Rows = tuple[int, ...]  # for each row of a batch, the number of its image


def prompt_counts(cond: Any, images: int) -> tuple[int, ...] | None:
    """How many prompts each image has ("a AND b" has two), from the host's conditioning; None if it does not tell."""
    batch = getattr(cond, "batch", None)
    if batch is None or len(batch) != images:
        return None
    return tuple(len(prompts) for prompts in batch)


def rows_of_step(total: int, counts: Sequence[int]) -> Rows | None:
    """The images of all rows of one denoising step.

    total: how many rows there are; counts: prompts of each image. The host puts the prompts' rows image by image,
    then the negative prompt's rows, one an image (twice for models that edit by instruction). None where the total
    does not come out.
    """
    images = tuple(range(len(counts)))
    prompts = tuple(image for image in images for _ in range(counts[image]))
    rest, odd = divmod(total - len(prompts), len(images))
    if odd or rest < 0:
        return None
    return prompts + images * rest


class RowCursor:
    """Hands out the rows of a step to the calls of the model, in the order in which the host splits them."""

    def __init__(self, images: int):
        self.images = images
        self._rows: Rows | None = None
        self._next = 0
        # What the last call's rows are: the first and the one behind the last, of all rows; None: not announced.
        self.taken: tuple[int, int, Rows] | None = None

    def begin(self, rows: Rows | None) -> None:
        """A new step with these rows; None: not known."""
        self._rows, self._next = rows, 0

    def take(self, batch: int) -> Rows:
        """The images of the next call's rows."""
        rows = self._rows
        if rows is not None and len(rows) == batch:
            self.taken = 0, batch, rows
            return rows
        if rows is not None and self._next + batch <= len(rows):
            start, self._next = self._next, self._next + batch
            self.taken = start, self._next, rows
            return rows[start : self._next]
        self.taken = None
        # A call that the step did not announce: whole batches, image by image, are what there can be.
        return tuple(row % self.images for row in range(batch))


def period(rows: Sequence[int]) -> int:
    """The shortest beginning of the rows, dividing their number, that they repeat."""
    for length in range(1, len(rows)):
        if len(rows) % length == 0 and all(row == rows[i % length] for i, row in enumerate(rows)):
            return length
    return len(rows)
