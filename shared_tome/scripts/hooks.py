"""The module hooks of scripts.py on a U-Net of diffusers' or ldm's classes.

A hook on the U-Net makes the state of each call; hooks on the blocks keep their input (what the paper measures
similarity on) and merge and unmerge around attn1, attn2 and ff. Nothing of the host is replaced or copied.
"""

from __future__ import annotations

import functools
import inspect
import logging
import math
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..attention.combine import TORCHS
from ..attention.sdpa import (
    NOT_AS_TRIED,
    Handler,
    HostAttention,
    SdpaHooks,
    attend_own,
    attend_weighed,
    leave_left_modes,
)
from ..attention.sequence import JointCall
from ..autotune.decisions import Decisions
from ..autotune.detached import about_model, run_bare
from ..autotune.step import why_left_alone
from ..autotune.store import RETRY
from ..config import ToMeConfig
from ..core.curve import is_compiling
from ..core.grid import Grid, grid_of
from ..core.groups import spread_rows
from ..core.schedule import config_at
from ..hooks.blocks import BlockHooks, Judged
from ..hooks.guard import is_replaced as is_replaced_here
from ..hooks.guard import why_left_whole
from ..hooks.heads import (
    MET,
    PROJECTIONS,
    find_rule,
    head_size,
    is_met,
    may_meet,
    meets_at_sdpa,
    narrow,
    stand_in,
    trial_dtype,
    why_not_own,
    widen_key,
    widen_query,
    widen_value,
)
from ..hooks.heads import served_blocks as blocks_with
from ..merging.call import MergedAttention, ModelCall, same_halves, shares_match
from ..merging.plan import Plan
from .autotune import verdict_on_step
from .outcome import CallOutcome, Outcome
from .steps import Steps

logger = logging.getLogger("ToMe")


# Around the taking off and putting on of blocks' hooks: a model may be at work in several threads.
_hooking = threading.Lock()


def served_blocks(model: nn.Module) -> Iterator[nn.Module]:
    """The transformer blocks with a self-attention of the kind we know."""
    return blocks_with(model, "heads")


@dataclass(eq=False)
class _Pass:
    """One block in one call: what its hooks hand to each other."""

    metric: Tensor  # [B, N, C], the block's input
    block: nn.Module
    layer: MergedAttention | None = None
    own: Plan | None = None  # the layer's, whose keys and values are taken where they meet the queries
    plan: Plan | None = None  # the block's match, for attn1's queries alone, attn2 and ff
    open: dict[str, Plan] = field(default_factory=dict)
    bias: Tensor | None = None  # [B, M]
    rule: str = ""  # how the heads are widened (heads.find_rule), or heads.MET
    head_size: int = 0


@dataclass(eq=False)
class _Call:
    """One call of the model. joint: what lets queries keep their own tokens, None where they shall not. passes: by
    block. kind, judged: see BlockHooks."""

    model: ModelCall
    decisions: Decisions
    batch: int
    joint: JointCall | None = None
    passes: dict[_Block, _Pass] = field(default_factory=dict)
    kind: tuple = ()
    judged: Judged = field(default_factory=Judged)
    outcome: CallOutcome = field(default_factory=CallOutcome)
    keeps_own: dict[tuple, bool] = field(default_factory=dict)  # by what of a layer decides


