"""ToMe in the U-Nets of Forge and reForge: the patches of ComfyUI's node, put into each call's options."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..comfy_tome.unet_call import PatchedCall, block_name
from ..shared_tome import ModelCall, ToMeConfig
from ..shared_tome.attention.combine import TORCHS
from ..shared_tome.attention.sdpa import leave_left_modes
from ..shared_tome.attention.sequence import JointCall, with_detail
from ..shared_tome.autotune.decisions import Decisions
from ..shared_tome.autotune.layer import ROWS
from ..shared_tome.autotune.paying import Decision, Judge
from ..shared_tome.core.failures import is_out_of_memory
from ..shared_tome.core.grid import grid_of
from ..shared_tome.core.groups import spread_rows
from ..shared_tome.hooks import guard
from ..shared_tome.hooks.heads import GIVEN, PROJECTIONS, meets_at_sdpa, stand_in, why_no_self_token, width
from ..shared_tome.hooks.parts import AtSdpa, Wide, Widening
from ..shared_tome.inspect.record import CallRecord
from ..shared_tome.inspect.report import CallTally
from ..shared_tome.merging.plan import Plan
from ..shared_tome.merging.residual import UNSEEN, ResidualCall
from .block import NO_WEIGHTS, is_taken
from .hooks import served_blocks
from .notes import Notes
from .sampling import Sampling
from .whole_step import RunMerged, WholeSteps, decision_on_model


class MergedUNet:
    """Calls a U-Net with its layers merged, for one sampling pass.

    base: what the patcher holds. alone: whether no other extension stands around the model's call.
    """

    def __init__(self, base: Any, sampling: Sampling, alone: bool = True):
        self._base, self._model, self._sampling = base, base.diffusion_model, sampling
        self._steps, self._alone = WholeSteps(sampling), alone
        self._met: dict[tuple, bool] = {}
        self._wide: dict[tuple, bool] = {}

    def __call__(self, args: dict[str, Any], run: Callable[[dict], Tensor], far: Callable[[], float] | None) -> Tensor:
        """args: of the host's model_function_wrapper. run: calls the model with them. far: how far the sampler is."""
        sampling, options = self._sampling, args["c"].get("transformer_options", {})
        x = args["input"]  # (B, C, H, W): whole batches of images, prompts and negative prompts one after another
        parts = options.get("cond_or_uncond") or args.get("cond_or_uncond") or ()
        call = sampling.call(x, sampling.images_of(x.shape[0]), far, parts) if x.dim() == 4 else None
        if call is None:
            return run(args)
        verdict = self._steps.of_unet(call, self._model, x, functools.partial(self._try_step, args))
        call_tally = sampling.call_tally
        if verdict.unpaid is not None and call_tally is None:
            return run(args)
        ours = self._patches(call, options, x, sampling, verdict.judge, verdict.unpaid)
        with ours.hooks(self._model):
            out = run({**args, "c": {**args["c"], "transformer_options": ours.options}})
        if isinstance(call_tally, CallRecord):
            call_tally.end()
        return out

    def _patches(
        self,
        call: ModelCall,
        options: dict[str, Any],
        x: Tensor,
        sampling: Sampling,
        judge: Judge,
        unpaid: str | None = None,
    ) -> ForgeCall:
        """Of one call of the model on x, which the sampling has begun."""
        self_tokens = None
        if call.config.wants_heads or sampling.residual is not None:
            self_tokens = SelfTokens(self._model, x.device, self._met, sampling)
        decisions = Decisions(call, log=sampling.decided, judge=judge)
        given = sampling.call_tally, self_tokens, self._wide, decisions, sampling.residual, unpaid
        return ForgeCall(call, options, x.shape[0], sampling.notes, *given)

    def _try_step(self, args: dict[str, Any], config: ToMeConfig) -> Decision | None:
        """What is known of the times of whole steps."""

        def merged(judge: Judge) -> RunMerged:
            sampling = self._sampling.tried(config)

            def call(x: Tensor, options: dict[str, Any], run: Callable[[dict[str, Any]], Any]) -> Any:
                ours = self._patches(sampling.call(x, sampling.images_of(x.shape[0])), options, x, sampling, judge)
                with ours.hooks(self._model):
                    return run(ours.options)

            return call

        if not self._alone:
            return None
        return decision_on_model(self._base, args, tuple(args["input"].shape[-2:]), ROWS, config, merged)


