"""ToMe in ComfyUI's diffusion transformers (the table in dit_models.py), images, video and sound.

As for U-Nets (unet.py): one wrapper around `apply_model` puts what a call needs into a copy of that call's own
transformer_options, and nothing outlives the call. Here it is one `optimized_attention_override`. It sees q, k and v
of every attention after their position embedding; where their number is that of the call's own tokens, the image's
keys and values (and the queries, for methods that merge them) go through the core and all other tokens stay: text,
references, padding. An override that another node has set is called in turn; a sparse one, which serves calls with as
many keys as queries alone, goes first, and what it declines is merged. (One model's attentions do not tell their
options and so are met one step later, where they call torch: DiTModel.silent.)

In one softmax with text, each image token that stands for n counts n times: log(n) is added to its logits
(shared_tome/attention/sequence.py, dit_attention.py).
"""

from __future__ import annotations

import functools
from contextlib import AbstractContextManager
from typing import Any

from torch import Tensor

from ..shared_tome import ModelCall
from ..shared_tome.attention.sequence import JointCall
from ..shared_tome.autotune.layer import known_or_measured, name_of
from ..shared_tome.autotune.timing import compared
from ..shared_tome.autotune.verdict import Given, Verdict
from ..shared_tome.core.channels import extra_channels
from ..shared_tome.inspect.reasons import NO_WHOLE_TOKEN
from ..shared_tome.inspect.report import CallTally
from ..shared_tome.merging.plan import Plan
from .chosen import INSIDE, OVERRIDE, Chosen, backend_behind
from .dit_attention import (
    Call,
    attend_merged,
    attend_sampled,
    fits_weights,
    torchs_order,
)
from .dit_auto import DiTDecisions
from .dit_layout import Layout
from .dit_models import DiTModel
from .dit_silent import NOT_TORCHS, met_at_torch
from .log import leave_alone, say_once
from .model_call import DIFFUSION_MODEL, KEY, call_key
from .outcome import NOT_MET, Outcome

# What the log says.
_SPARSE = "attentions that another node's sparse attention computes are left alone; ToMe merges those that it declines"
_GETS_MERGED = (
    "another node's attention gets the merged tokens; if that attention is sparse, use one of the two nodes, because "
    "sparse attention needs all tokens in their places"
)


