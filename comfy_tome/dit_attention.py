"""One attention call of a transformer in ComfyUI or Forge, and the ways to weigh its keys.

"joined": keys of one weight in a call of their own, combined by log-sum-exp (shared_tome/attention/sequence.py). It
takes the place of the program's PyTorch attention where that is what would run, and on the same kernel. "channels": the
weights as further channels of the heads, which any attention function takes: those of other nodes and packages, calls
with a mask.
"""

from __future__ import annotations

import dataclasses
import re
import types
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..shared_tome import kernels
from ..shared_tome.attention.bias import minds_scale
from ..shared_tome.attention.combine import KERNELS, TORCHS
from ..shared_tome.attention.self_token import why_no_self_token_here
from ..shared_tome.attention.sequence import JointCall, image_bias, merge_image, take_heads, unmerge_image
from ..shared_tome.core.channels import extra_channels
from ..shared_tome.merging.plan import Plan
from ..shared_tome.methods import Method

# Attention functions of ComfyUI and its kind that take heads of any size. Their others (SageAttention's two,
# comfy-kitchen's) and other nodes' may know these sizes alone.
_ANY_SIZE = tuple(f"attention_{name}" for name in ("basic", "sub_quad", "split", "xformers", "pytorch", "flash"))
SAFE_SIZES = (64, 96, 128)
# torch's names of the kernels that tell their log-sum-exp.
_NAMES = dict(zip(("FLASH_ATTENTION", "EFFICIENT_ATTENTION", "CUDNN_ATTENTION"), KERNELS, strict=True))
# Words by which another node's attention is known to be sparse.
_SPARSE = {"sparse", "sparge", "radial", "sla", "vsa", "nabla"}


class Attentions:
    """A program's attention functions, which are called as ComfyUI's: (q, k, v, heads, mask, ...)."""

    @property
    def module(self) -> ModuleType:
        """In which they lie."""
        raise NotImplementedError

    @property
    def operations(self) -> ModuleType:
        """With the program's own way to torch's attention, where it has one."""
        raise NotImplementedError

    @property
    def torchs(self) -> Callable[..., Tensor]:
        """The one that calls torch's attention."""
        return self.module.attention_pytorch

    def is_own(self, func: Any, name: str) -> bool:
        """Whether func is the program's own function of that name. An override gets it without its wrapper."""
        module = self.module
        own = getattr(module, name, None)
        own = getattr(own, "__wrapped__", own)
        return own is not None and own.__module__ == module.__name__ and getattr(func, "__wrapped__", func) is own

    def is_torchs(self, func: Any) -> bool:
        """Whether it is the one that calls torch's attention, and no function of the same name."""
        return self.is_own(func, "attention_pytorch")

    def order(self, device: torch.device) -> tuple[str, ...]:
        """The kernels of torch that it would try, in its order, whatever the program was started with; none where that
        function is not torch's own."""
        operations = self.operations
        way = getattr(operations, "scaled_dot_product_attention", None)
        if not isinstance(F.scaled_dot_product_attention, types.BuiltinFunctionType) or (
            way is not None and getattr(way, "__globals__", None) is not vars(operations)
        ):
            return ()  # somebody has put another in that place
        order = getattr(operations, "SDPA_BACKEND_PRIORITY", None)
        if device.type == "cpu" or order is None:
            return TORCHS
        return tuple(_NAMES.get(kernel.name, kernel.name) for kernel in order)


class _ComfyUI(Attentions):
    @property
    def module(self) -> ModuleType:
        from comfy.ldm.modules import attention

        return attention

    @property
    def operations(self) -> ModuleType:
        import comfy.ops

        return comfy.ops


COMFYUI = _ComfyUI()