class SelfTokens:
    """Whether the queries of a model's layers can keep their own tokens: where all meet at torch's attention.

    met: what heads.meets_at_sdpa answered, remembered for a sampling pass.
    """

    def __init__(self, diffusion_model: nn.Module, device: torch.device, met: dict[tuple, bool], sampling: Sampling):
        self._model, self._device, self._met, self._sampling = diffusion_model, device, met, sampling

    def joint(self) -> JointCall | None:
        """What lets them, or None, which is said once."""
        leave_left_modes()
        multires = self._sampling.config.method == "multires"
        for block in served_blocks(self._model):
            heads = _heads(block)
            weight = getattr(block.attn1.to_q, "weight", None)
            d = getattr(block.attn1.to_q, "out_features", 0 if weight is None else weight.shape[0]) // heads
            # The precision is the host's affair, and known only where its attention runs.
            reason = why_no_self_token(
                lambda b=block, h=heads, n=d: self._meets(b, h, n), d, self._device, torch.float32, multires
            )
            if reason is not None:
                self._sampling.tell_self_token(reason)
                return None
        self._sampling.tell_self_token(None)
        config = self._sampling.config
        return JointCall.of(config, TORCHS, lambda *told: self.say(with_detail(*told)))

    def say(self, message: str) -> None:
        """Tell once, in the log."""
        self._sampling.notes.say(message, shown=False)

    def _meets(self, block: nn.Module, heads: int, d: int) -> bool:
        forward = type(block.attn1).forward
        if is_taken(block.attn1):
            return False
        key = forward, heads, d
        if key not in self._met:
            layer = stand_in(block.attn1)
            self._met[key] = meets_at_sdpa(forward, d, self._device, torch.float32, layer=layer, heads=heads)
        return self._met[key]


