"""Attentions of a transformer in ComfyUI that do not tell their options, so that no override reaches them."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor

from ..shared_tome.attention.sdpa import Handler, HostAttention, SdpaHooks, leave_left_modes

# What to say where one of them calls another attention.
NOT_TORCHS = "ToMe skips an attention that is not PyTorch's: no node can reach it in this model"


@contextmanager
def met_at_torch(
    modules: Iterable[Any], attention: Callable[..., Tensor], matches: bool, missed: Callable[[], None]
) -> Iterator[None]:
    """Hooks by which attention modules are met where they call torch, gone when the call ends in whatever way.

    attention: called as an optimized_attention_override. matches: whether it wants as many heads of keys as of queries.
    missed: called where a module did not call torch.
    """
    handles: list[Any] = []
    here = threading.get_ident()  # another thread's call of the same modules has hooks of its own

    def meet(host: HostAttention, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """q [B, H, L, d], k and v [B, H or fewer, L, d] -> [B, H, L, d]."""
        from comfy.ldm.modules.attention import attention_pytorch

        told = {"skip_reshape": True, "skip_output_reshape": True, "mask": host.mask}
        if matches:
            k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
        elif host.options.get("enable_gqa"):
            told["enable_gqa"] = True
        return attention(attention_pytorch, q, k, v, q.shape[1], **told)

    def begin(*_: Any) -> Handler | None:
        return meet if threading.get_ident() == here else None

    try:
        for module in modules:
            handles += SdpaHooks(module, begin, lambda _: missed()).handles
        yield
    finally:
        for handle in handles:
            handle.remove()
        if handles:
            leave_left_modes()  # ComfyUI's interrupt is no Exception: no hook runs after it
