"""Reach the queries, keys and values of a host's attention where they meet: at scaled_dot_product_attention.

Some attentions build them from one fused projection, or turn them by rotary positions, so no module hook sees them as
the attention does. While such a module runs, that one torch function's arguments go to a function of ours; the host's
code is neither copied nor replaced.
"""

from __future__ import annotations

import functools
import sys
import threading
import types
from collections.abc import Callable, Hashable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode, _get_current_function_mode_stack

from .. import kernels
from ..core.curve import is_compiling
from ..merging.plan import Plan
from ..merging.residual import ResidualCall
from .self_token import why_no_self_token_here
from .sequence import JointCall, take_heads

_SDPA = F.scaled_dot_product_attention
_MODULE_CALL = nn.Module._wrapped_call_impl.__code__
# handler(attention, q, k, v): attention(q, k, v, bias=None) is what the host meant to do.
Handler = Callable[..., Tensor]
# What adapters say where attend_with_self_token's missed() is called.
NOT_AS_TRIED = "ToMe skipped this attention: it behaved differently from its trial run."


class AroundSdpa(TorchFunctionMode):
    """While it is entered, this thread's calls of that function go to the handler. calls: how many did.

    module: only those inside its forward, since an interrupt can leave the mode on; None: all.
    """

    def __init__(self, handler: Handler, module: nn.Module | None = None):
        super().__init__()
        self.handler, self.module, self.calls = handler, module, 0

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None) -> Any:
        if func is not _SDPA:  # some twenty an attention: each counts where steps wait for the processor
            return func(*args, **kwargs) if kwargs else func(*args)
        kwargs = kwargs or {}
        if self.module is not None and not _is_running(self.module):
            return func(*args, **kwargs)
        self.calls += 1
        names = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal", "scale", "enable_gqa")
        given = {**dict(zip(names, args, strict=False)), **kwargs}
        q, k, v = as_autocast(given.pop("query"), given.pop("key"), given.pop("value"))
        return self.handler(HostAttention(func, given, given.pop("attn_mask", None)), q, k, v)


def as_autocast(*tensors: Tensor) -> tuple[Tensor, ...]:
    """What torch's own function would make of its arguments under torch.autocast: norms of queries and keys leave them
    in float32 there, beside values in half precision."""
    kind = tensors[0].device.type
    if is_compiling() or kind not in ("cpu", "cuda"):
        return tensors
    try:
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
    except (AttributeError, TypeError):  # before torch 2.4
        gpu = kind == "cuda"
        is_on = torch.is_autocast_enabled() if gpu else torch.is_autocast_cpu_enabled()
        dtype = (torch.get_autocast_gpu_dtype() if gpu else torch.get_autocast_cpu_dtype()) if is_on else None
    if dtype is None:
        return tensors
    return tuple(x if x.dtype == torch.float64 else x.to(dtype) for x in tensors)


def _is_running(module: nn.Module) -> bool:
    """Whether a call of the module is under way in this thread."""
    if is_compiling():
        return True
    frame = sys._getframe(1)
    while frame is not None:
        if frame.f_code is _MODULE_CALL and frame.f_locals.get("self") is module:
            return True
        frame = frame.f_back
    return False


class HostAttention:
    """The host's call: its own keyword arguments, and a mask that it may have."""

    NOT_ALONE = "dropout, or another package's mode around the attention"  # said where not is_torchs_alone
    cuts_mask = False  # whether it has its mask for fewer keys

    def __init__(self, func: Callable[..., Tensor], options: dict[str, Any], mask: Tensor | None):
        self.func, self.options, self.mask = func, options, mask

    @property
    def is_plain(self) -> bool:
        """Whether keys may be taken away: no mask, not causal."""
        return self.mask is None and not self.options.get("is_causal")

    @property
    def is_torchs_alone(self) -> bool:
        """Whether torch's own kernels may be called in its place: no dropout, and no other mode that would miss it."""
        modes = _get_current_function_mode_stack()
        return not self.options.get("dropout_p") and all(type(mode).__module__.startswith("torch.") for mode in modes)

    @property
    def scale(self) -> float | None:
        """Of the logits; None: d ** -0.5."""
        return self.options.get("scale")

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None) -> Tensor:
        """q [B, H, N, d], k and v [B, H, M, d], bias [b, M] for each key, row i from its row i % b -> [B, H, N, d]."""
        if bias is None:
            return self.func(q, k, v, attn_mask=self.mask, **self.options)
        scale = q.shape[-1] ** -0.5 if self.scale is None else self.scale
        alone = self.is_plain and self.is_torchs_alone and is_torchs_sdpa()
        return kernels.attend(q, k, v, bias, scale, functools.partial(self.func, **self.options), alone)


def is_torchs_sdpa() -> bool:
    """Whether hosts that call F.scaled_dot_product_attention now get torch's, which can be seen here."""
    return F.scaled_dot_product_attention is _SDPA and isinstance(_SDPA, types.BuiltinFunctionType)


