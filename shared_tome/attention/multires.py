"""Attention at three resolutions (core/multires.py) in a model's call: where it can be had, what its layers share."""

from __future__ import annotations

import math
from collections.abc import Callable

from torch import Tensor

from .. import kernels
from ..core.grid import Grid
from ..core.multires import Counts, Drawn, Tiles, cut_tiles, draw_keys, tile_counts, tile_sizes
from ..merging.plan import MultiresPlan
from .masks import SeenMasks, mask_by_head
from .self_token import loses_gradient

# What is said once where it cannot be.
NO_KERNEL = "multires has no kernel here; sample takes its place"
NO_GRADIENT = "multires carries no gradient on a GPU; sample takes its place"
NOT_MULTIRES = "multires needs PyTorch's attention, with all queries at once; sample takes its place"
NOT_UNDER_MASK = "multires serves no mask that hides parts of an image from others; sample takes its place"


class MultiresCall:
    """What the attentions at three resolutions of one call share. Owned by that call.

    say: called as say(message, detail) where one cannot be had. tiles: those of each grid, start and length of a row,
    with the step's draws and how many tiles are taken how.
    """

    def __init__(self, say: Callable[[str, str], None]):
        self.say = say
        self.tiles: dict[tuple[Grid, int, int], tuple[Tiles, Drawn, Counts]] = {}
        self._masks = SeenMasks()

    def attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        start: int,
        plan: MultiresPlan,
        scale: float | None = None,
        mask: Tensor | None = None,
    ) -> Tensor | None:
        """See sequence.JointCall.attend. None where a GPU has no kernel for it, since plain torch would be slow."""
        if not are_alike(q, k, v):
            self.say(NOT_MULTIRES, f"{q.shape[1]}x{q.shape[2]} queries, {k.shape[1]}x{k.shape[2]} keys")
            return None
        if mask is not None:
            mask = mask_by_head(mask)
            whole = mask is not None and self._masks.leaves_whole(mask, start, plan.tokens)
            if not whole:
                self.say(NOT_UNDER_MASK, "it is not read while a graph is made" if whole is None else "its numbers")
                return None
        if not _may_attend(q, k, v, mask):  # before anything is cut
            self._say_no_kernel(q, k, v)
            return None
        tiles, drawn, counts = self.cut(q, start, plan)
        if q.device.type != "cpu" and not kernels.holds_tiles(q, tiles):
            self._say_no_kernel(q, k, v)
            return None
        scale = q.shape[-1] ** -0.5 if scale is None else scale
        given = (q, k, v, tiles, drawn, counts, plan.layer, scale, mask)
        if plan.watch is not None:
            plan.watch(*given)
        return kernels.attend_multires(*given).transpose(1, 2)

    def cut(self, q: Tensor, start: int, plan: MultiresPlan) -> tuple[Tiles, Drawn, Counts]:
        """The tiles of rows like q [B, H, L, d], the step's draws, and how many tiles are taken how."""
        place = (plan.grid, start, q.shape[2])
        if place not in self.tiles:
            tiles = cut_tiles(plan.grid, q.device, start, q.shape[2], *tile_sizes(plan.tokens))
            drawn = draw_keys(tiles, plan.seed, plan.step, kernels.draw)
            self.tiles[place] = tiles, drawn, tile_counts(tiles, *plan.shares)
        return self.tiles[place]

    def serves_mask(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor, start: int, grid: Grid) -> bool:
        """Whether `attend` takes a mask, with a plan on this grid."""
        mask = mask_by_head(mask)
        if mask is None or not (are_alike(q, k, v) and _may_attend(q, k, v, mask)):
            return False
        return bool(self._masks.leaves_whole(mask, start, math.prod(grid)))

    def _say_no_kernel(self, q: Tensor, k: Tensor, v: Tensor) -> None:
        why = NO_GRADIENT if loses_gradient(q, k, v) else NO_KERNEL
        self.say(why, f"heads of {q.shape[-1]} channels in {q.dtype} on {q.device.type}")


def are_alike(q: Tensor, k: Tensor, v: Tensor) -> bool:
    """Whether all have one shape and dtype."""
    return q.shape == k.shape == v.shape and q.dtype == k.dtype == v.dtype


def _may_attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> bool:
    """Whether a kernel may take these; on the CPU plain torch does."""
    return q.device.type == "cpu" or kernels.takes_multires(q, k, v, mask)
