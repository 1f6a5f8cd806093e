"""What `multires` chose, told by its attentions to who asks: kept for maps, or timed for reports."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import kernels
from ..autotune.timing import times_of
from ..core.resolutions import packed
from ..merging.plan import MultiresPlan


class Watcher:
    """To be a plan's `watch`. What it is told of the plan's first attention stays; see MultiresPlan."""

    kept: Tensor | None = None

    def see(self, *given: Any) -> None:
        """An attention is about to be computed of the arguments of kernels.attend_multires."""
        q, k, _, tiles, _, counts, _, scale, _ = given
        if self.kept is None:
            self.kept = packed(kernels.choose_multires(q, k, tiles, counts, scale), tiles, counts)


class ChoosingTimer:
    """Which share of the attentions' time on a GPU it takes to choose the tiles; each shape is timed once."""

    def __init__(self) -> None:
        self._times: dict[tuple, tuple[float, float]] = {}
        self._seen: list[tuple] = []

    def watch(self, plan: MultiresPlan) -> None:
        """Have the plan's attentions timed."""
        plan.watch = self.see

    def see(self, *given: Any) -> None:
        """As Watcher.see. Does nothing where there is no GPU."""
        q, k, _, tiles, _, counts, _, scale, mask = given
        if not q.is_cuda or torch.cuda.is_current_stream_capturing():
            return
        shape = tuple(q.shape), q.dtype, tiles.image, counts, mask is None
        self._seen.append(shape)
        if shape not in self._times:
            choosing = times_of(lambda: kernels.choose_multires(q, k, tiles, counts, scale), q.device)[0]
            self._times[shape] = choosing, times_of(lambda: kernels.attend_multires(*given), q.device)[0]

    @property
    def share(self) -> float | None:
        """Of all attentions that were seen, each as often as it was; None: none was timed."""
        times = [self._times[shape] for shape in self._seen]
        return sum(choosing for choosing, _ in times) / sum(whole for _, whole in times) if times else None
