"""The way through a transformer block that all hosts with module hooks share.

Hooks around attn1 merge what attn1 is given and unmerge what attn1 gives. Keys get their weights where they meet the
queries, or by wider heads. attn2 and ff follow the block's match. Each host has a policy, a class made from
`MergedBlock`: which layers are left alone, and who is told. Steps with small layers wait for the processor, so a hook
does little: what layers of one kind have in common is asked once a call (call.LayerKind).
"""

from __future__ import annotations

import functools
import inspect
import weakref
from collections.abc import Callable
from contextlib import nullcontext
from threading import Lock, get_ident
from types import SimpleNamespace
from typing import Any

from torch import Tensor, nn

from ..attention.combine import TORCHS
from ..attention.sdpa import NOT_AS_TRIED, AroundSdpa, HostAttention, attend_weighed, attend_with_self_token
from ..core.curve import is_compiling
from ..core.grid import Grid, grid_of
from ..core.groups import spread_rows
from ..merging.plan import Plan
from ..merging.residual import UNSEEN
from .call import MET, NONE, HookedCall, LayerKind, Pass
from .guard import why_left_whole
from .heads import is_met, why_no_self_token
from .parts import AroundParts, Wide, Widening, output_of, with_tokens
from .trials import kind_of

_hooking = Lock()  # around the putting on of a layer's hooks: threads may share a model