class DiTCall:
    """The override of one call of the model, and the options that carry it.

    judges: a layer is merged only where that was measured to be faster, levels "auto" (autotune/layer.py).
    compiled: whether torch.compile runs the model. guarded: whether its graph depends on `key`, which comes as the
    keyword `tome`; wrappers and models of other nodes may not take that.
    """

    def __init__(
        self,
        call: ModelCall,
        facts: DiTModel,
        layout: Layout,
        options: dict[str, Any],
        record: CallTally | None = None,
        judges: bool = False,
        outcome: Outcome | None = None,
        compiled: bool = False,
        chosen: Chosen | None = None,
    ):
        self.call, self.facts, self.layout = call, facts, layout
        self._chosen = Chosen(options) if chosen is None else chosen
        self._record, self._judges = record, judges
        self._outcome = Outcome() if outcome is None else outcome
        self._decisions = DiTDecisions(call.config, layout, self._outcome.decided)
        self._override = self._chosen.override
        self._sparse = self._chosen.sparse
        self._behind = backend_behind(self._override) if self._sparse else None
        order = self._chosen.kernels(call.seed.device, declined=True)
        self._joint = self._joins(order)
        # Of PyTorch's attention where it steps in for another (_fitting).
        instead = () if self._override is not None else torchs_order(call.seed.device)
        self._instead = self._joins(instead)
        # What is done must stand in a guard of its own, as in unet.py: all that a compiled graph takes for granted.
        # The seed is a tensor and so one of its inputs.
        by = [getattr(func, "__name__", func) for func in (self._chosen.host, self._behind)]
        self.key = repr((call_key(call), layout, order, instead, judges, self._sparse, by))
        self._met, self._served = False, 0
        self._plan: Plan | None = None
        self._queries = 0  # that a layer has brought so far, where they come in parts
        self.guarded = compiled and facts.compiles
        self.options = {**options, OVERRIDE: self.attention}
        if self.guarded:
            wrappers = dict(options.get("wrappers", {}))
            wrappers[DIFFUSION_MODEL] = {**wrappers.get(DIFFUSION_MODEL, {}), KEY: [self._check_key]}
            self.options["wrappers"] = wrappers

    def _check_key(self, executor: Any, *args: Any, tome: str = "", **kwargs: Any) -> Tensor:
        if tome != self.key:  # reading it is what makes torch.compile guard on it
            raise RuntimeError("another node changed ToMe's argument 'tome' on its way to the model")
        return executor(*args, **kwargs)

    def end(self, model: Any) -> None:
        """To be called after the model's call: says it where no attention came here."""
        if self._met:
            return
        if any(hasattr(module, "_orig_mod") for module in model.modules()):
            self._outcome.merged(
                self.layout.grid
            )  # a compiled block's attentions come here while the block is compiled alone
            return
        self._outcome.left_alone(NOT_MET, self.facts.name, self.layout.grid)
        if self._record is not None:
            self._record.left_alone(NOT_MET, self.facts.name, self.layout.grid)

    def attention(self, func: Any, q: Tensor, k: Tensor, v: Tensor, heads: int, *args: Any, **kwargs: Any) -> Tensor:
        """optimized_attention_override: q, k, v [B, L, H * d], or [B, H, L, d] with skip_reshape."""
        if "transformer_options" in kwargs:  # else no override would have been asked (DiTModel.silent)
            func = self._chosen.func(func)
        if not self._sparse:
            return self._merge(self._override, func, q, k, v, heads, *args, **kwargs)
        declined, told = [], {name: kwargs[name] for name in ("transformer_options", INSIDE) if name in kwargs}

        def dense(func: Any, *args: Any, **kwargs: Any) -> Tensor:
            declined.append(True)
            return self._merge(None, func, *args, **{**kwargs, **told})

        if self._behind is not None:  # it drops the function that it is given, and asks its options for an override
            kwargs.pop(INSIDE, None)
            kwargs["transformer_options"] = {**kwargs["transformer_options"], OVERRIDE: dense}
        out = self._override(functools.partial(dense, func), q, k, v, heads, *args, **kwargs)
        if not declined and self._start(q, v, Call.of(func, q, k, heads, args, kwargs)) is not None:
            self._leave(_SPARSE)
        return out

    def _merge(
        self, override: Any, func: Any, q: Tensor, k: Tensor, v: Tensor, heads: int, *args: Any, **kwargs: Any
    ) -> Tensor:
        """The attention by func, or by another node's override of it, with what is to be merged merged."""
        call = Call.of(func, q, k, heads, args, kwargs, override)
        start = self._start(q, v, call)
        ready = None if start is None else self._prepare(start, q, k, v, call)
        if ready is None:
            first = (func,) if override is None else (override, func)
            return first[0](*first[1:], q, k, v, heads, *args, **kwargs)
        self._outcome.merged(self.layout.grid)
        if self._sparse:
            say_once(_SPARSE, self.facts.name)
        elif override is not None:
            say_once(_GETS_MERGED)
        elif ready[1].func is not func:
            say_once(
                f"PyTorch's attention takes the place of {call.name} where keys need weights (text beside the image, "
                f"or an uneven ratio) and so heads of {_width(call)} channels"
            )
        return self._serve(*ready, *(call.plain(x) for x in (q, k, v)), start)

    def _serve(self, plan: Plan, call: Call, joint: JointCall, q: Tensor, k: Tensor, v: Tensor, start: int) -> Tensor:
        """The attention with the image's tokens merged, by what _prepare says."""
        kind = self.call.config.kind
        if kind.matches:
            return attend_merged(joint, call, q, k, v, start, plan, kind)
        return attend_sampled(joint, call, q, k, v, start, plan)

    def hooks(self, model: Any) -> AbstractContextManager[None]:
        """What the model's attentions need that do not tell their options (DiTModel.silent)."""
        modules = () if self.facts.silent is None else self.facts.silent(model, self.options)
        return met_at_torch(modules, self.attention, self.call.config.kind.matches, lambda: self._leave(NOT_TORCHS))

    def _verdict(self, call: Call, q: Tensor, k: Tensor, v: Tensor, start: int) -> Verdict | Given | None:
        """What was measured of this layer, or is set; None where nothing is.

        Measured on its first row's own tokens: what is decided must not depend on how many rows a call has, nor on a
        few words more in the prompt.
        """
        part = q.shape[2 if call.split else 1] != call.length - self.layout.elsewhere
        if not self._judges or self.call.config.kind.matches or call.mask is not None or part:
            return None
        return self._decisions.verdict(call, k, lambda shape: self._judge(call, q[:1], k[:1], v[:1], start, shape))

    def _judge(self, call: Call, q: Tensor, k: Tensor, v: Tensor, start: int, shape: tuple) -> Verdict | None:
        """The times of a layer of this shape, or None. q, k, v: of one row."""
        config, device = self.call.config, q.device
        torchs = self._joint.kernels or self._instead.kernels
        how = f"proportional {config.proportional}", f"own {config.keeps_own}"
        by = [name_of(func, device) for func in (call.func, call.override) if func is not None]
        how = (*how, f"shares {config.whole:.3f} {config.half:.3f}") if config.shares_by_hand else how
        names = [self.facts.name, *by, *torchs, *map(str, shape), config.method, f"{config.ratio:.4f}", *how]

        def measure() -> Verdict:
            plain, grid = [call.plain(x) for x in (q, k, v)], self.layout.grid
            plan = ModelCall(config, grid, device).plan(plain[0].new_empty(1, self.layout.tokens, 1), grid)
            fitting = None if plan is None else self._fitting(call, start, plan, True)
            if fitting is None:
                return Verdict(0.0, 0.0, 0.0)
            try:
                return compared(lambda: call.run(q, k, v), lambda: self._serve(plan, *fitting, *plain, start), device)
            finally:  # the draws that were timed are not this call's
                for joint in (self._joint, self._instead):
                    joint.multires.tiles.clear()

        return known_or_measured(", ".join(names), device, measure)

    def _start(self, q: Tensor, v: Tensor, call: Call) -> int | None:
        """Where the image's tokens begin; None for an attention that is none of ours."""
        options, length = call.kwargs.get("transformer_options") or {}, call.length
        if self.facts.numbered and "block_index" not in options:
            return None  # a refiner, before the blocks
        place = 2 if call.split else 1
        if v.shape[place] != length or q.shape[place] > length:
            return None  # to another's tokens
        part = q.shape[place] < length
        if part and (not self.layout.parts or length in self.layout.others):
            return None
        if part and call.mask is None and not self.layout.elsewhere and q.shape[place] in self.layout.others:
            return None  # sound that looks at the video
        start = self.layout.start(length, options.get("img_slice"))
        if start is None and length > self.layout.tokens and length not in self.layout.others:
            self._leave(
                "an attention whose tokens are not its text, its image and its references is left alone: another "
                "node has added some",
                f"{length} tokens for {self.layout}",
            )
        if start is None:
            return None
        self._met = True
        if length in self.layout.others:
            self._leave("an image of as many tokens as its prompt is left alone: self- and cross-attention look alike")
            return None
        if part and self.call.config.kind.queries:
            self._leave(
                "attentions that take a part of the queries each (guides of LTXV, HiDream-O1, later frames of Wan "
                "CausalAR) are left alone, because this method merges queries"
            )
            return None
        return start

    def _prepare(self, start: int, q: Tensor, k: Tensor, v: Tensor, call: Call) -> tuple[Plan, Call, JointCall] | None:
        """The plan of this layer, and what _fitting says; None where it is left alone."""
        if call.mask is not None and (call.mask.dim() < 2 or call.mask.shape[-1] != call.length):
            self._leave("an attention whose mask is not one over its keys is left alone")
            return None
        verdict = self._verdict(call, q, k, v, start)
        if verdict is not None and not verdict.pays():
            self._leave(verdict.reason)
            return None
        # Measured to be faster merged, or to be merged whatever it costs.
        paid = not self._judges or self._decisions.known(call, k) is not None
        matches = self.call.config.kind.matches
        if matches and self._fitting(call, start, None, paid) is None:
            return None
        if first := self._is_first(q, call):
            k = call.plain(k)
            image = (k if matches or not call.split else k[:, 0]).narrow(-2, start, self.layout.tokens)
            # The ViT paper's metric: keys averaged over the heads. What matches nothing wants its shape alone.
            metric = (
                image if not matches else image.mean(1) if call.split else image.unflatten(-1, (-1, call.d)).mean(2)
            )
            self._plan = self.call.plan(metric, self.layout.grid)  # metric [B, N, .]
        plan = self._plan
        if plan is None:
            self._outcome.left_alone(NO_WHOLE_TOKEN, self.facts.name, self.layout.grid)
        fitting = None if plan is None else self._fitting(call, start, plan, paid)
        if first and self._record is not None:
            if plan is None or fitting is not None:
                self._record.layer(self._name(call), self.layout.grid, plan)
            else:
                self._record.count(self.layout.grid)
        return None if fitting is None else (plan, *fitting)

    def _is_first(self, q: Tensor, call: Call) -> bool:
        """Whether this is the first attention of a layer: the others want the same tokens."""
        count, self._queries = self._queries, self._queries + q.shape[2 if call.split else 1]
        if self._queries < call.length - self.layout.elsewhere:
            return count == 0
        self._queries = 0
        if count == 0:
            self._served += 1
        return count == 0 and (self._served - 1) % self.layout.together == 0

    def _fitting(self, call: Call, start: int, plan: Plan | None, paid: bool) -> tuple[Call, JointCall] | None:
        """The call by an attention that takes its keys' weights, and how they are joined; None: it is left alone.

        The attention that the user has chosen does it wherever it can.

        Args:
            plan: of a method that matches nothing.
            paid: whether PyTorch's attention may take the place of one that knows a few sizes of heads.
        """
        weighed = self._weighs and (plan is None or self._joint.around(plan, start, call.length).bias is not None)
        if not weighed or fits_weights(call):
            return call, self._joint
        if call.override is None and paid:
            return call.by_torch(), self._instead
        other = call.name if call.override is None else "another node's attention"
        self._leave(
            "an attention is left alone where keys need weights (text beside the image, or an uneven ratio) and so "
            f"heads of {_width(call)} channels: {other} may not take them"
        )
        return None

    def _joins(self, order: tuple[str, ...]) -> JointCall:
        return JointCall(self._weighs, order, say_once, self.call.config.keeps_own)

    def _name(self, call: Call) -> str:
        """The block as the log names it."""
        options = call.kwargs.get("transformer_options") or {}
        if "block_index" not in options:
            return self.facts.name
        return f"{options.get('block_type', '')} block {options['block_index']}".lstrip()

    def _leave(self, reason: str, detail: str = "") -> None:
        self._met = True
        leave_alone(self._record, reason, self.facts.name, detail, self.layout.grid, outcome=self._outcome)

    @property
    def _weighs(self) -> bool:
        """Whether a key that stands for several counts for as many."""
        return self.call.config.weighs_keys


def _width(call: Call) -> int:
    """Channels of the heads that carry weights."""
    return call.d + extra_channels(call.d)
