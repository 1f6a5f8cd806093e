"""A transformer block of diffusers or ldm under the hooks of a script: the policy of hooks/engine.py there."""

from __future__ import annotations

import functools
import weakref
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from ..attention.combine import TORCHS
from ..autotune.detached import about_model, run_detached
from ..core.curve import is_compiling
from ..core.grid import Grid
from ..hooks import engine
from ..hooks.engine import Given, MergedBlock, Pass
from ..hooks.guard import why_left_whole
from ..hooks.heads import PROJECTIONS, head_size
from ..hooks.parts import argument, output_of, with_tokens
from ..hooks.portable import Portable
from ..merging.plan import Plan
from . import base
from .outcome import CallOutcome
from .trials import code_of, is_diffusers, is_replaced, names_of

if TYPE_CHECKING:
    from .hooks import UNetAttachment


@dataclass(eq=False)
class BlockPass(Pass):
    """block: the module. keys: [B, M, C], what to_k and to_v get in the place of attn1's input."""

    block: nn.Module | None = None
    keys: Tensor | None = None


@dataclass(eq=False)
class ScriptCall(engine.HookedCall):
    """One call of the model. keeps_self: by what of a layer decides."""

    outcome: CallOutcome = field(default_factory=CallOutcome)
    keeps_self: dict[tuple, bool] = field(default_factory=dict)


