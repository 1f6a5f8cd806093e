"""The way through a transformer block that all hosts with module hooks share.

Hooks around attn1 merge what attn1 is given and unmerge what attn1 gives. Keys get their weights where they meet the
queries, or by wider heads. attn2 and ff follow the block's match. Each host has a policy, a class made from
`MergedBlock`: how arguments are named, which layers are left alone, and who is told.
"""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from ..attention.sequence import JointCall
from ..core.grid import Grid, grid_of
from ..core.groups import spread_rows
from ..merging.call import MergedAttention, ModelCall
from ..merging.plan import Plan
from ..merging.residual import UNSEEN, ResidualCall
from .blocks import LayersSeen
from .heads import is_met, may_meet
from .parts import AroundParts, AtSdpa, Wide, Widening, argument, with_tokens
from .trials import kind_of


@dataclass(eq=False)
class Pass:
    """One block in one call: what its hooks hand to each other.

    metric: [B, N, C], what similarity is measured on; None: attn1's own tokens.
    """

    metric: Tensor | None = None
    layer: MergedAttention | None = None
    drawn_plan: Plan | None = None  # the layer's, whose keys and values are taken where they meet the queries
    plan: Plan | None = None  # the block's match, for attn2, ff, and attn1's queries alone
    open: dict[str, Plan] = field(default_factory=dict)
    bias: Tensor | None = None  # [b, M], of keys that get it where they meet the queries
    wide: Wide | None = None  # of keys that get it in wider heads
    query: Tensor | None = None  # what to_q gets in the place of attn1's input
    decision: Any = None  # what is known of the layer's times


@dataclass(eq=False)
class HookedCall:
    """One call of the model. decisions: what tells its policy which layers pay. joint: what lets queries keep their own
    tokens, None where they shall not. residual: what has some steps exact, None where nothing has. kind, layers_seen:
    see blocks.BlockHooks."""

    model: ModelCall
    decisions: Any
    batch: int
    joint: JointCall | None = None
    residual: ResidualCall | None = None
    kind: tuple = ()
    layers_seen: LayersSeen = field(default_factory=LayersSeen)
    passes: dict[MergedBlock, Pass] = field(default_factory=dict)


@dataclass(eq=False)
class Given:
    """What an attention is given: its arguments, the names of the tokens and of what keys are made from, and both.

    is_itself: whether the tokens attend to themselves.
    """

    args: tuple
    kwargs: dict[str, Any]
    name: str
    context_name: str
    x: Any
    context: Any
    is_itself: bool

    def replaced(self, q: Tensor, k: Tensor | None = None) -> tuple[tuple, dict[str, Any]]:
        """(args, kwargs) with the tokens q, and with k for the keys, which is left out where the host would take q."""
        args, kwargs = with_tokens(self.args, self.kwargs, self.name, q)
        if k is None or (k is q and self.context is None):
            return args, kwargs
        if len(args) > 1:
            return (*args[:1], k, *args[2:]), kwargs
        return args, {**kwargs, self.context_name: k}