@dataclass(frozen=True)
class AttentionCall:
    """One call of an attention function, and how its tensors lie: [B, H, L, d] where split, else [B, L, H * d].

    override: another node's, called with func as its first argument. length: of the keys. family: of the functions.
    """

    func: Any
    heads: int  # of the queries; keys and values may have fewer
    kwargs: dict[str, Any]
    split: bool
    length: int
    d: int
    override: Any
    family: Attentions  # no default: torch 2.11 cannot trace a dataclass with an object as one

    @classmethod
    def of(
        cls,
        func: Any,
        q: Tensor,
        k: Tensor,
        heads: int,
        args: tuple,
        kwargs: dict[str, Any],
        override: Any = None,
        family: Attentions = COMFYUI,
    ) -> AttentionCall:
        """From what optimized_attention(q, k, v, heads, mask, attn_precision, ...) is called with."""
        kwargs = {**kwargs, **dict(zip(("mask", "attn_precision"), args, strict=False))}
        split = bool(kwargs.get("skip_reshape"))
        d = q.shape[-1] if split else q.flatten(2).shape[-1] // heads
        return cls(func, heads, kwargs, split, k.shape[2 if split else 1], d, override, family)

    @property
    def mask(self) -> Tensor | None:
        """[..., L or 1, L]."""
        return self.kwargs.get("mask")

    @property
    def name(self) -> str:
        """The attention function's, for people and keys."""
        return getattr(self.func, "__name__", type(self.func).__name__)

    @property
    def takes_any_size(self) -> bool:
        """Whether the attention is known to take heads of any size."""
        return self.override is None and any(self.family.is_own(self.func, name) for name in _ANY_SIZE)

    @property
    def is_torchs(self) -> bool:
        """Whether the program's PyTorch attention itself would run, and no function of the same name."""
        return self.override is None and self.family.is_torchs(self.func)

    def run(self, q: Tensor, k: Tensor, v: Tensor, **kwargs: Any) -> Tensor:
        """The attention as it would be without ToMe: another node's override goes first."""
        first = (self.func,) if self.override is None else (self.override, self.func)
        return first[0](*first[1:], q, k, v, self.heads, **{**self.kwargs, **kwargs})

    def by_torch(self) -> AttentionCall:
        """The call of the program's PyTorch attention in place of this one."""
        return dataclasses.replace(self, func=self.family.torchs)

    def replace(self, **kwargs: Any) -> AttentionCall:
        """The call with other keywords."""
        return dataclasses.replace(self, kwargs={**self.kwargs, **kwargs})

    def plain(self, x: Tensor) -> Tensor:
        """Without a variant of the second layout, [B, L, H, d] (SD3's values)."""
        return x if self.split else x.flatten(2)

    def flattened(self) -> AttentionCall:
        """The call on what `flat` gives. Both are off where they are not named, and Forge does not know the second."""
        off = {name: False for name in ("skip_reshape", "skip_output_reshape") if name in self.kwargs}
        return dataclasses.replace(self.replace(**off), split=False)

    def flat(self, x: Tensor) -> Tensor:
        """[B, L, H * d] of either."""
        return x.transpose(1, 2).flatten(2) if self.split else x

    def by_head(self, x: Tensor) -> Tensor:
        """[B, H, L, d] of either."""
        return x if self.split else x.view(*x.shape[:2], -1, self.d).transpose(1, 2)  # unflatten takes twice as long

    def take(self, x: Tensor, index: Tensor) -> Tensor:
        """The tokens of index [K], in one gather of whole rows where the memory allows."""
        return take_heads(x, index) if self.split else kernels.take(x, index[None])


def is_sparse(override: Any) -> bool:
    """Whether another node's attention override says by its name, or by that of its module, that it is sparse."""
    override = getattr(override, "func", override)  # functools.partial
    owner = override if hasattr(override, "__qualname__") else type(override)
    module = re.split(r"custom_nodes|comfy_extras", owner.__module__ or "")[-1]  # not the folders ComfyUI lies in
    words = re.findall(r"[A-Z]?[a-z]+|[A-Z]+(?![a-z])", f"{module} {owner.__qualname__}")
    return not _SPARSE.isdisjoint(word.lower() for word in words)


def may_combine(call: AttentionCall) -> bool:
    """Whether JointCall.attend may take the place of this call: the program's PyTorch attention, without a mask."""
    return call.mask is None and call.is_torchs


def attend_joint(
    joint: JointCall, call: AttentionCall, q: Tensor, k: Tensor, v: Tensor, start: int, plan: Plan
) -> Tensor | None:
    """JointCall.attend in place of this call of PyTorch's attention: its outcome as the host wants it, or None."""
    heads = (call.by_head(x) for x in (q, k, v))
    out = joint.attend(*heads, start, plan, call.kwargs.get("scale"), call.mask)  # (B, L, H, d)
    if out is None:
        return None
    return out.transpose(1, 2) if call.kwargs.get("skip_output_reshape") else out.flatten(2)


