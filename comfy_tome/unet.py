"""ToMe in ComfyUI's U-Nets (SD1.x, SD2.x, SDXL, SVD's spatial layers and what is built like them).

The node adds a wrapper around `apply_model`, and one around the U-Net itself for nodes that call it past
`apply_model`. For each call of the model the first that is met makes a `UNetCall` and puts that call's patches
(unet_call.py) into a copy of the call's own transformer_options: the attention patch last and the output patch first,
so that ToMe sits right around the attention whatever else is on the model and in whatever order the nodes stand.
Nothing outlives the call: clones, several samplers, several GPUs and control networks cannot mix.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..shared_tome import ModelCall, ToMeConfig
from ..shared_tome.attention.bias import attend_tokens, minds_scale
from ..shared_tome.autotune.decisions import Decisions
from ..shared_tome.autotune.layer import ROWS, Attention
from ..shared_tome.autotune.paying import Decision, Judge
from ..shared_tome.autotune.verdicts import verdict_of
from ..shared_tome.core.curve import is_compiling
from ..shared_tome.core.grid import grid_at
from ..shared_tome.inspect.reasons import NO_WHOLE_TOKEN, why_not_served
from ..shared_tome.inspect.report import CallTally
from ..shared_tome.merging.plan import Plan
from ..shared_tome.merging.residual import ResidualCall
from .chosen import OVERRIDE, Chosen, self_tokens, why_sampled
from .dit_attention import AttentionCall, attend_joint, tell_not_own
from .log import leave_alone, say_once
from .model_call import (
    DIFFUSION_MODEL,
    KEY,
    Answered,
    call_key,
    draw_of,
    find_options,
    halves_alike,
    put_options,
    without_wrapper,
)
from .outcome import ANSWERED, Outcome, outcome_of, tokens_of
from .record import begin, is_compiled
from .residuals import residual_of
from .schedule import config_now
from .unet_auto import leaves_layers_alone
from .unet_call import PatchedCall, block_name, parts_of
from .unet_model import dtype_of, layers_of, replaced_layers, run_block
from .whole_step import about_model, decision_on_step

# What the log says.
_DENSE = (
    "layers that ToMe merges are computed densely; another node's sparse attention computes the layers that ToMe skips"
)


class UNetPatch:
    """The wrappers around the model's call. Holds the config alone; safe to share between clones and threads."""

    def __init__(self, config: ToMeConfig):
        self.asked, self.config = config, config.resolved(multires=False)

    def __call__(self, executor: Any, x: Tensor, t: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Around apply_model(x, t, c_concat, c_crossattn, control, transformer_options)."""
        args, options = find_options(args, kwargs)
        args, kwargs = put_options(args, kwargs, without_wrapper(options, DIFFUSION_MODEL))
        with outcome_of(options) as outcome:
            return self._run(outcome, executor, x, t, args, kwargs)

    def around_model(self, executor: Any, x: Tensor, t: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Around the U-Net's own forward(x, t, context, y, control, transformer_options), for nodes that call it
        themselves. Calls of apply_model take this wrapper away."""
        if is_compiling():
            return executor(x, t, *args, **kwargs)
        args, options = find_options(args, kwargs)
        with outcome_of(options) as outcome:
            return self._run(outcome, executor, x, t, args, kwargs)

    def _run(
        self, outcome: Outcome, executor: Any, x: Tensor, t: Tensor, args: tuple, kwargs: dict[str, Any]
    ) -> Tensor:
        args, options = find_options(args, kwargs)
        base = executor.class_obj
        model, full = getattr(base, "diffusion_model", base), tuple(x.shape[-2:])
        sampled = outcome.base if base is model else base  # tells the noise levels
        config = config_now(self.config, options, sampled, outcome)
        residual = residual_of(outcome.residuals, config, options, x, sampled, executor)
        # A step that is exact counts as one at ratio 0.
        told = config if residual is None or not residual.exact else config.replace(ratio=0.0)
        draw = None if residual is None else residual.draw
        record, log = begin(executor, sampled, x, t, args, kwargs, self.config, told, draw), outcome.decided
        log.resolve(self.asked, self.config)
        if record is not None:
            record.run.tally.decided = log
        if outcome.is_skipped(self.config, config.ratio):
            return executor(x, t, *args, **kwargs)
        compiled = is_compiled(executor, options)
        layers = layers_of(model), dtype_of(base)
        about = "" if sampled is None else about_model(sampled)
        chosen = Chosen(options, model, compiled)
        host = chosen.host, chosen.kernels(x.device), about

        def leaves_alone(judge: Judge) -> bool:
            if record is not None or compiled:
                return False
            return leaves_layers_alone(outcome, config, full, x.device, *layers, *host, judge)

        if leaves_alone(Judge(waits=False)):  # whatever its step takes
            return executor(x, t, *args, **kwargs)

        def measured(config: ToMeConfig) -> Decision | None:
            if compiled or base is model:
                return None
            return _decision_on_step(base, x, t, args, kwargs, config, chosen, *host)

        verdict = verdict_of(log, config, full, measured)
        judge, unpaid = verdict.judge, verdict.unpaid
        if judge.waits and leaves_alone(judge):
            return executor(x, t, *args, **kwargs)
        recorded = None if record is None or record.run.compiled else record
        if verdict.speedup is not None:
            outcome.measured(verdict.speedup)
        if unpaid is not None and recorded is None:
            leave_alone(None, unpaid, f"{x.shape[-2]}x{x.shape[-1]}", "nothing is merged", outcome=outcome)
            return executor(x, t, *args, **kwargs)
        step, alike = draw_of(options, x.device, sampled) if draw is None else draw, halves_alike(options, x, config)
        call = ModelCall(config, full, x.device, step=step, alike=alike)
        given = chosen, layers if compiled else None, model, unpaid, outcome, about, judge, residual
        patch = UNetCall(call, options, recorded, *given)
        if compiled:
            # What is done must stand in a guard of its own: ComfyUI's compile node drops every guard on
            # transformer_options, so without this a compiled model would keep the patches it first saw.
            kwargs["tome"] = patch.key
        answered = None if compiled else Answered(patch.options)
        args, kwargs = put_options(args, kwargs, answered.options if answered is not None else patch.options)
        with patch.mlp_hooks(model), chosen.followed():
            out = executor(x, t, *args, **kwargs)
        if answered:
            outcome.left_alone(ANSWERED)
        if record is not None and outcome.residuals is not None:
            record.run.tally.why_not_exact = outcome.residuals.why_off
            if residual is not None and residual.exact and not residual.is_on:
                record.run.tally.not_exact(record.step, config.ratio)
        if record is not None:
            record.end()
        return out


def _decision_on_step(
    base: Any,
    x: Tensor,
    t: Tensor,
    args: tuple,
    kwargs: dict[str, Any],
    config: ToMeConfig,
    chosen: Chosen,
    attention: Attention,
    kernels: tuple[str, ...],
    about: str,
) -> Decision | None:
    """What is known of the times of whole steps, or None. base: the model that apply_model is of."""

    def merged(options: dict[str, Any], run: Callable[[dict[str, Any], dict[str, Any]], Any], judge: Judge) -> Any:
        call = ModelCall(config, tuple(x.shape[-2:]), x.device, step=draw_of(options, x.device, base))
        patch = _TriedCall(call, options, None, chosen, None, base.diffusion_model, about=about, judge=judge)
        with patch.mlp_hooks(base.diffusion_model), chosen.followed():
            return run(patch.options, {})

    grid = tuple(x.shape[-2:])
    return decision_on_step(base, x, t, args, kwargs, grid, ROWS, config, merged, chosen, kernels, about)


class UNetCall(PatchedCall):
    """The patches of one call of the model in ComfyUI, and the options that carry them.

    chosen, model, about: the host's attention, to measure with. layers: what Decisions.look_ahead wants to know of a
    compiled model; None: it is not compiled.
    unpaid: why no layer is merged after all, for the record. outcome: the sampling's. judge: of its layers (Decisions).
    """

    say = staticmethod(say_once)

    def __init__(
        self,
        call: ModelCall,
        options: dict[str, Any],
        record: CallTally | None = None,
        chosen: Chosen | None = None,
        layers: tuple[list[tuple[int, int, int]], torch.dtype] | None = None,
        model: Any = None,
        unpaid: str | None = None,
        outcome: Outcome | None = None,
        about: str = "",
        judge: Judge | None = None,
        residual: ResidualCall | None = None,
    ):
        self._compiled, self._model = layers is not None, model
        self._outcome = Outcome() if outcome is None else outcome
        self._chosen = Chosen(options) if chosen is None else chosen
        self._attention = self._chosen.override
        # Nothing to measure with: nothing to join with either (a test's call, not a host's).
        attention = None if chosen is None else chosen.host
        kernels = () if chosen is None else chosen.kernels(call.seed.device)
        joint = None if chosen is None else self_tokens(call.config, kernels)
        replaced = replaced_layers(model, parts_of(call))
        decisions = Decisions(call, about, self._outcome.decided, judge)
        super().__init__(call, options, decisions, joint, record, replaced, attention, kernels, residual)
        self._unpaid = unpaid
        if layers is not None:
            self._decisions.look_ahead(*layers, attention, kernels)
            self._tell_ahead(*layers)
        self._torchs = inspect.unwrap(attention) if kernels else None
        self._minding = None  # the attention function that minds `scale`, where one is known to
        if self._attention is None and attention is not None and minds_scale(attention):
            self._minding = inspect.unwrap(attention)
        # The seed is a tensor and so an input of a compiled graph; all else is decided in Python.
        self.key = f"{call_key(call)} {self._decisions.unpaid} {kernels} {sorted(map(repr, self._replaced))}"
        self.options = self._patched(options)

    def _tell_ahead(self, layers: list[tuple[int, int, int]], dtype: torch.dtype) -> None:
        """What becomes of a compiled model's layers, which tell nothing themselves."""
        for level, channels, heads in layers:
            grid = grid_at(self.call.full, level)
            unpaid = self._decisions.why_not_paid(self._decisions.known(grid, channels, heads, dtype, self._kernels))
            reason = why_not_served(self.call.config, grid, self.call.full) or unpaid
            if reason is not None:
                self._outcome.left_alone(reason, tokens_of(grid), grid)
            else:
                self._outcome.merged(grid)
        if not layers:  # not a U-Net as they are known: taken to be merged
            self._outcome.merged()

    def _patched(self, options: dict[str, Any]) -> dict[str, Any]:
        options = self.patched(options)
        if self.call.config.weighs_keys or self._chosen.sparse or self._residual is not None:
            options[OVERRIDE] = self.attention
        options = without_wrapper(options, DIFFUSION_MODEL)
        if self._compiled:
            wrappers = dict(options.get("wrappers", {}))
            wrappers[DIFFUSION_MODEL] = {**wrappers.get(DIFFUSION_MODEL, {}), KEY: [self._check_key]}
            options["wrappers"] = wrappers
        return options

    def _check_key(self, executor: Any, *args: Any, tome: str = "", **kwargs: Any) -> Tensor:
        if tome != self.key:  # reading it is what makes torch.compile guard on it
            raise RuntimeError("another node changed ToMe's argument 'tome' on its way to the model")
        return executor(*args, **kwargs)

    def attention(self, func: Any, q: Tensor, k: Tensor, v: Tensor, heads: int, *args: Any, **kwargs: Any) -> Tensor:
        """optimized_attention_override: what becomes of the layer that runs now; another node's override is called, not
        lost."""
        func, override = self._chosen.func(func) if self._chosen.changes else func, self._attention
        bias, plan, self._bias, self._drawn = self._bias, self._drawn, None, None
        if bias is None and plan is None:
            if self._layer is not None and self._chosen.sparse:  # merged tokens are in no place
                override = None
                say_once(_DENSE)
            first = (func,) if override is None else (override, func)
            return first[0](*first[1:], q, k, v, heads, *args, **kwargs)
        call = AttentionCall.of(func, q, k, v, heads, args, kwargs, override)
        if plan is None or self._keeping is None:
            return self._attend(call, bias, plan)
        residual, layer = self._keeping
        return residual.attend(layer, lambda: self._attend(call, bias, plan), call.run)

    def _attend(self, call: AttentionCall, bias: Tensor | None, plan: Plan | None) -> Tensor:
        """Adds the sizes to the logits. plan: of keys and values that are drawn here."""
        if self._chosen.sparse:
            call = call.replace(override=None)
            say_once(_DENSE)
        is_torchs = bool(self._kernels) and call.kwargs.get("mask") is None
        is_torchs = is_torchs and (call.func is self._torchs or call.is_torchs)
        if plan is not None:
            if is_torchs and self._joint is not None:
                out = attend_joint(self._joint, call, 0, plan)
                if out is not None:
                    return out
                tell_not_own(self._joint, call, torchs=True)
            elif self._joint is not None:
                say_once(why_sampled(self.call.config))
            call = call.with_keys(plan.choice[0])  # what sampling before the projections gives
        if bias is None or call.k.shape[1] != bias.shape[1]:
            return call.run()
        kwargs = dict(call.kwargs)
        scale = kwargs.pop("scale", None)

        def attention(q: Tensor, k: Tensor, v: Tensor, *scale: float) -> Tensor:
            named = {**kwargs, "scale": scale[0]} if scale else kwargs
            return call.replace(q=q, k=k, v=v, kwargs=named).run()

        minds = call.func is self._minding
        return attend_tokens(call.q, call.k, call.v, call.heads, bias, attention, is_torchs, scale, minds)

    def tell(self, grid: tuple[int, int], plan: Plan | None) -> None:
        if plan is None:
            self._outcome.left_alone(NO_WHOLE_TOKEN, tokens_of(grid), grid)
        else:
            self._outcome.merged(grid)

    def tell_exact(self, grid: tuple[int, int], reason: str) -> None:
        self._outcome.exact(reason, grid)

    def leave_unserved(self, reason: str, grid: tuple[int, int]) -> None:
        self._outcome.left_alone(reason, tokens_of(grid), grid)

    def run_block(self, heads: int, x: Tensor) -> Callable[[], Any] | None:
        return run_block(self._model, heads, x, self._chosen.options)

    def leave(
        self, reason: str, extra_options: dict[str, Any], detail: str = "", grid: tuple[int, int] | None = None
    ) -> None:
        place = extra_options.get("block_index", 0)
        leave_alone(self._record, reason, block_name(extra_options), detail, grid, place, self._outcome)


class _TriedCall(UNetCall):
    """Of a step that is only tried: what becomes of its layers is told in the steps to come."""

    def leave(self, *_: Any, **__: Any) -> None:
        pass
