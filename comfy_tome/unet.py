"""ToMe in ComfyUI's U-Nets (SD1.x, SD2.x, SDXL, SVD's spatial layers and what is built like them).

The node adds a wrapper around `apply_model`, and one around the U-Net itself for nodes that call it past
`apply_model`. For each call of the model the first that is met makes a `UNetCall` and puts that
call's patches into a copy of the call's own transformer_options: the attention patch last and the output patch
first, so that ToMe sits right around the attention whatever else is on the model and in whatever order the nodes
stand. Nothing outlives the call: clones, several samplers, several GPUs and control networks cannot mix.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..shared_tome import ModelCall, ToMeConfig
from ..shared_tome.attention.bias import attend_tokens, minds_scale
from ..shared_tome.attention.self_token import NOT_KEPT
from ..shared_tome.attention.sequence import NOT_MULTIRES, JointCall
from ..shared_tome.autotune.decisions import Decisions, why_layers_left_alone
from ..shared_tome.autotune.layer import Attention, Verdict
from ..shared_tome.autotune.step import why_left_alone
from ..shared_tome.core.curve import is_compiling
from ..shared_tome.core.grid import grid_at
from ..shared_tome.core.schedule import config_at
from ..shared_tome.hooks.guard import why_left_whole
from ..shared_tome.inspect.report import NO_WHOLE_TOKEN, CallTally, why_not_served
from ..shared_tome.merging.plan import Plan
from .dit_attention import Call, attend_joint, kernel_order, may_join
from .log import leave_alone, say_once
from .model_call import (
    DIFFUSION_MODEL,
    KEY,
    call_key,
    draw_of,
    find_options,
    halves_alike,
    progress_of,
    put_options,
    without_wrapper,
)
from .outcome import Outcome, outcome_of
from .record import begin, is_compiled
from .unet_auto import about_model, verdict_on_step
from .unet_model import dtype_of, layers_of, replaced_layers, run_block


class UNetPatch:
    """The wrappers around the model's call. Holds the config alone; safe to share between clones and threads."""

    def __init__(self, config: ToMeConfig):
        self.config = config.resolved(multires=False)

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
        config = config_at(self.config, lambda: progress_of(options, sampled))
        record = begin(executor, sampled, x, t, args, kwargs, self.config, config)
        if outcome.is_skipped(self.config, config.ratio):
            return executor(x, t, *args, **kwargs)
        compiled = is_compiled(executor, options)
        layers = layers_of(model), dtype_of(base)
        about = "" if sampled is None else about_model(sampled)
        host = _host_attention(), _kernels_of(options, x.device), about
        if record is None and not compiled and _leaves_alone(outcome, config, full, x.device, *layers, *host):
            return executor(x, t, *args, **kwargs)
        told = None if record is None or record.run.compiled else record
        unpaid = None
        if not compiled and base is not model:
            unpaid = _why_not_paid(base, x, t, args, kwargs, config, *host)
        if unpaid is not None and told is None:
            leave_alone(None, unpaid, f"{x.shape[-2]}x{x.shape[-1]}", "nothing is merged", outcome=outcome)
            return executor(x, t, *args, **kwargs)
        step, alike = draw_of(options, x.device, sampled), halves_alike(options, x, config)
        call = ModelCall(config, full, x.device, step=step, alike=alike)
        patch = UNetCall(call, options, told, host[0], layers if compiled else None, model, unpaid, outcome, about)
        if compiled:
            # What is done must stand in a guard of its own: ComfyUI's compile node drops every guard on
            # transformer_options, so without this a compiled model would keep the patches it first saw.
            kwargs["tome"] = patch.key
        args, kwargs = put_options(args, kwargs, patch.options)
        with patch.mlp_hooks(model):
            out = executor(x, t, *args, **kwargs)
        if record is not None:
            record.end()
        return out


def _host_attention() -> Attention:
    """The attention that ComfyUI was started with."""
    from comfy.ldm.modules.attention import optimized_attention

    return optimized_attention


def _leaves_alone(
    outcome: Outcome,
    config: ToMeConfig,
    full: tuple[int, int],
    device: torch.device,
    layers: list[tuple[int, int, int]],
    dtype: torch.dtype,
    attention: Attention,
    kernels: tuple[str, ...],
    about: str,
) -> bool:
    """Whether no layer would be merged, by what is known of all of them: then the model runs as if ToMe were not there.
    Its patches take the processor time, which shows where steps wait for it."""
    if not layers:
        return False  # not a U-Net as they are known
    reasons = why_layers_left_alone(config, full, device, layers, dtype, attention, kernels, about)
    for grid, reason in (reasons or {}).items():
        leave_alone(None, reason, f"layers of {grid[0]}x{grid[1]} tokens", outcome=outcome)
    if reasons == {}:
        for grid in sorted({grid_at(full, level) for level, _, _ in layers}, reverse=True):
            outcome.left_alone(why_not_served(config, grid, full), tokens_of(grid))
    return reasons is not None


