"""One attention call of a transformer in ComfyUI, and the ways to weigh its keys.

"joined": keys of one weight in a call of their own, joined by log-sum-exps (shared_tome/joined.py). It takes the place
of ComfyUI's PyTorch attention where that is what would run, and on the same kernel. "channels": the weights as further
channels of the heads, which any attention function takes: those of other nodes and packages, calls with a mask.
"""

from __future__ import annotations

import dataclasses
import math
import types
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..shared_tome.joined import KERNELS, Part, attend_in_parts
from ..shared_tome.plan import Plan, take
from ..shared_tome.sampling import SamplePlan, run_lengths
from .log import say_once

_HOST = "comfy.ldm.modules.attention"
# ComfyUI's attention functions that take heads of any size and mind `scale`; sage's two do not.
_ANY_SIZE = tuple(f"attention_{name}" for name in ("basic", "sub_quad", "split", "xformers", "pytorch", "flash"))
# torch's names of the kernels that tell their log-sum-exp.
_NAMES = dict(zip(("FLASH_ATTENTION", "EFFICIENT_ATTENTION", "CUDNN_ATTENTION"), KERNELS, strict=True))
# Keys that count several times stand as often among those that count once where that makes so few: it saves a call.
_FEW = 256


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
        return x if self.split else x.unflatten(-1, (-1, self.d)).transpose(1, 2)

    def tokens(self, x: Tensor, start: int, count: int) -> Tensor:
        """Those from `start` on."""
        return x.narrow(2 if self.split else 1, start, count)

    def take(self, x: Tensor, index: Tensor) -> Tensor:
        """The tokens of index [K], in one gather of whole rows where the memory allows."""
        if not self.split:
            return take(x, index[None])
        batch, heads, _, d = x.shape
        if x.stride(1) == d and x.stride(3) == 1:  # [B, L, H, d] in memory
            return take(x.transpose(1, 2).flatten(2), index[None]).unflatten(-1, (heads, d)).transpose(1, 2)
        if batch == 1 or x.stride(0) == heads * x.stride(1):
            return take(x.flatten(0, 1), index[None]).unflatten(0, (batch, heads))
        return x.index_select(2, index)


@dataclass(frozen=True, eq=False)
class Around:
    """What all layers of a length share.

    before, after: the tokens that are not the image's. bias: log(counts) [1, K] of all keys; None: they count alike.
    sizes: the image's keys by what they count: (places in plan.index, or None for all; the logarithm), the most
    first; None where that is not known. ones: places of keys that stand among the others as often as they count.
    """

    before: Tensor
    after: Tensor
    bias: Tensor | None
    sizes: tuple[tuple[Tensor | None, float], ...] | None
    ones: Tensor | None

    @classmethod
    def of(cls, plan: Plan, start: int, length: int, weighs: bool) -> Around:
        """weighs: whether a key that stands for several tokens counts as many."""
        index = torch.arange(length, device=plan.device)
        before, after = index[:start], index[start + plan.tokens :]
        if not weighs or (plan.even and length == plan.tokens):  # alone and alike: softmax takes no notice
            return cls(before, after, None, None, None)
        bias = F.pad(plan.sizes[:1].log(), (len(before), len(after)))
        small, longer = divmod(plan.tokens, plan.kept)
        if plan.even:
            return cls(before, after, bias, ((None, math.log(small)),), None)
        if not isinstance(plan, SamplePlan):
            return cls(before, after, bias, None, None)
        order = run_lengths(plan.tokens, plan.kept, plan.device)[1].argsort(stable=True)
        shorter = plan.kept - longer
        groups = [(order[:shorter], shorter, small), (order[shorter:], longer, small + 1)]
        (most, _, size), (least, count, times) = groups if shorter >= longer else groups[::-1]
        if count * times <= _FEW:
            return cls(before, after, bias, ((most, math.log(size)),), least.repeat_interleave(times))
        return cls(before, after, bias, ((most, math.log(size)), (least, math.log(times))), None)


def kernel_order(device: torch.device) -> tuple[str, ...]:
    """The kernels that ComfyUI's PyTorch attention would try, in its order; none where it is not torch's own."""
    import comfy.ops

    if not isinstance(F.scaled_dot_product_attention, types.BuiltinFunctionType) or getattr(
        comfy.ops.scaled_dot_product_attention, "__globals__", None
    ) is not vars(comfy.ops):
        return ()  # another node has put its own in that place
    order = getattr(comfy.ops, "SDPA_BACKEND_PRIORITY", None)
    if device.type == "cpu" or order is None:
        return KERNELS
    return tuple(_NAMES.get(kernel.name, kernel.name) for kernel in order)


def may_join(call: Call, q: Tensor, k: Tensor, v: Tensor) -> bool:
    """Whether `attend_joined` may take the place of this call, ComfyUI's PyTorch attention on all tokens' q, k, v."""
    if call.mask is not None or q.stride(-1) != 1:
        return False
    if not (q.shape == k.shape == v.shape and q.dtype == k.dtype == v.dtype):
        return False
    if torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad):
        return False
    func = any_size(call.func)
    return getattr(func, "__name__", "") == "attention_pytorch" and getattr(func, "__module__", "") == _HOST


def attend_joined(
    call: Call, q: Tensor, k: Tensor, v: Tensor, start: int, plan: Plan, around: Around, kernel: str
) -> Tensor | None:
    """What the attention gives with keys and values of plan.index alone, each of its weight, and all other tokens.

    None where a part is not as the kernel wants it: cuDNN takes no single key.
    """
    index = plan.index[0]
    image = [call.tokens(x, start, plan.tokens) for x in (k, v)]
    parts: list[Part] = []
    for places, weight in around.sizes:
        chosen = index if places is None else index[places]
        parts.append((*(call.by_head(call.take(x, chosen)) for x in image), weight))
    end = start + plan.tokens
    ones = None if around.ones is None else index[around.ones]
    others = []
    for x, own in zip((k, v), image, strict=True):
        pieces = [call.tokens(x, 0, start)] if start else []
        pieces += [] if ones is None else [call.take(own, ones)]
        pieces += [call.tokens(x, end, call.length - end)] if end < call.length else []
        if pieces:
            others.append(call.by_head(pieces[0] if len(pieces) == 1 else torch.cat(pieces, 2 if call.split else 1)))
    if others:
        parts.append((*others, 0.0))
    if any(part[0].shape[2] < (2 if kernel == "cudnn" else 1) or part[1].stride(-1) != 1 for part in parts):
        return None
    out = attend_in_parts(call.by_head(q), parts, kernel, call.kwargs.get("scale"))  # (B, L, H, d)
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
