"""ToMe on a U-Net of the ldm or sgm classes, by module hooks.

Nothing is replaced: the host's attention codes, LoRA and other extensions keep working. A hook on the model makes
the state of each call and one after it takes it away; hooks on the blocks' attn1 (attn2, ff) merge and unmerge.
"""

from __future__ import annotations

import functools
import re
import weakref
from collections.abc import Callable, Iterator
from typing import Any

from torch import Tensor, nn

from ..shared_tome import ModelCall
from ..shared_tome.attention.combine import TORCHS
from ..shared_tome.attention.sdpa import (
    NOT_AS_TRIED,
    Handler,
    HostAttention,
    SdpaHooks,
    attend_own,
    attend_weighed,
    leave_left_modes,
)
from ..shared_tome.attention.sequence import JointCall
from ..shared_tome.autotune.decisions import Decisions
from ..shared_tome.autotune.detached import about_model, run_bare
from ..shared_tome.autotune.verdict import Verdict
from ..shared_tome.core.grid import Grid, grid_of
from ..shared_tome.core.groups import spread_rows
from ..shared_tome.core.progress import percent_of_time
from ..shared_tome.hooks.blocks import BlockHooks, Judged
from ..shared_tome.hooks.guard import is_replaced, why_left_whole
from ..shared_tome.hooks.heads import (
    MET,
    find_rule,
    head_size,
    is_met,
    may_meet,
    meets_at_sdpa,
    narrow,
    served_blocks,
    trial_dtype,
    why_not_own,
    widen_key,
    widen_query,
    widen_value,
    width,
)
from ..shared_tome.inspect.record import CallRecord
from ..shared_tome.inspect.report import CallTally, counted, why_not_served
from ..shared_tome.merging.call import MergedAttention
from ..shared_tome.merging.plan import Plan
from .sampling import Sampling

# Those whose hooks are on a model. Not a registry to work with: it only serves to take off what a crash left on.
_attached: weakref.WeakSet[Attachment] = weakref.WeakSet()

NO_WEIGHTS = "the active attention optimization takes no weights of keys; proportional attention is off"


class NotServed(Exception):
    """This model has nothing that ToMe can merge. The text is for a person."""


def detach_all() -> None:
    """Take off every hook that is on any model, whoever put it there and whatever became of it."""
    for attachment in list(_attached):
        attachment.detach()


