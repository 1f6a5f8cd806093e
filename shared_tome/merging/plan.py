"""The outcome of a match: how to merge tokens and how to bring them back.

`Plan` is the identity; `MergePlan` holds the groups that matching found; `SamplePlan` the tokens drawn. Index tensors
have b rows: see core/groups.py.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable

import torch
from torch import Tensor

from .. import kernels
from ..core.curve import curve_order
from ..core.grid import Grid
from ..core.groups import spread_rows, sum_sizes, weighted_mean
from ..core.sampling import run_lengths, run_of_token


class Plan:
    """Merges N tokens into M and back. This base class merges nothing: both return their argument.

    batch, tokens, kept: B, N and M.
    """

    is_identity = True

    def __init__(self, batch: int, tokens: int, kept: int, device: torch.device):
        self.batch, self.tokens, self.kept, self.device = batch, tokens, kept, device

    @property
    def ratio(self) -> float:
        """The share of the tokens that really goes (after the cap)."""
        return 1.0 - self.kept / self.tokens

    @property
    def index(self) -> Tensor:
        """[B, M]: the token that represents each group."""
        return spread_rows(self.choice, self.batch)

    @property
    def choice(self) -> Tensor:
        """[b, M]: `index` with as many rows as there are choices: 1, the batch, or a divisor of it."""
        return torch.arange(self.tokens, device=self.device)[None]

    @property
    def groups(self) -> Tensor:
        """[B, N]: which merged token each token belongs to."""
        return torch.arange(self.tokens, device=self.device).expand(self.batch, -1)

    @property
    def sizes(self) -> Tensor:
        """[B, M] float32: how many tokens each stands for; they sum to N."""
        return torch.ones(self.batch, self.kept, dtype=torch.float32, device=self.device)

    def merge(self, x: Tensor) -> Tensor:
        """x [B, N, C] -> [B, M, C]."""
        return x

    def merge_again(self, x: Tensor, sizes: Tensor) -> tuple[Tensor, Tensor]:
        """Tokens x [B, N, C] that stand for sizes [B, N] already -> [B, M, C], means weighted by these, and the sizes'
        sums [B, M] (Bolya et al., arXiv 2210.09461, section 3, "Tracking Token Size")."""
        return x, sizes

    def unmerge(self, y: Tensor) -> Tensor:
        """y [B, M, C] -> [B, N, C]: each token takes its group's value."""
        return y

    def key_bias(self) -> Tensor | None:
        """log(sizes) [1 or B, M] for proportional attention; None where it would change nothing."""
        return None


class MergePlan(Plan):
    """Groups of similar tokens, each with a destination.

    Args:
        index: [b, M] the representative of each merged token, groups: [b, N].
        mean: merged tokens are means; otherwise the representative's own value.
        fills: tokens that went come back as zeros (prune). even: all groups are of one size.
        chain: what kernels.match made of the groups, None to find it here where it is needed.
    """

    is_identity = False

    def __init__(
        self,
        batch: int,
        index: Tensor,
        groups: Tensor,
        *,
        mean: bool = False,
        fills: bool = False,
        even: bool = False,
        chain: kernels.Chain | None = None,
    ):
        super().__init__(batch, groups.shape[1], index.shape[1], index.device)
        self._index, self._groups = index, groups
        self._chain = kernels.links(index, groups) if mean and chain is None else chain
        self._bias: Tensor | None = None  # log(sizes) [b, M] once a mean has written it
        self._sizes = kernels.group_sizes(groups, self.kept, self._chain)
        self.mean, self.fills, self.even = mean, fills, even

    @property
    def choice(self) -> Tensor:
        return self._index

    @property
    def groups(self) -> Tensor:
        return spread_rows(self._groups, self.batch)

    @property
    def sizes(self) -> Tensor:
        return spread_rows(self._sizes, self.batch)

    def merge(self, x: Tensor) -> Tensor:
        if not self.mean:
            return kernels.take(x, self._index)
        merged, bias = kernels.mean(x, self._index, self._groups, self._sizes, self._chain)
        self._bias = self._bias if bias is None else bias
        return merged

    def merge_again(self, x: Tensor, sizes: Tensor) -> tuple[Tensor, Tensor]:
        total = sum_sizes(sizes, self.groups, self.kept)
        if not self.mean:
            return self.merge(x), total
        if not kernels.has_mean(x, self._chain):
            return weighted_mean(x, sizes, self._groups, total), total
        # By way of the plain mean, which is faster: a group's weights have the mean 1.
        weights = sizes * (self.sizes / total).gather(1, self.groups)  # (B, N)
        return self.merge(x * weights[..., None]).to(x.dtype), total  # float32 in between

    def unmerge(self, y: Tensor) -> Tensor:
        out = kernels.take(y, self._groups)
        if not self.fills:
            return out
        stays = torch.zeros(self._groups.shape, dtype=torch.bool, device=y.device).scatter(1, self._index, True)
        return torch.where(spread_rows(stays, y.shape[0])[..., None], out, 0.0)

    def key_bias(self) -> Tensor | None:
        if self.even:
            return None
        bias = self._sizes.log() if self._bias is None else self._bias
        return bias if bias.shape[0] == 1 else spread_rows(bias, self.batch)


