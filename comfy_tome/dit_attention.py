"""One attention call of a transformer in ComfyUI, and the ways to weigh its keys.

"joined": keys of one weight in a call of their own, joined by log-sum-exps (shared_tome/joint.py). It takes the place
of ComfyUI's PyTorch attention where that is what would run, and on the same kernel. "channels": the weights as further
channels of the heads, which any attention function takes: those of other nodes and packages, calls with a mask.
"""

from __future__ import annotations

import dataclasses
import types
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..shared_tome.joined import KERNELS, TORCHS
from ..shared_tome.joint import JointCall, take_heads
from ..shared_tome.plan import Plan, take
from .log import say_once

_HOST = "comfy.ldm.modules.attention"
# ComfyUI's attention functions that take heads of any size and mind `scale`; sage's two do not.
_ANY_SIZE = tuple(f"attention_{name}" for name in ("basic", "sub_quad", "split", "xformers", "pytorch", "flash"))
# torch's names of the kernels that tell their log-sum-exp.
_NAMES = dict(zip(("FLASH_ATTENTION", "EFFICIENT_ATTENTION", "CUDNN_ATTENTION"), KERNELS, strict=True))


@dataclass(frozen=True)
class Call:
    """One call of an attention function, and how its tensors lie: [B, H, L, d] where split, else [B, L, H * d]."""

    func: Any
    heads: int  # of the queries; keys and values may have fewer
    kwargs: dict[str, Any]
    split: bool
    length: int
    d: int

    @classmethod
    def of(cls, func: Any, q: Tensor, k: Tensor, heads: int, args: tuple, kwargs: dict[str, Any]) -> Call:
        """From what optimized_attention(q, k, v, heads, mask, attn_precision, ...) is called with."""
        kwargs = {**kwargs, **dict(zip(("mask", "attn_precision"), args, strict=False))}
        split = bool(kwargs.get("skip_reshape"))
        d = q.shape[-1] if split else q.flatten(2).shape[-1] // heads
        return cls(func, heads, kwargs, split, k.shape[2 if split else 1], d)

    @property
    def mask(self) -> Tensor | None:
        """[..., L or 1, L]."""
        return self.kwargs.get("mask")

    def replace(self, **kwargs: Any) -> Call:
        """The call with other keywords."""
        return dataclasses.replace(self, kwargs={**self.kwargs, **kwargs})

    def plain(self, x: Tensor) -> Tensor:
        """Without a variant of the second layout, [B, L, H, d] (SD3's values)."""
        return x if self.split else x.flatten(2)

    def flattened(self) -> Call:
        """The call on what `flat` gives."""
        return dataclasses.replace(self.replace(skip_reshape=False, skip_output_reshape=False), split=False)

    def flat(self, x: Tensor) -> Tensor:
        """[B, L, H * d] of either."""
        return x.transpose(1, 2).flatten(2) if self.split else x

    def by_head(self, x: Tensor) -> Tensor:
        """[B, H, L, d] of either."""
        return x if self.split else x.view(*x.shape[:2], -1, self.d).transpose(1, 2)  # unflatten takes twice as long

    def take(self, x: Tensor, index: Tensor) -> Tensor:
        """The tokens of index [K], in one gather of whole rows where the memory allows."""
        return take_heads(x, index) if self.split else take(x, index[None])


def kernel_order(device: torch.device) -> tuple[str, ...]:
    """The kernels that ComfyUI's PyTorch attention would try, in its order; none where it is not torch's own."""
    import comfy.ops

    if not isinstance(F.scaled_dot_product_attention, types.BuiltinFunctionType) or getattr(
        comfy.ops.scaled_dot_product_attention, "__globals__", None
    ) is not vars(comfy.ops):
        return ()  # another node has put its own in that place
    order = getattr(comfy.ops, "SDPA_BACKEND_PRIORITY", None)
    if device.type == "cpu" or order is None:
        return TORCHS
    return tuple(_NAMES.get(kernel.name, kernel.name) for kernel in order)


def may_join(call: Call) -> bool:
    """Whether JointCall.attend may take the place of this call: ComfyUI's PyTorch attention, without a mask."""
    if call.mask is not None:
        return False
    func = any_size(call.func)
    return getattr(func, "__name__", "") == "attention_pytorch" and getattr(func, "__module__", "") == _HOST


def attend_joint(
    joint: JointCall, call: Call, q: Tensor, k: Tensor, v: Tensor, start: int, plan: Plan
) -> Tensor | None:
    """JointCall.attend in place of this call, which may_join has allowed: its outcome as the host wants it, or None."""
    out = joint.attend(*(call.by_head(x) for x in (q, k, v)), start, plan, call.kwargs.get("scale"))  # (B, L, H, d)
    if out is None:
        return None
    return out.transpose(1, 2) if call.kwargs.get("skip_output_reshape") else out.flatten(2)


def any_size(func: Any) -> Any:
    """ComfyUI's attention function, or its PyTorch one where that knows a few head sizes only."""
    name = getattr(func, "__name__", "")
    if name in _ANY_SIZE:
        return func
    from comfy.ldm.modules.attention import attention_pytorch

    say_once(f"the weighted keys of an attention with text go through PyTorch's attention, not {name}")
    return attention_pytorch


def take_mask(mask: Tensor, length: int, start: int, plan: Plan, queries: bool, keys: bool) -> Tensor:
    """A mask [B or 1, ..., L or 1, L], or [L, L], for merged tokens: that of each one's own representative."""
    mask = mask[None] if mask.dim() == 2 else mask
    index = torch.arange(length, device=mask.device).expand(plan.batch, -1)
    index = torch.cat((index[:, :start], plan.index + start, index[:, start + plan.tokens :]), dim=1)  # (B, K)
    mask = mask.expand(plan.batch, *mask.shape[1:])
    index = index.reshape(plan.batch, *(1,) * (mask.dim() - 2), -1)
    if keys:
        mask = mask.gather(-1, index.expand(*mask.shape[:-1], -1))
    if queries and mask.shape[-2] == length:
        index = index.transpose(-1, -2)  # (B, ..., K, 1)
        mask = mask.gather(-2, index.expand(*mask.shape[:-2], -1, mask.shape[-1]))
    return mask
