"""ToMe in ComfyUI's diffusion transformers (the table in dit_models.py), images, video and sound.

As for U-Nets (unet.py): one wrapper around `apply_model` puts what a call needs into a copy of that call's own
transformer_options, and nothing outlives the call. Here it is one `optimized_attention_override`, through which every
attention comes to dit_call.py. An override that another node has set is called in turn; a sparse one, which serves
calls with as many keys as queries alone, goes first, and what it declines is merged. (One model's attentions do not
tell their options and so are met one step later, where they call torch: DiTModel.silent.)
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

from torch import Tensor

from ..shared_tome import ModelCall
from ..shared_tome.autotune.paying import Judge
from ..shared_tome.inspect.reasons import NO_WHOLE_TOKEN
from ..shared_tome.inspect.report import CallTally
from .chosen import INSIDE, OVERRIDE, Chosen, backend_behind
from .dit_attention import COMFYUI, AttentionCall
from .dit_call import TransformerCall
from .dit_layout import Layout
from .dit_models import DiTModel
from .dit_silent import NOT_TORCHS, met_at_torch
from .graphs import outside
from .log import leave_alone, say_once
from .model_call import DIFFUSION_MODEL, KEY, call_key
from .outcome import NOT_MET, Outcome

# What the log says.
_SPARSE = "ToMe skips attentions that another node's sparse attention computes, and merges those that it declines"
_GETS_MERGED = (
    "another node's attention gets the merged tokens; if that attention is sparse, use one of the two nodes, because "
    "sparse attention needs all tokens in their places"
)


class DiTCall(TransformerCall):
    """The override of one call of the model, and the options that carry it.

    compiled: whether torch.compile runs the model. guarded: whether its graph depends on `key`, which comes as the
    keyword `tome`; wrappers and models of other nodes may not take that. outside: whether the attentions run outside of
    the graph (graphs.py).
    """

    def __init__(
        self,
        call: ModelCall,
        facts: DiTModel,
        layout: Layout,
        options: dict[str, Any],
        record: CallTally | None = None,
        by_times: bool = False,
        outcome: Outcome | None = None,
        compiled: bool = False,
        chosen: Chosen | None = None,
        judge: Judge | None = None,
        unpaid: str | None = None,
    ):
        self._chosen = Chosen(options) if chosen is None else chosen
        self._outcome = Outcome() if outcome is None else outcome
        self._override = self._chosen.override
        self._sparse = self._chosen.sparse
        self._behind = backend_behind(self._override) if self._sparse else None
        order = self._chosen.kernels(call.seed.device, declined=True)
        # Of PyTorch's attention where it steps in for another (_fits).
        instead = () if self._override is not None else COMFYUI.order(call.seed.device)
        decided = self._outcome.decided
        super().__init__(call, facts, layout, order, instead, record, by_times, decided, judge, unpaid)
        # What is done must stand in a guard of its own, as in unet.py: all that a compiled graph takes for granted.
        # The seed is a tensor and so one of its inputs.
        by = [getattr(func, "__name__", func) for func in (self._chosen.host, self._behind)]
        self.key = repr((call_key(call), layout, order, instead, by_times, self._sparse, by))
        self.guarded, self.outside = compiled and facts.compiles, compiled and not facts.compiles
        self._entry = outside(self.attention) if self.outside else self.attention
        self.options = {**options, OVERRIDE: self._entry, **self._around_replaced(options)}
        if self.guarded:
            wrappers = dict(options.get("wrappers", {}))
            wrappers[DIFFUSION_MODEL] = {**wrappers.get(DIFFUSION_MODEL, {}), KEY: [self._check_key]}
            self.options["wrappers"] = wrappers

    def _around_replaced(self, options: dict[str, Any]) -> dict[str, Any]:
        """Of the options: the blocks that other nodes replace, with _replaced around them."""
        replaced = options.get("patches_replace", {})
        if not replaced.get("dit"):
            return {}
        blocks = {place: functools.partial(self._replaced, place, block) for place, block in replaced["dit"].items()}
        return {"patches_replace": {**replaced, "dit": blocks}}

    def _replaced(self, place: tuple[str, int], block: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """A block by another node. One that is skipped counts all the same, since other calls may run it
        (SkipLayerGuidance): those behind it keep their choices."""
        came = self._came
        out = block(*args, **kwargs)
        for _ in range(0 if self._came > came else self._layers_of(place[1])):
            self.call.pass_over(self.layout.grid)
            if self._record is not None:
                self._record.count(self.layout.grid)
        return out

    def _layers_of(self, number: int) -> int:
        """How many layers of a block count: of those with the text and without it the ones that were merged so far."""
        if not self.layout.twice:
            return 1
        starts = (self.layout.head, self.layout.alone)[: 2 if number in self.layout.twice else 1]
        merged = {kind.start for kind in self._kinds.values()} or starts
        return sum(start in merged for start in starts)

    def _check_key(self, executor: Any, *args: Any, tome: str = "", **kwargs: Any) -> Tensor:
        if tome != self.key:  # reading it is what makes torch.compile guard on it
            raise RuntimeError("another node changed ToMe's argument 'tome' on its way to the model")
        return executor(*args, **kwargs)

    def end(self, model: Any) -> None:
        """To be called after the model's call: says it where no attention came here."""
        if self._met:
            return
        if any(hasattr(module, "_orig_mod") for module in model.modules()):
            # A compiled block's attentions come here while the block is compiled alone.
            self._outcome.merged(self.layout.grid)
            return
        self._outcome.left_alone(NOT_MET, self.facts.name, self.layout.grid)
        if self._record is not None:
            self._record.left_alone(NOT_MET, self.facts.name, self.layout.grid)

    def attention(self, func: Any, q: Tensor, k: Tensor, v: Tensor, heads: int, *args: Any, **kwargs: Any) -> Tensor:
        """optimized_attention_override: q, k, v [B, L, H * d], or [B, H, L, d] with skip_reshape."""
        if self._chosen.changes and "transformer_options" in kwargs:  # else no override was asked (DiTModel.silent)
            func = self._chosen.func(func)
        if not self._sparse:
            return self.merge(self._override, func, q, k, v, heads, *args, **kwargs)
        declined, told = [], {name: kwargs[name] for name in ("transformer_options", INSIDE) if name in kwargs}

        def dense(func: Any, *args: Any, **kwargs: Any) -> Tensor:
            declined.append(True)
            return self.merge(None, func, *args, **{**kwargs, **told})

        if self._behind is not None:  # it drops the function that it is given, and asks its options for an override
            kwargs.pop(INSIDE, None)
            kwargs["transformer_options"] = {**kwargs["transformer_options"], OVERRIDE: dense}
        out = self._override(functools.partial(dense, func), q, k, v, heads, *args, **kwargs)
        if not declined:
            call = AttentionCall.of(func, q, k, v, heads, args, kwargs)
            if self.start(call, self.block(call)) is not None:
                self.skip(_SPARSE)
        return out

    def hooks(self, model: Any) -> AbstractContextManager[None]:
        """What the model's attentions need that do not tell their options (DiTModel.silent)."""
        modules = () if self.facts.silent is None else self.facts.silent(model, self.options)
        return met_at_torch(modules, self._entry, self.call.config.kind.matches, lambda: self.skip(NOT_TORCHS))

    def say(self, message: str, detail: str = "") -> None:
        say_once(message, detail)

    def leave(self, reason: str, detail: str = "") -> None:
        leave_alone(self._record, reason, self.facts.name, detail, self.layout.grid, outcome=self._outcome)

    def leave_whole(self) -> None:
        self._outcome.left_alone(NO_WHOLE_TOKEN, self.facts.name, self.layout.grid)

    def tell_merged(self, call: AttentionCall, instead: bool) -> None:
        self._outcome.merged(self.layout.grid)
        if self._sparse:
            say_once(_SPARSE, self.facts.name)
        elif self._override is not None:
            say_once(_GETS_MERGED)
        else:
            super().tell_merged(call, instead)


class TriedDiTCall(DiTCall):
    """Of a step that is only tried: what becomes of its layers is told in the steps to come."""

    def say(self, *_: Any, **__: Any) -> None:
        pass

    def leave(self, *_: Any, **__: Any) -> None:
        pass

    def tell_merged(self, *_: Any, **__: Any) -> None:
        pass
