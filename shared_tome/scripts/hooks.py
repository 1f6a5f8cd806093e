"""The module hooks of apply_patch on a U-Net of diffusers' or ldm's classes.

A hook on the U-Net makes the state of each call; hooks on the blocks (block.py) keep their input, which the paper
measures similarity on, and merge and unmerge around attn1, attn2 and ff. Nothing of the host is replaced or copied.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from threading import get_ident
from typing import Any

from torch import Tensor, nn

from ..attention.combine import TORCHS
from ..attention.sdpa import leave_left_modes
from ..attention.sequence import JointCall
from ..autotune.decisions import Decisions
from ..autotune.layer import ROWS
from ..autotune.paying import Judge
from ..config import ToMeConfig
from ..hooks.blocks import BlockHooks
from ..hooks.call import HookedCall
from ..hooks.heads import served_blocks as blocks_with
from ..hooks.parts import argument
from ..merging.call import ModelCall
from ..merging.residual import ResidualCall, why_no_effect
from . import base
from .block import ScriptBlock
from .outcome import CallOutcome
from .residuals import RunResiduals
from .trials import ScriptTrials
from .whole_steps import Step, WholeSteps


def served_blocks(model: nn.Module) -> Iterator[nn.Module]:
    """The transformer blocks with a self-attention of the kind we know."""
    return blocks_with(model, "heads")


def compiles_blocks(model: nn.Module) -> bool:
    """Whether torch.compile runs the blocks by themselves (compile_repeated_blocks), while the model's hooks run as
    ever. All are compiled, or none."""
    return getattr(next(served_blocks(model), None), "_compiled_call_impl", None) is not None


class UNetAttachment(base.BaseAttachment):
    """On a U-Net. merge_attn: whether attn1 is merged at all."""

    def __init__(
        self, model: nn.Module, config: ToMeConfig, pipe: Any, merge_attn: bool = True, judge: Judge | None = None
    ):
        super().__init__(config.resolved(multires=False), pipe, merge_attn, judge)
        self.decided.resolve(config, self.config)
        self._whole_steps = WholeSteps(self)
        self.trials = ScriptTrials()
        self.takes_keys: dict[tuple, bool] = {}  # by attention code: whether it makes its keys from the given context
        self._blocks = [ScriptBlock(self) for _ in served_blocks(model)]
        self._hooks = BlockHooks()
        self._residuals = RunResiduals(self.steps, self.say)
        if (why := why_no_effect(self.config)) is not None:
            self.say(why)
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
        self._residuals.end()

    def afresh(self) -> dict[str, Any]:
        return {**super().afresh(), "takes_keys": {}}

    def _hook(self, model: nn.Module) -> Iterator[tuple[ScriptBlock, Callable[[], list[Any]]]]:
        """The blocks, and what puts their hooks on."""
        for hooked, block in zip(self._blocks, served_blocks(model), strict=True):
            yield hooked, functools.partial(hooked.hook, block)

    def _before_model(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        self.calls.pop(get_ident(), None)  # of one that was interrupted: KeyboardInterrupt runs no hook
        leave_left_modes()
        x = argument(args, kwargs, 0, "sample", "x")
        if not isinstance(x, Tensor) or x.dim() != 4:  # (B, C, H, W)
            self.say("ToMe skips a call whose input is not [B, C, H, W] (video)")
            return
        if self.is_checkpointed(module):
            return
        timestep = argument(args, kwargs, 1, "timestep", "timesteps", "t")
        config, grid = self.config_now(timestep), base.grid_of_sizes(*x.shape[2:])
        kind: tuple = (grid, config.ratio, x.dtype, x.device)
        if config.ratio > 0.0 and not (self._hooks.is_idle(kind) or self._whole_steps.is_known(kind)):
            step = Step(module, args, kwargs, config, grid, x, ROWS)
            if (why := self._whole_steps.why_not_paid(step, kind)) is not None:
                self.say(f"{why}; nothing is merged")
                self._hooks.rest(kind)
        waits = self._whole_steps.waits(kind)
        kind = kind if waits else (*kind, "busy")  # layers of one kind are judged alike
        idle = self._hooks.is_idle(kind)
        # What does nothing takes the processor time: the GPU is asked for nothing, and the blocks' hooks go.
        prompt = argument(args, kwargs, 2, "encoder_hidden_states", "context")
        compiled = base.compiles() or compiles_blocks(module)
        residual = self._residuals.call(config, timestep, x, prompt, compiled)
        draw = None if residual is None else residual.draw
        call = None if idle and self.steps.tells(timestep) else self.model_call(config, grid, timestep, x, draw)
        with base.hooking:
            alone = not self.calls  # another thread may be in the midst of a call
            if idle and alone:
                self._hooks.off()
            elif call is not None and not idle:
                decisions = Decisions(call, log=self.decided, judge=self.judge or Judge(waits))
                joint = self._joint(call, residual, compiled)
                self.call = HookedCall(call, decisions, x.shape[0], joint, residual, kind, CallOutcome())
                self._hooks.on(lambda: self._hook(module), kind, alone)

    def _after_model(self, module: nn.Module, args: tuple, out: Any) -> None:
        call = self.calls.pop(get_ident(), None)
        self._residuals.end_call(failed=out is None)
        if call is not None and out is not None:  # None: the call ended in an exception
            self._hooks.remember(call.kind, call.layers_seen)
            if not base.compiles():
                self._outcome.end_call(call.kind, call.tally)

    def _joint(self, call: ModelCall, residual: ResidualCall | None, compiled: bool) -> JointCall | None:
        """What lets queries keep their own tokens, or None where they shall not."""
        if not call.config.wants_heads and residual is None:
            return None
        if compiled:
            own = call.config.method == "sample"
            what = "own token has no effect" if own else "sample takes the place of multires"
            self.say(f"under torch.compile {what}")
            return None
        return JointCall.of(call.config, TORCHS, self._say_why)

    def tell_self_token(self, refused: str | None) -> None:
        """Why the queries of a layer cannot keep their own tokens, if they cannot."""
        if refused is not None and self.config.wants_heads:
            self.say(refused)
