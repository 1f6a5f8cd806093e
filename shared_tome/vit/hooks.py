"""The module hooks of vit.py.

How a block is merged in its middle without its forward being copied: it computes x + mlp(norm2(x)). A hook before
norm2 gives it the merged tokens; one behind the MLP branch adds the branch's output to them, keeps the sum and hands
zeros to the block, which adds these to the unmerged x; one behind the block puts the kept sum in place of that.
"""

from __future__ import annotations

import functools
import threading
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import kernels
from ..attention.bias import attend_tokens, minds_scale
from ..attention.sdpa import Handler, HostAttention, SdpaHooks, leave_left_modes
from ..config import ToMeConfig
from ..core.curve import is_compiling
from ..core.groups import group_counts, group_mean
from ..merging.call import backward_pass
from ..merging.match import match_tokens
from ..merging.plan import Plan
from .options import Options
from .padding import Padding
from .towers import Tower, find_tower, reads_between

_CHECKPOINTED = "ToMe does not work with gradient checkpointing, which runs blocks twice; turn it off"
NAME = "_shared_tome_vit"  # the attribute of a patched model that keeps its attachment


class VitCall:
    """One call of a tower: what its tokens stand for by now."""

    def __init__(self, owner: VitAttachment, per_block: tuple[int, ...], first: int):
        self.owner, self.per_block, self.prefix, self.first = owner, per_block, owner.prefix, first
        self.follows = owner.options.trace or owner.options.restore != "none" or owner.rotates
        self.sizes: Tensor | None = None  # [B, M]; None: all 1
        self.padding: Padding | None = None
        self.bias: Tensor | None = None  # [B, M], their logarithm
        self.sources: Tensor | None = None  # [B, N]
        self.metric: Tensor | None = None  # [B, M, d], this block's keys
        self.middle: Tensor | None = None  # [B, M, C], the merged tokens before the MLP
        self.out: Tensor | None = None  # [B, M, C], the block's output
        self.counts: list[int] = []
        self.steps: list[Tensor | None] = []  # sources behind each block, where they are traced

    def merge(self, x: Tensor, goes: int) -> Tensor | None:
        """x [B, N, C] -> [B, N - goes, C], by the block's keys; None where nothing is to go."""
        metric, self.metric = self.metric, None
        prefix = self.prefix
        goes = min(goes, (_count(x) - prefix) // 2)
        if goes <= 0 or metric is None:
            return None
        # Registers beyond the two tokens that matching can keep in place are put aside.
        aside = prefix - 1 if prefix > 2 else 0
        if self.padding is not None:
            metric = self.padding.set_apart(metric, self.sizes)
        plan = self.owner.match(metric[:, aside:], prefix - aside, goes)
        if plan.is_identity:
            return None
        groups = plan.groups
        if self.sizes is None:
            merged, sizes = plan.merge(x[:, aside:]), plan.sizes
        else:
            merged, sizes = plan.merge_again(x[:, aside:], self.sizes[:, aside:])
        if aside:  # they stay 1
            merged, sizes = torch.cat((x[:, :aside], merged), dim=1), F.pad(sizes, (aside, 0), value=1.0)
            groups = torch.cat((torch.arange(aside, device=x.device).expand(x.shape[0], -1), groups + aside), dim=1)
        self.sizes, self.bias = sizes, None
        if self.follows:
            self.sources = groups if self.sources is None else groups.gather(1, self.sources)
        return merged

    def key_bias(self) -> Tensor | None:
        """log(sizes) [B, M], or None where all are 1; what hides padding alone where keys are not weighed."""
        if self.bias is None and self.sizes is not None:
            weighed = self.sizes.log() if self.owner.options.proportional else torch.zeros_like(self.sizes)
            self.bias = weighed if self.padding is None else self.padding.hide(weighed, self.sizes)
        return self.bias if self.owner.options.proportional or self.padding is not None else None


@functools.lru_cache(maxsize=1024)
def _config(goes: int, count: int) -> ToMeConfig:
    return ToMeConfig(ratio=(goes + 0.5) / count, method="merge", partition="alternate", min_tokens=0)


class VitAttachment:
    """The hooks on one tower, and the calls under way: one a thread. Other ways to merge are subclasses.

    thread: merge this thread's calls alone (None: every thread's). handles: of all hooks, to which more may be added.
    """

    call_type = VitCall

    def __init__(self, tower: Tower, options: Options, thread: int | None = None):
        self.options, self.thread = options, thread
        self.depth, self.prefix, self.rotates = len(tower.blocks), tower.prefix, tower.rotates
        self.last: tuple[Tensor, Tensor, tuple[int, ...], tuple[Tensor, ...]] | None = None
        self._calls: dict[int, VitCall] = {}
        self._paused: set[int] = set()  # threads
        self.handles: list[Any] = []
        for place, block in enumerate(tower.blocks):
            self.handles += _VitBlock(self, place).hook(block, tower)

    def detach(self) -> None:
        """Take all hooks off."""
        for handle in self.handles:
            handle.remove()
        self.handles.clear()
        self._calls.clear()
        leave_left_modes()

    def pause(self, pauses: bool) -> None:
        """Whether this thread's calls that begin from now on are left alone."""
        (self._paused.add if pauses else self._paused.discard)(threading.get_ident())

    @property
    def call(self) -> VitCall | None:
        """This thread's call."""
        return self._calls.get(threading.get_ident())

    def metric(self, q: Tensor, k: Tensor) -> Tensor:
        """What similarity is measured on, [B, M, d], from a block's q and k [B, H, M, d]."""
        return k.detach().mean(dim=1)

    def match(self, metric: Tensor, prefix: int, goes: int) -> Plan:
        """Which tokens of metric [B, M, d] merge: `goes` fewer, the first `prefix` (at most 2) alone and in place."""
        count = _count(metric)
        config = _config(goes, count)
        return match_tokens(metric, (1, count), config, class_token=prefix > 0, distill_token=prefix == 2)

    def begin(self, x: Tensor) -> None:
        """The first block is about to run on x [B, N, C]."""
        if self.thread not in (None, threading.get_ident()):
            return
        self.drop()  # of one that was interrupted: KeyboardInterrupt runs no hook
        leave_left_modes()
        if threading.get_ident() in self._paused:
            return
        tokens = _count(x)
        per_block = self.options.per_block(self.depth, tokens - self.prefix)
        self._calls[threading.get_ident()] = self.call_type(self, per_block, tokens)

    def drop(self) -> None:
        """Forget this thread's call."""
        self._calls.pop(threading.get_ident(), None)

    def end(self, tokens: Tensor) -> None:
        """The last block is done with its tokens [B, M, C]."""
        call = self._calls.pop(threading.get_ident())
        if self.options.trace:
            batch, count, _ = tokens.shape
            sizes = torch.ones(batch, count, device=tokens.device) if call.sizes is None else call.sizes.round()
            every = torch.arange(call.first, device=tokens.device).expand(batch, -1)  # (B, N)
            steps = tuple(every if sources is None else sources for sources in call.steps)
            self.last = (steps[-1], sizes, tuple(call.counts), steps)


class _VitBlock:
    """The hooks of one block. Holds no state of a call and no module."""

    def __init__(self, owner: VitAttachment, place: int):
        self.owner, self.place = owner, place

    def hook(self, block: nn.Module, tower: Tower) -> list[Any]:
        """Register; returns the handles."""
        attention = getattr(block, tower.attention)
        handles = [
            block.register_forward_pre_hook(self._before_block, with_kwargs=True),
            getattr(block, tower.norm).register_forward_pre_hook(self._before_norm),
            getattr(block, tower.tail).register_forward_hook(self._after_tail),
            block.register_forward_hook(self._after_block, prepend=True, always_call=True),
        ]
        if tower.explicit:
            handles.append(attention.register_forward_pre_hook(self._give_attention, with_kwargs=True))
        else:
            handles += SdpaHooks(attention, self._before_attention).handles
        if tower.rotates:
            handles.append(attention.register_forward_pre_hook(self._turn, with_kwargs=True))
        return handles

    def _before_block(self, block: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple | None:
        if getattr(block, "gradient_checkpointing", False) and block.training:
            raise ValueError(_CHECKPOINTED)
        if self.place == 0:
            self.owner.begin(args[0] if args else kwargs[_name(kwargs)])
        call = self.owner.call
        # A block that runs again by itself would have other tokens than it had, and so a wrong gradient.
        if call is None and self.place > 0 and self.owner.thread is None and backward_pass() >= 0:
            raise RuntimeError(_CHECKPOINTED)
        if call is None or call.out is None:
            return None
        out, call.out = call.out, None  # the merged tokens, where the host got them restored
        if args:
            return (out, *args[1:]), kwargs
        return args, {**kwargs, _name(kwargs): out}

    def _wants_attention(self, call: VitCall | None) -> bool:
        if call is None or call.per_block[self.place] > 0:
            return call is not None
        return call.sizes is not None and (self.owner.options.proportional or call.padding is not None)

    def _before_attention(self, attention: nn.Module, args: tuple, kwargs: dict[str, Any]) -> Handler | None:
        return self._attend if self._wants_attention(self.owner.call) else None

    def _attend(self, attention: HostAttention, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """q, k, v [B, H, M, d] -> [B, H, M, d]."""
        call = self.owner.call
        if not attention.is_plain:
            if call.padding is None:
                call.padding = Padding(attention, k.shape[2] == call.first, self.owner.options.restore)
                call.sizes = call.padding.sizes.expand(k.shape[0], -1)
            attention = HostAttention(attention.func, attention.options, None)
        if call.per_block[self.place] > 0:
            call.metric = self.owner.metric(q, k)
        return attention(q, k, v, bias=call.key_bias())

    def _turn(self, attention: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple | None:
        """Give merged tokens the places of what they stand for, where keys turn by their place."""
        call = self.owner.call
        if call is None or call.sources is None:
            return None
        x = args[0] if args else kwargs[_name(kwargs)]
        prefix = self.owner.prefix
        rotations = _mean_rotations(kwargs["position_embeddings"], call.sources, prefix, x.shape[1] - prefix)
        return args, {**kwargs, "position_embeddings": rotations}

    def _give_attention(self, attention: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple | None:
        """ComfyUI: attention(x, mask, optimized_attention), the last called as f(q, k, v, heads, mask)."""
        call = self.owner.call
        if not self._wants_attention(call):
            return None
        names = ("x", "mask", "optimized_attention")
        given = {**dict(zip(names, args, strict=False)), **kwargs}
        if given.get("mask") is not None:
            raise ValueError("ToMe does not work with masked attention: merged tokens have no place in the mask")
        host, goes = given["optimized_attention"], call.per_block[self.place]

        def attend(q: Tensor, k: Tensor, v: Tensor, heads: int, *args: Any, **kwargs: Any) -> Tensor:
            """q, k, v [B, M, H * d] -> [B, M, H * d]. A newer ComfyUI hands tensors over in containers."""
            q, k, v = (x if isinstance(x, Tensor) else x.take() for x in (q, k, v))
            if goes > 0:
                call.metric = self.owner.metric(*(x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in (q, k)))
            bias = call.key_bias()
            if bias is None:
                return host(q, k, v, heads, *args, **kwargs)
            kwargs.pop("preferred_attention", None)  # by the layer's weights; it may not take heads with weights

            def inner(q: Tensor, k: Tensor, v: Tensor, scale: float | None = None) -> Tensor:
                return host(q, k, v, heads, *args, **kwargs, **({} if scale is None else {"scale": scale}))

            return attend_tokens(q, k, v, heads, bias, inner, scale=kwargs.pop("scale", None), minds=minds_scale(host))

        return (), {**given, "optimized_attention": attend}

    def _before_norm(self, norm: nn.Module, args: tuple) -> tuple | None:
        call = self.owner.call
        if call is None:
            return None
        call.middle = call.merge(args[0], call.per_block[self.place])
        call.counts.append((args[0] if call.middle is None else call.middle).shape[1])
        if self.owner.options.trace:
            call.steps.append(call.sources)
        return None if call.middle is None else (call.middle, *args[1:])

    def _after_tail(self, tail: nn.Module, args: tuple, out: Tensor) -> Tensor | None:
        call = self.owner.call
        if call is None or call.middle is None:
            return None
        call.out, call.middle = call.middle + out, None
        return out.new_zeros(1, 1, 1)

    def _after_block(self, block: nn.Module, args: tuple, out: Any) -> Any:
        call = self.owner.call
        if call is None:
            return None
        if out is None:  # the block ended in an exception
            self.owner.drop()
            return None
        tokens, call.out = call.out, None
        if tokens is None:
            tokens = out[0] if isinstance(out, tuple) else out
        is_last, restore = self.place == self.owner.depth - 1, self.owner.options.restore
        if is_last:
            self.owner.end(tokens)
        shown = tokens
        if call.sources is not None and (restore == "all" or (restore == "last" and is_last)):
            shown = kernels.take(tokens, call.sources)  # (B, N, C)
            if not is_last:
                call.out = tokens
        return (shown, *out[1:]) if isinstance(out, tuple) else shown


def attach(
    model: nn.Module, options: Options, kind: type[VitAttachment] = VitAttachment
) -> tuple[Tower, VitAttachment]:
    """Hook a model, in place of what was on it. kind: a subclass that measures or matches in its own way."""
    tower = find_tower(model)
    options.check(len(tower.blocks))
    if options.restore != "all" and reads_between(model):
        raise ValueError(
            f"{type(model).__name__} reads the tokens between the blocks, where merged ones are fewer; choose "
            f"restore='all', got {options.restore!r}"
        )
    detach(model)
    attachment = kind(tower, options)
    setattr(model, NAME, attachment)
    return tower, attachment


def detach(model: nn.Module) -> None:
    """Take the hooks off, if there are any."""
    attachment = getattr(model, NAME, None)
    if attachment is not None:
        attachment.detach()
        delattr(model, NAME)


def _name(kwargs: dict[str, Any]) -> str:
    """What a block calls its tokens."""
    return "hidden_states" if "hidden_states" in kwargs else "x"


def _mean_rotations(
    rotations: tuple[Tensor, Tensor], sources: Tensor, prefix: int, count: int
) -> tuple[Tensor, Tensor]:
    """The mean turn of the patches that each merged token stands for, where keys turn by their place (RoPE).

    A turned key is linear in the cosine and the sine of its angles. So a merged token of equal patches gets the mean of
    their turned keys, which is what merging makes of tokens everywhere else.

    Args:
        rotations: cosines and sines [N, d] of the patches. sources: [B, prefix + N], which merged token each went into;
            the first `prefix` tokens stay in place and do not turn. count: M, how many merged patches there are.
    Returns:
        both [B, 1, M, d].
    """
    index = sources[:, prefix:] - prefix  # (B, N)
    sizes = group_counts(index, count)
    return tuple(group_mean(x.expand(len(index), -1, -1), index, sizes)[:, None] for x in rotations)


def _count(x: Tensor) -> int:
    """How many tokens x [B, N, C] has. Under torch.jit.trace sizes are tensors, which nothing is found by."""
    return int(x.shape[1]) if not is_compiling() and torch.jit.is_tracing() else x.shape[1]
