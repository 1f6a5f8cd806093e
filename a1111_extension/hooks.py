"""ToMe on a U-Net of the ldm or sgm classes, by module hooks.

Nothing is replaced: the host's attention codes, LoRA and other extensions keep working. A hook on the model makes
the state of each call and one after it takes it away; hooks on the blocks (block.py) merge and unmerge.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable, Iterator
from threading import get_ident
from typing import Any

from torch import Tensor, nn

from ..shared_tome import ModelCall, ToMeConfig
from ..shared_tome.attention.combine import TORCHS
from ..shared_tome.attention.sdpa import leave_left_modes
from ..shared_tome.attention.sequence import JointCall, with_detail
from ..shared_tome.autotune.decisions import Decisions
from ..shared_tome.autotune.paying import Decision, Judge
from ..shared_tome.core.progress import percent_of_time
from ..shared_tome.hooks.blocks import BlockHooks
from ..shared_tome.hooks.call import HookedCall
from ..shared_tome.hooks.heads import served_blocks
from ..shared_tome.hooks.served import is_tomesds
from ..shared_tome.hooks.trials import Trials
from ..shared_tome.inspect.record import CallRecord
from ..shared_tome.inspect.report import CallTally
from .block import WebUIBlock, plain_forward
from .sampling import Sampling
from .whole_step import WholeSteps, decision_on_copies

# Those whose hooks are on a model. Not a registry to work with: it only serves to take off what a crash left on.
_attached: weakref.WeakSet[PassAttachment] = weakref.WeakSet()


COMPILED = (
    "the model runs under torch.compile, which would not notice ToMe from one picture to the next; nothing is merged"
)


TOMESD = (
    "is off, because another extension has patched the model with tomesd, which merges tokens too; use one of the two"
)


class NotServed(Exception):
    """This model has nothing that ToMe can merge. The text is for a person."""


def is_compiled(model: nn.Module) -> bool:
    """Whether torch.compile runs this model, as a module of its own around it or in place."""
    return hasattr(model, "_orig_mod") or getattr(model, "_compiled_call_impl", None) is not None


def detach_all() -> None:
    """Take off every hook that is on any model, whoever put it there and whatever became of it."""
    for attachment in list(_attached):
        attachment.detach()


class PassAttachment:
    """The hooks of one sampling pass on one diffusion model. `detach` may be called at any time, and twice.

    called: told after each call of the model. judge: of a copy's layers, whose steps are only tried; None: steps are
    judged, too. Raises NotServed.
    """

    def __init__(
        self,
        model: nn.Module | None,
        sampling: Sampling,
        called: Callable[[], None] = lambda: None,
        judge: Judge | None = None,
    ):
        self.sampling, self._judge, self._steps = sampling, judge, WholeSteps(sampling)
        self._called, self.tell_self_token = called, sampling.tell_self_token
        self.model: nn.Module | None = None
        self.calls: dict[int, HookedCall] = {}  # by thread: the call under way
        self._call_tally: CallTally | None = None  # the call's, which may be told although nothing is merged
        # The active optimization cannot change in a pass.
        self.trials = Trials(lambda attn1: (plain_forward(attn1),), lambda attn1: (plain_forward(attn1), {}))
        self._hooks = BlockHooks()
        self._blocks: list[WebUIBlock] = []
        self._handles: list[Any] = []
        self.attach(model)

    def attach(self, model: nn.Module | None) -> None:
        """Move to this model; nothing happens where the hooks are on it already."""
        if model is not None and model is self.model:
            return
        self.detach()
        blocks = list(served_blocks(model)) if model is not None else []
        if not blocks:
            raise NotServed(f"{type(model).__name__} has no self-attention that ToMe knows; nothing is merged")
        if is_compiled(model):
            raise NotServed(COMPILED)
        if is_tomesds(model):
            raise NotServed(TOMESD)
        self.model = model
        self.sampling.another_model()
        _attached.add(self)
        try:
            self._handles += [
                model.register_forward_pre_hook(self._before_model, with_kwargs=True),
                model.register_forward_hook(self._after_model),
            ]
            names = {module: name for name, module in model.named_modules()}
            self._blocks = [WebUIBlock(self, block, names[block]) for block in blocks]
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
        self._blocks, self._steps = [], WholeSteps(self.sampling)
        self.model = self._call_tally = None
        self.calls.clear()
        leave_left_modes()
        _attached.discard(self)

    def _hook(self) -> Iterator[tuple[WebUIBlock, Callable[[], list[Any]]]]:
        """The blocks, and what puts their hooks on."""
        for block in self._blocks:
            yield block, block.hook

    def say(self, message: str) -> None:
        """Tell what was left alone and why, in the log."""
        self.sampling.notes.say(message, shown=False)

    @property
    def config(self) -> ToMeConfig:
        """The pass's options."""
        return self.sampling.config

    def _before_model(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        x = args[0] if args else kwargs.get("x")
        self._call_tally = None
        self.calls.clear()
        leave_left_modes()
        if not isinstance(x, Tensor) or x.dim() != 4:  # (B, C, H, W)
            return
        time = args[1] if len(args) > 1 else kwargs.get("timesteps")
        progress = None if time is None else functools.partial(percent_of_time, time)
        call = self.sampling.call(x, progress=progress)
        self._call_tally = self.sampling.call_tally
        if call is None:
            return
        judge, unpaid = self._judge, None
        if judge is None:
            tried = functools.partial(self._try_step, module, x, args, kwargs)
            verdict = self._steps.of_unet(call, module, x, tried)
            judge, unpaid = verdict.judge, verdict.unpaid
        # Layers of one kind are judged alike.
        kind = (call.full, call.config.ratio, x.dtype, *(() if judge.waits else ("busy",)))
        if unpaid is not None:
            self._hooks.rest(kind)
        if self._call_tally is None and self._hooks.is_idle(kind):
            self._hooks.off()
            return
        # A report wants to know of every layer.
        self._hooks.on(self._hook, kind if self._call_tally is None else None)
        decisions = Decisions(call, log=self.sampling.decided, judge=judge)
        given = x.shape[0], self._joint(call), self.sampling.residual, kind, self._call_tally, unpaid
        self.calls[get_ident()] = HookedCall(call, decisions, *given)

    def _try_step(
        self, model: nn.Module, x: Tensor, args: tuple, kwargs: dict[str, Any], config: ToMeConfig
    ) -> Decision | None:
        """What is known of the times of whole steps, by copies of the model."""
        tried: list[PassAttachment] = []

        def attach(made: nn.Module, judge: Judge) -> None:
            tried.append(PassAttachment(made, self.sampling.tried(config), judge=judge))

        try:
            return decision_on_copies(model, x, args, kwargs, config, attach)
        finally:
            for one in tried:
                one.detach()  # else copies and hooks hold each other, and with them the model's weights

    def _joint(self, call: ModelCall) -> JointCall | None:
        """What lets queries keep their own tokens, None where they shall not."""
        if not call.config.wants_heads and self.sampling.residual is None:
            return None
        return JointCall.of(call.config, TORCHS, lambda *told: self.say(with_detail(*told)))

    def _after_model(self, module: nn.Module, args: tuple, out: Any) -> None:
        call, call_tally, self._call_tally = self.calls.pop(get_ident(), None), self._call_tally, None
        if isinstance(call_tally, CallRecord):
            call_tally.end()
        if call is not None:
            self._hooks.remember(call.kind, call.layers_seen)
        self._called()
