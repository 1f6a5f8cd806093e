"""Reach the queries, keys and values of a host's attention where they meet: at scaled_dot_product_attention.

Some attentions build them from one fused projection, or turn them by rotary positions, so no module hook sees them as
the attention does. While such a module runs, that one torch function's arguments go to a function of ours; the host's
code is neither copied nor replaced.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode, _get_current_function_mode_stack

from .attention import extend_heads

_SDPA = F.scaled_dot_product_attention
# handler(attention, q, k, v): attention(q, k, v, bias=None) is what the host meant to do.
Handler = Callable[..., Tensor]


class _AroundSdpa(TorchFunctionMode):
    def __init__(self, handler: Handler):
        super().__init__()
        self.handler, self.calls = handler, 0

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None) -> Any:
        kwargs = kwargs or {}
        if func is not _SDPA:
            return func(*args, **kwargs)
        self.calls += 1
        names = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal", "scale", "enable_gqa")
        given = {**dict(zip(names, args, strict=False)), **kwargs}
        q, k, v, mask = given.pop("query"), given.pop("key"), given.pop("value"), given.pop("attn_mask", None)
        return self.handler(HostAttention(func, given, mask), q, k, v)


class HostAttention:
    """The host's call: its own keyword arguments, and a mask that it may have."""

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
        """q [B, H, N, d], k and v [B, H, M, d], bias [B or 1, M] for each key -> [B, H, N, d]."""
        if bias is None:
            return self.func(q, k, v, attn_mask=self.mask, **self.options)
        d = q.shape[-1]
        scale = d**-0.5 if self.scale is None else self.scale
        q, k, v = extend_heads(q, k, v, bias[:, None] * (d**-0.5 / scale))
        return self.func(q, k, v, **{**self.options, "scale": scale})[..., :d]


class SdpaHooks:
    """Hooks on an attention module. While its forward runs, each attention in it goes through a handler.

    begin(module, args, kwargs): the handler of this call, or None where it is to be left alone.
    """

    def __init__(self, module: nn.Module, begin: Callable[..., Handler | None]):
        self._begin = begin
        self._modes: dict[int, _AroundSdpa] = {}  # by thread
        self.handles = [
            module.register_forward_pre_hook(self._before, with_kwargs=True),
            # Runs after an exception too: a mode must not stay behind.
            module.register_forward_hook(self._after, prepend=True, always_call=True),
        ]

    def _before(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        handler = self._begin(module, args, kwargs)
        if handler is not None:
            mode = _AroundSdpa(handler)
            mode.__enter__()
            self._modes[threading.get_ident()] = mode

    def _after(self, module: nn.Module, args: tuple, out: Any) -> None:
        mode = self._modes.pop(threading.get_ident(), None)
        if mode is None:
            return
        mode.__exit__(None, None, None)
        if mode.calls == 0 and out is not None:
            raise RuntimeError(
                f"{type(module).__name__} did not call torch's scaled_dot_product_attention, where ToMe works; choose "
                "it (transformers: attn_implementation='sdpa', timm: fused_attn, diffusers: the native backend)"
            )