def _why_not_paid(
    base: Any,
    x: Tensor,
    t: Tensor,
    args: tuple,
    kwargs: dict[str, Any],
    config: ToMeConfig,
    attention: Attention,
    kernels: tuple[str, ...],
    about: str,
) -> str | None:
    """Why merging does not pay in whole steps, or None. base: the model that apply_model is of."""

    def merged(options: dict[str, Any], run: Callable[[dict[str, Any], dict[str, Any]], Any]) -> Any:
        call = ModelCall(config, tuple(x.shape[-2:]), x.device, step=draw_of(options, x.device, base))
        patch = UNetCall(call, options, None, attention, None, base.diffusion_model, about=about)
        with patch.mlp_hooks(base.diffusion_model):
            return run(patch.options, {})

    found = verdict_on_step(base, x, t, args, kwargs, config, merged, attention, kernels, about)
    return None if found is None or found.pays() else why_left_alone(found)


def _kernels_of(options: dict[str, Any], device: torch.device) -> tuple[str, ...]:
    """torch's kernels that the attention would try, in its order; none where it is another's."""
    return () if options.get("optimized_attention_override") is not None else kernel_order(device)


class UNetCall:
    """The patches of one call of the model, and the options that carry them.

    attention, model, about: the host's, to measure with. layers: what Decisions.look_ahead wants to know of a compiled
    model; None: it is not compiled.
    unpaid: why no layer is merged after all, for the record. outcome: the sampling's.
    """

    def __init__(
        self,
        call: ModelCall,
        options: dict[str, Any],
        record: CallTally | None = None,
        attention: Attention | None = None,
        layers: tuple[list[tuple[int, int, int]], torch.dtype] | None = None,
        model: Any = None,
        unpaid: str | None = None,
        outcome: Outcome | None = None,
        about: str = "",
    ):
        self._decisions = Decisions(call, about)
        self.call, self._unpaid, self._compiled = call, unpaid, layers is not None
        self._outcome = Outcome() if outcome is None else outcome
        self._record = record
        self._host_attention, self._model = attention, model
        # The seed is a tensor and so an input of a compiled graph; all else is decided in Python.
        self.key = call_key(call)
        self._pending: Tensor | None = None
        self._pending_own: Plan | None = None  # the layer's, whose keys and values are taken behind their projections
        self._block_plan: Plan | None = None
        self._block: dict[str, Any] = {}  # extra_options of the block that the plan is of
        config = call.config
        parts = ("attn1", *("attn2",) * config.cross_attention, *("ff",) * config.mlp)
        taken = options.get("patches_replace", {})
        self._replaced = replaced_layers(model, parts) | {(part, at) for part in parts for at in taken.get(part, ())}
        self._attention = options.get("optimized_attention_override")
        # Nothing to measure with: nothing to join with either (a test's call, not a host's).
        self._kernels = () if attention is None else _kernels_of(options, call.seed.device)
        self._joint = self._own_tokens()
        if layers is not None:
            self._decisions.look_ahead(*layers, attention, self._kernels)
            self._tell_ahead(*layers)
        self._minding = None  # the attention function that minds `scale`, where one is known to
        if self._attention is None and attention is not None and minds_scale(attention):
            self._minding = inspect.unwrap(attention)
        self.key += f" {self._decisions.unpaid} {self._kernels} {sorted(map(repr, self._replaced))}"
        self.options = self._patched(options)

    def _tell_ahead(self, layers: list[tuple[int, int, int]], dtype: torch.dtype) -> None:
        """What becomes of a compiled model's layers, which tell nothing themselves."""
        merged = not layers  # not a U-Net as they are known: taken to be merged
        for level, channels, heads in layers:
            grid = grid_at(self.call.full, level)
            unpaid = self._decisions.why_not_paid(self._decisions.known(grid, channels, heads, dtype, self._kernels))
            reason = why_not_served(self.call.config, grid, self.call.full) or unpaid
            merged |= reason is None
            if reason is not None:
                self._outcome.left_alone(reason, tokens_of(grid))
        if merged:
            self._outcome.merged()

    def _own_tokens(self) -> JointCall | None:
        """What lets queries keep their own tokens; None where they shall not, or another's attention would run."""
        config = self.call.config
        if not config.wants_heads or self._host_attention is None:
            return None
        if not self._kernels:
            say_once(NOT_KEPT if config.method == "sample" else NOT_MULTIRES)
            return None
        return JointCall(True, self._kernels, say_once, config.keeps_own)

    def _patched(self, options: dict[str, Any]) -> dict[str, Any]:
        options = dict(options)
        patches = dict(options.get("patches", {}))
        patches["attn1_patch"] = [*patches.get("attn1_patch", ()), self.before_attention]
        patches["attn1_output_patch"] = [self.after_attention, *patches.get("attn1_output_patch", ())]
        config = self.call.config
        if config.cross_attention:
            patches["attn2_patch"] = [*patches.get("attn2_patch", ()), self.before_cross_attention]
            patches["attn2_output_patch"] = [self.after_cross_attention, *patches.get("attn2_output_patch", ())]
        options["patches"] = patches
        if config.weighs_keys:
            options["optimized_attention_override"] = self.attention
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

    def before_attention(self, q: Tensor, k: Tensor, v: Tensor, extra_options: dict[str, Any]) -> tuple:
        """attn1_patch: q, k, v [B, N, C] before their projections."""
        self._block_plan = self._pending = self._pending_own = None
        grid = self._grid(q, k, v, extra_options)
        if grid is None:
            return q, k, v
        layer = self.call.attention(q, k, v, grid, own=self._joint is not None)
        if self._record is not None:
            plan = None if layer is None else layer.plan
            place = extra_options.get("block_index", 0)
            self._record.layer(block_name(extra_options), grid, plan, place, self._verdict(q, grid, extra_options))
        if layer is None:
            self._outcome.left_alone(NO_WHOLE_TOKEN, tokens_of(grid))
            return q, k, v
        self._outcome.merged()
        if self.call.config.kind.matches:
            self._block_plan, self._block = layer.plan, extra_options
        self._pending = layer.bias
        self._pending_own = None if self._joint is None else layer.plan
        extra_options[KEY] = layer
        return layer.q, layer.k, layer.v

    def after_attention(self, out: Tensor, extra_options: dict[str, Any]) -> Tensor:
        """attn1_output_patch: out [B, N or M, C], after the output projection, before the residual."""
        self._pending = self._pending_own = None
        layer = extra_options.pop(KEY, None)
        return out if layer is None else layer.unmerge(out)

    def before_cross_attention(self, q: Tensor, k: Tensor, v: Tensor, extra_options: dict[str, Any]) -> tuple:
        """attn2_patch: the block's match serves the queries of its cross-attention."""
        plan = self._block_plan
        if plan is None or self._is_left_whole("attn2", q, extra_options):
            return q, k, v
        extra_options[KEY] = plan
        return plan.merge(q), k, v

    def after_cross_attention(self, out: Tensor, extra_options: dict[str, Any]) -> Tensor:
        """attn2_output_patch."""
        plan = extra_options.pop(KEY, None)
        return out if plan is None else plan.unmerge(out)

    def attention(self, func: Any, q: Tensor, k: Tensor, v: Tensor, heads: int, *args: Any, **kwargs: Any) -> Tensor:
        """optimized_attention_override: adds the sizes to the logits; another node's override is called, not lost."""
        bias, self._pending = self._pending, None
        plan, self._pending_own = self._pending_own, None
        is_torchs = False
        if bias is not None or plan is not None:
            call = Call.of(func, q, k, heads, args, kwargs)
            is_torchs = bool(self._kernels) and may_join(call)
        if plan is not None:
            if is_torchs:
                out = attend_joint(self._joint, call, q, k, v, 0, plan)
                if out is not None:
                    return out
            else:
                say_once(NOT_KEPT if self.call.config.method == "sample" else NOT_MULTIRES)
            k, v = (call.take(x, plan.choice[0]) for x in (k, v))  # what sampling before the projections gives

        def attention(q: Tensor, k: Tensor, v: Tensor, scale: float | None = None) -> Tensor:
            named = kwargs if scale is None else {**kwargs, "scale": scale}
            if self._attention is None:
                return func(q, k, v, heads, *args, **named)
            return self._attention(func, q, k, v, heads, *args, **named)

        if bias is None or k.shape[1] != bias.shape[1]:
            return attention(q, k, v)
        scale = kwargs.pop("scale", None)
        return attend_tokens(q, k, v, heads, bias, attention, is_torchs, scale, func is self._minding)

    def _grid(self, q: Tensor, k: Tensor, v: Tensor, extra_options: dict[str, Any]) -> tuple[int, int] | None:
        """The grid of this call's tokens, or None where it is to be left alone."""
        shape = extra_options.get("activations_shape")
        if shape is None or len(shape) != 4 or q.dim() != 3:
            self._leave("a layer that does not tell its grid is left alone", extra_options)
            return None
        grid = (shape[2], shape[3])
        if not self.call.serves(grid):
            reason = why_not_served(self.call.config, grid, self.call.full)
            self._outcome.left_alone(reason, tokens_of(grid))
            if self._record is not None:
                self._record.left_alone(reason, block_name(extra_options), grid, extra_options.get("block_index", 0))
            return None
        if q.shape[0] != shape[0] or q.shape[1] != grid[0] * grid[1]:
            self._leave(
                "a layer whose tokens are not those of its grid is left alone: another node has tiled or merged "
                "them, or it attends over time",
                extra_options,
                f"{tuple(q.shape[:2])} for a grid of {grid[0]}x{grid[1]}",
                grid,
            )
            return None
        if k.shape[:2] != q.shape[:2] or v.shape[:2] != q.shape[:2]:
            self._leave("a layer that does not attend to its own tokens is left alone", extra_options, grid=grid)
            return None
        if self._is_left_whole("attn1", q, extra_options, grid):
            return None
        unpaid = self._unpaid or self._decisions.why_not_paid(self._verdict(q, grid, extra_options))
        if unpaid is not None:
            self._leave(unpaid, extra_options, f"{grid[0]}x{grid[1]} tokens", grid)
            return None
        return grid

    def _is_left_whole(
        self, part: str, x: Tensor, extra_options: dict[str, Any], grid: tuple[int, int] | None = None
    ) -> bool:
        """Whether a layer of the block is another node's, or its tokens x [B, N, C] are; which is said.

        grid: of a self-attention, whose tokens lie on it; the others' have to be those of the block's plan.
        """
        plan, shape = self._block_plan, extra_options.get("activations_shape", ())
        rows, tokens = x.shape[:2] if grid is not None else (plan.batch, plan.tokens)
        reason = why_left_whole(part, x, rows, tokens, self._is_replaced(part, extra_options))
        if reason is not None:
            self._leave(reason, extra_options, grid=grid or tuple(shape[2:4]) or None)
        return reason is not None

    def _is_replaced(self, part: str, extra_options: dict[str, Any]) -> bool:
        """Whether another node computes this layer of the block that runs now."""
        block = extra_options.get("block")
        places = () if block is None else (block, (*block, extra_options.get("block_index", 0)))
        return any((part, place) in self._replaced for place in places)

    def _verdict(self, q: Tensor, grid: tuple[int, int], extra_options: dict[str, Any]) -> Verdict | None:
        """What is known of this layer's times."""
        heads = extra_options.get("n_heads")
        block = None if is_compiling() else functools.partial(run_block, self._model, heads)
        return self._decisions.verdict(q, grid, heads, self._host_attention, self._kernels, block)

    def _leave(
        self, reason: str, extra_options: dict[str, Any], detail: str = "", grid: tuple[int, int] | None = None
    ) -> None:
        place = extra_options.get("block_index", 0)
        leave_alone(self._record, reason, block_name(extra_options), detail, grid, place, self._outcome)

    @contextmanager
    def mlp_hooks(self, model: Any):
        """For the option `mlp`: hooks on a U-Net's feed-forward layers, gone when the call ends in whatever way."""
        if not self.call.config.mlp or not isinstance(model, nn.Module):
            yield
            return
        handles = []
        try:
            for module in model.modules():
                if hasattr(module, "attn1") and hasattr(module, "ff"):
                    handles.append(module.ff.register_forward_pre_hook(self._before_mlp))
                    handles.append(module.ff.register_forward_hook(self._after_mlp))
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _before_mlp(self, module: Any, args: tuple) -> tuple:
        plan = self._block_plan
        if plan is None:
            return args
        if self._is_left_whole("ff", args[0], self._block):
            self._block_plan = None
            return args
        return (plan.merge(args[0]), *args[1:])

    def _after_mlp(self, module: Any, args: tuple, out: Tensor) -> Tensor:
        plan = self._block_plan
        return out if plan is None else plan.unmerge(out)


def tokens_of(grid: tuple[int, int]) -> str:
    """A grid as the log names it."""
    return f"{grid[0]}x{grid[1]} tokens"


def block_name(extra_options: dict[str, Any]) -> str:
    """The block as the log names it."""
    block = extra_options.get("block")
    return f"{block[0]} block {block[1]}" if block is not None else "unnamed block"