class MergedBlock(AroundParts, Widening):
    """The hooks of one transformer block. It holds nothing of a call: see Pass.

    owner: what holds the hooks of the model, with its options (`config`), the calls under way by thread (`calls`), what
    its attention codes do (`trials`), `say`, which tells a line once, and `tell_self_token`, which is told why the
    queries of a layer cannot keep their own tokens, or None.
    NO_WEIGHTS: said where an attention code takes no wider heads. OTHER_TOKENS, OTHER_KEYS: said where attn1 gets other
    tokens than its block, or keys of others, and is left alone; None: nothing is said, or they may be others'.
    BEGINS: whether a pass begins with attn1; else a hook of the policy begins it.
    """

    NO_WEIGHTS: str
    OTHER_TOKENS: str | None = None
    OTHER_KEYS: str | None = None
    BEGINS = True

    def __init__(self, owner: Any):
        self.owner = owner
        self._hooked: list[weakref.ref] = []  # the projections that carry their hooks
        self._projection_handles: list[Any] = []

    def hook_layers(self, block: nn.Module) -> list[Any]:
        """Register around the block's layers; returns the handles."""
        config, attn1 = self.owner.config, block.attn1
        # Ours is the last to see attn1's inputs and the first to see its output: right around the attention. The second
        # runs after an exception too: a mode must not stay behind.
        handles = [
            attn1.register_forward_pre_hook(self._before_attention, with_kwargs=True),
            attn1.register_forward_hook(self._after_attention, prepend=True, always_call=True),
            SimpleNamespace(remove=self.forget_projections),
        ]
        for name, wanted in (("attn2", config.cross_attention), ("ff", config.mlp)):
            module = getattr(block, name, None)
            if wanted and isinstance(module, nn.Module):
                handles += self.hook_part(name, module)
        return handles

    def forget_projections(self) -> None:
        """Take the hooks off the projections."""
        for handle in self._projection_handles:
            handle.remove()
        self._projection_handles, self._hooked = [], []

    @property
    def now(self) -> Pass | None:
        """This block's pass in this thread's call."""
        call = self.owner.calls.get(get_ident())
        return None if call is None else call.passes.get(self)

    def say(self, message: str) -> None:
        """Tell a line once."""
        self.owner.say(message)

    # --- What a host's policy says ------------------------------------------------------------------------------------

    def code_of(self, attn1: nn.Module) -> Any:
        """What decides how a layer attends, to be compared; None: another extension answers in its place, in this call
        perhaps alone."""
        raise NotImplementedError

    def decision(
        self, call: HookedCall, now: Pass, attn1: nn.Module, x: Tensor, grid: Grid, kernels: tuple[str, ...]
    ) -> Any:
        """What is known of a layer's times. kernels: of torch's, where they are called for it."""
        raise NotImplementedError

    def off_grid(self, call: HookedCall, x: Tensor) -> str:
        """What is said of tokens that are no level of the latent."""
        raise NotImplementedError

    def leave(self, call: HookedCall, reason: str, grid: Grid | None = None) -> None:
        """A layer is left alone."""
        self.say(reason)

    def leave_unserved(self, call: HookedCall, grid: Grid) -> None:
        """The options leave out the layers on a grid."""

    def why_left(self, name: str, module: nn.Module, x: Any, kwargs: dict[str, Any], plan: Plan) -> str | None:
        """Why attn2 or ff, which is given x, is left alone, or None. plan: the block's."""
        raise NotImplementedError

    def pass_over(self, call: HookedCall, grid: Grid) -> None:
        """A layer that another extension has counts all the same: those behind it keep their choices."""
        call.model.pass_over(grid)

    def meets(self, call: HookedCall, attn1: nn.Module, x: Tensor) -> bool:
        """Whether the queries of a layer's kind meet all keys: for their own tokens, or three resolutions."""
        owner, kind, multires = self.owner, kind_of(attn1, attn1.heads, x), call.model.config.method == "multires"
        reason = why_no_self_token(lambda: owner.trials.meets(attn1, kind), *kind, multires)
        owner.tell_self_token(reason)
        return reason is None

    def tell(self, call: HookedCall, now: Pass, plan: Plan | None, exact: str | None = None) -> None:
        """To the call's tally: a layer is merged by a plan; None: the ratio takes away no whole token. exact: why it is
        whole in this step, as the option exact_every wants it."""

    def takes_weights(self, attn1: nn.Module) -> bool:
        """Whether keys of a layer may get weights at all; if not, says why."""
        return True

    def widened_input(self, now: Pass, q: Tensor, heads: int, d: int) -> Tensor:
        """What attn1 is given for its queries q where its heads, of d channels, will be widened."""
        return q

    # --- The walk -----------------------------------------------------------------------------------------------------

    def _before_attention(self, attn1: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple | None:
        call = self.owner.calls.get(get_ident())
        if call is None:
            return None
        if self.BEGINS:
            call.passes[self] = Pass()
        now = call.passes.get(self)
        if now is None:
            return None
        names, seen, is_traced = names_of(type(attn1).forward), call.layers_seen, is_compiling()
        x = args[0] if args else kwargs.get(names[0])
        context = args[1] if len(args) > 1 else kwargs.get(names[1])
        is_itself = context is None or context is x
        seen.others += 1
        if not is_traced:  # a graph that is traced keeps its hooks
            seen.busy.add(self)
        metric = x if now.metric is None else now.metric
        if not isinstance(x, Tensor) or x.dim() != 3 or x.shape[:2] != metric.shape[:2]:
            if self.OTHER_TOKENS is not None:
                self.say(self.OTHER_TOKENS)
            return None
        if not is_itself and self.OTHER_KEYS is not None:
            self.leave(call, self.OTHER_KEYS)
            return None
        code, heads = self.code_of(attn1), getattr(attn1, "heads", None)
        if is_traced:
            kind = self._find_kind(call, now, attn1, x, code, is_itself)
        else:
            size = getattr(attn1.to_q, "out_features", None)
            key = code, is_itself, heads, size, x.shape, x.dtype, x.device, x.requires_grad
            kind = call.kinds.get(key)
            if kind is None:
                kind = call.kinds[key] = self._find_kind(call, now, attn1, x, code, is_itself)
        if kind.is_merged:
            now.kind, keeps_exact = kind, call.residual is not None and call.residual.is_on
            now.is_drawn = kind.meets and (kind.wants_heads or keeps_exact)
            return self.merge_attention(call, now, attn1, args, kwargs, x)
        if kind.grid is None:
            self.leave(call, self.off_grid(call, x))
        elif not kind.is_served:
            seen.leave(self)
            self.leave_unserved(call, kind.grid)
        elif code is None:
            self.leave(call, why_left_whole("attn1", x, *x.shape[:2], replaced=True), kind.grid)
            self.pass_over(call, kind.grid)
        else:
            seen.leave(self, unpaid=True)
            self.leave(call, f"{kind.unpaid}; ToMe skips layers of {x.shape[1]} tokens", kind.grid)
        return None

    def _find_kind(
        self, call: HookedCall, now: Pass, attn1: nn.Module, x: Tensor, code: Any, is_itself: bool
    ) -> LayerKind:
        """What holds for attn1, which is given x, and for the layers like it."""
        kind, model, heads = LayerKind(code, is_itself), call.model, getattr(attn1, "heads", None)
        kind.grid = grid_of(x.shape[1], model.full) if x.shape[0] == call.batch else None
        kind.is_served = kind.grid is not None and model.serves(kind.grid)
        if not kind.is_served or code is None:
            return kind
        kind.meets = call.joint is not None and is_itself and bool(heads) and self.meets(call, attn1, x)
        if call.residual is not None and not kind.meets:
            call.residual.turn_off(UNSEEN)
        kind.wants_heads, kind.unpaid = model.config.wants_heads, call.unpaid
        if kind.unpaid is None:
            kernels = TORCHS if kind.meets and kind.wants_heads else ()
            kind.decision = self.decision(call, now, attn1, x, kind.grid, kernels)
            kind.unpaid = call.decisions.why_not_paid(kind.decision)
        kind.is_merged = kind.unpaid is None
        return kind

    def merge_attention(
        self, call: HookedCall, now: Pass, attn1: nn.Module, args: tuple, kwargs: dict[str, Any], x: Tensor
    ) -> tuple | None:
        """What attn1 is given instead, (args, kwargs), or None."""
        residual, grid, exact = call.residual, now.kind.grid, None
        layer = now.layer = call.model.attention(x, x, x, grid, metric=now.metric, keeps_self=now.is_drawn)
        if layer is not None and residual is not None and residual.begin(self, x, grid):
            exact = residual.told
        if call.tally is not None:
            self.tell(call, now, None if layer is None else layer.plan, exact)
        if layer is None:
            return None
        if now.is_drawn:  # attn1 gets all tokens
            self._go_around(now, attn1)
            return None
        now.plan = layer.plan if call.model.config.kind.matches else None
        q, k = layer.q if layer.bias is None else self._weigh(now, attn1), layer.k
        name, context_name = names_of(type(attn1).forward)
        if len(args) > 1:
            return (q, None if k is q and args[1] is None else k, *args[2:]), kwargs
        if k is not q or kwargs.get(context_name) is not None:  # else the host takes the tokens for the keys too
            kwargs = {**kwargs, context_name: k}
        return with_tokens(args, kwargs, name, q)

    def _weigh(self, now: Pass, attn1: nn.Module) -> Tensor:
        """Get ready to give keys their weights. Returns what attn1 is given for its queries."""
        layer, kind, heads = now.layer, now.kind, getattr(attn1, "heads", None)
        if kind.weights is None:
            kind.weights = self._find_weights(kind, attn1, heads, layer.q)
        if kind.weights == NONE:
            return layer.q
        if kind.weights == MET:
            now.bias = layer.bias
            self._go_around(now, attn1)
            return layer.q
        now.wide = Wide(kind.weights, spread_rows(layer.bias, layer.k.shape[0]), kind.d)
        self._hook_projections(attn1, heads)
        return self.widened_input(now, layer.q, heads, kind.d)

    def _find_weights(self, kind: LayerKind, attn1: nn.Module, heads: int | None, q: Tensor) -> str:
        """How the keys of a layer that is given q get their weights (LayerKind.weights)."""
        if not heads or not self.takes_weights(attn1):
            return NONE
        owner, given = self.owner, kind_of(attn1, heads, q)
        kind.d = given[0]
        if is_met(owner.config, kind.d, q, lambda: owner.trials.meets(attn1, given)):
            return MET
        rule = owner.trials.rule(attn1, given)
        if rule is None:
            self.say(self.NO_WEIGHTS)
        return NONE if rule is None else rule

    def _hook_projections(self, attn1: nn.Module, heads: int) -> None:
        """On the projections that are there now: a LoRA loaded later puts others in their place."""
        modules = [attn1.to_q, attn1.to_k, attn1.to_v, output_of(attn1)]
        if self._are_hooked(modules):
            return
        with nullcontext() if is_compiling() else _hooking:
            if not self._are_hooked(modules):  # another thread may have been here meanwhile
                self.forget_projections()
                self._projection_handles = self.hook_projections(attn1, heads)
                self._hooked = [weakref.ref(module) for module in modules]

    def _are_hooked(self, modules: list[nn.Module]) -> bool:
        return bool(self._hooked) and all(ref() is one for ref, one in zip(self._hooked, modules, strict=True))

    def _go_around(self, now: Pass, attn1: nn.Module) -> None:
        """Have attn1's attention come to `_attend` until attn1 ends."""
        now.mode = AroundSdpa(self._attend, attn1)
        now.mode.__enter__()

    def _attend(self, attention: HostAttention, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Where attn1's keys meet its queries: some are drawn, or each gets its weight. Asks anew what is to be done,
        since an interrupt can leave the mode on that calls it.

        q [B, H, N, d], k and v [B, H, M, d] -> [B, H, N, d].
        """
        call = self.owner.calls.get(get_ident())
        now = None if call is None else call.passes.get(self)
        if now is None or now.layer is None or not now.is_drawn:
            return attend_weighed(None if now is None else now.bias, self._missed, attention, q, k, v)
        keeping = None if call.residual is None else (call.residual, self)
        return attend_with_self_token(call.joint, now.layer.plan, self._missed, attention, q, k, v, keeping)

    def _missed(self) -> None:
        self.say(NOT_AS_TRIED)

    def _after_attention(self, attn1: nn.Module, args: tuple, out: Any) -> Tensor | None:
        call = self.owner.calls.get(get_ident())
        now = None if call is None else call.passes.get(self)
        if now is None:
            return None
        mode, now.mode = now.mode, None
        if mode is not None:
            mode.__exit__(None, None, None)
        layer, now.layer, now.bias, now.wide, now.query, now.keys = now.layer, None, None, None, None, None
        if out is None:  # an exception, after which another package may run the layer again
            now.open.pop("attn1", None)
            return None
        if mode is not None and not mode.calls:
            self._missed()
        if now.is_drawn and layer is not None and call.residual is not None:
            call.residual.end(self)
        if layer is None:  # queries alone may be merged, as those of attn2
            return self._after_part("attn1", attn1, args, out)
        return self.unmerge(layer.plan, out) if layer.merges_queries else None

    # --- What the hooks of parts.py ask -------------------------------------------------------------------------------

    def wide(self) -> Wide | None:
        now = self.now
        return None if now is None else now.wide

    def open_plans(self) -> dict[str, Plan]:
        now = self.now
        return {} if now is None else now.open

    def part_plan(self, name: str, module: nn.Module, x: Any, kwargs: dict[str, Any]) -> Plan | None:
        now = self.now
        plan = None if now is None else now.plan
        reason = None if plan is None else self.why_left(name, module, x, kwargs, plan)
        if reason is not None:
            call = self.owner.calls[get_ident()]
            self.leave(call, reason, grid_of(plan.tokens, call.model.full))
        return plan if reason is None else None


@functools.lru_cache(maxsize=64)
def names_of(forward: Callable[..., Any]) -> tuple[str, str]:
    """What diffusers or ldm call an attention's tokens and what its keys are made from."""
    if "encoder_hidden_states" in inspect.signature(forward).parameters:
        return "hidden_states", "encoder_hidden_states"
    return "x", "context"
