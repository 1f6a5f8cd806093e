"""What the hooks on any model of a script have in common: the call under way, the step, and what is said once."""

from __future__ import annotations

import logging
import sys
import threading
from typing import Any

import torch
from torch import Tensor, nn

from ..attention.sdpa import leave_left_modes
from ..attention.sequence import with_detail
from ..autotune.decision_log import DecisionLog
from ..autotune.paying import Judge
from ..config import ToMeConfig
from ..core.curve import is_compiling
from ..core.grid import Grid
from ..core.schedule import config_at
from ..hooks.portable import Portable
from ..inspect.reasons import capped
from ..merging.call import ModelCall, same_halves, shares_match
from .outcome import Outcome
from .steps import Clock, Steps

logger = logging.getLogger("ToMe")
_CHECKPOINTED = "ToMe skips a call under gradient checkpointing, which runs blocks twice; turn it off to merge"
# Around the taking off and putting on of blocks' hooks: a model may be at work in several threads.
hooking = threading.Lock()


class BaseAttachment(Portable):
    """The hooks on one model, and the calls under way: one a thread, gone when the call ends.

    merge_attn: whether self-attention is merged at all. judge: of a copy's layers, whose steps are only tried; None:
    its steps are judged, too.
    """

    def __init__(
        self,
        config: ToMeConfig,
        pipe: Any,
        merge_attn: bool = True,
        judge: Judge | None = None,
        clock: Clock | None = None,
    ):
        self.merge_attn, self.judge = merge_attn, judge  # before anything is said
        self.config, self.steps = config, Steps(pipe, *(clock or Clock()))
        self._handles: list[Any] = []
        self.calls: dict[int, Any] = {}  # by thread: what its call of the model knows
        self._said: set[str] = set()
        self._last_alike = False
        self.decided = DecisionLog()
        self._outcome = Outcome(config, self.steps, self._log)
        if (cap := capped(config)) is not None:
            self.say(cap)

    def try_on(self, model: nn.Module, config: ToMeConfig, judge: Judge) -> None:
        """Hooks like these on a copy of the model, of which a step is only tried."""
        type(self)(model, config, self.steps.pipe, self.merge_attn, judge)

    def detach(self, model: nn.Module) -> None:
        """Take all hooks off."""
        self._outcome.end()
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self.calls.clear()
        leave_left_modes()

    def afresh(self) -> dict[str, Any]:
        return {"calls": {}, "_said": set()}

    @property
    def call(self) -> Any:
        """What this thread's call of the model knows, or None."""
        return self.calls.get(threading.get_ident())

    @call.setter
    def call(self, value: Any) -> None:
        if value is None:
            self.calls.pop(threading.get_ident(), None)
        else:
            self.calls[threading.get_ident()] = value

    def say(self, message: str) -> None:
        """Tell once what is left alone and why."""
        if message not in self._said:
            self._said.add(message)
            self._log(message)

    def speak_as(self, other: BaseAttachment) -> None:
        """What this and the other have to say is said once: of networks that share a run."""
        self._said, self._outcome, self.decided = other._said, other._outcome, other.decided

    def _log(self, message: str) -> None:
        if self.judge is None:  # else a step is tried: what becomes of the layers is told in the steps to come
            logger.warning("[ToMe] %s", message)

    def _say_why(self, message: str, detail: str) -> None:
        self.say(with_detail(message, detail))

    def is_checkpointed(self, model: nn.Module) -> bool:
        """Whether diffusers will run the model's blocks a second time for their gradients, when the call is over; said
        once."""
        runs_again = torch.is_grad_enabled() and bool(getattr(model, "is_gradient_checkpointing", False))
        if runs_again:
            self.say(_CHECKPOINTED)
        return runs_again

    def config_now(self, timestep: Any, multires: bool = False) -> ToMeConfig:
        """With the ratio that holds at this step. multires: see ToMeConfig.resolved."""
        asked = self.config.resolved(multires)
        self.decided.resolve(self.config, asked)
        if (less := self.config.why_less(asked)) is not None:
            self.say(less)
        return config_at(asked, lambda: self.steps.progress(timestep))

    def model_call(
        self, config: ToMeConfig, grid: Grid, timestep: Any, x: Tensor, draw: Tensor | None = None
    ) -> ModelCall | None:
        """The core's state for this call, or None where nothing is merged now.

        config: from config_now; x: the latent, [B, ...]. draw: of another step, in the place of this one's.
        """
        step = self.steps.step(timestep, x.device) if draw is None else draw
        if config.ratio > 0.0:
            self._outcome.reach(not (compiles() or captures(x.device)))
            return ModelCall(config, grid, x.device, step=step, alike=self._alike(config, x))
        self._outcome.skip(timestep, lambda known: self.config_now(self.steps.given(known)).ratio)
        return None

    def _alike(self, config: ToMeConfig, x: Tensor) -> bool:
        """Whether both halves of the batch x [B, ...] are the same images. A captured call, which cannot wait for the
        device, takes the answer of the call before it: its warm-up."""
        if not shares_match(config):
            return True
        if compiles():
            self.say("share match is off under torch.compile: each image is matched alone")
            return False
        if captures(x.device):
            return self._last_alike
        self._last_alike = alike = same_halves(x)
        return alike


def grid_of_sizes(*sizes: Any) -> Grid:
    """Sizes of a call's tensors as a grid. Under torch.jit.trace they are tensors, which nothing is found by."""
    return tuple(map(int, sizes)) if not is_compiling() and torch.jit.is_tracing() else sizes


def captures(device: torch.device) -> bool:
    """Whether a CUDA graph is being captured, in which nothing can wait for the device."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def compiles() -> bool:
    """Whether torch.compile is at work, under which no attention is seen (sdpa.py)."""
    found = is_compiling()
    if not found and "torch._dynamo" in sys.modules:  # between its graphs
        found = getattr(torch._C._dynamo.eval_frame, "get_eval_frame_callback", lambda: None)() not in (None, False)
    return found
