"""The attentions of one call of a transformer, for programs whose attention functions are called as ComfyUI's are:
ComfyUI itself and Forge. A program's way to them is a class made from TransformerCall.

q, k and v of every attention come after their position embedding; where their number is that of the call's own tokens,
the image's keys and values (and the queries, for methods that merge them) go through the core and all other tokens
stay: text, references, padding. In one softmax with text, each image token that stands for n counts n times: log(n) is
added to its logits (shared_tome/attention/sequence.py, dit_attention.py).
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ..shared_tome import ModelCall
from ..shared_tome.attention.sequence import JointCall
from ..shared_tome.autotune.decision_log import DecisionLog
from ..shared_tome.autotune.layer import known_or_measured, name_of
from ..shared_tome.autotune.paying import Decision, Given, Judge
from ..shared_tome.autotune.timing import compared
from ..shared_tome.core.channels import extra_channels
from ..shared_tome.core.curve import is_compiling
from ..shared_tome.inspect.report import CallTally
from ..shared_tome.merging.plan import Plan
from .dit_attention import COMFYUI, AttentionCall, Attentions, Kind, attend_merged, attend_sampled, fits_weights
from .dit_auto import DiTDecisions
from .dit_layout import Layout
from .dit_models import DiTModel


class TransformerCall:
    """One call of the model.

    order: the kernels of torch that the attention tries; instead: those of PyTorch's attention where that takes the
    place of another. record: where somebody wants a report or a map. by_times: a layer is merged only where that was
    measured to be faster, levels "auto" (autotune/layer.py). decided: where that is told. judge: of its layers, by the
    whole step. unpaid: why no layer is merged after all, told where one would be.
    """

    family: Attentions = COMFYUI
    other = "node"  # what else changes models in this program

    def __init__(
        self,
        call: ModelCall,
        facts: DiTModel,
        layout: Layout,
        order: tuple[str, ...],
        instead: tuple[str, ...] = (),
        record: CallTally | None = None,
        by_times: bool = False,
        decided: DecisionLog | None = None,
        judge: Judge | None = None,
        unpaid: str | None = None,
    ):
        self.call, self.facts, self.layout = call, facts, layout
        self._record, self._by_times, self._unpaid = record, by_times, unpaid
        log, judge = DecisionLog() if decided is None else decided, Judge() if judge is None else judge
        self._decisions = DiTDecisions(call.config, layout, log, judge)
        self._joint, self._instead = self.combines(order), self.combines(instead)
        self._met, self._served = False, 0
        self._came = 0  # attentions so far that are ours
        self._plan: Plan | None = None
        self._queries = 0  # that a layer has brought so far, where they come in parts
        self._kinds: dict[tuple | None, Kind] = {}

    # --- What a host says ---------------------------------------------------------------------------------------------

    def say(self, message: str, detail: str = "") -> None:
        """To the log, once."""
        raise NotImplementedError

    def leave(self, reason: str, detail: str = "") -> None:
        """A layer is left alone. detail: for the log alone."""
        raise NotImplementedError

    def leave_whole(self) -> None:
        """The ratio takes away no whole token of a layer."""

    def tell_merged(self, call: AttentionCall, instead: bool) -> None:
        """Layers of a kind are merged. instead: by PyTorch's attention in the place of another."""
        if instead:
            self.say(
                f"PyTorch's attention takes the place of {call.name} where keys need weights (text beside the image, "
                f"or an uneven ratio) and so heads of {_width(call)} channels"
            )

    def block(self, call: AttentionCall) -> dict[str, Any]:
        """What is told of the block that runs: its `block_index` and `block_type`, as transformer_options have them."""
        return call.kwargs.get("transformer_options") or {}

    def combines(self, order: tuple[str, ...]) -> JointCall:
        """What attentions by these kernels share."""
        config = self.call.config
        return JointCall(config.weighs_keys, order, self.say, config.keeps_self)

    # --- The walk -----------------------------------------------------------------------------------------------------

    def merge(
        self, override: Any, func: Any, q: Tensor, k: Tensor, v: Tensor, heads: int, *args: Any, **kwargs: Any
    ) -> Tensor:
        """The attention by func, or by another node's override of it, with what is to be merged merged.

        q, k, v: [B, L, H * d], or [B, H, L, d] with skip_reshape.
        """
        call = AttentionCall.of(func, q, k, v, heads, args, kwargs, override, self.family)
        found = self.find(call)
        if found is not None:
            return self.serve(call, *found)
        first = (func,) if override is None else (override, func)
        return first[0](*first[1:], q, k, v, heads, *args, **kwargs)

    def find(self, call: AttentionCall) -> tuple[Plan, Kind] | None:
        """An attention's plan, and what is known of its kind; None where it is left alone."""
        block = self.block(call)
        key = None if is_compiling() else self._key(call, block)  # a compiled graph keeps nothing
        kind = self._kinds.get(key)
        if kind is not None:
            self._came += 1
        elif (kind := self._look(call, block)) is None:
            return None
        # The first attention of a layer: the others want the same tokens.
        brought, self._queries = self._queries, self._queries + kind.queries
        first = brought == 0
        if self._queries >= kind.wanted:
            self._queries = 0
            if first:
                self._served += 1
            first = first and (self._served - 1) % self.layout.together == 0
        if first:
            self._plan = self.call.plan(self._metric(call, kind.start), self.layout.grid)
        plan = self._plan
        if plan is None:
            self.leave_whole()
        fits = plan is not None and (kind.joint is not None or self._fits(call, kind, plan))
        if first and self._record is not None:
            if plan is None or fits:
                self._record.layer(self.block_name(block), self.layout.grid, plan)
            else:
                self._record.count(self.layout.grid)
        if not fits:
            return None
        if key not in self._kinds:
            self.tell_merged(call, kind.instead)
            if key is not None:
                self._kinds[key] = kind
        return plan, kind

    def serve(self, call: AttentionCall, plan: Plan, kind: Kind) -> Tensor:
        """The attention with the image's tokens merged, by what `find` says."""
        call, method = call.by_torch() if kind.instead else call, self.call.config.kind
        if method.matches:
            return attend_merged(kind, call, plan, method)
        return attend_sampled(kind, call, plan)

    def _metric(self, call: AttentionCall, start: int) -> Tensor:
        """What the image's similarity is measured on, [B, N, .]: the ViT paper's, keys averaged over the heads. What
        matches nothing wants its shape alone."""
        matches, k = self.call.config.kind.matches, call.k
        image = (k if matches or not call.split else k[:, 0]).narrow(-2, start, self.layout.tokens)
        if not matches:
            return image
        return image.mean(1) if call.split else image.unflatten(-1, (-1, call.d)).mean(2)

    # --- Of each kind of attentions, once -----------------------------------------------------------------------------

    def _key(self, call: AttentionCall, block: dict[str, Any]) -> tuple:
        """What tells kinds of attentions apart. A call of the model has one override at most, which need not have a
        hash."""
        mask, text = call.kwargs.get("mask"), block.get("img_slice")
        given = call.func, call.override is None, call.heads, call.split, "block_index" in block, text and tuple(text)
        return *given, call.q.shape, call.k.shape, call.v.shape, call.k.dtype, None if mask is None else mask.shape

    def _look(self, call: AttentionCall, block: dict[str, Any]) -> Kind | None:
        """Whether attentions of this kind may be merged; None: they are left alone."""
        start = self.start(call, block)
        if start is None:
            return None
        if call.mask is not None and (call.mask.dim() < 2 or call.mask.shape[-1] != call.length):
            self.skip("ToMe skips an attention whose mask is not one over its keys")
            return None
        unpaid = self._unpaid or self._decisions.why_not_paid(self._decision(call, start))
        if unpaid is not None:
            self.skip(unpaid)
            return None
        paid = not self._by_times or self._decisions.known(call) is not None
        kind = Kind(start, call.count(call.q), call.length - self.layout.elsewhere, paid)
        return None if self.call.config.kind.matches and not self._fits(call, kind, None) else kind

    def start(self, call: AttentionCall, block: dict[str, Any]) -> int | None:
        """Where the image's tokens begin; None for an attention that is none of ours."""
        length, queries = call.length, call.count(call.q)
        if self.facts.numbered and "block_index" not in block:
            return None  # a refiner, before the blocks
        if call.count(call.v) != length or queries > length:
            return None  # to another's tokens
        part = queries < length
        if part and (not self.layout.parts or length in self.layout.others):
            return None
        if part and call.mask is None and not self.layout.elsewhere and queries in self.layout.others:
            return None  # sound that looks at the video
        start = self.layout.start(length, block.get("img_slice"))
        if start is None and length > self.layout.tokens and length not in self.layout.others:
            self.skip(
                "ToMe skips an attention whose tokens are not its text, its image and its references: another "
                f"{self.other} has added some",
                f"{length} tokens for {self.layout}",
            )
        if start is None:
            return None
        self._met, self._came = True, self._came + 1
        if length in self.layout.others:
            self.skip("ToMe skips an image of as many tokens as its prompt: self- and cross-attention look alike")
            return None
        if part and self.call.config.kind.queries:
            self.skip(
                "ToMe skips attentions that take a part of the queries each (guides of LTXV, HiDream-O1, later frames "
                "of Wan CausalAR), because this method merges queries"
            )
            return None
        return start

    def _decision(self, call: AttentionCall, start: int) -> Decision | Given | None:
        """What was measured of this layer, or is set; None where nothing is.

        Measured on its first row's own tokens: what is decided must not depend on how many rows a call has, nor on a
        few words more in the prompt.
        """
        part = call.count(call.q) != call.length - self.layout.elsewhere
        if not self._by_times or self.call.config.kind.matches or call.mask is not None or part:
            return None
        row = call.replace(q=call.q[:1], k=call.k[:1], v=call.v[:1])
        return self._decisions.decision(call, lambda shape: self._time(row, start, shape))

    def _time(self, call: AttentionCall, start: int, shape: tuple) -> Decision | None:
        """The times of a layer of this shape, or None. call: of one row."""
        config, device = self.call.config, call.q.device
        torchs = self._joint.kernels or self._instead.kernels
        how = f"proportional {config.proportional}", f"own {config.keeps_self}"
        by = [name_of(func, device) for func in (call.func, call.override) if func is not None]
        how = (*how, f"shares {config.whole:.3f} {config.half:.3f}") if config.shares_by_hand else how
        names = [self.facts.name, *by, *torchs, *map(str, shape), config.method, f"{config.ratio:.4f}", *how]

        def measure() -> Decision:
            grid, kind = self.layout.grid, Kind(start, 0, 0)
            plan = ModelCall(config, grid, device).plan(call.q.new_empty(1, self.layout.tokens, 1), grid)
            if plan is None or not self._fits(call, kind, plan):
                return Decision(0.0, 0.0, 0.0)
            try:
                return compared(call.run, lambda: self.serve(call, plan, kind), device)
            finally:  # the draws that were timed are not this call's
                for joint in (self._joint, self._instead):
                    joint.multires.tiles.clear()

        return known_or_measured(", ".join(names), device, measure)

    def _fits(self, call: AttentionCall, kind: Kind, plan: Plan | None) -> bool:
        """Whether an attention takes its keys' weights, which goes into `kind`: the one that the user has chosen
        wherever it can.

        plan: of a method that matches nothing.
        """
        weighs = self.call.config.weighs_keys
        weighed = weighs and (plan is None or self._joint.around(plan, kind.start, call.length).bias is not None)
        fits = not weighed or fits_weights(call)
        if fits or (call.override is None and kind.paid):
            kind.fit(call, self._joint if fits else self._instead, not fits)
            return True
        other = call.name if call.override is None else "another node's attention"
        self.skip(
            "ToMe skips an attention where keys need weights (text beside the image, or an uneven ratio) and so "
            f"heads of {_width(call)} channels: {other} may not take them"
        )
        return False

    def block_name(self, block: dict[str, Any]) -> str:
        """The block as the log names it, by what is told of it."""
        if "block_index" not in block:
            return self.facts.name
        return f"{block.get('block_type', '')} block {block['block_index']}".lstrip()

    def skip(self, reason: str, detail: str = "") -> None:
        """A layer that was met is left alone. detail: for the log alone."""
        self._met = True
        self.leave(reason, detail)


def _width(call: AttentionCall) -> int:
    """Channels of the heads that carry weights."""
    return call.d + extra_channels(call.d)
