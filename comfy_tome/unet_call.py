"""The attention patches of one call of a U-Net, for the programs that know ComfyUI's: ComfyUI itself, Forge, reForge.

attn1_patch merges what a self-attention is given, attn1_output_patch unmerges what it gives; attn2's patches and hooks
on the feed-forward layers follow the block's match.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Hashable, Iterable
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from ..shared_tome import ModelCall
from ..shared_tome.attention.sequence import JointCall
from ..shared_tome.autotune.decisions import Decisions
from ..shared_tome.autotune.layer import Attention, Decision
from ..shared_tome.core.curve import is_compiling
from ..shared_tome.core.grid import Grid
from ..shared_tome.hooks.guard import why_left_whole
from ..shared_tome.hooks.parts import AroundParts
from ..shared_tome.inspect.reasons import why_not_served
from ..shared_tome.inspect.report import CallTally
from ..shared_tome.merging.call import MergedAttention
from ..shared_tome.merging.plan import Plan
from ..shared_tome.merging.residual import ResidualCall


class PatchedCall(AroundParts):
    """One call of the model.

    decisions: which layers pay. joint: what lets queries keep their own tokens, None where they shall not. record:
    where somebody wants a report or a map. replaced: (part, block) of the layers that other nodes compute, beside those
    that the options tell. attention, kernels: the host's attention, and those of torch's kernels that it tries.
    """

    def __init__(
        self,
        call: ModelCall,
        options: dict[str, Any],
        decisions: Decisions,
        joint: JointCall | None,
        record: CallTally | None = None,
        replaced: Iterable[tuple] = (),
        attention: Attention | None = None,
        kernels: tuple[str, ...] = (),
        residual: ResidualCall | None = None,
    ):
        self.call, self._decisions, self._joint, self._record = call, decisions, joint, record
        self._residual, self._keeping = residual, None  # the second: (residual, name) of the layer that runs now
        self._host_attention, self._kernels = attention, kernels
        taken = options.get("patches_replace", {})
        self._replaced = {*replaced, *((part, at) for part in parts_of(call) for at in taken.get(part, ()))}
        # Of the self-attention that runs now: what was merged, what its keys weigh [b, M], and the plan where keys and
        # values are taken behind their projections. The last two are for the first attention function that is called.
        self._layer: MergedAttention | None = None
        self._bias: Tensor | None = None
        self._drawn: Plan | None = None
        self._grids: dict[tuple, Grid] = {}  # of kinds of layers that are merged
        self._block_plan: Plan | None = None
        self._block: dict[str, Any] = {}  # extra_options of the block that the plan is of
        self._open: dict[str, Plan] = {}
        self._unpaid: str | None = None  # why no layer is merged after all, where that is known

    def patched(self, options: dict[str, Any]) -> dict[str, Any]:
        """A copy of the options with the attention patches: the attention patch last, the output patch first."""
        patches = dict(options.get("patches", {}))
        patches["attn1_patch"] = [*patches.get("attn1_patch", ()), self.before_attention]
        patches["attn1_output_patch"] = [self.after_attention, *patches.get("attn1_output_patch", ())]
        if self.call.config.cross_attention:
            patches["attn2_patch"] = [*patches.get("attn2_patch", ()), self.before_cross_attention]
            patches["attn2_output_patch"] = [self.after_cross_attention, *patches.get("attn2_output_patch", ())]
        return {**options, "patches": patches}

    # --- What a host says ---------------------------------------------------------------------------------------------

    def leave(
        self, reason: str, extra_options: dict[str, Any], detail: str = "", grid: tuple[int, int] | None = None
    ) -> None:
        """A layer is left alone. detail: for the log alone."""
        raise NotImplementedError

    def tell(self, grid: tuple[int, int], plan: Plan | None) -> None:
        """A layer on a grid is merged by a plan; None: the ratio takes away no whole token."""

    def tell_exact(self, grid: tuple[int, int], reason: str) -> None:
        """A layer on a grid is whole in this step, as the option exact_every wants it."""

    def leave_unserved(self, reason: str, grid: tuple[int, int]) -> None:
        """The options leave out the layers on a grid."""

    def find_grid(self, tokens: int, extra_options: dict[str, Any]) -> tuple[tuple[int, int], int] | None:
        """The grid that a layer of so many tokens is said to have, and its rows; None where nothing is said."""
        shape = extra_options.get("activations_shape")
        return None if shape is None or len(shape) != 4 else ((shape[2], shape[3]), shape[0])

    def is_replaced(self, part: str, extra_options: dict[str, Any]) -> bool:
        """Whether another node computes this layer of the block that runs now."""
        block = extra_options.get("block")
        if not self._replaced or block is None:
            return False
        return any((part, at) in self._replaced for at in (block, (*block, extra_options.get("block_index", 0))))

    def run_block(self, heads: int, x: Tensor) -> Callable[[], Any] | None:
        """What runs a block of that kind by itself, to be timed; None where there is none."""
        return None

    # --- The walk -----------------------------------------------------------------------------------------------------

    def before_attention(self, q: Tensor, k: Tensor, v: Tensor, extra_options: dict[str, Any]) -> tuple:
        """attn1_patch: q, k, v [B, N, C] before their projections."""
        self._layer = self._bias = self._drawn = self._block_plan = self._keeping = None
        key = None
        if not (is_compiling() or self.is_replaced("attn1", extra_options)):
            shape = tuple(extra_options.get("activations_shape") or ())
            key = shape, q.shape, k.shape, v.shape, q.dtype, extra_options.get("n_heads")
        grid = self._grids.get(key) or self._look(q, k, v, extra_options)
        if grid is None:
            return q, k, v
        if key is not None:
            self._grids[key] = grid
        residual = self._residual if self._residual is not None and self._residual.is_on else None
        behind = self._joint is not None or residual is not None
        layer = self._layer = self.call.attention(q, k, v, grid, keeps_self=behind)
        plan, place = None if layer is None else layer.plan, extra_options.get("block_index", 0)
        exact = False
        if layer is not None and residual is not None:
            self._keeping = residual, (block_name(extra_options), place)
            exact = residual.begin(self._keeping[1], q, grid)
        if self._record is not None and exact:
            self._record.left_alone(residual.told, block_name(extra_options), grid, place)
        elif self._record is not None:
            decision = self._decision(q, grid, extra_options)
            self._record.layer(block_name(extra_options), grid, plan, place, decision)
        if exact:
            self.tell_exact(grid, residual.told)
        else:
            self.tell(grid, plan)
        if layer is None:
            return q, k, v
        if self.call.config.kind.matches:
            self._block_plan, self._block = plan, extra_options
        self._bias, self._drawn = layer.bias, plan if behind else None
        return layer.q, layer.k, layer.v

    def keeping(self) -> tuple[ResidualCall, Hashable] | None:
        """Of the layer that runs now: what has some steps exact, and the layer's name (parts.AtSdpa)."""
        return self._keeping

    def after_attention(self, out: Tensor, extra_options: dict[str, Any]) -> Tensor:
        """attn1_output_patch: out [B, N or M, C], after the output projection, before the residual."""
        if self._keeping is not None:
            self._keeping[0].end(self._keeping[1])
        layer = self._layer
        self._layer = self._bias = self._drawn = self._keeping = None
        return out if layer is None else layer.unmerge(out)

    def before_cross_attention(self, q: Tensor, k: Tensor, v: Tensor, extra_options: dict[str, Any]) -> tuple:
        """attn2_patch: the block's match serves the queries of its cross-attention."""
        plan = self._block_plan
        if plan is None or self._is_left_whole("attn2", q, extra_options):
            return q, k, v
        self._open["attn2"] = plan
        return plan.merge(q), k, v

    def after_cross_attention(self, out: Tensor, extra_options: dict[str, Any]) -> Tensor:
        """attn2_output_patch."""
        plan = self._open.pop("attn2", None)
        return out if plan is None else plan.unmerge(out)

    def _look(self, q: Tensor, k: Tensor, v: Tensor, extra_options: dict[str, Any]) -> Grid | None:
        """Whether a kind of layers is merged: the grid of its tokens, or None."""
        found = self.find_grid(q.shape[1], extra_options) if q.dim() == 3 else None
        if found is None:
            self.leave("ToMe skips a layer whose grid is not known", extra_options)
            return None
        grid, rows = found
        if not self.call.serves(grid):
            reason = why_not_served(self.call.config, grid, self.call.full)
            self.leave_unserved(reason, grid)
            if self._record is not None:
                self._record.left_alone(reason, block_name(extra_options), grid, extra_options.get("block_index", 0))
            return None
        if q.shape[0] != rows or q.shape[1] != grid[0] * grid[1]:
            self.leave(
                "ToMe skips a layer whose tokens are not those of its grid: another node has tiled or merged "
                "them, or it attends over time",
                extra_options,
                f"{tuple(q.shape[:2])} for a grid of {grid[0]}x{grid[1]}",
                grid,
            )
            return None
        if k.shape[:2] != q.shape[:2] or v.shape[:2] != q.shape[:2]:
            self.leave("ToMe skips a layer that does not attend to its own tokens", extra_options, grid=grid)
            self._pass_over(grid)
            return None
        if self._is_left_whole("attn1", q, extra_options, grid):
            self._pass_over(grid)
            return None
        unpaid = self._unpaid or self._decisions.why_not_paid(self._decision(q, grid, extra_options))
        if unpaid is not None:
            self.leave(unpaid, extra_options, f"{grid[0]}x{grid[1]} tokens", grid)
            return None
        return grid

    def _pass_over(self, grid: tuple[int, int]) -> None:
        """Another node may have this layer in some calls alone."""
        self.call.pass_over(grid)
        if self._record is not None:
            self._record.count(grid)

    def _is_left_whole(
        self, part: str, x: Tensor, extra_options: dict[str, Any], grid: tuple[int, int] | None = None
    ) -> bool:
        """Whether a layer of the block is another node's, or its tokens x [B, N, C] are; which is said.

        grid: of a self-attention, whose tokens lie on it; the others' have to be those of the block's plan.
        """
        plan, shape = self._block_plan, extra_options.get("activations_shape", ())
        rows, tokens = x.shape[:2] if grid is not None else (plan.batch, plan.tokens)
        reason = why_left_whole(part, x, rows, tokens, self.is_replaced(part, extra_options))
        if reason is not None:
            self.leave(reason, extra_options, grid=grid or tuple(shape[2:4]) or None)
        return reason is not None

    def _decision(self, q: Tensor, grid: tuple[int, int], extra_options: dict[str, Any]) -> Decision | None:
        """What is known of a layer's times."""
        heads = extra_options.get("n_heads")
        block = None if is_compiling() else functools.partial(self.run_block, heads)
        return self._decisions.decision(q, grid, heads, self._host_attention, self._kernels, block)

    # --- The feed-forward layers, for the option mlp ------------------------------------------------------------------

    def hook_mlp(self, block: nn.Module) -> list[Any]:
        """Hooks on a block's feed-forward layer, where the option asks for them; returns the handles."""
        return self.hook_part("ff", block.ff) if self.call.config.mlp and hasattr(block, "ff") else []

    @contextmanager
    def mlp_hooks(self, model: Any):
        """hook_mlp on a U-Net's blocks, gone when the call ends in whatever way."""
        handles = []
        try:
            for module in model.modules() if self.call.config.mlp and isinstance(model, nn.Module) else ():
                if hasattr(module, "attn1"):
                    handles += self.hook_mlp(module)
            yield
        finally:
            for handle in handles:
                handle.remove()

    def part_plan(self, name: str, module: nn.Module, x: Any, kwargs: dict[str, Any]) -> Plan | None:
        if self._block_plan is not None and self._is_left_whole(name, x, self._block):
            self._block_plan = None
        return self._block_plan

    def open_plans(self) -> dict[str, Plan]:
        return self._open


def parts_of(call: ModelCall) -> tuple[str, ...]:
    """A block's layers that the options have merged."""
    config = call.config
    return "attn1", *("attn2",) * config.cross_attention, *("ff",) * config.mlp


def block_name(extra_options: dict[str, Any]) -> str:
    """The block as the log names it."""
    block = extra_options.get("block")
    return f"{block[0]} block {block[1]}" if block is not None else "unnamed block"
