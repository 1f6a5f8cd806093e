"""ToMe in Forge and reForge: the patches of ComfyUI's node, put into a clone of the pass's U-Net.

Their U-Net carries ComfyUI's attn1 patches but no wrappers around `apply_model`; the one hook that sees each call
with its transformer_options is `model_function_wrapper`. It takes a single function, so one that stands there
already is called by ours. Both programs put the unpatched U-Net back before each pass: nothing needs removing.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..comfy_tome.unet import UNetCall, block_name
from ..shared_tome import ModelCall
from ..shared_tome.attention.combine import TORCHS
from ..shared_tome.attention.sdpa import (
    NOT_AS_TRIED,
    Handler,
    HostAttention,
    SdpaHooks,
    attend_own,
    leave_left_modes,
)
from ..shared_tome.attention.sequence import JointCall
from ..shared_tome.core.failures import is_out_of_memory
from ..shared_tome.core.grid import grid_of
from ..shared_tome.core.groups import spread_rows
from ..shared_tome.core.progress import percent_of_level, percent_table
from ..shared_tome.hooks import guard
from ..shared_tome.hooks.heads import (
    GIVEN,
    PROJECTIONS,
    meets_at_sdpa,
    narrow,
    stand_in,
    why_not_own,
    widen_key,
    widen_query,
    widen_value,
    width,
)
from ..shared_tome.inspect.record import CallRecord
from ..shared_tome.inspect.report import CallTally
from .block import NO_WEIGHTS, is_taken
from .hooks import NotServed, served_blocks
from .notes import Notes
from .sampling import Sampling

_WRAPPER = "model_function_wrapper"
_MARK = "is_tome"


def is_forge(sd_model: Any) -> bool:
    """Whether the host is Forge or reForge."""
    return hasattr(sd_model, "forge_objects")


def patch(sd_model: Any, sampling: Sampling, called: Callable[[], None] = lambda: None) -> None:
    """Give this pass a merged clone of the U-Net; called twice, the second replaces the first.

    called: told after each call of the model.

    Raises NotServed: the model has no self-attention that takes patches (Flux and other transformers).
    """
    unet = sd_model.forge_objects.unet.clone()
    diffusion_model = unet.model.diffusion_model
    if next(served_blocks(diffusion_model), None) is None:
        raise NotServed(f"{type(diffusion_model).__name__} has no self-attention that ToMe knows; nothing is merged")
    inner = _without_ours(unet.model_options.get(_WRAPPER))
    sampling.another_model()
    unet.set_model_unet_function_wrapper(_wrapper(unet.model, sampling, inner, called))
    sd_model.forge_objects.unet = unet


def unpatch(sd_model: Any) -> None:
    """Take our wrapper out of this pass's U-Net, if it is there."""
    objects = getattr(sd_model, "forge_objects", None)
    wrapper = objects.unet.model_options.get(_WRAPPER) if objects is not None else None
    if not getattr(wrapper, _MARK, False):
        return
    unet = objects.unet.clone()
    inner = _without_ours(wrapper)
    if inner is None:
        unet.model_options.pop(_WRAPPER, None)
    else:
        unet.set_model_unet_function_wrapper(inner)
    objects.unet = unet


def _without_ours(wrapper: Callable | None) -> Callable | None:
    while getattr(wrapper, _MARK, False):
        wrapper = wrapper.inner
    return wrapper


def _percent_to_sigma(model: Any) -> Callable[[float], float] | None:
    """The noise level at a share of the model's time: Forge keeps it in `predictor`, reForge in `model_sampling`."""
    for name in ("predictor", "model_sampling"):
        found = getattr(getattr(model, name, None), "percent_to_sigma", None)
        if found is not None:
            return found
    return None


