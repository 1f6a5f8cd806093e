"""What the layers of one call of a denoiser share: its seed, its step, and the tokens drawn for it.

An adapter makes a ModelCall for each call of the model and asks it for a plan at each attention layer. It is owned
by that call, so clones, threads and several samplers cannot mix.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from .. import kernels
from ..config import ToMeConfig
from ..core.curve import curve_order, is_compiling
from ..core.grid import Grid, grid_at
from ..core.noise import fold_seed
from ..core.sampling import run_of_token
from ..core.schedule import serves_layer
from .match import check_tokens, kept_of, match_tokens, sampled
from .plan import Plan

# Layers whose tokens are drawn in one go where runs are of two lengths: the first ones of a grid, all that most
# denoisers have at a level that pays, and those behind them, which SDXL's deepest level and transformers have.
_DRAWN_FIRST, _DRAWN_THEN = 16, 64
# Layers whose src and dst are split in one go.
_SPLIT_AT_ONCE = 16
# Different draws that heads have at most, where each draws for itself.
_HEAD_DRAWS = 16


def backward_pass() -> int:
    """The number of torch's backward pass that is under way in this thread; -1: none."""
    if is_compiling():
        return -1
    return getattr(torch._C, "_current_graph_task_id", lambda: -1)()


def shares_match(config: ToMeConfig) -> bool:
    """Whether one match is to serve both halves of a batch, where they are the same images."""
    return config.share_match and config.kind.matches


def same_halves(x: Tensor) -> bool:
    """Whether the second half of the rows of x [B, ...] repeats the first (ModelCall's `alike`). Synchronises: to be
    asked only where shares_match."""
    half = x.shape[0] // 2
    return x.shape[0] % 2 == 0 and torch.equal(x[:half], x[half:])