class MergedBlock(AroundParts, AtSdpa, Widening):
    """The hooks of one transformer block. It holds nothing of a call: see Pass.

    owner: what holds the hooks of the model, with its options (`config`), this thread's call (`call`), what its
    attention codes do (`trials`), `say`, which tells a line once, and `tell_self_token`, which is told why the queries
    of a layer cannot keep their own tokens, or None.
    NO_WEIGHTS: said where an attention code takes no wider heads.
    """

    NO_WEIGHTS: str

    def __init__(self, owner: Any):
        self.owner = owner

    def hook_layers(self, block: nn.Module) -> list[Any]:
        """Register around the block's layers; returns the handles."""
        config, attn1 = self.owner.config, block.attn1
        # Ours is the last to see attn1's inputs and the first to see its output: right around the attention.
        handles = [
            attn1.register_forward_pre_hook(self._before_attention, with_kwargs=True),
            attn1.register_forward_hook(self._after_attention, prepend=True),
        ]
        if (config.wants_heads or config.keeps_exact or may_meet(config)) and getattr(attn1, "heads", None):
            handles += self.hook_sdpa(attn1)
        for name, wanted in (("attn2", config.cross_attention), ("ff", config.mlp)):
            module = getattr(block, name, None)
            if wanted and isinstance(module, nn.Module):
                handles += self.hook_part(name, module)
        return handles

    @property
    def now(self) -> Pass | None:
        """This block's pass in this thread's call."""
        call = self.owner.call
        return None if call is None else call.passes.get(self)

    def say(self, message: str) -> None:
        """Tell a line once."""
        self.owner.say(message)

    # --- What a host's policy says ------------------------------------------------------------------------------------

    def begin(self, attn1: nn.Module) -> Pass | None:
        """The block's pass, of which attn1 is about to run; None where the block is left alone."""
        return self.now

    def names(self, attn1: nn.Module) -> tuple[str, str]:
        """What attn1 calls its tokens and what it makes keys from."""
        return "x", "context"

    def is_served(self, now: Pass, given: Given) -> bool:
        """Whether attn1 is given tokens to look at, [B, N, C]; if not, says why."""
        raise NotImplementedError

    def off_grid(self, x: Tensor) -> str:
        """What is said of tokens that are no level of the latent."""
        raise NotImplementedError

    def leave(self, reason: str, grid: Grid | None = None) -> None:
        """A layer is left alone."""
        self.say(reason)

    def leave_unpaid(self, reason: str, tokens: int, grid: Grid) -> None:
        """Merging does not pay in a layer of so many tokens."""
        self.leave(f"{reason}; ToMe skips layers of {tokens} tokens", grid)

    def leave_unserved(self, grid: Grid) -> None:
        """The options leave out the layers on a grid."""

    def why_left(self, name: str, module: nn.Module, x: Any, kwargs: dict[str, Any], plan: Plan) -> str | None:
        """Why attn2 or ff, which is given x, is left alone, or None. plan: the block's."""
        raise NotImplementedError

    def why_attention_left(self, attn1: nn.Module, given: Given) -> str | None:
        """Why an attn1 on a grid that is served is left alone, or None; asked before its times are."""
        return None

    def pass_over(self, grid: Grid) -> None:
        """Such an attn1 counts all the same: the layers behind it keep their choices."""
        self.owner.call.model.pass_over(grid)

    def keeps_self(self, attn1: nn.Module, given: Given) -> bool:
        """Whether the queries of this call of a layer meet all keys: for their own tokens, or three resolutions."""
        heads, owner = getattr(attn1, "heads", None), self.owner
        if owner.call.joint is None or not heads:
            return False
        multires = owner.call.model.config.method == "multires"
        reason = owner.trials.why_no_self_token(attn1, kind_of(attn1, heads, given.x), multires)
        owner.tell_self_token(reason)
        return reason is None

    def why_not_paid(self, now: Pass, attn1: nn.Module, x: Tensor, grid: Grid, keeps_self: bool) -> str | None:
        """Why merging does not pay in a layer, or None."""
        raise NotImplementedError

    def tell(self, now: Pass, grid: Grid, plan: Plan | None) -> None:
        """A layer is merged by a plan; None: the ratio takes away no whole token."""

    def tell_exact(self, grid: Grid, reason: str) -> None:
        """A layer is whole in this step, as the option exact_every wants it."""

    def takes_weights(self, attn1: nn.Module) -> bool:
        """Whether keys of a layer may get weights at all; if not, says why."""
        return True

    def widened_input(self, now: Pass, attn1: nn.Module, d: int) -> Tensor:
        """What attn1 is given for its queries where its heads, of d channels, will be widened."""
        return now.layer.q

    def given_instead(self, now: Pass, attn1: nn.Module, given: Given, q: Tensor) -> tuple[tuple, dict[str, Any]]:
        """What attn1 is given for its layer's queries q and keys, (args, kwargs)."""
        return given.replaced(q, now.layer.k)

    # --- The walk -----------------------------------------------------------------------------------------------------

    def _before_attention(self, attn1: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple | None:
        now = self.begin(attn1)
        if now is None:
            return None
        name, context_name = self.names(attn1)
        x, context = argument(args, kwargs, 0, name), argument(args, kwargs, 1, context_name)
        given = Given(args, kwargs, name, context_name, x, context, context is None or context is x)
        call = self.owner.call
        call.layers_seen.begin(self)
        if not self.is_served(now, given):
            return None
        grid = grid_of(x.shape[1], call.model.full)
        if grid is None or x.shape[0] != call.batch:
            self.leave(self.off_grid(x))
            return None
        if not call.model.serves(grid):
            call.layers_seen.leave(self)
            self.leave_unserved(grid)
            return None
        reason = self.why_attention_left(attn1, given)
        if reason is not None:
            self.leave(reason, grid)
            self.pass_over(grid)
            return None
        meets = self.keeps_self(attn1, given)
        if self.residual is not None and not meets:
            self.residual.turn_off(UNSEEN)
        keeps_self = meets and (call.model.config.wants_heads or self.residual is not None)
        unpaid = self.why_not_paid(now, attn1, x, grid, meets and call.model.config.wants_heads)
        if unpaid is not None:
            self.leave_unpaid(unpaid, x.shape[1], grid)
            call.layers_seen.leave(self, unpaid=True)
            return None
        return self.merge_attention(now, attn1, given, grid, keeps_self)

    def merge_attention(self, now: Pass, attn1: nn.Module, given: Given, grid: Grid, keeps_self: bool) -> tuple | None:
        """What attn1 is given instead, (args, kwargs), or None."""
        call, x = self.owner.call.model, given.x
        layer = call.attention(x, x, x, grid, metric=now.metric, keeps_self=keeps_self)
        if layer is not None and self.residual is not None and self.residual.begin(self, x, grid):
            self.tell_exact(grid, self.residual.told)
        else:
            self.tell(now, grid, None if layer is None else layer.plan)
        if layer is None:
            return None
        now.layer = layer
        if keeps_self:
            now.drawn_plan = layer.plan
            return None  # attn1 gets all tokens; some of their keys are taken where they meet the queries
        now.plan = layer.plan if call.config.kind.matches else None
        return self.given_instead(now, attn1, given, self._weigh(now, attn1))

    def _weigh(self, now: Pass, attn1: nn.Module) -> Tensor:
        """Get ready to give keys their weights, where they have any. Returns what attn1 is given for its queries."""
        layer, owner = now.layer, self.owner
        heads = getattr(attn1, "heads", None)
        if layer.bias is None or not heads or not self.takes_weights(attn1):
            return layer.q
        d, *_ = kind = kind_of(attn1, heads, layer.q)
        if is_met(owner.config, d, layer.q, lambda: owner.trials.meets(attn1, kind)):
            now.bias = layer.bias
            return layer.q
        rule = owner.trials.rule(attn1, kind)
        if rule is None:
            self.say(self.NO_WEIGHTS)
            return layer.q
        now.wide = Wide(rule, spread_rows(layer.bias, layer.k.shape[0]), d)
        return self.widened_input(now, attn1, d)

    def _after_attention(self, attn1: nn.Module, args: tuple, out: Any) -> Tensor | None:
        now = self.now
        if now is None:
            return None
        if now.drawn_plan is not None and self.residual is not None:
            self.residual.end(self)
        layer, now.layer, now.drawn_plan, now.bias, now.wide, now.query = now.layer, None, None, None, None, None
        if layer is None:  # queries alone may be merged, as those of attn2
            return self._after_part("attn1", attn1, args, out)
        return self.unmerge(layer.plan, out) if layer.merges_queries else None

    # --- What the hooks of parts.py ask -------------------------------------------------------------------------------

    def meeting(self) -> tuple[JointCall | None, Plan | None, Tensor | None]:
        now = self.now
        return (None, None, None) if now is None else (self.owner.call.joint, now.drawn_plan, now.bias)

    @property
    def residual(self) -> ResidualCall | None:
        """What has some steps exact, as long as it does."""
        found = None if self.owner.call is None else self.owner.call.residual
        return found if found is not None and found.is_on else None

    def keeping(self) -> tuple[ResidualCall, Hashable] | None:
        residual = self.residual
        return None if residual is None else (residual, self)

    def wide(self) -> Wide | None:
        now = self.now
        return None if now is None else now.wide

    def open_plans(self) -> dict[str, Plan]:
        now = self.now
        return {} if now is None else now.open

    def part_plan(self, name: str, module: nn.Module, x: Any, kwargs: dict[str, Any]) -> Plan | None:
        now = self.now
        if now is None or now.plan is None:
            return None
        plan = now.plan
        reason = self.why_left(name, module, x, kwargs, plan)
        if reason is not None:
            self.leave(reason, grid_of(plan.tokens, self.owner.call.model.full))
            return None
        return plan
