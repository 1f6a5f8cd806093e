"""scripts.py on diffusers' transformers (rows.py), most of which attend to text and image together.

The image's part of an attention is sampled or merged (attention/sequence.py), each key weighted by how many tokens it
stands for; text and reference tokens stay. That happens behind the rotary positions, where queries and keys meet
(attention/sdpa.py).
"""

from __future__ import annotations

import functools
import inspect
import math
import weakref
from collections.abc import Callable, Hashable, Iterator
from dataclasses import dataclass, field
from threading import get_ident
from typing import Any

import torch
from torch import Tensor, nn

from .. import kernels
from ..attention.combine import TORCHS
from ..attention.sdpa import Handler, HostAttention, SdpaHooks, attend_sampled, leave_left_modes, not_torchs
from ..attention.sequence import JointCall, image_bias, merge_image, unmerge_image
from ..autotune.layer import ALWAYS
from ..autotune.paying import Judge
from ..autotune.step import tokens_beside
from ..config import ToMeConfig
from ..core.grid import Grid
from ..core.schedule import serves_layer
from ..hooks.blocks import BlockHooks
from ..hooks.served import served_as
from ..merging.call import ModelCall
from ..merging.plan import Plan
from ..merging.residual import why_no_effect
from .base import BaseAttachment, grid_of_sizes, hooking
from .joint_autotune import JointDecisions
from .masks import Group, attend_padded, group_rows
from .outcome import CallOutcome
from .parallel import Shard, why_not_parallel
from .rows import ROWS, Place, Row, attentions_of
from .trials import is_answered, is_replaced
from .whole_steps import Step, WholeSteps

# What the log says.
_ANSWERED = (
    "ToMe skips attentions that something else answers in the model's place (a cache, guidance by skipped layers)"
)


@dataclass(eq=False)
class _TransformerCall:
    """One call of the model. grid: the image's; head, tail: tokens before and behind it; groups: its rows by what a
    mask hides of these, None where no mask is known; shard: this process's part, where several share the call. kind:
    see WholeSteps; unpaid: why all of it is left alone. next: the number of the attention to come."""

    model: ModelCall
    joint: JointCall
    grid: Grid
    batch: int
    head: int
    tail: int
    decisions: JointDecisions
    groups: tuple[Group, ...] | None = None
    shard: Shard | None = None
    kind: Hashable = None
    unpaid: str | None = None
    next: int = 0
    outcome: CallOutcome = field(default_factory=CallOutcome)