def _wrapper(model: Any, sampling: Sampling, inner: Callable | None, called: Callable[[], None]) -> Callable:
    """A plain function, because clone() copies objects deeply and would part them from the sampling's state.

    model: what the U-Net's patcher holds.
    """
    diffusion_model, percent_to_sigma = model.diffusion_model, _percent_to_sigma(model)
    met: dict[tuple, bool] = {}
    wide: dict[tuple, bool] = {}
    table: list[Tensor] = []  # asked for where there is a schedule

    def progress(level: Tensor) -> float:
        if not table:
            table.append(percent_table(percent_to_sigma))
        return percent_of_level(level, table[0])

    def tome_wrapper(apply_model: Callable, args: dict[str, Any]) -> Tensor:
        def run(args: dict[str, Any]) -> Tensor:
            if inner is not None:
                return inner(apply_model, args)
            return apply_model(args["input"], args["timestep"], **args["c"])

        x = args["input"]  # (B, C, H, W): whole batches of images, prompts and negative prompts one after another
        rows = tuple(row % len(sampling.seeds) for row in range(x.shape[0]))
        tells = percent_to_sigma is not None
        far = functools.partial(progress, args["timestep"]) if tells else None
        call = sampling.call(x, rows, far) if x.dim() == 4 else None
        if call is None:
            out = run(args)
        else:
            told = sampling.told
            own = OwnTokens(diffusion_model, x.device, met, sampling) if call.config.wants_heads else None
            options = args["c"].get("transformer_options", {})
            ours = ForgeCall(call, options, x.shape[0], sampling.notes, told, own, wide)
            with ours.hooks(diffusion_model):
                out = run({**args, "c": {**args["c"], "transformer_options": ours.options}})
            if isinstance(told, CallRecord):
                told.end()
        called()
        return out

    tome_wrapper.inner = inner
    setattr(tome_wrapper, _MARK, True)
    return tome_wrapper


class OwnTokens:
    """Whether the queries of a model's layers can keep their own tokens: where all meet at torch's attention.

    met: what heads.meets_at_sdpa answered, remembered for a sampling pass.
    """

    def __init__(self, diffusion_model: nn.Module, device: torch.device, met: dict[tuple, bool], sampling: Sampling):
        self._model, self._device, self._met, self._sampling = diffusion_model, device, met, sampling

    def joint(self) -> JointCall | None:
        """What lets them, or None, which is said once."""
        leave_left_modes()
        for block in served_blocks(self._model):
            heads = _heads(block)
            weight = getattr(block.attn1.to_q, "weight", None)
            d = getattr(block.attn1.to_q, "out_features", 0 if weight is None else weight.shape[0]) // heads
            # The precision is the host's affair, and known only where its attention runs.
            reason = why_not_own(lambda b=block, h=heads, n=d: self._meets(b, h, n), d, self._device, torch.float32)
            if reason is not None:
                self._sampling.tell_own(reason)
                return None
        self._sampling.tell_own(None)
        own = self._sampling.config.keeps_own
        return JointCall(True, TORCHS, lambda message, detail: self.say(f"{message} ({detail})"), own)

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