class ModelCall:
    """Plans for the layers of one call.

    Args:
        config: with the ratio that holds at this step (see schedule.config_at).
        full: the latent's own grid, from which levels are counted.
        device: where the tokens are.
        seed: a number, or a tensor [] or [B] with one number for each row of the batch; None: config.seed.
        step: number or 0-d tensor: a tensor costs no synchronisation.
        alike: whether both halves of the batch are the same images, so that one match may serve both (share_match).
    """

    def __init__(
        self,
        config: ToMeConfig,
        full: Grid,
        device: torch.device,
        seed: int | Tensor | None = None,
        step: int | Tensor = 0,
        alike: bool = True,
    ):
        self.config, self.full, self.step = config, full, step
        self.alike = alike
        self._draws = config.samples or (config.kind.matches and config.partition.startswith("random"))
        self._backward_pass = backward_pass()  # that it was made in
        self._matching = config if alike or not config.share_match else config.replace(share_match=False)
        seed = config.seed if seed is None else seed
        if not isinstance(seed, Tensor):
            seed = torch.full((), fold_seed(seed), dtype=torch.int64, device=device)
        self.seed = seed
        self._served: dict[Grid, bool] = {}
        self._layers: dict[Grid, int] = {}
        self._drawn: dict[Grid, tuple[int, Tensor]] = {}  # (first layer, [layers, b, M])
        self._split: dict[Grid, tuple[int, list[tuple[Tensor, Tensor]]]] = {}  # (first layer, each one's)
        # Made here and not where they are used: that may be inside a compiled graph, in each layer anew.
        levels = (grid_at(full, level) for level in range(4)) if config.samples else ()
        self._orders = {grid: curve_order(grid, device) for grid in levels if self.serves(grid)}
        self._runs = {grid: run_of_token(grid, kept_of(grid, config), order) for grid, order in self._orders.items()}

    def serves(self, grid: Grid) -> bool:
        """Whether a layer on this grid is merged at all."""
        if grid not in self._served:  # a model asks once a layer
            self._served[grid] = self.config.ratio > 0.0 and serves_layer(self.config, grid, self.full)
        return self._served[grid]

    def plan(self, metric: Tensor, grid: Grid) -> Plan | None:
        """The plan for the next layer on this grid, or None where it is to be left alone.

        metric: [B, N, C]; each call counts as a layer, in the order in which the model runs them. Raises ValueError
        where the grid does not have N tokens, RuntimeError where a layer runs again for its gradient.
        """
        if not self.serves(grid):
            return None
        if self._draws and backward_pass() != self._backward_pass:  # other tokens, and so a wrong gradient
            raise RuntimeError("ToMe does not work with gradient checkpointing, which runs layers twice; turn it off")
        layer = self._layers.get(grid, 0)
        self._layers[grid] = layer + 1
        if self.config.samples:
            check_tokens(grid, metric=metric)

            def draw(kept: int) -> Tensor:
                return self._draw(grid, kept, layer)

            plan = sampled(metric.shape[0], grid, self.config, draw, self.seed, self.step, layer)
            plan.known_runs = self._runs.get(grid)
        else:
            parts = self._parts(grid, layer)
            plan = match_tokens(metric, grid, self._matching, seed=self.seed, step=self.step, layer=layer, parts=parts)
        return None if plan.is_identity else plan

    def pass_over(self, grid: Grid) -> None:
        """The next layer on this grid is left alone, in this call perhaps alone: those behind it keep their choices.

        Else perturbed attention, which replaces a layer in one of two calls, would scale up a difference of draws.
        """
        self._layers[grid] = self._layers.get(grid, 0) + 1

    def _parts(self, grid: Grid, layer: int) -> tuple[Tensor, Tensor] | None:
        """The layer's src and dst, split for many layers at once, or None where that gains nothing."""
        if not (self.config.kind.matches and kernels.can_split(grid, self.config, self.seed, self.step)):
            return None
        place = layer % _SPLIT_AT_ONCE
        first = layer - place
        if grid not in self._split or self._split[grid][0] != first:
            self._split[grid] = first, kernels.split(grid, self.config, self.seed, self.step, first, _SPLIT_AT_ONCE)
        return self._split[grid][1][place]

    def _draw(self, grid: Grid, kept: int, layer: int) -> Tensor:
        """The tokens of a layer, [T, b, kept]: its own choice and what heads that draw for themselves take. Those of
        many layers are drawn at once."""
        tokens = math.prod(grid)
        # Heads that draw apart want the turns after the layer's own, as many as a run has.
        head_draws = min(_HEAD_DRAWS, -(-tokens // kept)) if self.config.keeps_self else 1
        if tokens % kept == 0:  # each run's walk begins again after as many layers as it has tokens
            layers = tokens // kept
            first, place = 0, layer % layers
        else:
            first, layers = (0, _DRAWN_FIRST) if layer < _DRAWN_FIRST else (_DRAWN_FIRST, _DRAWN_THEN)
            place = (layer - first) % layers
            first = layer - place
        if grid not in self._drawn or self._drawn[grid][0] != first:
            count = layers + head_draws - 1
            order = self._orders[grid] if grid in self._orders else curve_order(grid, self.seed.device)
            self._drawn[grid] = first, kernels.draw(order, kept, self.seed, self.step, first, count)
        return self._drawn[grid][1].narrow(0, place, head_draws)

    def attention(
        self, q: Tensor, k: Tensor, v: Tensor, grid: Grid, metric: Tensor | None = None, keeps_self: bool = False
    ) -> MergedAttention | None:
        """What the next self-attention layer on this grid is to be given, or None where it is left alone.

        q, k, v: [B, N, C], before or after their projections; pass the same tensor where they are the same.
        metric: [B, N, D], what similarity is measured on; None: q. keeps_self: k and v stay whole, for an adapter that
        samples behind the projections because queries keep their own tokens (attention/sequence.py, with the outcome's
        plan). Raises ValueError where one of them does not have the grid's tokens.
        """
        if self.serves(grid):
            check_tokens(grid, q=q, k=k, v=v)
        plan = self.plan(q if metric is None else metric, grid)
        if plan is None:
            return None
        kind = self.config.kind
        merges_queries = kind.queries and not keeps_self
        # By what they are and not by id(), which torch 2.11 cannot trace.
        queries = plan.merge(q) if merges_queries else q
        keys, values = k, v
        if kind.keys and not keeps_self:
            keys = queries if merges_queries and k is q else plan.merge(k)
            values = keys if v is k else queries if merges_queries and v is q else plan.merge(v)
        bias = plan.key_bias() if self.config.weighs_keys else None
        return MergedAttention(plan, queries, keys, values, bias, merges_queries)


@dataclass(frozen=True, eq=False)
class MergedAttention:
    """One attention layer's inputs, merged, and the way back.

    q: [B, N or M, C]; k, v: [B, M or N, C]; bias: [b, M], to be added to the logits of each key, or None.
    """

    plan: Plan
    q: Tensor
    k: Tensor
    v: Tensor
    bias: Tensor | None
    merges_queries: bool

    def unmerge(self, out: Tensor) -> Tensor:
        """The attention's output [B, N or M, C] -> [B, N, C]."""
        return self.plan.unmerge(out) if self.merges_queries else out