def takes_wider(attention: nn.Module, heads: int, q: Tensor) -> bool:
    """Whether the host's attention runs on heads that are wider than the layer's: SageAttention 1 knows three sizes.

    q [B, N, H * d]: what the layer's to_q gives. Runs the attention on a few zeros.
    """
    x = q.new_zeros(1, 6, width(heads, q.shape[-1] // heads))
    parts = {name: lambda *_: x for name in PROJECTIONS}
    layer = stand_in(attention)(**parts, to_out=nn.Sequential(nn.Identity(), nn.Identity()))
    try:
        with torch.no_grad():
            return type(attention).forward(layer, x).shape == x.shape
    except Exception as error:  # whatever a foreign attention raises
        if is_out_of_memory(error):  # says nothing of the attention
            raise
        return False


def _heads(block: nn.Module) -> int:
    return getattr(block.attn1, "heads", None) or block.n_heads


class ForgeCall(PatchedCall, AtSdpa):
    """ComfyUI's patches where the grid is not told and the attention cannot be overridden.

    notes: where to tell what is left alone. call_tally, self_tokens, residual: of the call, where there is one. wide:
    what takes_wider answered, remembered for a sampling pass. unpaid: why no layer is merged after all, which was said
    already.
    """

    def __init__(
        self,
        call: ModelCall,
        options: dict[str, Any],
        batch: int,
        notes: Notes,
        call_tally: CallTally | None,
        self_tokens: SelfTokens | None,
        wide: dict[tuple, bool],
        decisions: Decisions,
        residual: ResidualCall | None,
        unpaid: str | None,
    ):
        joint = None if self_tokens is None else self_tokens.joint()
        if residual is not None and joint is None:
            residual.turn_off(UNSEEN)
        super().__init__(call, options, decisions, joint, call_tally, residual=residual)
        self._notes, self._batch, self._unpaid, self._wide = notes, batch, unpaid, wide
        self._taken: frozenset[str] = frozenset()  # of the block that runs now: see is_taken
        self.options = self.patched(options)

    def say(self, message: str) -> None:
        """Once a generation, not once a process."""
        self._notes.say(message, shown=False)

    @contextmanager
    def hooks(self, diffusion_model: nn.Module) -> Iterator[None]:
        """The hooks of one call: on the feed-forward layers for `mlp`, on the projections for keys with weights, on
        blocks in which another extension has replaced a layer."""
        handles: list[Any] = []
        try:
            for block in served_blocks(diffusion_model):
                handles += self._watch(block)
                if self._joint is not None:
                    handles += self.hook_sdpa(block.attn1)
                elif self.call.config.weighs_keys:
                    # No attention code of Forge, reForge and Forge Classic takes a scale (heads.GIVEN).
                    heads = _heads(block)
                    handles += _Weights(self, block.attn1, heads).hook_projections(block.attn1, heads)
                handles += self.hook_mlp(block)
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _watch(self, block: nn.Module) -> list[Any]:
        found = frozenset(part for part in guard.NAMES if is_taken(getattr(block, part, None)))

        def begin(*_: Any) -> None:
            self._taken = found

        def end(*_: Any) -> None:
            self._taken = frozenset()

        return [block.register_forward_pre_hook(begin), block.register_forward_hook(end)] if found else []

    def meeting(self) -> tuple[JointCall | None, Plan | None]:
        return self._joint, self._drawn

    @property
    def pending(self) -> Tensor | None:
        """The bias [b, M] of the layer that runs now: attn1_patch sets it and attn1_output_patch clears it."""
        return self._bias

    def find_grid(self, tokens: int, extra_options: dict[str, Any]) -> tuple[tuple[int, int], int] | None:
        found = super().find_grid(tokens, extra_options)
        if found is None and "activations_shape" not in extra_options:
            grid = grid_of(tokens, self.call.full)
            return None if grid is None else (grid, self._batch)
        return found

    def is_replaced(self, part: str, extra_options: dict[str, Any]) -> bool:
        return part in self._taken or super().is_replaced(part, extra_options)

    def leave(
        self, reason: str, extra_options: dict[str, Any], detail: str = "", grid: tuple[int, int] | None = None
    ) -> None:
        if reason != self._unpaid:
            self.say(reason)
        if self._record is not None:
            part = extra_options.get("block_index", 0)
            self._record.left_alone(reason.partition(";")[0], block_name(extra_options), grid, part)

    def may_widen(self, attn1: nn.Module, heads: int, out: Tensor) -> bool:
        """takes_wider, asked once and said where it does not. out [B, N, H * d]: what one of the projections gives."""
        key = type(attn1).forward, heads, out.shape[-1], out.device, out.dtype
        if key not in self._wide:
            self._wide[key] = takes_wider(attn1, heads, out)
            if not self._wide[key]:
                self.say(NO_WEIGHTS)
        return self._wide[key]


class _Weights(Widening):
    """The wider heads of one layer in one call of the model."""

    def __init__(self, call: ForgeCall, attn1: nn.Module, heads: int):
        self._call, self._attn1, self._heads, self.say = call, attn1, heads, call.say
        self._of: Tensor | None = None  # the bias that what was found is of
        self._found: Wide | None = None

    def wide(self) -> Wide | None:
        return self._found if self._call.pending is not None and self._call.pending is self._of else None

    def _widen(self, name: str, heads: int, module: nn.Module, args: tuple, out: Tensor) -> Tensor | None:
        bias = self._call.pending
        if bias is not None and bias is not self._of:
            self._of, wider = bias, self._call.may_widen(self._attn1, heads, out)
            rows = out.shape[0]
            self._found = Wide(GIVEN, spread_rows(bias, rows), out.shape[-1] // heads) if wider else None
        return super()._widen(name, heads, module, args, out)