class ForgeCall(UNetCall):
    """ComfyUI's patches where the grid is not told and the attention cannot be overridden.

    notes: where to tell what is left alone. told, own: of the call, where there is one. wide: what takes_wider
    answered, remembered for a sampling pass.
    """

    def __init__(
        self,
        call: ModelCall,
        options: dict[str, Any],
        batch: int,
        notes: Notes,
        told: CallTally | None = None,
        own: OwnTokens | None = None,
        wide: dict[tuple, bool] | None = None,
    ):
        self._notes, self._own = notes, own
        self._wide = {} if wide is None else wide
        self._taken: frozenset[str] = frozenset()  # of the block that runs now: see is_taken
        super().__init__(call, options, told)
        self._batch = batch
        for name in ("wrappers", "optimized_attention_override"):  # these are ComfyUI's; keep what was there
            self.options.pop(name, None)
            if name in options:
                self.options[name] = options[name]

    @contextmanager
    def hooks(self, diffusion_model: nn.Module) -> Iterator[None]:
        """The hooks of one call: on the feed-forward layers for `mlp`, on the projections for keys with weights, on
        blocks in which another extension has replaced a layer."""
        config = self.call.config
        handles: list[Any] = []
        try:
            for block in served_blocks(diffusion_model):
                handles += self._watch(block)
                if self._joint is not None:
                    handles += SdpaHooks(block.attn1, self._begin_own, self._missed_own).handles
                elif config.weighs_keys:
                    handles += self._widen(block)
                if config.mlp and hasattr(block, "ff"):
                    handles.append(block.ff.register_forward_pre_hook(self._before_mlp))
                    handles.append(block.ff.register_forward_hook(self._after_mlp))
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

    def _own_tokens(self) -> JointCall | None:
        return None if self._own is None else self._own.joint()

    def _begin_own(self, attn1: nn.Module, args: tuple, kwargs: dict[str, Any]) -> Handler | None:
        # As the pending bias below, it is this layer's.
        return None if self._pending_own is None else self._attend_own

    def _attend_own(self, attention: HostAttention, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """q, k, v [B, H, N, d] -> [B, H, N, d]."""
        return attend_own(self._joint, self._pending_own, self._missed_own, attention, q, k, v)

    def _missed_own(self) -> None:
        self._own.say(NOT_AS_TRIED)

    def _grid(self, q: Tensor, k: Tensor, v: Tensor, extra_options: dict[str, Any]) -> tuple[int, int] | None:
        grid = grid_of(q.shape[1], self.call.full) if q.dim() == 3 else None
        if grid is not None and "activations_shape" not in extra_options:
            extra_options = {**extra_options, "activations_shape": (self._batch, q.shape[2], *grid)}
        return super()._grid(q, k, v, extra_options)

    def _is_replaced(self, part: str, extra_options: dict[str, Any]) -> bool:
        return part in self._taken or super()._is_replaced(part, extra_options)

    def _leave(
        self, reason: str, extra_options: dict[str, Any], detail: str = "", grid: tuple[int, int] | None = None
    ) -> None:
        """Once a generation, not once a process."""
        self._notes.say(reason, shown=False)
        if self._record is not None:
            part = extra_options.get("block_index", 0)
            self._record.left_alone(reason.partition(";")[0], block_name(extra_options), grid, part)

    def _widen(self, block: nn.Module) -> list[Any]:
        """No attention code of Forge, reForge and Forge Classic takes a scale: each goes by the heads that it is given
        (heads.GIVEN)."""
        attn1 = block.attn1
        heads = _heads(block)
        state: dict[str, Any] = {}

        def after_query(module: nn.Module, args: tuple, out: Tensor) -> Tensor | None:
            # The pending bias is this layer's: attn1_patch sets it right before and attn1_output_patch clears it.
            state["d"] = out.shape[-1] // heads
            return widen_query(out, heads, GIVEN) if self._weighs(attn1, heads, out) else None

        def after_key(module: nn.Module, args: tuple, out: Tensor) -> Tensor | None:
            if not self._weighs(attn1, heads, out):
                return None
            return widen_key(out, heads, GIVEN, spread_rows(self._pending, out.shape[0]))

        def after_value(module: nn.Module, args: tuple, out: Tensor) -> Tensor | None:
            return widen_value(out, heads) if self._weighs(attn1, heads, out) else None

        def before_out(module: nn.Module, args: tuple) -> tuple | None:
            if self._pending is None or args[0].shape[-1] == heads * state["d"]:
                return None
            return (narrow(args[0], heads, state["d"]), *args[1:])

        return [
            attn1.to_q.register_forward_hook(after_query),
            attn1.to_k.register_forward_hook(after_key),
            attn1.to_v.register_forward_hook(after_value),
            attn1.to_out.register_forward_pre_hook(before_out),
        ]

    def _weighs(self, attn1: nn.Module, heads: int, out: Tensor) -> bool:
        """Whether the layer that runs now gets wider heads. out [B, N, H * d]: what one of its projections gives."""
        if self._pending is None:
            return False
        key = type(attn1).forward, heads, out.shape[-1], out.device, out.dtype
        if key not in self._wide:
            self._wide[key] = takes_wider(attn1, heads, out)
            if not self._wide[key]:
                self._notes.say(NO_WEIGHTS, shown=False)
        return self._wide[key]
