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


@dataclass(frozen=True, eq=False)
class AttentionCall:
    """One call of an attention function: its tensors, [B, H, L, d] where split, else [B, L, H * d], and what else it is
    given.

    override: another node's, called with func as its first argument. family: of the functions.
    """

    func: Any
    q: Tensor
    k: Tensor
    v: Tensor
    heads: int  # of the queries; keys and values may have fewer
    kwargs: dict[str, Any]
    split: bool
    d: int
    override: Any
    family: Attentions  # no default: torch 2.11 cannot trace a dataclass with an object as one

    @classmethod
    def of(
        cls,
        func: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        heads: int,
        args: tuple,
        kwargs: dict[str, Any],
        override: Any = None,
        family: Attentions = COMFYUI,
    ) -> AttentionCall:
        """From what optimized_attention(q, k, v, heads, mask, attn_precision, ...) is called with."""
        kwargs = {**kwargs, **dict(zip(("mask", "attn_precision"), args, strict=False))}
        split = bool(kwargs.get("skip_reshape"))
        if not split and v.dim() == 4:  # SD3's are [B, L, H, d]
            q, k, v = q.flatten(2), k.flatten(2), v.flatten(2)
        return cls(func, q, k, v, heads, kwargs, split, q.shape[-1] // (1 if split else heads), override, family)

    def count(self, x: Tensor) -> int:
        """The tokens of q, k or v."""
        return x.shape[2 if self.split else 1]

    @property
    def length(self) -> int:
        """Of the keys."""
        return self.count(self.k)

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

    def run(self) -> Tensor:
        """The attention as it would be without ToMe: another node's override goes first."""
        first = (self.func,) if self.override is None else (self.override, self.func)
        return first[0](*first[1:], self.q, self.k, self.v, self.heads, **self.kwargs)

    def by_torch(self) -> AttentionCall:
        """The call of the program's PyTorch attention in place of this one."""
        return self.replace(func=self.family.torchs)

    def replace(self, **changes: Any) -> AttentionCall:
        """The call with other fields."""
        return dataclasses.replace(self, **changes)

    def flattened(self) -> AttentionCall:
        """The call on [B, L, H * d]."""
        # Both are off where they are not named, and Forge does not know the second.
        off = {name: False for name in ("skip_reshape", "skip_output_reshape") if name in self.kwargs}
        q, k, v = (x.transpose(1, 2).flatten(2) if self.split else x for x in (self.q, self.k, self.v))
        return self.replace(q=q, k=k, v=v, kwargs={**self.kwargs, **off}, split=False)

    def by_head(self) -> tuple[Tensor, Tensor, Tensor]:
        """q, k and v as [B, H, L, d]."""
        q, k, v, d = self.q, self.k, self.v, self.d
        if not self.split:  # unflatten takes twice as long
            q, k = q.view(*q.shape[:2], -1, d).transpose(1, 2), k.view(*k.shape[:2], -1, d).transpose(1, 2)
            v = v.view(*v.shape[:2], -1, d).transpose(1, 2)
        return q, k, v

    def shaped(self, out: Tensor) -> Tensor:
        """An outcome [B, L, H, d] as the host wants it."""
        return out.transpose(1, 2) if self.kwargs.get("skip_output_reshape") else out.flatten(2)

    def with_keys(self, index: Tensor) -> AttentionCall:
        """The call with the keys and values of index [K] alone, in one gather of whole rows where the memory allows."""
        k, v = (take_heads(x, index) if self.split else kernels.take(x, index[None]) for x in (self.k, self.v))
        kwargs = self.kwargs if self.mask is None else {**self.kwargs, "mask": self.mask.index_select(-1, index)}
        return self.replace(k=k, v=v, kwargs=kwargs)


@dataclass(eq=False)
class Kind:
    """What attentions of one call of a model have in common that are merged alike.

    start: where the image's tokens begin. queries: how many an attention brings; wanted: how many their layer has.
    paid: whether PyTorch's attention may take the place of one that knows a few sizes of heads: the layer was measured
    to be faster merged, or is to be merged whatever it costs. joint: what they share; None: not yet known. instead:
    whether PyTorch's attention takes the place of another. torchs: whether it computes them; any_size: whether what
    does takes heads of any size.
    """

    start: int
    queries: int
    wanted: int
    paid: bool = True
    joint: JointCall | None = None
    instead: bool = False
    torchs: bool = False
    any_size: bool = False

    def fit(self, call: AttentionCall, joint: JointCall, instead: bool) -> None:
        """Set what computes attentions like this call."""
        self.joint, self.instead = joint, instead
        by = call.by_torch() if instead else call
        self.torchs, self.any_size = by.is_torchs, by.takes_any_size


def is_sparse(override: Any) -> bool:
    """Whether another node's attention override says by its name, or by that of its module, that it is sparse."""
    override = getattr(override, "func", override)  # functools.partial
    owner = override if hasattr(override, "__qualname__") else type(override)
    module = re.split(r"custom_nodes|comfy_extras", owner.__module__ or "")[-1]  # not the folders ComfyUI lies in
    words = re.findall(r"[A-Z]?[a-z]+|[A-Z]+(?![a-z])", f"{module} {owner.__qualname__}")
    return not _SPARSE.isdisjoint(word.lower() for word in words)


def attend_joint(joint: JointCall, call: AttentionCall, start: int, plan: Plan) -> Tensor | None:
    """JointCall.attend in place of this call of PyTorch's attention: its outcome as the host wants it, or None."""
    given = call.kwargs
    out = joint.attend(*call.by_head(), start, plan, given.get("scale"), given.get("mask"))  # (B, L, H, d)
    return None if out is None else call.shaped(out)


def tell_not_own(joint: JointCall, call: AttentionCall, torchs: bool) -> None:
    """To be called where attend_joint has nothing: says why queries do not keep their own tokens, where they should.

    torchs: by PyTorch's attention."""
    if joint.keeps_self:
        joint.tell_not_own(why_no_self_token_here(*call.by_head(), call.mask is not None, torchs))


def attend_sampled(kind: Kind, call: AttentionCall, plan: Plan) -> Tensor:
    """Keys and values from some of the image's tokens, the same for all rows, and all others: no unmerge."""
    joint, combines = kind.joint, kind.torchs and bool(kind.joint.kernels)
    out = attend_joint(joint, call, kind.start, plan) if combines else None
    if out is not None:
        return out
    if not combines:
        joint.tell_sampled(plan, call.name)
    tell_not_own(joint, call, combines)
    around = joint.around(plan, kind.start, call.length)
    return attend_weighed(kind, call.with_keys(around.index(plan, kind.start)), around.bias)


def attend_merged(kind: Kind, call: AttentionCall, plan: Plan, method: Method) -> Tensor:
    """Methods that match: the image's part of queries, keys and values merged; the queries' outcome unmerged."""
    flat, start = call.flattened(), kind.start
    q, k, v, kwargs = flat.q, flat.k, flat.v, flat.kwargs  # (B, L, H * d)
    if call.mask is not None:
        kwargs = {**kwargs, "mask": take_mask(call.mask, call.length, start, plan, method.queries, method.keys)}
    bias = image_bias(plan, start, call.length) if kind.joint.weighs else None
    q = merge_image(q, start, plan) if method.queries else q
    k, v = (merge_image(x, start, plan) for x in (k, v)) if method.keys else (k, v)
    out = attend_weighed(kind, flat.replace(q=q, k=k, v=v, kwargs=kwargs), bias)
    out = unmerge_image(out, start, plan) if method.queries else out
    return call.shaped(out.unflatten(-1, (call.heads, -1)))


def attend_weighed(kind: Kind, call: AttentionCall, bias: Tensor | None) -> Tensor:
    """The attention with bias [b, K] added to its logits, without a mask, which would be slow (attention/bias.py)."""
    if bias is None:
        return call.run()
    d, scale = call.d, call.kwargs.get("scale") or call.d**-0.5
    combines = kind.torchs and kind.joint.kernels and call.mask is None
    if combines and kernels.can_attend(*(by_head := call.by_head()), bias):
        return call.shaped(kernels.attend(*by_head, bias, scale).transpose(1, 2))
    q, k, v = (x if call.split else x.unflatten(-1, (-1, d)) for x in (call.q, call.k, call.v))  # or (B, L, H, d)
    bias = bias[:, None] if call.split else bias[:, :, None]
    q, k, v = kernels.extend_heads(q, k, v, bias * (d**-0.5 / scale))
    kwargs = {name: value for name, value in call.kwargs.items() if name != "scale"}
    if kind.any_size and minds_scale(call.func):
        kwargs["scale"] = scale
    else:
        # What the attention takes by itself must be right: a size that it knows, and the scale of that size.
        if not kind.any_size:
            width = next(size for size in SAFE_SIZES if size >= q.shape[-1])
            q, k, v = (F.pad(x, (0, width - x.shape[-1])) for x in (q, k, v))
        q = q * (scale * q.shape[-1] ** 0.5)
    width = q.shape[-1]
    q, k, v = (x if call.split else x.flatten(2) for x in (q, k, v))  # or (B, L, H * width)
    out = call.replace(q=q, k=k, v=v, kwargs=kwargs).run()
    if kwargs.get("skip_output_reshape"):
        return out[..., :d]  # (B, H, L, d)
    return out.unflatten(-1, (call.heads, width))[..., :d].flatten(2)  # (B, L, H * d)


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
