"""The attentions of one call of a transformer, for programs whose attention functions are called as ComfyUI's are:
ComfyUI itself and Forge. A program's way to them is a class made from TransformerCall.

q, k and v of every attention come after their position embedding; where their number is that of the call's own tokens,
the image's keys and values (and the queries, for methods that merge them) go through the core and all other tokens
stay: text, references, padding. In one softmax with text, each image token that stands for n counts n times: log(n) is
added to its logits (shared_tome/attention/sequence.py, dit_attention.py).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from ..shared_tome import ModelCall
from ..shared_tome.attention.sequence import JointCall
from ..shared_tome.autotune.decision_log import DecisionLog
from ..shared_tome.autotune.layer import known_or_measured, name_of
from ..shared_tome.autotune.paying import Decision, Given, Judge
from ..shared_tome.autotune.timing import compared
from ..shared_tome.core.channels import extra_channels
from ..shared_tome.inspect.report import CallTally
from ..shared_tome.merging.plan import Plan
from .dit_attention import COMFYUI, AttentionCall, Attentions, attend_merged, attend_sampled, fits_weights
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
        self._plan: Plan | None = None
        self._queries = 0  # that a layer has brought so far, where they come in parts

    # --- What a host says ---------------------------------------------------------------------------------------------

    def say(self, message: str, detail: str = "") -> None:
        """To the log, once."""
        raise NotImplementedError

    def leave(self, reason: str, detail: str = "") -> None:
        """A layer is left alone. detail: for the log alone."""
        raise NotImplementedError

    def leave_whole(self) -> None:
        """The ratio takes away no whole token of a layer."""

    def tell_merged(self, call: AttentionCall, by: AttentionCall) -> None:
        """A layer is merged. by: the call by the attention that does it."""
        if by.func is not call.func:
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
        merged = self.ready(override, func, q, k, v, heads, args, kwargs)
        if merged is not None:
            return merged()
        first = (func,) if override is None else (override, func)
        return first[0](*first[1:], q, k, v, heads, *args, **kwargs)

    def ready(
        self, override: Any, func: Any, q: Tensor, k: Tensor, v: Tensor, heads: int, args: tuple, kwargs: dict[str, Any]
    ) -> Callable[[], Tensor] | None:
        """What computes the same attention merged, or None where it is left alone."""
        call = AttentionCall.of(func, q, k, heads, args, kwargs, override, self.family)
        start = self._start(q, v, call)
        found = None if start is None else self._prepare(start, q, k, v, call)
        if found is None:
            return None

        def merged() -> Tensor:
            self.tell_merged(call, found[1])
            return self._serve(*found, *(call.plain(x) for x in (q, k, v)), start)

        return merged

    def _serve(
        self, plan: Plan, call: AttentionCall, joint: JointCall, q: Tensor, k: Tensor, v: Tensor, start: int
    ) -> Tensor:
        """The attention with the image's tokens merged, by what _prepare says."""
        kind = self.call.config.kind
        if kind.matches:
            return attend_merged(joint, call, q, k, v, start, plan, kind)
        return attend_sampled(joint, call, q, k, v, start, plan)

    def _decision(self, call: AttentionCall, q: Tensor, k: Tensor, v: Tensor, start: int) -> Decision | Given | None:
        """What was measured of this layer, or is set; None where nothing is.

        Measured on its first row's own tokens: what is decided must not depend on how many rows a call has, nor on a
        few words more in the prompt.
        """
        part = q.shape[2 if call.split else 1] != call.length - self.layout.elsewhere
        if not self._by_times or self.call.config.kind.matches or call.mask is not None or part:
            return None
        return self._decisions.decision(call, k, lambda shape: self._time(call, q[:1], k[:1], v[:1], start, shape))

    def _time(self, call: AttentionCall, q: Tensor, k: Tensor, v: Tensor, start: int, shape: tuple) -> Decision | None:
        """The times of a layer of this shape, or None. q, k, v: of one row."""
        config, device = self.call.config, q.device
        torchs = self._joint.kernels or self._instead.kernels
        how = f"proportional {config.proportional}", f"own {config.keeps_self}"
        by = [name_of(func, device) for func in (call.func, call.override) if func is not None]
        how = (*how, f"shares {config.whole:.3f} {config.half:.3f}") if config.shares_by_hand else how
        names = [self.facts.name, *by, *torchs, *map(str, shape), config.method, f"{config.ratio:.4f}", *how]

        def measure() -> Decision:
            plain, grid = [call.plain(x) for x in (q, k, v)], self.layout.grid
            plan = ModelCall(config, grid, device).plan(plain[0].new_empty(1, self.layout.tokens, 1), grid)
            fitting = None if plan is None else self._fitting(call, start, plan, True)
            if fitting is None:
                return Decision(0.0, 0.0, 0.0)
            try:
                return compared(lambda: call.run(q, k, v), lambda: self._serve(plan, *fitting, *plain, start), device)
            finally:  # the draws that were timed are not this call's
                for joint in (self._joint, self._instead):
                    joint.multires.tiles.clear()

        return known_or_measured(", ".join(names), device, measure)

    def _start(self, q: Tensor, v: Tensor, call: AttentionCall) -> int | None:
        """Where the image's tokens begin; None for an attention that is none of ours."""
        options, length = self.block(call), call.length
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
            self.skip(
                "ToMe skips an attention whose tokens are not its text, its image and its references: another "
                f"{self.other} has added some",
                f"{length} tokens for {self.layout}",
            )
        if start is None:
            return None
        self._met = True
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

    def _prepare(
        self, start: int, q: Tensor, k: Tensor, v: Tensor, call: AttentionCall
    ) -> tuple[Plan, AttentionCall, JointCall] | None:
        """The plan of this layer, and what _fitting says; None where it is left alone."""
        if call.mask is not None and (call.mask.dim() < 2 or call.mask.shape[-1] != call.length):
            self.skip("ToMe skips an attention whose mask is not one over its keys")
            return None
        unpaid = self._unpaid or self._decisions.why_not_paid(self._decision(call, q, k, v, start))
        if unpaid is not None:
            self.skip(unpaid)
            return None
        # Measured to be faster merged, or to be merged whatever it costs.
        paid = not self._by_times or self._decisions.known(call, k) is not None
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
            self.leave_whole()
        fitting = None if plan is None else self._fitting(call, start, plan, paid)
        if first and self._record is not None:
            if plan is None or fitting is not None:
                self._record.layer(self.block_name(self.block(call)), self.layout.grid, plan)
            else:
                self._record.count(self.layout.grid)
        return None if fitting is None else (plan, *fitting)

    def _is_first(self, q: Tensor, call: AttentionCall) -> bool:
        """Whether this is the first attention of a layer: the others want the same tokens."""
        count, self._queries = self._queries, self._queries + q.shape[2 if call.split else 1]
        if self._queries < call.length - self.layout.elsewhere:
            return count == 0
        self._queries = 0
        if count == 0:
            self._served += 1
        return count == 0 and (self._served - 1) % self.layout.together == 0

    def _fitting(
        self, call: AttentionCall, start: int, plan: Plan | None, paid: bool
    ) -> tuple[AttentionCall, JointCall] | None:
        """The call by an attention that takes its keys' weights, and how they are joined; None: it is left alone.

        The attention that the user has chosen does it wherever it can.

        Args:
            plan: of a method that matches nothing.
            paid: whether PyTorch's attention may take the place of one that knows a few sizes of heads.
        """
        weighs = self.call.config.weighs_keys
        weighed = weighs and (plan is None or self._joint.around(plan, start, call.length).bias is not None)
        if not weighed or fits_weights(call):
            return call, self._joint
        if call.override is None and paid:
            return call.by_torch(), self._instead
        other = call.name if call.override is None else "another node's attention"
        self.skip(
            "ToMe skips an attention where keys need weights (text beside the image, or an uneven ratio) and so "
            f"heads of {_width(call)} channels: {other} may not take them"
        )
        return None

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