def tell_not_own(joint: JointCall, call: AttentionCall, q: Tensor, k: Tensor, v: Tensor, torchs: bool) -> None:
    """To be called where attend_joint has nothing: says why queries do not keep their own tokens, where they should.

    torchs: by PyTorch's attention."""
    if joint.keeps_self:
        heads = (call.by_head(x) for x in (q, k, v))
        joint.tell_not_own(why_no_self_token_here(*heads, call.mask is not None, torchs))


def attend_sampled(
    joint: JointCall, call: AttentionCall, q: Tensor, k: Tensor, v: Tensor, start: int, plan: Plan
) -> Tensor:
    """Keys and values from some of the image's tokens, the same for all rows, and all others: no unmerge."""
    torchs = bool(joint.kernels) and call.is_torchs
    out = attend_joint(joint, call, q, k, v, start, plan) if torchs else None
    if out is not None:
        return out
    if not torchs:
        joint.tell_sampled(plan, call.name)
    around = joint.around(plan, start, call.length)
    tell_not_own(joint, call, q, k, v, torchs)
    index = around.index(plan, start)
    k, v = call.take(k, index), call.take(v, index)
    if call.mask is not None:
        call = call.replace(mask=call.mask.index_select(-1, index))
    return attend_weighed(call, q, k, v, around.bias, bool(joint.kernels))


def attend_merged(
    joint: JointCall, call: AttentionCall, q: Tensor, k: Tensor, v: Tensor, start: int, plan: Plan, kind: Method
) -> Tensor:
    """Methods that match: the image's part of queries, keys and values merged; the queries' outcome unmerged."""
    flat = call.flattened()
    if call.mask is not None:
        flat = flat.replace(mask=take_mask(call.mask, call.length, start, plan, kind.queries, kind.keys))
    q, k, v = (call.flat(x) for x in (q, k, v))  # (B, L, H * d)
    q = merge_image(q, start, plan) if kind.queries else q
    k, v = (merge_image(x, start, plan) for x in (k, v)) if kind.keys else (k, v)
    bias = image_bias(plan, start, call.length) if joint.weighs else None
    out = attend_weighed(flat, q, k, v, bias, bool(joint.kernels))
    out = unmerge_image(out, start, plan) if kind.queries else out
    return out.unflatten(-1, (call.heads, -1)).transpose(1, 2) if call.kwargs.get("skip_output_reshape") else out


def attend_weighed(call: AttentionCall, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, combines: bool) -> Tensor:
    """The attention with bias [b, K] added to its logits, without a mask, which would be slow (attention.py).

    combines: whether kernels of ours may take the place of torch's.
    """
    if bias is None:
        return call.run(q, k, v)
    heads, kwargs, d = call.heads, dict(call.kwargs), call.d
    scale = kwargs.pop("scale", None) or d**-0.5
    if combines and may_combine(call):
        by_head = [call.by_head(x) for x in (q, k, v)]  # (B, H, L, d)
        if kernels.can_attend(*by_head, bias):
            made = kernels.attend(*by_head, bias, scale)
            return made if kwargs.get("skip_output_reshape") else made.transpose(1, 2).flatten(2)
    if not call.split:
        q, k, v = (x.unflatten(-1, (-1, d)) for x in (q, k, v))  # (B, L, H, d)
    bias = bias[:, None] if call.split else bias[:, :, None]
    q, k, v = kernels.extend_heads(q, k, v, bias * (d**-0.5 / scale))
    if call.takes_any_size and minds_scale(call.func):
        kwargs["scale"] = scale
    else:
        # What the attention takes by itself must be right: a size that it knows, and the scale of that size.
        if not call.takes_any_size:
            width = next(size for size in SAFE_SIZES if size >= q.shape[-1])
            q, k, v = (F.pad(x, (0, width - x.shape[-1])) for x in (q, k, v))
        q = q * (scale * q.shape[-1] ** 0.5)
    width = q.shape[-1]
    if not call.split:
        q, k, v = (x.flatten(2) for x in (q, k, v))  # (B, L, H * width)
    out = dataclasses.replace(call, kwargs=kwargs).run(q, k, v)
    if kwargs.get("skip_output_reshape"):
        return out[..., :d]  # (B, H, L, d)
    return out.unflatten(-1, (heads, width))[..., :d].flatten(2)  # (B, L, H * d)


def fits_weights(call: AttentionCall) -> bool:
    """Whether the attention takes the wider heads by which attend_weighed weighs keys."""
    return call.takes_any_size or call.d + extra_channels(call.d) <= SAFE_SIZES[-1]


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
