"""A transformer block of diffusers or ldm under the hooks of a script: the policy of hooks/engine.py there."""

from __future__ import annotations

import functools
from threading import get_ident
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from ..autotune.detached import about_model, run_detached
from ..core.curve import is_compiling
from ..core.grid import Grid
from ..hooks.call import HookedCall, Pass
from ..hooks.engine import MergedBlock, names_of
from ..hooks.guard import why_left_whole
from ..hooks.parts import with_tokens
from ..hooks.portable import Portable
from ..merging.plan import Plan
from . import base
from .trials import code_of, is_diffusers, is_replaced

if TYPE_CHECKING:
    from .hooks import UNetAttachment


FUSED = (
    "fused projections make queries and keys from the same tokens; call unfuse_qkv_projections() or choose method merge"
)


class ScriptBlock(Portable, MergedBlock):
    """The hooks of one transformer block. Holds no state of a call and no module."""

    owner: UNetAttachment
    NO_WEIGHTS = "this attention processor takes no weights of keys; proportional attention is off"
    OTHER_TOKENS = "ToMe skips a self-attention that is given other tokens than its block"
    BEGINS = False
    code_of = staticmethod(code_of)

    def __init__(self, owner: UNetAttachment):
        super().__init__(owner)
        self._watch: Any = None  # a handle on to_k, in the first call of a kind of attention

    def afresh(self) -> dict[str, Any]:
        return {"_hooked": []}

    def hook(self, block: nn.Module) -> list[Any]:
        """Register; returns the handles."""
        return [
            block.register_forward_pre_hook(self._before_block, with_kwargs=True),
            block.register_forward_hook(self._after_block),
            *self.hook_layers(block),
        ]

    def _before_block(self, block: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        call = self.owner.calls.get(get_ident())
        x = args[0] if args else kwargs.get("hidden_states", kwargs.get("x"))
        if call is not None and isinstance(x, Tensor):
            call.passes[self] = Pass(metric=x, block=block)

    def _after_block(self, block: nn.Module, args: tuple, out: Any) -> None:
        if self._watch is not None:
            self._stop_watching()
        call = self.owner.calls.get(get_ident())
        if call is not None:
            call.passes.pop(self, None)

    def off_grid(self, call: HookedCall, x: Tensor) -> str:
        return "ToMe skips a layer whose tokens are not those of the image (it attends over time)"

    def leave_unserved(self, call: HookedCall, grid: Grid) -> None:
        call.tally.leave(call.model, grid)

    def meets(self, call: HookedCall, attn1: nn.Module, x: Tensor) -> bool:
        if not self.owner.merge_attn or is_fused(attn1) or base.compiles():
            return False
        return super().meets(call, attn1, x)

    def decision(
        self, call: HookedCall, now: Pass, attn1: nn.Module, x: Tensor, grid: Grid, kernels: tuple[str, ...]
    ) -> Any:
        block = None if is_compiling() else functools.partial(run_detached, now.block)
        about = functools.partial(about_model, now.block, x.device)
        return call.decisions.decision(x, grid, attn1.heads, kernels=kernels, block=block, about=about)

    def tell(self, call: HookedCall, now: Pass, plan: Plan | None, exact: str | None = None) -> None:
        if plan is None:
            call.tally.leave(call.model, now.kind.grid)
        else:
            call.tally.merged = True  # where this one is exact, in the steps behind

    def merge_attention(
        self, call: HookedCall, now: Pass, attn1: nn.Module, args: tuple, kwargs: dict[str, Any], x: Tensor
    ) -> tuple | None:
        method = call.model.config.kind
        if not (self.owner.merge_attn and now.kind.is_itself):
            return self._merge_queries(call, now, attn1, args, kwargs, x) if method.matches else None
        mask = args[2] if len(args) > 2 else kwargs.get("attention_mask", kwargs.get("mask"))
        if method.keys and mask is not None:
            self.say("ToMe skips a self-attention with a mask")
            return None
        is_uneven, takes_keys = method.keys != method.queries, True
        if is_uneven:
            takes_keys = self.owner.takes_keys.get(now.kind.code)
            if getattr(attn1, "fused_projections", False) and is_fused(attn1):
                self.say(FUSED)
                return None
            if takes_keys is False and not now.is_drawn:
                what = type(getattr(attn1, "processor", None) or attn1).__name__
                self.say(f"ToMe skips the self-attention of {what}, which makes its keys itself; choose method merge")
                return None
        name, context_name = names_of(type(attn1).forward)
        is_told = args[1] if len(args) > 1 else kwargs.get(context_name)
        # Asked before a mode is entered, which would see the trial.
        is_given = is_uneven and is_told is None and not (now.is_drawn or is_compiling())
        is_given = is_given and self.owner.trials.projects_itself(attn1, x)
        made = super().merge_attention(call, now, attn1, args, kwargs, x)
        if made is None or not is_uneven or is_compiling():
            return made
        if is_given:
            # Many processors take what is given keys for an attention to the prompt, and do another thing there.
            now.keys = now.layer.k
            self._hook_projections(attn1, attn1.heads)
            made = with_tokens(args, kwargs, name, made[0][0] if made[0] else made[1][name])
        if takes_keys is None:
            self._watch_keys(now.kind.code, attn1)
        return made

    def hook_projections(self, attn1: nn.Module, heads: int) -> list[Any]:
        handles = super().hook_projections(attn1, heads)
        return [*handles, *(getattr(attn1, n).register_forward_pre_hook(self._give_keys) for n in ("to_k", "to_v"))]

    def _give_keys(self, module: nn.Module, args: tuple) -> tuple | None:
        now = self.now
        if now is None or now.keys is None or args[0].shape != now.layer.q.shape:
            return None
        return (now.keys, *args[1:])

    def _merge_queries(
        self, call: HookedCall, now: Pass, attn1: nn.Module, args: tuple, kwargs: dict[str, Any], x: Tensor
    ) -> tuple | None:
        """merge_attention where keys are others' (the block only attends to a prompt) or attn1 is not to be merged: the
        block's match serves attn1's queries, and its other layers."""
        plan = now.plan = call.model.plan(now.metric, now.kind.grid)
        if plan is None:
            self.tell(call, now, None)
        if plan is None or not (self.owner.merge_attn and call.model.config.kind.queries):
            return None
        why = self._why_anothers("attn1", attn1, kwargs, x.shape[1])
        if why is not None:
            self.say(why)
            return None
        self.tell(call, now, plan)
        now.open["attn1"] = plan
        return with_tokens(args, kwargs, names_of(type(attn1).forward)[0], plan.merge(x))

    def _watch_keys(self, code: tuple, attn1: nn.Module) -> None:
        """See once for each attention code whether its keys come from the context that it is given."""

        def see(module: nn.Module, args: tuple) -> None:
            now = self.now
            # Another thread's layer may run before, or one that an exception left its watch on.
            if now is not None and now.layer is not None and now.kind.code == code:
                self.owner.takes_keys[code] = args[0].shape[1] == now.layer.k.shape[1]
                self._stop_watching()

        self._stop_watching()
        self._watch = attn1.to_k.register_forward_pre_hook(see)

    def _stop_watching(self) -> None:
        if self._watch is not None:
            self._watch.remove()
            self._watch = None

    def takes_weights(self, attn1: nn.Module) -> bool:
        fused = is_fused(attn1)
        if fused:
            self.say("fused projections take no weights of keys; proportional attention is off")
        return not fused

    def forget_projections(self) -> None:
        super().forget_projections()
        self._stop_watching()

    def why_left(self, name: str, module: nn.Module, x: Any, kwargs: dict[str, Any], plan: Plan) -> str | None:
        return why_left_whole(name, x, plan.batch, plan.tokens) or self._why_anothers(name, module, kwargs, plan.tokens)

    def part_plan(self, name: str, module: nn.Module, x: Any, kwargs: dict[str, Any]) -> Plan | None:
        plan = super().part_plan(name, module, x, kwargs)
        if plan is not None:
            self.owner.call.tally.merged = True
        return plan

    def _why_anothers(self, name: str, module: nn.Module, kwargs: dict[str, Any], tokens: int) -> str | None:
        """Why a module that gets merged queries, or tokens, may need every token or its place; or None."""
        processor, why = getattr(module, "processor", None), None
        made = type(module).forward.__module__.partition(".")[0]
        if is_replaced(module) or made != type(module).__module__.partition(".")[0]:
            return why_left_whole(name, None, 0, 0, replaced=True)
        if processor is not None and not is_diffusers(type(processor)):
            why = f"{type(processor).__name__} replaces its attention"
        elif kwargs.get("ip_adapter_masks") is not None:
            why = "an IP-Adapter masks parts of the picture"
        else:
            mask = next((kwargs[key] for key in ("attention_mask", "mask") if kwargs.get(key) is not None), None)
            if isinstance(mask, Tensor) and mask.dim() > 2 and mask.shape[-2] == tokens:
                why = "it has a mask for each token"
        return None if why is None else f"{name} is not merged: {why}"


def is_fused(attention: nn.Module) -> bool:
    """Whether one projection makes queries, keys and values. diffusers' U-Nets keep the mark after
    unfuse_qkv_projections(), and its plain processors pay no heed to it."""
    kind = type(getattr(attention, "processor", None))
    plain = is_diffusers(kind) and not kind.__name__.startswith("Fused")
    return getattr(attention, "fused_projections", False) and not plain