class Attachment:
    """The hooks of one sampling pass on one diffusion model. `detach` may be called at any time, and twice.

    called: told after each call of the model. Raises NotServed.
    """

    def __init__(self, model: nn.Module | None, sampling: Sampling, called: Callable[[], None] = lambda: None):
        self.sampling = sampling
        self._called = called
        self.model: nn.Module | None = None
        self.call: ModelCall | None = None
        self.joint: JointCall | None = None  # this call's, where queries are to keep their own tokens
        self.told: CallTally | None = None  # this call's, where somebody wants a report or a map
        self.kind: tuple = ()  # this call's, and what became of its layers: see BlockHooks
        self.judged = Judged()
        self._hooks = BlockHooks()
        self._blocks: list[_Block] = []
        self._handles: list[Any] = []
        self._rules: dict[tuple, str | None] = {}
        self._meets: dict[tuple, bool] = {}
        self.attach(model)

    def attach(self, model: nn.Module | None) -> None:
        """Move to this model; nothing happens where the hooks are on it already."""
        if model is not None and model is self.model:
            return
        self.detach()
        blocks = list(served_blocks(model)) if model is not None else []
        if not blocks:
            raise NotServed(f"{type(model).__name__} has no self-attention that ToMe knows; nothing is merged")
        self.model = model
        self.sampling.another_model()
        _attached.add(self)
        try:
            self._handles += [
                model.register_forward_pre_hook(self._before_model, with_kwargs=True),
                model.register_forward_hook(self._after_model),
            ]
            names = {module: name for name, module in model.named_modules()}
            self._blocks = [_Block(self, block, names[block]) for block in blocks]
            self._hooks.on(self._hook)
        except BaseException:
            self.detach()
            raise

    def detach(self) -> None:
        """Take all hooks off."""
        self._hooks.off()
        self._hooks = BlockHooks()
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._blocks = []
        self.model = self.call = self.decisions = self.joint = self.told = None
        _attached.discard(self)

    def _hook(self) -> Iterator[tuple[_Block, Callable[[], list[Any]]]]:
        """The blocks, and what puts their hooks on."""
        for block in self._blocks:
            yield block, block.hook

    def say(self, message: str) -> None:
        """Tell what was left alone and why, in the log."""
        self.sampling.notes.say(message, shown=False)

    def rule(self, attention: nn.Module, d: int, x: Tensor) -> str | None:
        """heads.find_rule for a layer, remembered for this pass: the active optimization cannot change in it."""
        key = forward, d, _, dtype = _kind(attention, d, x)
        if key not in self._rules:
            self._rules[key] = find_rule(forward, d, x.device, dtype)
            if self._rules[key] is None:
                self.say(NO_WEIGHTS)
        return self._rules[key]

    def keeps_own(self, attention: nn.Module, d: int, x: Tensor) -> bool:
        """Whether a layer's queries can keep their own tokens."""
        reason = why_not_own(lambda: self.meets(attention, d, x), d, x.device, trial_dtype(x))
        self.sampling.tell_own(reason)
        return reason is None

    def meets(self, attention: nn.Module, d: int, x: Tensor) -> bool:
        """heads.meets_at_sdpa of a layer, remembered likewise."""
        key = forward, d, _, dtype = _kind(attention, d, x)
        if key not in self._meets:
            self._meets[key] = meets_at_sdpa(forward, d, x.device, dtype)
        return self._meets[key]

    def _before_model(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        x = args[0] if args else kwargs.get("x")
        self.call = self.decisions = self.joint = self.told = None
        leave_left_modes()
        if isinstance(x, Tensor) and x.dim() == 4:  # (B, C, H, W)
            time = args[1] if len(args) > 1 else kwargs.get("timesteps")
            progress = None if time is None else functools.partial(percent_of_time, time)
            self.call = self.sampling.call(x, progress=progress)
            self.decisions = None if self.call is None else Decisions(self.call)
            self.told = self.sampling.told
            self.batch = x.shape[0]
        self.judged = Judged()
        if self.call is not None:
            self.kind = (self.call.full, self.call.config.ratio, x.dtype)
            if self.told is None and self._hooks.is_idle(self.kind):
                self.call = None
                self._hooks.off()
            else:
                # A report wants to know of every layer.
                self._hooks.on(self._hook, self.kind if self.told is None else None)
        if self.call is not None and self.call.config.wants_heads:
            own = self.call.config.keeps_own
            self.joint = JointCall(True, TORCHS, lambda message, detail: self.say(f"{message} ({detail})"), own)

    def _after_model(self, module: nn.Module, args: tuple, out: Any) -> None:
        if isinstance(self.told, CallRecord):
            self.told.end()
        if self.call is not None:
            self._hooks.judge(self.kind, self.judged)
        self.call = self.decisions = self.joint = self.told = None
        self._called()


class _Block:
    """The hooks of one transformer block, and what they hand to each other during one call of it."""

    def __init__(self, owner: Attachment, block: nn.Module, name: str):
        self.owner = owner
        self.where, self.part = block_place(name)
        self.heads = getattr(block.attn1, "heads", None)
        self._block = weakref.ref(block)
        self.reset()

    def reset(self) -> None:
        self.layer: MergedAttention | None = None
        self.own: Plan | None = None  # the layer's, whose keys and values are taken where they meet the queries
        self.plan: Plan | None = None  # the block's match, for attn2 and ff
        self.planned: ModelCall | None = None  # the call that the match is of
        self.open: dict[str, Plan] = {}
        self.query: Tensor | None = None
        self.bias: Tensor | None = None
        self.rule: str | None = None
        self.head_size = 0
        self.verdict: Verdict | None = None  # what is known of this layer's times

    def hook(self) -> list[Any]:
        """Register; returns the handles."""
        block, config = self._block(), self.owner.sampling.config
        if block is None:
            return []
        attn1 = block.attn1
        # Ours is the last to see the inputs and the first to see the output: right around the attention.
        handles = [
            attn1.register_forward_pre_hook(self._before_attention, with_kwargs=True),
            attn1.register_forward_hook(self._after_attention, prepend=True),
        ]
        if (config.wants_heads or may_meet(config)) and self.heads:
            handles += SdpaHooks(attn1, self._begin, self._missed).handles
        if config.weighs_keys and self.heads:
            to_out = attn1.to_out[0] if isinstance(attn1.to_out, (nn.Sequential, nn.ModuleList)) else attn1.to_out
            handles += [
                attn1.to_q.register_forward_pre_hook(self._before_query, prepend=True),
                attn1.to_q.register_forward_hook(self._after_query),
                attn1.to_k.register_forward_hook(self._after_key),
                attn1.to_v.register_forward_hook(self._after_value),
                to_out.register_forward_pre_hook(self._before_out, prepend=True),
            ]
        for name, wanted in (("attn2", config.cross_attention), ("ff", config.mlp)):
            module = getattr(block, name, None)
            if wanted and isinstance(module, nn.Module):
                handles += [
                    module.register_forward_pre_hook(self._merge_input(name), with_kwargs=True),
                    module.register_forward_hook(self._unmerge_output(name), prepend=True),
                ]
        return handles

    def _before_attention(self, attn1: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple | None:
        self.reset()  # a call that ended in an exception may have left something
        call = self.owner.call
        if call is None:
            return None
        x = args[0] if args else kwargs.get("x")
        context = args[1] if len(args) > 1 else kwargs.get("context")
        grid = self._grid(call, attn1, x, context)
        own = grid is not None and self._keeps_own(attn1, x)
        layer = call.attention(x, x, x, grid, own=own) if grid is not None else None
        told = self.owner.told
        if told is not None and grid is not None:
            told.layer(self.where, grid, layer and layer.plan, self.part, self.verdict)
        if layer is None:
            return None
        self.layer = layer
        if call.config.kind.matches:
            self.plan, self.planned = layer.plan, call
        if own:
            self.own = layer.plan
            return None  # attn1 gets all tokens; _attend_own takes some of their keys
        q = self._with_bias(attn1, layer)
        if len(args) > 1:
            args = (q, layer.k, *args[2:])
        elif args:
            args, kwargs = (q,), {**kwargs, "context": layer.k}
        else:
            kwargs = {**kwargs, "x": q, "context": layer.k}
        return args, kwargs

    def _after_attention(self, attn1: nn.Module, args: tuple, out: Tensor) -> Tensor | None:
        layer, self.layer = self.layer, None
        self.own = self.query = self.bias = self.rule = None
        return None if layer is None else layer.unmerge(out)

    def _keeps_own(self, attn1: nn.Module, x: Tensor) -> bool:
        """Whether the queries of this call of a layer keep their own tokens."""
        if self.owner.joint is None or not self.heads:
            return False
        return self.owner.keeps_own(attn1, head_size(attn1, self.heads, x), x)

    def _begin(self, attn1: nn.Module, args: tuple, kwargs: dict[str, Any]) -> Handler | None:
        return self._attend_own if self.own is not None else self._attend_weighed if self.rule == MET else None

    def _attend_own(self, attention: HostAttention, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """q, k, v [B, H, N, d] -> [B, H, N, d]."""
        return attend_own(self.owner.joint, self.own, self._missed, attention, q, k, v)

    def _attend_weighed(self, attention: HostAttention, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """q [B, H, N, d], k and v [B, H, M, d] -> [B, H, N, d]."""
        return attend_weighed(self.bias, self._missed, attention, q, k, v)

    def _missed(self) -> None:
        self.owner.say(NOT_AS_TRIED)

    def _grid(self, call: ModelCall, attn1: nn.Module, x: Any, context: Any) -> Grid | None:
        """The grid of this layer's tokens, or None where it is to be left alone."""
        batch = self.owner.batch
        self.owner.judged.begin(self)
        if not isinstance(x, Tensor) or x.dim() != 3:
            return None
        if context is not None and context is not x:
            self._leave("another extension gives the self-attention keys of its own; such calls are left alone")
            return None
        grid = grid_of(x.shape[1], call.full)
        if grid is None or x.shape[0] != batch:
            self._leave(
                f"{x.shape[1]} tokens in {counted(x.shape[0], 'row')} are no level of "
                f"{call.full[0]}x{call.full[1]} in {counted(batch, 'row')}; such layers are left alone"
            )
            return None
        if not call.serves(grid):
            self.owner.judged.leave(self)
            if self.owner.told is not None:
                reason = why_not_served(call.config, grid, call.full)
                self.owner.told.left_alone(reason, self.where, grid, self.part)
            return None
        reason = why_left_whole("attn1", x, batch, x.shape[1], is_taken(attn1))
        if reason is not None:
            self._leave(reason, grid)
            return None
        kernels = TORCHS if self._keeps_own(attn1, x) else ()
        about = functools.partial(about_model, attn1, x.device)
        self.verdict = self.owner.decisions.verdict(
            x, grid, self.heads, kernels=kernels, block=self._run_bare, about=about
        )
        unpaid = self.owner.decisions.why_not_paid(self.verdict)
        if unpaid is not None:
            self._leave(f"{unpaid}; layers of {x.shape[1]} tokens are left alone", grid)
            self.owner.judged.leave(self, unpaid=True)
            return None
        return grid

    def _run_bare(self, x: Tensor) -> Callable[[], Any] | None:
        """What runs this block by itself, to be timed."""
        block = self._block()
        return None if block is None else run_bare(block, x)

    def _leave(self, reason: str, grid: Grid | None = None) -> None:
        self.owner.say(reason)
        if self.owner.told is not None:
            self.owner.told.left_alone(reason.partition(";")[0], self.where, grid, self.part)

    def _with_bias(self, attn1: nn.Module, layer: MergedAttention) -> Tensor:
        """Get ready to widen the heads where keys have weights. Returns what attn1 gets as x."""
        if layer.bias is None or not self.heads:
            return layer.q
        d = head_size(attn1, self.heads, layer.q)
        if is_met(self.owner.sampling.config, d, layer.q, lambda: self.owner.meets(attn1, d, layer.q)):
            self.rule, self.bias = MET, layer.bias
            return layer.q
        rule = self.owner.rule(attn1, d, layer.q)
        if rule is None:
            return layer.q
        self.rule, self.head_size = rule, d
        self.bias = spread_rows(layer.bias, layer.k.shape[0])
        self.query = layer.q
        # The sdp code takes the head size from x's channels: it gets a stand-in of that shape (no memory), and
        # to_q gets the real one.
        return layer.q.new_zeros(1, 1, 1).expand(*layer.q.shape[:2], width(self.heads, d))

    def _before_query(self, module: nn.Module, args: tuple) -> tuple | None:
        query, self.query = self.query, None
        return None if query is None else (query,)

    @property
    def _widens(self) -> bool:
        return self.bias is not None and self.rule != MET

    def _after_query(self, module: nn.Module, args: tuple, out: Tensor) -> Tensor | None:
        return widen_query(out, self.heads, self.rule) if self._widens else None

    def _after_key(self, module: nn.Module, args: tuple, out: Tensor) -> Tensor | None:
        return widen_key(out, self.heads, self.rule, self.bias) if self._widens else None

    def _after_value(self, module: nn.Module, args: tuple, out: Tensor) -> Tensor | None:
        return widen_value(out, self.heads) if self._widens else None

    def _before_out(self, module: nn.Module, args: tuple) -> tuple | None:
        if not self._widens:
            return None
        self.bias = None
        return (narrow(args[0], self.heads, self.head_size),)

    def _merge_input(self, name: str) -> Any:
        """A pre-hook for attn2 or ff: the block's match serves it too, where its tokens are those of the match."""

        def before(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple | None:
            plan = self.plan
            if plan is None or self.planned is not self.owner.call:  # attn1 did not run in this call of the model
                return None
            x = args[0] if args else kwargs.get("x")
            reason = why_left_whole(name, x, plan.batch, plan.tokens, is_taken(module))
            if reason is not None:
                self._leave(reason, grid_of(plan.tokens, self.planned.full))
                return None
            self.open[name] = plan
            x = plan.merge(x)
            return ((x, *args[1:]), kwargs) if args else (args, {**kwargs, "x": x})

        return before

    def _unmerge_output(self, name: str) -> Any:
        def after(module: nn.Module, args: tuple, out: Tensor) -> Tensor | None:
            plan = self.open.pop(name, None)
            return None if plan is None else plan.unmerge(out)

        return after


def block_place(name: str) -> tuple[str, int]:
    """A transformer block's module name as (block as reports name it, which transformer of that block)."""
    found = re.search(r"(input|middle|output)_blocks?\b(?:\.(\d+))?", name)
    part = re.search(r"transformer_blocks\.(\d+)$", name)
    if found is None:
        return name or "unnamed block", 0
    number = found[2] if found[1] != "middle" else "0"  # the numbers within the middle block are not of blocks
    return f"{found[1]} block {number}", int(part[1]) if part else 0


def _kind(attn1: nn.Module, d: int, x: Tensor) -> tuple:
    """What an attention code's behaviour hangs on: its forward, d, the device, a dtype to try it in."""
    return _plain_forward(attn1), d, x.device, trial_dtype(x)


def _hypertile(attn1: Any) -> Any:
    """What HyperTile keeps on a layer that it once took."""
    return getattr(attn1, "__webui_hypertile_params", None)


def is_taken(module: Any) -> bool:
    """Whether somebody replaced this very layer's forward: what stands there may go by the number of tokens. HyperTile
    leaves its wrapper there when it is off."""
    params = _hypertile(module)
    return is_replaced(module) and (params is None or bool(getattr(params, "enabled", True)))


def _plain_forward(attn1: nn.Module) -> Any:
    """The function that runs between the projections: forward(self, x, context)."""
    params = _hypertile(attn1)
    if "forward" in vars(attn1) and params is not None:
        return getattr(params.forward, "__func__", params.forward)
    return type(attn1).forward