class JointAttachment(BaseAttachment):
    """On a transformer of ROWS. merge_attn: whether anything is merged at all."""

    def __init__(
        self, model: nn.Module, config: ToMeConfig, pipe: Any, merge_attn: bool = True, judge: Judge | None = None
    ):
        self._model = served_as(model, ROWS)  # a row has functions, which cannot be pickled
        super().__init__(config, pipe, merge_attn, judge, self.row.clock)
        self._names = tuple(inspect.signature(type(model).forward).parameters)[1:]
        self._grid: tuple[weakref.ref, Grid, int] | None = None
        self._groups: tuple[weakref.ref, tuple[int, ...], tuple[Group, ...] | None] | None = None
        self._whole_steps, self._hooks = WholeSteps(self), BlockHooks()
        self._agreed: dict[Hashable, list[bool]] = {}  # by the processes that share the model: a fact about them
        if (why := why_no_effect(config, transformer=True)) is not None:
            self.say(why)
        if not merge_attn:
            self.say("nothing is merged: attention is off")
            return
        self._handles += [
            model.register_forward_pre_hook(self._before_model, with_kwargs=True),
            model.register_forward_hook(self._after_model, always_call=True),
        ]
        self._hooks.on(lambda: self._hook(model))

    def detach(self, model: nn.Module) -> None:
        super().detach(model)
        self._hooks.off()

    def _hook(self, model: nn.Module) -> Iterator[tuple[int, Callable[[], list[Any]]]]:
        """The attentions by their numbers, and what puts their hooks on."""
        for number, attention in enumerate(attentions_of(model, self.row)):
            begin = functools.partial(self._before_attention, number)
            yield number, lambda given=(attention, begin): SdpaHooks(*given, self._missed).handles

    @property
    def row(self) -> Row:
        """The model's."""
        return ROWS[self._model]

    def afresh(self) -> dict[str, Any]:
        return {**super().afresh(), "_grid": None, "_groups": None, "_agreed": {}}

    def _before_model(self, model: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        self.calls.pop(get_ident(), None)  # of one that was interrupted: KeyboardInterrupt runs no hook
        leave_left_modes()
        reason = why_not_parallel(model)
        if reason is not None:
            self.say(f"{reason}; nothing is merged")
            return
        if self.is_checkpointed(model):
            return
        arguments = {**dict(zip(self._names, args, strict=False)), **kwargs}
        place = self.row.place(model, arguments, self._grid_of)
        grid, x = grid_of_sizes(*place.grid), place.latent
        if math.prod(grid) == 0:
            self.say("ToMe skips image tokens that are not rows of one image")
            return
        timestep = arguments.get(self.row.timestep)
        config = self.config_now(timestep, kernels.serves(x))
        others = tokens_beside(place.head + place.tail, place.mask is not None)
        kind, unpaid, shard = (grid, others, config.ratio, x.dtype, x.device), None, None
        if config.ratio > 0.0 and not self._hooks.is_idle(kind):
            shard = Shard.of(model, place, self._agreed)
            if serves_layer(config, grid, grid) and not self._whole_steps.is_known(kind):
                timed = math.prod(grid) < ALWAYS
                step = Step(model, args, kwargs, config, grid, x, 1, others, timed, shard)
                unpaid = self._whole_steps.why_not_paid(step, kind)
        idle = self._hooks.is_idle(kind)
        call = None if idle and self.steps.tells(timestep) else self.model_call(config, grid, timestep, x)
        groups = None if idle or call is None else self._groups_of(place)
        with hooking:
            alone = not self.calls
            if idle and alone:
                self._hooks.off()
            elif call is not None and not idle:
                joint = JointCall(call.config.weighs_keys, TORCHS, self._say_why, call.config.keeps_self)
                judge = self.judge or Judge(self._whole_steps.waits(kind))
                decisions = JointDecisions(call, grid, type(model).__name__, shard, self.decided, judge)
                self.call = _TransformerCall(
                    call, joint, grid, x.shape[0], place.head, place.tail, decisions, groups, shard, kind, unpaid
                )
                self._hooks.on(lambda: self._hook(model), narrow=alone)

    def _after_model(self, model: nn.Module, args: tuple, out: Any) -> None:
        call = self.calls.pop(get_ident(), None)
        if call is not None and out is not None:  # None: the call ended in an exception
            self._outcome.end_call(call.grid, call.outcome)
            if call.unpaid is not None:  # and what else keeps it from being merged has been told
                self._hooks.rest(call.kind)

    def _grid_of(self, ids: Tensor) -> tuple[Grid, int]:
        """The image's grid from its position ids [N, 3] (number, row, column), and the reference tokens behind it.

        Read once for each tensor of ids: reading waits for the device. (0, 0) where they are no grid.
        """
        known = self._grid  # read once: another thread's call may put its own there
        if known is None or known[0]() is not ids:
            rows = (ids[0] if ids.dim() == 3 else ids).detach().cpu().float()  # (N, 3)
            own = int((rows[:, 0] == 0).sum())
            image = rows[:own]
            height, width = (image.amax(0) - image.amin(0)).int().add(1).tolist()[1:] if own else (0, 0)
            count = torch.arange(height * width)
            place = torch.stack((count // max(1, width), count % max(1, width)), dim=1)  # (H * W, 2)
            regular = height * width == own and torch.equal((image - image[:1])[:, 1:].long(), place)
            known = (weakref.ref(ids), (height, width) if regular else (0, 0), len(rows) - own)
            self._grid = known
        return known[1:]

    def _groups_of(self, place: Place) -> tuple[Group, ...] | None:
        """The rows of a batch by what the mask hides of their text. Read once for each mask, as ids are."""
        mask, sizes = place.mask, (place.head, math.prod(place.grid), place.tail)
        if mask is None:
            return None
        known = self._groups
        if known is None or known[0]() is not mask or known[1] != sizes:
            read = mask.detach().cpu()
            valid = read if place.valid is None else place.valid(read, place.head + place.tail)
            known = self._groups = (weakref.ref(mask), sizes, group_rows(valid, *sizes, place.latent.device))
        return known[2]

    def _before_attention(
        self, number: int, attention: nn.Module, args: tuple, kwargs: dict[str, Any]
    ) -> Handler | None:
        call = self.calls.get(get_ident())
        if call is None:
            return None
        for _ in range(call.next, number):  # guidance by skipped layers: those behind keep their choices
            call.model.pass_over(call.grid)
        call.next = number + 1
        return self._attend if call.shard is None else functools.partial(self._attend_part, attention.heads)

    def _missed(self, attention: nn.Module) -> None:
        """The attention came to an end without torch's. Raises RuntimeError where it runs another one itself."""
        if not (is_replaced(attention) or is_answered(attention)):
            raise not_torchs(attention)
        self.say(_ANSWERED)
        if self.call is not None:  # a call inside of this one has ended it
            self.call.model.pass_over(self.call.grid)

    def _attend_part(self, heads: int, attention: HostAttention, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """_attend with some of a layer's `heads` heads."""
        if self.call is None or self.call.unpaid is not None:
            return self._attend(attention, q, k, v)  # in the order that the host has
        self.call.shard.heads = heads
        return self.call.shard.attend(self._attend, attention, q, k, v)

    def _attend(self, attention: HostAttention, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """q, k, v [B, H, L, d] -> [B, H, L, d]."""
        call = self.calls.get(get_ident())
        if call is None:
            return attention(q, k, v)
        image, length = math.prod(call.grid), k.shape[2]
        beside = length - image
        own = q.shape[2] == length and beside in (0, call.tail, call.head + call.tail)
        if not own or k.shape[0] != call.batch:
            self.say("ToMe skips an attention with other tokens than the text's and the image's")
            return attention(q, k, v)
        start = call.head if beside == call.head + call.tail else 0
        is_masked = not attention.is_plain
        is_padded = is_masked and bool(call.groups) and attention.mask is not None and beside == call.head + call.tail
        if is_masked and not is_padded and not self._serves_mask(attention, q, k, v, start):
            self.say("ToMe skips an attention with a mask")
            return attention(q, k, v)
        serves = call.model.serves(call.grid)
        if call.unpaid is not None:
            call.outcome.leave(call.model, call.grid, call.unpaid)
            return attention(q, k, v)
        unpaid = call.decisions.why_not_paid(attention, q, k, v, start) if serves else None
        if unpaid is not None:
            self.say(f"{unpaid}; ToMe skips attentions of {length} tokens")
            call.outcome.leave(call.model, call.grid, unpaid)
            return attention(q, k, v)
        # The ViT paper's metric: keys averaged over the heads. What matches nothing wants its shape alone.
        mean = (lambda x: x.mean(1)) if call.shard is None else call.shard.mean
        metric = mean(k[:, :, start : start + image]) if call.model.config.kind.matches else k[:, 0, :image]
        plan = call.model.plan(metric, call.grid)  # metric [B, N, d]
        if plan is None:
            call.outcome.leave(call.model, call.grid)
            return attention(q, k, v)
        call.outcome.merged = True
        plan = plan if call.shard is None else call.shard.of_heads(plan)
        matches, given = call.model.config.kind.matches, (attention, q, k, v, start, plan)
        attend = self._merged if matches else functools.partial(attend_sampled, call.joint)
        if is_padded:
            return attend_padded(attend, call.groups, *given, not matches, self._tell_masked)
        return attend(*given)

    def _tell_masked(self) -> None:
        if self.call.joint.keeps_self:
            self.say("own token has no effect under a mask")

    def _serves_mask(self, attention: HostAttention, q: Tensor, k: Tensor, v: Tensor, start: int) -> bool:
        """Whether the attention can be had under its mask: at three resolutions (attention/masks.py)."""
        call, mask = self.call, attention.mask
        if mask is None or attention.options.get("is_causal") or not attention.is_torchs_alone:
            return False
        return call.model.config.method == "multires" and call.joint.multires.serves_mask(
            q, k, v, mask, start, call.grid
        )

    def _merged(self, attention: HostAttention, q: Tensor, k: Tensor, v: Tensor, start: int, plan: Plan) -> Tensor:
        """Methods that match: the image's part of queries, keys and values merged, which begins at `start`; what the
        queries get unmerged. q, k, v [B, H, L, d] -> [B, H, L, d]."""
        kind, length = self.call.model.config.kind, k.shape[2]
        bias = image_bias(plan, start, length) if self.call.joint.weighs else None

        def merge(x: Tensor) -> Tensor:  # [B, H, L, d] -> [B, H, K, d]
            return _split(merge_image(_flat(x), start, plan), x.shape[1])

        q = merge(q) if kind.queries else q
        k, v = (merge(k), merge(v)) if kind.keys else (k, v)
        out = attention(q, k, v, bias=bias)
        return _split(unmerge_image(_flat(out), start, plan), out.shape[1]) if kind.queries else out


def _flat(x: Tensor) -> Tensor:
    """[B, H, L, d] -> [B, L, H * d]."""
    return x.transpose(1, 2).flatten(2)


def _split(x: Tensor, heads: int) -> Tensor:
    """Back, [B, L, H * d] -> [B, H, L, d]."""
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)