class ScriptBlock(Portable, MergedBlock):
    """The hooks of one transformer block. Holds no state of a call and no module."""

    owner: UNetAttachment
    NO_WEIGHTS = "this attention processor takes no weights of keys; proportional attention is off"

    def __init__(self, owner: UNetAttachment):
        super().__init__(owner)
        self._hooked: list[weakref.ref] = []  # the projections that carry their hooks
        self._projection_handles: list[Any] = []
        self._watch: Any = None  # a handle on to_k, in the first call of a kind of attention

    def afresh(self) -> dict[str, Any]:
        return {"_hooked": []}

    def hook(self, block: nn.Module) -> list[Any]:
        """Register; returns the handles."""
        return [
            block.register_forward_pre_hook(self._before_block, with_kwargs=True),
            block.register_forward_hook(self._after_block),
            SimpleNamespace(remove=self.forget_projections),
            *self.hook_layers(block),
        ]

    def _before_block(self, block: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        x = argument(args, kwargs, 0, "hidden_states", "x")
        if self.owner.call is not None and isinstance(x, Tensor):
            self.owner.call.passes[self] = BlockPass(metric=x, block=block)

    def _after_block(self, block: nn.Module, args: tuple, out: Any) -> None:
        self._stop_watching()
        if self.owner.call is not None:
            self.owner.call.passes.pop(self, None)

    def names(self, attn1: nn.Module) -> tuple[str, str]:
        return names_of(type(attn1).forward)

    def is_served(self, now: Pass, given: Given) -> bool:
        x = given.x
        if not isinstance(x, Tensor) or x.dim() != 3 or x.shape[:2] != now.metric.shape[:2]:
            self.say("ToMe skips a self-attention that is given other tokens than its block")
            return False
        return True

    def off_grid(self, x: Tensor) -> str:
        return "ToMe skips a layer whose tokens are not those of the image (it attends over time)"

    def leave_unserved(self, grid: Grid) -> None:
        self.owner.call.outcome.leave(self.owner.call.model, grid)

    def why_attention_left(self, attn1: nn.Module, given: Given) -> str | None:
        # What a cache answers was given with another step's merged tokens.
        return why_left_whole("attn1", given.x, *given.x.shape[:2], is_answered(attn1))

    def keeps_self(self, attn1: nn.Module, given: Given) -> bool:
        call = self.owner.call
        if call.joint is None or not self.owner.merge_attn or not given.is_itself or is_fused(attn1):
            return False
        d = head_size(attn1, attn1.heads, given.x)
        key = (type(attn1), type(getattr(attn1, "processor", None)), attn1.heads, d, given.x.shape[1], given.x.dtype)
        if key not in call.keeps_self:  # asked once a call and not once a layer
            call.keeps_self[key] = not base.compiles() and super().keeps_self(attn1, given)
        return call.keeps_self[key]

    def why_not_paid(self, now: Pass, attn1: nn.Module, x: Tensor, grid: Grid, keeps_self: bool) -> str | None:
        block = None if is_compiling() else functools.partial(run_detached, now.block)
        about, kernels = functools.partial(about_model, now.block, x.device), TORCHS if keeps_self else ()
        decisions = self.owner.call.decisions
        return decisions.why_not_paid(
            decisions.decision(x, grid, attn1.heads, kernels=kernels, block=block, about=about)
        )

    def tell(self, now: Pass, grid: Grid, plan: Plan | None) -> None:
        outcome = self.owner.call.outcome
        if plan is None:
            outcome.leave(self.owner.call.model, grid)
        else:
            outcome.merged = True

    def tell_exact(self, grid: Grid, reason: str) -> None:
        self.owner.call.outcome.merged = True  # in the steps behind

    def merge_attention(self, now: Pass, attn1: nn.Module, given: Given, grid: Grid, keeps_self: bool) -> tuple | None:
        call = self.owner.call.model
        kind = call.config.kind
        if self.owner.merge_attn and given.is_itself:
            if not self._can_merge_keys(attn1, given, kind, keeps_self):
                return None
            made = super().merge_attention(now, attn1, given, grid, keeps_self)
            if made is not None and kind.keys != kind.queries:
                self._watch_keys(attn1, now.layer.k.shape[1])
            return made
        if not kind.matches:
            return None
        now.plan = call.plan(now.metric, grid)
        if now.plan is None:
            self.tell(now, grid, None)
        if now.plan is None or not (self.owner.merge_attn and kind.queries):
            return None
        why = self._why_anothers("attn1", attn1, given.kwargs, given.x.shape[1])
        if why is not None:
            self.say(why)
            return None
        self.tell(now, grid, now.plan)
        now.open["attn1"] = now.plan  # keys of its own (the block only attends to a prompt): queries alone
        return with_tokens(given.args, given.kwargs, given.name, now.plan.merge(given.x))

    def _can_merge_keys(self, attn1: nn.Module, given: Given, kind: Any, keeps_self: bool) -> bool:
        if kind.keys and argument(given.args, given.kwargs, 2, "attention_mask", "mask") is not None:
            self.say("ToMe skips a self-attention with a mask")
            return False
        if is_fused(attn1) and kind.keys != kind.queries:
            self.say(
                "fused projections make queries and keys from the same tokens; call unfuse_qkv_projections() or choose "
                "method merge"
            )
            return False
        if not keeps_self and kind.keys != kind.queries and not self.owner.takes_keys.get(code_of(attn1), True):
            what = type(getattr(attn1, "processor", None) or attn1).__name__
            self.say(f"ToMe skips the self-attention of {what}, which makes its keys itself; choose method merge")
            return False
        return True

    def _watch_keys(self, attn1: nn.Module, tokens: int) -> None:
        """See once for each attention code whether its keys come from the context that it is given."""
        code = code_of(attn1)
        if code in self.owner.takes_keys or is_compiling():
            return

        def see(module: nn.Module, args: tuple) -> None:
            self.owner.takes_keys[code] = args[0].shape[1] == tokens
            self._stop_watching()

        self._stop_watching()
        self._watch = attn1.to_k.register_forward_pre_hook(see)

    def _stop_watching(self) -> None:
        if self._watch is not None:
            self._watch.remove()
            self._watch = None

    def takes_weights(self, attn1: nn.Module) -> bool:
        if is_fused(attn1):
            self.say("fused projections take no weights of keys; proportional attention is off")
        return not is_fused(attn1)

    def given_instead(self, now: Pass, attn1: nn.Module, given: Given, q: Tensor) -> tuple[tuple, dict[str, Any]]:
        args, kwargs = super().given_instead(now, attn1, given, q)
        is_told = argument(args, kwargs, 1, given.context_name) is not None and given.context is None
        if not is_told or is_compiling() or not self.owner.trials.projects_itself(attn1, given.x):
            return args, kwargs
        # Many processors take what is given keys for an attention to the prompt, and do another thing there.
        now.keys = now.layer.k
        self._follow_projections(attn1)
        return given.replaced(q)

    def hook_projections(self, attn1: nn.Module, heads: int) -> list[Any]:
        handles = super().hook_projections(attn1, heads)
        return [*handles, *(getattr(attn1, n).register_forward_pre_hook(self._give_keys) for n in ("to_k", "to_v"))]

    def _give_keys(self, module: nn.Module, args: tuple) -> tuple | None:
        now = self.now
        if now is None or now.keys is None or args[0].shape != now.layer.q.shape:
            return None
        return (now.keys, *args[1:])

    def _after_attention(self, attn1: nn.Module, args: tuple, out: Any) -> Tensor | None:
        if self.now is not None:
            self.now.keys = None
        return super()._after_attention(attn1, args, out)

    def widened_input(self, now: Pass, attn1: nn.Module, d: int) -> Tensor:
        self._follow_projections(attn1)
        return now.layer.q

    def _follow_projections(self, attn1: nn.Module) -> None:
        """Has the hooks on the projections that are there now: a LoRA loaded later puts others in their place."""
        modules = [*(getattr(attn1, name) for name in PROJECTIONS), output_of(attn1)]
        if [ref() for ref in self._hooked] != modules:
            self.forget_projections()
            self._hooked = [weakref.ref(module) for module in modules]
            self._projection_handles = self.hook_projections(attn1, attn1.heads)

    def forget_projections(self) -> None:
        """Take the hooks off the projections."""
        for handle in self._projection_handles:
            handle.remove()
        self._projection_handles, self._hooked = [], []
        self._stop_watching()

    def why_left(self, name: str, module: nn.Module, x: Any, kwargs: dict[str, Any], plan: Plan) -> str | None:
        return why_left_whole(name, x, plan.batch, plan.tokens) or self._why_anothers(name, module, kwargs, plan.tokens)

    def part_plan(self, name: str, module: nn.Module, x: Any, kwargs: dict[str, Any]) -> Plan | None:
        plan = super().part_plan(name, module, x, kwargs)
        if plan is not None:
            self.owner.call.outcome.merged = True
        return plan

    def _why_anothers(self, name: str, module: nn.Module, kwargs: dict[str, Any], tokens: int) -> str | None:
        """Why a module that gets merged queries, or tokens, may need every token or its place; or None."""
        processor, why = getattr(module, "processor", None), None
        made = type(module).forward.__module__.partition(".")[0]
        if is_replaced(module) or made != type(module).__module__.partition(".")[0]:
            return why_left_whole(name, None, 0, 0, replaced=True)
        if processor is not None and not is_diffusers(processor):
            why = f"{type(processor).__name__} replaces its attention"
        elif kwargs.get("ip_adapter_masks") is not None:
            why = "an IP-Adapter masks parts of the picture"
        else:
            mask = next((kwargs[key] for key in ("attention_mask", "mask") if kwargs.get(key) is not None), None)
            if isinstance(mask, Tensor) and mask.dim() > 2 and mask.shape[-2] == tokens:
                why = "it has a mask for each token"
        return None if why is None else f"{name} is not merged: {why}"


def is_answered(module: nn.Module) -> bool:
    """Whether diffusers' own hooks on an attention may answer in its place: caches (PyramidAttentionBroadcast,
    TaylorSeer), guidance that skips layers."""
    return bool(getattr(getattr(module, "_diffusers_hook", None), "hooks", None))


def is_fused(attention: nn.Module) -> bool:
    """Whether one projection makes queries, keys and values. diffusers' U-Nets keep the mark after
    unfuse_qkv_projections(), and its plain processors pay no heed to it."""
    processor = getattr(attention, "processor", None)
    plain = is_diffusers(processor) and not type(processor).__name__.startswith("Fused")
    return getattr(attention, "fused_projections", False) and not plain