class BaseAttachment:
    """The hooks on one model, and the calls under way: one a thread, gone when the call ends."""

    def __init__(self, config: ToMeConfig, pipe: Any, timestep_scale: float = 1.0):
        self.config, self.steps = config, Steps(pipe, timestep_scale)
        self._handles: list[Any] = []
        self._calls: dict[int, Any] = {}
        self._said: set[str] = set()
        self._last_alike = False
        self._outcome = Outcome(config, self.steps, self._log)

    def detach(self, model: nn.Module) -> None:
        """Take all hooks off."""
        self._outcome.end()
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._calls.clear()
        leave_left_modes()

    @property
    def call(self) -> Any:
        """What this thread's call of the model knows, or None."""
        return self._calls.get(threading.get_ident())

    @call.setter
    def call(self, value: Any) -> None:
        if value is None:
            self._calls.pop(threading.get_ident(), None)
        else:
            self._calls[threading.get_ident()] = value

    def say(self, message: str) -> None:
        """Tell once what is left alone and why."""
        if message not in self._said:
            self._said.add(message)
            self._log(message)

    def _log(self, message: str) -> None:
        logger.warning("[ToMe] %s", message)

    def _say_why(self, message: str, detail: str) -> None:
        self.say(f"{message} ({detail})")

    def config_now(self, timestep: Any, multires: bool = False) -> ToMeConfig:
        """With the ratio that holds at this step. multires: see ToMeConfig.resolved."""
        asked = self.config.resolved(multires)
        if (less := self.config.why_less(asked)) is not None:
            self.say(less)
        return config_at(asked, lambda: self.steps.progress(timestep))

    def model_call(self, config: ToMeConfig, grid: Grid, timestep: Any, x: Tensor) -> ModelCall | None:
        """The core's state for this call, or None where nothing is merged now.

        config: from config_now; x: the latent, [B, ...].
        """
        step = self.steps.step(timestep, x.device)
        if config.ratio > 0.0:
            self._outcome.reach(not (_compiles() or _captures(x.device)))
            return ModelCall(config, grid, x.device, step=step, alike=self._alike(config, x))
        self._outcome.skip(timestep, lambda known: self.config_now(known / self.steps.scale).ratio)
        return None

    def _alike(self, config: ToMeConfig, x: Tensor) -> bool:
        """Whether both halves of the batch x [B, ...] are the same images. A captured call, which cannot wait for the
        device, takes the answer of the call before it: its warm-up."""
        if not shares_match(config):
            return True
        if _compiles():
            self.say("under torch.compile each image has a match of its own: share match is off")
            return False
        if _captures(x.device):
            return self._last_alike
        self._last_alike = alike = same_halves(x)
        return alike