class SamplePlan(Plan):
    """One token of each run; groups and sizes are worked out only when asked for.

    head_draws: [T, b, M], the choice and what comes after it in the walk, for heads that draw for themselves
    (attention/self_token.py). known_runs: `runs`, where a ModelCall has worked them out.
    """

    is_identity = False
    known_runs: Tensor | None = None

    def __init__(self, batch: int, grid: Grid, head_draws: Tensor):
        self._begin(batch, grid, head_draws.shape[2], head_draws.device)
        self._head_draws = head_draws

    def _begin(self, batch: int, grid: Grid, kept: int, device: torch.device) -> None:
        Plan.__init__(self, batch, math.prod(grid), kept, device)
        self.grid, self.even = grid, self.tokens % kept == 0
        self._first = 0  # the place of the choice in turns

    @property
    def head_draws(self) -> Tensor:
        return self._head_draws

    def from_head(self, head: int) -> SamplePlan:
        """The same for an attention that has a model's heads from that one on."""
        plan = copy.copy(self)
        plan._first -= head
        plan._roll(head)
        return plan

    def _roll(self, head: int) -> None:
        self._head_draws = self._head_draws.roll(-head, 0)

    @property
    def choice(self) -> Tensor:
        return self.head_draws[self._first % len(self.head_draws)]

    @property
    def groups(self) -> Tensor:
        return self.runs.expand(self.batch, -1)

    @property
    def runs(self) -> Tensor:
        """[N]: the place in `choice`, and in each of `head_draws`, of the token that stands for each."""
        if self.known_runs is not None:
            return self.known_runs
        return run_of_token(self.grid, self.kept, curve_order(self.grid, self.device))

    @property
    def sizes(self) -> Tensor:
        return run_lengths(self.tokens, self.kept, self.device)[1].float().expand(self.batch, -1)

    def merge(self, x: Tensor) -> Tensor:
        return kernels.take(x, self.choice)

    def merge_again(self, x: Tensor, sizes: Tensor) -> tuple[Tensor, Tensor]:
        return self.merge(x), sum_sizes(sizes, self.groups, self.kept)

    def unmerge(self, y: Tensor) -> Tensor:
        return kernels.take(y, self.groups[:1])

    def key_bias(self) -> Tensor | None:
        return None if self.even else self.sizes[:1].log()


class MultiresPlan(SamplePlan):
    """Keys at three resolutions (core/multires.py), where an attention sees the heads of all tokens.

    That is for attention/sequence.py to do; to everybody else this is a sample of as many keys, which is drawn once
    somebody asks for it.

    kept, draw: how many keys that sample has, and what draws it, [T, b, kept]. shares: (whole, half) of the tiles.
    seed: [] or [b], step, layer: of the draws. watch: told of each attention before it is computed, as
    kernels.attend_multires is; None: nobody wants to know.
    """

    watch: Callable[..., None] | None = None

    def __init__(
        self,
        batch: int,
        grid: Grid,
        kept: int,
        draw: Callable[[], Tensor],
        shares: tuple[float, float],
        seed: Tensor,
        step: int | Tensor,
        layer: int,
    ):
        self._begin(batch, grid, kept, seed.device)
        self._draw, self._drawn = draw, None
        self.shares, self.seed, self.step, self.layer = shares, seed, step, layer

    @property
    def head_draws(self) -> Tensor:
        if self._drawn is None:
            self._drawn = self._draw()
        return self._drawn

    def _roll(self, head: int) -> None:
        self.layer += head  # head h of layer l draws what h + l says
        draw = self._draw
        self._draw, self._drawn = (lambda: draw().roll(-head, 0)), None