def attend_sampled(
    joint: JointCall, attention: HostAttention, q: Tensor, k: Tensor, v: Tensor, start: int, plan: Plan
) -> Tensor:
    """Keys and values from some of the image's tokens, which begin at `start`, and all others: no unmerge.

    Args:
        q, k, v: [B, H, L, d] of all tokens. plan: of a method that matches nothing; where there are tokens beside the
            image's, its choice is one for all rows. Under a mask that joint.attend does not take, all keys stay.
    Returns:
        [B, H, L, d].
    """
    torchs, mask = attention.is_torchs_alone, attention.mask
    out = joint.attend(q, k, v, start, plan, attention.scale, mask) if torchs else None  # (B, L, H, d)
    if out is not None:
        return out.transpose(1, 2)
    if mask is not None and not attention.cuts_mask:
        return attention(q, k, v)
    if not torchs:
        joint.tell_sampled(plan, attention.NOT_ALONE)
    if joint.keeps_self:
        joint.tell_not_own(why_no_self_token_here(q, k, v, mask is not None, torchs, attention.NOT_ALONE))
    around = joint.around(plan, start, k.shape[2])
    index = plan.choice if k.shape[2] == plan.tokens else around.index(plan, start)
    return attention(q, take_heads(k, index), take_heads(v, index), bias=around.bias)


def attend_with_self_token(
    joint: JointCall | None,
    plan: Plan | None,
    missed: Callable[[], None],
    attention: HostAttention,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    keeping: tuple[ResidualCall, Hashable] | None = None,
) -> Tensor:
    """attend_sampled where the image is alone and the attention behaves as in its trial run (heads.meets_at_sdpa).

    Elsewhere it calls missed() and all keys stay. q, k, v: [B, H, N, d] -> [B, H, N, d]. keeping: what has some steps
    exact, and the layer's name.
    """
    able = joint is not None and plan is not None and attention.is_plain and q.shape == k.shape == v.shape
    if not able or (q.shape[0], q.shape[2]) != (plan.batch, plan.tokens):
        missed()
        return attention(q, k, v)
    drawn = functools.partial(attend_sampled, joint, attention, q, k, v, 0, plan)
    if keeping is None:
        return drawn()
    residual, layer = keeping
    return residual.attend(layer, drawn, lambda: attention(q, k, v))


def attend_weighed(
    bias: Tensor | None, missed: Callable[[], None], attention: HostAttention, q: Tensor, k: Tensor, v: Tensor
) -> Tensor:
    """The host's call with bias [b, M] for its keys where the attention behaves as in its trial run (heads.is_met).

    Elsewhere it calls missed() and all keys weigh alike. q [B, H, N, d], k and v [B, H, M, d] -> [B, H, N, d].
    """
    if bias is None or not attention.is_plain or k.shape[2] != bias.shape[1] or k.shape[0] % bias.shape[0]:
        missed()
        return attention(q, k, v)
    return attention(q, k, v, bias=bias)


def leave_left_modes() -> None:
    """Take off what an interrupt (KeyboardInterrupt, which runs no hook) left on in this thread.

    To be called where no attention runs.
    """
    for mode in reversed(_get_current_function_mode_stack()):
        if not isinstance(mode, AroundSdpa):
            break
        mode.__exit__(None, None, None)


def not_torchs(module: nn.Module) -> RuntimeError:
    """The error where an attention module runs another attention than torch's."""
    return RuntimeError(
        f"{type(module).__name__} did not call torch's scaled_dot_product_attention, where ToMe works; choose it "
        "(transformers: attn_implementation='sdpa', timm: fused_attn, diffusers: the native backend)"
    )


class SdpaHooks:
    """Hooks on an attention module. While its forward runs, each attention in it goes through a handler.

    begin(module, args, kwargs): the handler of this call, or None where it is to be left alone.
    missed(module): called where the forward came to an end without that function; None: not_torchs is raised.
    """

    def __init__(
        self,
        module: nn.Module,
        begin: Callable[..., Handler | None],
        missed: Callable[[nn.Module], None] | None = None,
    ):
        self._begin, self._missed = begin, missed
        self._modes: dict[int, AroundSdpa] = {}  # by thread
        self.handles = [
            module.register_forward_pre_hook(self._before, with_kwargs=True),
            # Runs after an exception too: a mode must not stay behind.
            module.register_forward_hook(self._after, prepend=True, always_call=True),
        ]

    def _before(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        handler = self._begin(module, args, kwargs)
        if handler is not None:
            mode = AroundSdpa(handler, module)
            mode.__enter__()
            self._modes[threading.get_ident()] = mode

    def _after(self, module: nn.Module, args: tuple, out: Any) -> None:
        mode = self._modes.pop(threading.get_ident(), None)
        if mode is None:
            return
        mode.__exit__(None, None, None)
        if mode.calls or out is None:
            return
        if self._missed is None:
            raise not_torchs(module)
        self._missed(module)