class Attachment(BaseAttachment):
    """On a U-Net. merge_attn: whether attn1 is merged at all. judges: whether its whole steps are judged, too."""

    def __init__(self, model: nn.Module, config: ToMeConfig, pipe: Any, merge_attn: bool = True, judges: bool = True):
        super().__init__(config.resolved(multires=False), pipe)
        self.merge_attn, self._judges = merge_attn, judges
        self._judged: dict[tuple, float] = {}  # when a kind of steps is asked about again, by the monotonic clock
        self._rules: dict[tuple, str | None] = {}
        self._meets: dict[tuple, bool] = {}
        self.takes_keys: dict[tuple, bool] = {}  # by attention code: whether it makes its keys from the given context
        self._blocks = [_Block(self) for _ in served_blocks(model)]
        self._hooks = BlockHooks()
        if not (merge_attn or config.cross_attention or config.mlp):
            self.say("nothing is merged: attention, cross-attention and MLP are all off")
        self._handles += [
            model.register_forward_pre_hook(self._before_model, with_kwargs=True),
            model.register_forward_hook(self._after_model, always_call=True),
        ]
        self._hooks.on(lambda: self._hook(model))

    def detach(self, model: nn.Module) -> None:
        super().detach(model)
        self._hooks.off()

    def _hook(self, model: nn.Module) -> Iterator[tuple[_Block, Callable[[], list[Any]]]]:
        """The blocks, and what puts their hooks on."""
        for hooked, block in zip(self._blocks, served_blocks(model), strict=True):
            yield hooked, functools.partial(hooked.hook, block)

    def _before_model(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        self.call = None  # of one that was interrupted: KeyboardInterrupt runs no hook
        leave_left_modes()
        x = argument(args, kwargs, 0, "sample", "x")
        if not isinstance(x, Tensor) or x.dim() != 4:  # (B, C, H, W)
            self.say("a call whose input is not [B, C, H, W] (video) is left alone")
            return
        timestep = argument(args, kwargs, 1, "timestep", "timesteps", "t")
        config, grid = self.config_now(timestep), (x.shape[2], x.shape[3])
        kind = (grid, config.ratio, x.dtype, x.device)
        if config.ratio > 0.0 and not self._hooks.is_idle(kind):
            self._judge_step(module, args, kwargs, config, kind, x.shape[0])
        idle = self._hooks.is_idle(kind)
        # What does nothing takes the processor time: the GPU is asked for nothing, and the blocks' hooks go.
        call = None if idle and self.steps.tells(timestep) else self.model_call(config, grid, timestep, x)
        with _hooking:
            alone = not self._calls  # another thread may be in the midst of a call
            if idle and alone:
                self._hooks.off()
            elif call is not None and not idle:
                self.call = _Call(call, Decisions(call), x.shape[0], self._joint(call), kind=kind)
                self._hooks.on(lambda: self._hook(module), kind, alone)

    def _judge_step(
        self, model: nn.Module, args: tuple, kwargs: dict[str, Any], config: ToMeConfig, kind: tuple, batch: int
    ) -> None:
        """Whether merging pays in whole steps of this kind, asked once of each; again where it is not known."""
        known = time.monotonic() < self._judged.get(kind, 0.0)
        if not self._judges or known or _captures(kind[-1]) or _compiles():
            return
        config = config.replace(start=0.0, end=1.0)  # whatever its place in the schedule

        def merge(made: nn.Module) -> None:
            twin = Attachment(made, config, self.steps.pipe, self.merge_attn, judges=False)
            twin._said, twin._outcome = self._said, self._outcome  # what both have to say is said once

        verdict = verdict_on_step(model, args, kwargs, batch, kind[0], config, merge)
        self._judged[kind] = time.monotonic() + RETRY if verdict is None else math.inf
        if verdict is not None and not verdict.pays():
            self.say(f"{why_left_alone(verdict)}; nothing is merged")
            self._hooks.rest(kind)

    def _after_model(self, module: nn.Module, args: tuple, out: Any) -> None:
        call, self.call = self.call, None
        if call is not None and out is not None:  # None: the call ended in an exception
            self._hooks.judge(call.kind, call.judged)
            if not _compiles():
                self._outcome.end_call(call.kind, call.outcome)

    def _joint(self, call: ModelCall) -> JointCall | None:
        """What lets queries keep their own tokens, or None where they shall not."""
        if not call.config.wants_heads:
            return None
        if _compiles():
            own = call.config.method == "sample"
            self.say(f"under torch.compile {'queries do not keep their own tokens' if own else 'multires is sample'}")
            return None
        return JointCall(True, TORCHS, self._say_why, call.config.keeps_own)

    def keeps_own(self, attn1: nn.Module, x: Tensor) -> bool:
        """Whether the layer's queries can keep their own tokens (heads.meets_at_sdpa), asked once for each."""
        if _compiles():
            return False
        d, dtype = head_size(attn1, attn1.heads, x), trial_dtype(x)
        reason = why_not_own(lambda: self.meets(attn1, x), d, x.device, dtype)
        if reason is not None:
            self.say(reason)
        return reason is None

    def meets(self, attn1: nn.Module, x: Tensor) -> bool:
        """heads.meets_at_sdpa of a layer that is given x, asked once for each; not where torch.compile is at work."""
        if _compiles():
            return False
        d, dtype = head_size(attn1, attn1.heads, x), trial_dtype(x)
        forward = type(attn1).forward
        key = (*code_of(attn1), attn1.heads, d, x.device, dtype)
        if key not in self._meets:
            self._meets[key] = meets_at_sdpa(forward, d, x.device, dtype, layer=stand_in(attn1), heads=attn1.heads)
        return self._meets[key]

    def rule(self, attn1: nn.Module, d: int, x: Tensor) -> str | None:
        """How the layer's attention code scales (heads.find_rule), asked once for each."""
        dtype = trial_dtype(x)
        forward, names = type(attn1).forward, _names(attn1)
        # A forward of its own, or keys in fewer heads, are not what a trial runs.
        alike = {getattr(getattr(attn1, name), "out_features", attn1.heads * d) for name in PROJECTIONS}
        tried = not is_replaced(attn1) and alike == {attn1.heads * d}
        key = (*code_of(attn1), attn1.heads, d, x.device, dtype, tried)
        if key not in self._rules:
            self._rules[key] = None if not tried else find_rule(
                forward, d, x.device, dtype, layer=stand_in(attn1), heads=attn1.heads, context=names[1]
            )  # fmt: skip
            if self._rules[key] is None:
                self.say("this attention processor takes no weights of keys; proportional attention is off")
        return self._rules[key]


class _Block:
    """The hooks of one transformer block. Holds no state of a call and no module."""

    def __init__(self, owner: Attachment):
        self.owner = owner
        self._hooked: list[weakref.ref] = []  # the projections that carry the hooks below
        self._projection_handles: list[Any] = []
        self._watch: Any = None  # a handle on to_k, in the first call of a kind of attention

    def hook(self, block: nn.Module) -> list[Any]:
        """Register; returns the handles."""
        config, attn1 = self.owner.config, block.attn1
        # Ours is the last to see attn1's inputs and the first to see its output: right around the attention.
        handles = [
            block.register_forward_pre_hook(self._before_block, with_kwargs=True),
            block.register_forward_hook(self._after_block),
            attn1.register_forward_pre_hook(self._before_attention, with_kwargs=True),
            attn1.register_forward_hook(self._after_attention, prepend=True),
        ]
        handles.append(SimpleNamespace(remove=self.forget_projections))
        if config.wants_heads or may_meet(config):
            handles += SdpaHooks(attn1, self._begin, self._missed).handles
        for name, wanted in (("attn2", config.cross_attention), ("ff", config.mlp)):
            module = getattr(block, name, None)
            if wanted and isinstance(module, nn.Module):
                handles += [
                    # partial and not a closure: a deep copy of the model gets hooks of its own.
                    module.register_forward_pre_hook(functools.partial(self._merge_input, name), with_kwargs=True),
                    module.register_forward_hook(functools.partial(self._unmerge_output, name), prepend=True),
                ]
        return handles

    @property
    def now(self) -> _Pass | None:
        """This block's pass in this thread's call."""
        call = self.owner.call
        return None if call is None else call.passes.get(self)

    def _before_block(self, block: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        x = argument(args, kwargs, 0, "hidden_states", "x")
        if self.owner.call is not None and isinstance(x, Tensor):
            self.owner.call.passes[self] = _Pass(x, block)

    def _after_block(self, block: nn.Module, args: tuple, out: Any) -> None:
        if self.owner.call is not None:
            self.owner.call.passes.pop(self, None)

    def _before_attention(self, attn1: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple | None:
        now = self.now
        if now is None:
            return None
        name, context_name = _names(attn1)
        x = argument(args, kwargs, 0, name)
        context = argument(args, kwargs, 1, context_name)
        itself = context is None or context is x
        own = itself and self._keeps_own(attn1, x)
        grid = self._grid(x, now, attn1, own)
        if grid is None:
            return None
        call = self.owner.call.model
        kind = call.config.kind
        if self.owner.merge_attn and itself:
            if not self._can_merge_keys(attn1, args, kwargs, kind, own):
                return None
            now.layer = call.attention(x, x, x, grid, metric=now.metric, own=own)
            if now.layer is None:
                self.owner.call.outcome.leave(call, grid)
                return None
            self.owner.call.outcome.merged = True
            if own:
                now.own = now.layer.plan
                return None  # attn1 gets all tokens; _attend_own takes some of their keys
            now.plan = now.layer.plan if kind.matches else None
            self._weigh(attn1, now)
            if kind.keys != kind.queries:
                self._watch_keys(attn1, now.layer.k.shape[1])
            return _with(args, kwargs, name, now.layer.q, context_name, now.layer.k)
        if not kind.matches:
            return None
        now.plan = call.plan(now.metric, grid)
        if now.plan is None:
            self.owner.call.outcome.leave(call, grid)
        if now.plan is None or not (self.owner.merge_attn and kind.queries):
            return None
        if self._is_anothers("attn1", attn1, kwargs, x.shape[1]):
            return None
        self.owner.call.outcome.merged = True
        now.open["attn1"] = now.plan  # keys of its own (the block only attends to a prompt): queries alone
        return _with(args, kwargs, name, now.plan.merge(x))

    def _after_attention(self, attn1: nn.Module, args: tuple, out: Tensor) -> Tensor | None:
        now = self.now
        if now is None:
            return None
        layer, now.layer, now.own, now.bias = now.layer, None, None, None
        self._stop_watching()
        if layer is not None:
            return self._unmerge(layer.plan, out) if layer.merges_queries else None
        return self._unmerge(now.open.pop("attn1", None), out)

    def _unmerge(self, plan: Plan | None, out: Any) -> Tensor | None:
        """What replaces a module's output [B, M, C]: [B, N, C]; None where it stays."""
        if plan is None:
            return None
        if not isinstance(out, Tensor) or out.shape[:2] != (plan.batch, plan.kept):
            self.owner.say("an attention gave back other tokens than it was given; its output is left as it is")
            return None
        return plan.unmerge(out)

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

    def _is_anothers(self, name: str, module: nn.Module, kwargs: dict[str, Any], tokens: int) -> bool:
        """Whether a module that gets merged queries, or tokens, may need every token or its place; says so."""
        processor = getattr(module, "processor", None)
        why = None
        made = type(module).forward.__module__.partition(".")[0]
        if is_replaced(module) or made != type(module).__module__.partition(".")[0]:
            self.owner.say(why_left_whole(name, None, 0, 0, replaced=True))
            return True
        if processor is not None and not _is_diffusers(processor):
            why = f"{type(processor).__name__} replaces its attention"
        elif kwargs.get("ip_adapter_masks") is not None:
            why = "an IP-Adapter masks parts of the picture"
        else:
            mask = next((kwargs[key] for key in ("attention_mask", "mask") if kwargs.get(key) is not None), None)
            if isinstance(mask, Tensor) and mask.dim() > 2 and mask.shape[-2] == tokens:
                why = "it has a mask for each token"
        if why is not None:
            self.owner.say(f"{name} is not merged: {why}")
        return why is not None

    def _keeps_own(self, attn1: nn.Module, x: Any) -> bool:
        """Whether the queries of this call of a layer keep their own tokens."""
        call = self.owner.call
        if call.joint is None or not self.owner.merge_attn or is_fused(attn1):
            return False
        if not isinstance(x, Tensor) or x.dim() != 3:
            return False
        processor = getattr(attn1, "processor", None)
        d = head_size(attn1, attn1.heads, x)
        key = (type(attn1), type(processor), attn1.heads, d, x.shape[1], x.dtype)
        if key not in call.keeps_own:  # asked once a call and not once a layer
            grid = grid_of(x.shape[1], call.model.full)
            served = grid is not None and call.model.serves(grid)
            call.keeps_own[key] = served and self.owner.keeps_own(attn1, x)
        return call.keeps_own[key]

    def _begin(self, attn1: nn.Module, args: tuple, kwargs: dict[str, Any]) -> Handler | None:
        now = self.now
        if now is None:
            return None
        return self._attend_own if now.own is not None else self._attend_weighed if now.rule == MET else None

    def _attend_own(self, attention: HostAttention, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """q, k, v [B, H, N, d] -> [B, H, N, d]."""
        now = self.now
        joint, plan = (None, None) if now is None else (self.owner.call.joint, now.own)
        return attend_own(joint, plan, self._missed, attention, q, k, v)

    def _attend_weighed(self, attention: HostAttention, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """q [B, H, N, d], k and v [B, H, M, d] -> [B, H, N, d]."""
        now = self.now
        return attend_weighed(None if now is None else now.bias, self._missed, attention, q, k, v)

    def _missed(self) -> None:
        self.owner.say(NOT_AS_TRIED)

    def _grid(self, x: Any, now: _Pass, attn1: nn.Module, own: bool = False) -> Grid | None:
        """The grid of this layer's tokens, or None where it is to be left alone."""
        call = self.owner.call
        call.judged.begin(self)
        if not isinstance(x, Tensor) or x.dim() != 3 or x.shape[:2] != now.metric.shape[:2]:
            self.owner.say("a self-attention that is given other tokens than its block is left alone")
            return None
        grid = grid_of(x.shape[1], call.model.full)
        if grid is None or x.shape[0] != call.batch:
            self.owner.say("a layer whose tokens are not those of the image (it attends over time) is left alone")
            return None
        if not call.model.serves(grid):
            call.outcome.leave(call.model, grid)
            call.judged.leave(self)
            return None
        block = None if is_compiling() else functools.partial(run_bare, now.block)
        about = functools.partial(about_model, now.block, x.device)
        verdict = call.decisions.verdict(x, grid, attn1.heads, kernels=TORCHS if own else (), block=block, about=about)
        unpaid = call.decisions.why_not_paid(verdict)
        if unpaid is not None:
            self.owner.say(f"{unpaid}; layers of {x.shape[1]} tokens are left alone")
            call.judged.leave(self, unpaid=True)
            return None
        return grid

    def _can_merge_keys(self, attn1: nn.Module, args: tuple, kwargs: dict[str, Any], kind: Any, own: bool) -> bool:
        if kind.keys and argument(args, kwargs, 2, "attention_mask", "mask") is not None:
            self.owner.say("a self-attention with a mask is left alone")
            return False
        if is_fused(attn1) and kind.keys != kind.queries:
            self.owner.say(
                "fused projections allow no keys of their own; call unfuse_qkv_projections() or choose method merge"
            )
            return False
        if not own and kind.keys != kind.queries and not self.owner.takes_keys.get(code_of(attn1), True):
            what = type(getattr(attn1, "processor", None) or attn1).__name__
            self.owner.say(f"{what} allows no keys of their own: its self-attention is left alone; choose method merge")
            return False
        return True

    def _weigh(self, attn1: nn.Module, now: _Pass) -> None:
        """Get ready to widen the heads where keys have weights."""
        layer = now.layer
        if layer.bias is None:
            return
        if is_fused(attn1):
            self.owner.say("fused projections take no weights of keys; proportional attention is off")
            return
        d = head_size(attn1, attn1.heads, layer.q)
        if is_met(self.owner.config, d, layer.q, lambda: self.owner.meets(attn1, layer.q)):
            now.rule, now.bias = MET, layer.bias
            return
        rule = self.owner.rule(attn1, d, layer.q)
        if rule is not None:
            self._follow_projections(attn1)
            now.rule, now.head_size = rule, d
            now.bias = spread_rows(layer.bias, layer.k.shape[0])

    def _follow_projections(self, attn1: nn.Module) -> None:
        """Have the hooks on the projections that are there now: a LoRA loaded later puts others in their place."""
        to_out = attn1.to_out[0] if isinstance(attn1.to_out, (nn.Sequential, nn.ModuleList)) else attn1.to_out
        modules = [getattr(attn1, name) for name in PROJECTIONS] + [to_out]
        if [ref() for ref in self._hooked] == modules:
            return
        self.forget_projections()
        self._hooked = [weakref.ref(module) for module in modules]
        self._projection_handles = [
            getattr(attn1, name).register_forward_hook(functools.partial(self._widen, name, attn1.heads))
            for name in PROJECTIONS
        ]
        narrow_input = functools.partial(self._narrow, attn1.heads)
        self._projection_handles.append(to_out.register_forward_pre_hook(narrow_input, prepend=True))

    def forget_projections(self) -> None:
        """Take the hooks off the projections."""
        for handle in self._projection_handles:
            handle.remove()
        self._projection_handles, self._hooked = [], []
        self._stop_watching()

    def _widen(self, name: str, heads: int, module: nn.Module, args: tuple, out: Tensor) -> Tensor | None:
        now = self.now
        if now is None or now.bias is None or now.rule == MET:
            return None
        if name == "to_q":
            return widen_query(out, heads, now.rule)
        if name == "to_v":
            return widen_value(out, heads)
        bias = now.bias
        if out.shape[:2] != bias.shape:
            self.owner.say("an attention makes keys from other tokens than it is given; they have no weights")
            bias = bias.new_zeros(out.shape[:2])
        return widen_key(out, heads, now.rule, bias)

    def _narrow(self, heads: int, module: nn.Module, args: tuple) -> tuple | None:
        now = self.now
        if now is None or now.bias is None or now.rule == MET:
            return None
        return narrow(args[0], heads, now.head_size), *args[1:]

    def _merge_input(self, name: str, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple | None:
        """Before attn2 or ff: the block's match serves it too."""
        now = self.now
        x = argument(args, kwargs, 0, "hidden_states", "x")
        if now is None or now.plan is None or not isinstance(x, Tensor):
            return None
        reason = why_left_whole(name, x, now.plan.batch, now.plan.tokens)
        if reason is not None:
            self.owner.say(reason)
            return None
        if self._is_anothers(name, module, kwargs, now.plan.tokens):
            return None
        now.open[name] = now.plan
        self.owner.call.outcome.merged = True
        return _with(args, kwargs, "hidden_states" if "hidden_states" in kwargs else "x", now.plan.merge(x))

    def _unmerge_output(self, name: str, module: nn.Module, args: tuple, out: Tensor) -> Tensor | None:
        return None if self.now is None else self._unmerge(self.now.open.pop(name, None), out)


def is_replaced(module: nn.Module) -> bool:
    """guard.is_replaced, but for accelerate's forward, which moves weights and then runs the class's."""
    return is_replaced_here(module) and not hasattr(module, "_hf_hook")


def is_fused(attention: nn.Module) -> bool:
    """Whether one projection makes queries, keys and values. diffusers' U-Nets keep the mark after
    unfuse_qkv_projections(), and its plain processors pay no heed to it."""
    processor = getattr(attention, "processor", None)
    plain = _is_diffusers(processor) and not type(processor).__name__.startswith("Fused")
    return getattr(attention, "fused_projections", False) and not plain


def _is_diffusers(processor: Any) -> bool:
    return type(processor).__module__.partition(".")[0] == "diffusers"


def code_of(attention: nn.Module) -> tuple:
    """What decides how a layer attends: its forward, its processor with that one's settings, and torch's function,
    which may have been replaced."""
    processor = getattr(attention, "processor", None)
    told: Any = ()
    if processor is not None and _is_diffusers(processor):
        simple = (bool, int, float, str)
        told = tuple((key, x) for key, x in getattr(processor, "__dict__", {}).items() if isinstance(x, simple))
    elif hasattr(processor, "__weakref__"):
        told = weakref.ref(processor)
    return type(attention).forward, type(processor), told, F.scaled_dot_product_attention


def argument(args: tuple, kwargs: dict[str, Any], place: int, *names: str) -> Any:
    """An argument by place or by one of its names."""
    if len(args) > place:
        return args[place]
    return next((kwargs[name] for name in names if name in kwargs), None)


def _with(
    args: tuple, kwargs: dict[str, Any], name: str, x: Tensor, context_name: str = "", context: Any = None
) -> tuple[tuple, dict[str, Any]]:
    """(args, kwargs) with other tokens, and with a context unless it is these tokens."""
    args, kwargs = ((x, *args[1:]), kwargs) if args else (args, {**kwargs, name: x})
    if context is not None and context is not x:
        args, kwargs = (args[:1] + (context,) + args[2:], kwargs) if len(args) > 1 else (
            args, {**kwargs, context_name: context}
        )  # fmt: skip
    return args, kwargs


def _captures(device: torch.device) -> bool:
    """Whether a CUDA graph is being captured, in which nothing can wait for the device."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def _compiles() -> bool:
    """Whether torch.compile is at work, under which no attention is seen (sdpa.py)."""
    found = is_compiling()
    if not found and "torch._dynamo" in sys.modules:  # between its graphs
        found = getattr(torch._C._dynamo.eval_frame, "get_eval_frame_callback", lambda: None)() not in (None, False)
    return found


def _names(attn1: nn.Module) -> tuple[str, str]:
    """What diffusers or ldm call the tokens and what the keys are made from."""
    return _names_of(type(attn1).forward)


@functools.lru_cache(maxsize=64)
def _names_of(forward: Callable[..., Any]) -> tuple[str, str]:
    if "encoder_hidden_states" in inspect.signature(forward).parameters:
        return "hidden_states", "encoder_hidden_states"
    return "x", "context"
