"""ToMe in ComfyUI's diffusion transformers (the table in dit_models.py), images, video and sound.

As for U-Nets (unet.py): one wrapper around `apply_model` puts what a call needs into a copy of that call's own
transformer_options, and nothing outlives the call. Here it is one `optimized_attention_override`. It sees q, k and v
of every attention after their position embedding; where their number is that of the call's own tokens, the image's
keys and values (and the queries, for methods that merge them) go through the core and all other tokens stay: text,
references, padding. An override that another node has set is called in turn. (One model's attentions do not tell their
options and so are met one step later, where they call torch: DiTModel.silent.)

In one softmax with text, each image token that stands for n counts n times: log(n) is added to its logits
(shared_tome/joint.py, dit_attention.py).
"""

from __future__ import annotations

import math
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from ..shared_tome import ModelCall, ToMeConfig, kernels
from ..shared_tome.attention import extend_heads, extra_channels
from ..shared_tome.auto import Verdict, known_or_measured, measures, name_of
from ..shared_tome.autotune.timing import compared
from ..shared_tome.curve import is_compiling
from ..shared_tome.grid import Grid
from ..shared_tome.joint import JointCall, image_bias, merge_image, unmerge_image
from ..shared_tome.own import NOT_KEPT
from ..shared_tome.plan import Plan
from ..shared_tome.report import CallTally, why_not_served
from ..shared_tome.schedule import config_at
from ..shared_tome.sdpa import Handler, HostAttention, SdpaHooks, leave_left_modes
from .dit_attention import Call, any_size, attend_joint, kernel_order, may_join, take_mask
from .dit_models import DiTModel, Told, cross_lengths, dit_model, unwrapped
from .log import leave_alone, say_once
from .model_call import DIFFUSION_MODEL, KEY, call_key, draw_of, find_options, halves_alike, progress_of, put_options
from .record import COMPILE_KEY, CallRecord, begin

# Head sizes that every attention kernel in use takes (SageAttention: these alone).
_SAFE_SIZES = (64, 96, 128)
# Text and reference tokens of two calls that differ by less count as equally many where a layer is judged.
_OTHERS = 256


@dataclass(frozen=True)
class Layout:
    """How a call's tokens lie: `head` tokens, the image's, `tail` tokens (None: as many as are left over).

    alone: some layers have the image's only. crosses: lengths that a cross-attention may have. together: attention
    calls of one layer that want the same tokens.
    """

    grid: Grid
    head: int | None
    tail: int | None
    alone: bool = False
    crosses: tuple[int, ...] = ()
    together: int = 1

    @property
    def tokens(self) -> int:
        """How many of them are the image's, N."""
        return math.prod(self.grid)

    @classmethod
    def of(cls, facts: DiTModel, model: Any, shape: tuple[int, ...], told: Told) -> Layout | None:
        """The layout of a call, or None where its image tokens do not lie on a grid."""
        grid = facts.grid(model, tuple(shape), told)
        if grid is None:
            return None
        return cls(
            grid,
            None if facts.head is None else facts.head(model, told),
            None if facts.tail is None else facts.tail(model, told, grid),
            facts.alone,
            cross_lengths(told) if facts.crosses else (),
            facts.calls(model),
        )

    def start(self, length: int, img_slice: list[int] | None = None) -> int | None:
        """Where the image begins among `length` tokens; None where these are not this call's tokens.

        img_slice: [end of the text, end], where the model tells it.
        """
        head, tail = self.head, self.tail
        if head is None:
            start = length - self.tokens - tail
            return start if start >= 0 else None
        if tail is None:
            return head if length >= head + self.tokens else None
        if length == head + self.tokens + tail:
            return head
        if self.alone and length == self.tokens:
            return 0
        # Another node has added tokens: to the text, or behind the image. Only the model itself can tell which.
        if img_slice is not None and img_slice[1] == length >= img_slice[0] + self.tokens + tail:
            return img_slice[0]
        return None


class DiTPatch:
    """The wrapper around `apply_model`. Holds the config alone; safe to share between clones and threads."""

    def __init__(self, config: ToMeConfig):
        self.config = config.replace(levels="0")  # a transformer has one resolution
        self.judges = config.levels == "auto"

    def __call__(self, executor: Any, x: Tensor, t: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        args, options = find_options(args, kwargs)
        config = config_at(self.config, lambda: progress_of(options, executor.class_obj))
        record = begin(executor, x, t, args, kwargs, self.config, config)
        told = {**kwargs, **_prompt(args)}
        patch = self._patch(config, executor.class_obj, x, options, told, record)
        if patch is None:
            return executor(x, t, *args, **kwargs)
        if patch.facts.compiles:
            kwargs["tome"] = patch.key
        args, kwargs = put_options(args, kwargs, patch.options)
        with patch.hooks(unwrapped(executor.class_obj.diffusion_model)):
            out = executor(x, t, *args, **kwargs)
        if record is not None:
            record.end()
        return out

    def _patch(
        self, config: ToMeConfig, base: Any, x: Tensor, options: dict[str, Any], told: Told, record: CallRecord | None
    ) -> DiTCall | None:
        """What this call gets, or None where it is left alone. base: the model that apply_model is of."""
        model = unwrapped(base.diffusion_model)
        facts = dit_model(model)
        if config.ratio == 0.0 or facts is None:
            return None
        layout = Layout.of(facts, model, x.shape, told)
        if layout is None:
            leave_alone(record, "an image whose tokens do not lie on one grid is left alone", facts.name)
            return None
        if record is not None:
            record.lies_on(layout.grid)
        if not facts.compiles and COMPILE_KEY in options.get("wrappers", {}).get("apply_model", {}):
            reason = "under torch.compile this model is left alone: it would not notice ToMe"
            leave_alone(record, reason, facts.name, grid=layout.grid)
            return None
        step, alike = draw_of(options, x.device, base), halves_alike(options)
        call = ModelCall(config, layout.grid, x.device, step=step, alike=alike)
        if not call.serves(layout.grid):
            if record is not None:
                record.left_alone(why_not_served(config, layout.grid, layout.grid), facts.name, layout.grid)
            return None
        record = None if record is None or record.run.compiled else record
        return DiTCall(call, facts, layout, options, record, self.judges)


class DiTCall:
    """The override of one call of the model, and the options that carry it."""

    def __init__(
        self,
        call: ModelCall,
        facts: DiTModel,
        layout: Layout,
        options: dict[str, Any],
        record: CallTally | None = None,
        judges: bool = False,
    ):
        self.call, self.facts, self.layout = call, facts, layout
        # levels "auto": by what was measured of a layer (auto.py); None: whatever it costs.
        self._unpaid: dict[tuple, str | None] | None = {} if judges else None
        self._record = record
        self._override = options.get("optimized_attention_override")
        order = kernel_order(call.seed.device) if self._override is None else ()
        self._joint = JointCall(self._weighs, order, say_once, call.config.keeps_own)
        # What is done must stand in a guard of its own, as in unet.py: all that a compiled graph takes for granted.
        # The seed is a tensor and so one of its inputs.
        self.key = repr((call_key(call), layout, order))
        self._served = 0
        self._plan: Plan | None = None
        wrappers = dict(options.get("wrappers", {}))
        wrappers[DIFFUSION_MODEL] = {**wrappers.get(DIFFUSION_MODEL, {}), KEY: [self._check_key]}
        self.options = {**options, "optimized_attention_override": self.attention, "wrappers": wrappers}

    def _check_key(self, executor: Any, *args: Any, tome: str = "", **kwargs: Any) -> Tensor:
        if self.facts.compiles and tome != self.key:  # reading it is what makes torch.compile guard on it
            raise RuntimeError("another node changed ToMe's argument 'tome' on its way to the model")
        return executor(*args, **kwargs)

    def attention(self, func: Any, q: Tensor, k: Tensor, v: Tensor, heads: int, *args: Any, **kwargs: Any) -> Tensor:
        """optimized_attention_override: q, k, v [B, L, H * d], or [B, H, L, d] with skip_reshape."""
        call = Call.of(func, q, k, heads, args, kwargs)
        start = self._start(q, v, call)
        if start is not None and self._does_not_pay(call, q, k, v, start):
            start = None
        plan = self._plan_at(start, call.plain(k), call)
        if plan is None:
            return self._run(func, q, k, v, heads, *args, **kwargs)
        serve = self._merged if self.call.config.kind.matches else self._sampled
        return serve(call, *(call.plain(x) for x in (q, k, v)), start, plan)

    @contextmanager
    def hooks(self, model: Any) -> Iterator[None]:
        """For attentions that do not tell their options (DiTModel.silent): hooks, gone when the call ends in whatever
        way."""
        if self.facts.silent is None:
            yield
            return
        handles: list[Any] = []
        here = threading.get_ident()  # another thread's call of the same modules has hooks of its own

        def begin(*_: Any) -> Handler | None:
            return self._met if threading.get_ident() == here else None

        try:
            for module in self.facts.silent(model):
                handles += SdpaHooks(module, begin, self._missed).handles
            yield
        finally:
            for handle in handles:
                handle.remove()
            leave_left_modes()  # ComfyUI's interrupt is no Exception: no hook runs after it

    def _met(self, attention: HostAttention, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """q [B, H, L, d], k and v [B, H or fewer, L, d] -> [B, H, L, d], where such an attention calls torch."""
        from comfy.ldm.modules.attention import attention_pytorch

        told = {"skip_reshape": True, "skip_output_reshape": True, "mask": attention.mask}
        if self.call.config.kind.matches:
            k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
        elif attention.options.get("enable_gqa"):
            told["enable_gqa"] = True
        return self.attention(attention_pytorch, q, k, v, q.shape[1], **told)

    def _missed(self) -> None:
        self._leave("an attention that is not PyTorch's is left alone: this model tells no node of it")

    def _does_not_pay(self, call: Call, q: Tensor, k: Tensor, v: Tensor, start: int) -> bool:
        """Whether this layer was measured not to be faster merged, and is left alone.

        Measured on its first row's own tokens: what is decided must not depend on how many rows a call has, nor on a
        few words more in the prompt.
        """
        config = self.call.config
        if self._unpaid is None or config.kind.matches or call.mask is not None or is_compiling():
            return False
        others = -(-(call.length - self.layout.tokens) // _OTHERS)
        shape = (self.layout.grid, others, call.heads, k.shape[1 if call.split else 2], call.d, q.dtype, call.split)
        if shape not in self._unpaid:
            self._unpaid[shape] = None
            if measures(config.replace(levels="auto"), self.layout.grid, q.device):
                self._unpaid[shape] = self._judge(call, q[:1], k[:1], v[:1], start, shape)
        reason = self._unpaid[shape]
        if reason is not None:
            self._leave(reason)
        return reason is not None

    def _judge(self, call: Call, q: Tensor, k: Tensor, v: Tensor, start: int, shape: tuple) -> str | None:
        """Why a layer of this shape is left alone, or None. q, k, v: of one row."""
        config, device = self.call.config, q.device
        names = [self.facts.name, name_of(any_size(call.func), device), *self._joint.kernels, *map(str, shape)]
        names += [config.method, f"{config.ratio:.4f}"]
        names += [f"proportional {config.proportional}", f"own {config.keeps_own}"]
        names += [f"by {name_of(self._override, device)}"] if self._override is not None else []

        def measure() -> Verdict:
            plain, grid = [call.plain(x) for x in (q, k, v)], self.layout.grid
            plan = ModelCall(config, grid, device).plan(plain[0].new_empty(1, self.layout.tokens, 1), grid)
            if plan is None:
                return Verdict(0.0, 0.0, 0.0)
            kwargs = {"heads": call.heads, **call.kwargs}
            return compared(
                lambda: self._run(call.func, q, k, v, **kwargs),
                lambda: self._sampled(call, *plain, start, plan),
                device,
            )

        found = known_or_measured(", ".join(names), device, measure)
        return None if found is None or found.pays() else found.reason

    def _run(self, func: Any, *args: Any, **kwargs: Any) -> Tensor:
        """The attention as it would be without ToMe: another node's override goes first."""
        return func(*args, **kwargs) if self._override is None else self._override(func, *args, **kwargs)

    def _start(self, q: Tensor, v: Tensor, call: Call) -> int | None:
        """Where the image's tokens begin; None for an attention that is none of ours."""
        options, length = call.kwargs.get("transformer_options") or {}, call.length
        if self.facts.numbered and "block_index" not in options:
            return None  # a refiner, before the blocks
        place = 2 if call.split else 1
        if q.shape[place] != length or v.shape[place] != length:
            return None  # to another's tokens
        start = self.layout.start(length, options.get("img_slice"))
        if start is None and length > self.layout.tokens:
            self._leave(
                "an attention whose tokens are not its text, its image and its references is left alone: another "
                "node has added some",
                f"{length} tokens for {self.layout}",
            )
        if start is not None and length in self.layout.crosses:
            self._leave("an image of as many tokens as its prompt is left alone: self- and cross-attention look alike")
            return None
        return start

    def _plan_at(self, start: int | None, k: Tensor, call: Call) -> Plan | None:
        """The plan of this layer; None where it is left alone."""
        if start is None:
            return None
        if call.mask is not None and (call.mask.dim() < 2 or call.mask.shape[-1] != call.length):
            self._leave("an attention whose mask is not one over its keys is left alone")
            return None
        matches = self.call.config.kind.matches
        if matches and self._weighs and not self._takes_wider_heads(call.d):
            return None
        first = self._served % self.layout.together == 0
        if first:
            image = (k if matches or not call.split else k[:, 0]).narrow(-2, start, self.layout.tokens)
            # The ViT paper's metric: keys averaged over the heads. What matches nothing wants its shape alone.
            metric = (
                image if not matches else image.mean(1) if call.split else image.unflatten(-1, (-1, call.d)).mean(2)
            )
            self._plan = self.call.plan(metric, self.layout.grid)  # metric [B, N, .]
        self._served += 1
        plan = self._plan
        if plan is not None and not matches and self._joint.around(plan, start, call.length).bias is not None:
            if not self._takes_wider_heads(call.d):
                plan = None
        if first and self._record is not None and plan is self._plan:
            self._record.layer(self._name(call), self.layout.grid, plan)
        elif first and self._record is not None:
            self._record.count(self.layout.grid)
        return plan

    def _name(self, call: Call) -> str:
        """The block as the log names it."""
        options = call.kwargs.get("transformer_options") or {}
        if "block_index" not in options:
            return self.facts.name
        return f"{options.get('block_type', '')} block {options['block_index']}".lstrip()

    def _leave(self, reason: str, detail: str = "") -> None:
        leave_alone(self._record, reason, self.facts.name, detail, self.layout.grid)

    @property
    def _weighs(self) -> bool:
        """Whether a key that stands for several counts for as many."""
        return self.call.config.weighs_keys

    def _takes_wider_heads(self, d: int) -> bool:
        """Whether the attention that is to be called takes heads of d channels with weights on them."""
        width = d + extra_channels(d)
        if self._override is None or width <= _SAFE_SIZES[-1]:
            return True
        self._leave(
            f"an attention whose keys need weights (text beside the image, or an uneven ratio) is left whole: heads of "
            f"{width} channels may be more than another node's attention takes"
        )
        return False

    def _sampled(self, call: Call, q: Tensor, k: Tensor, v: Tensor, start: int, plan: Plan) -> Tensor:
        """Keys and values from some of the image's tokens, the same for all rows, and all others: no unmerge."""
        around = self._joint.around(plan, start, call.length)
        if self._joint.kernels and around.sizes is not None and may_join(call):
            out = attend_joint(self._joint, call, q, k, v, start, plan)
            if out is not None:
                return out
        elif self._joint.own:
            masked = "under a mask queries do not keep their own tokens"
            say_once(NOT_KEPT if call.mask is None else masked)
        index = around.index(plan, start)
        k, v = call.take(k, index), call.take(v, index)
        if call.mask is not None:
            call = call.replace(mask=call.mask.index_select(-1, index))
        return self._weighted(call, q, k, v, around.bias)

    def _merged(self, call: Call, q: Tensor, k: Tensor, v: Tensor, start: int, plan: Plan) -> Tensor:
        """Methods that match: the image's part of queries, keys and values merged; the queries' outcome unmerged."""
        kind, flat = self.call.config.kind, call.flattened()
        if call.mask is not None:
            flat = flat.replace(mask=take_mask(call.mask, call.length, start, plan, kind.queries, kind.keys))
        q, k, v = (call.flat(x) for x in (q, k, v))  # (B, L, H * d)
        q = merge_image(q, start, plan) if kind.queries else q
        k, v = (merge_image(x, start, plan) for x in (k, v)) if kind.keys else (k, v)
        out = self._weighted(flat, q, k, v, image_bias(plan, start, call.length) if self._weighs else None)
        out = unmerge_image(out, start, plan) if kind.queries else out
        return out.unflatten(-1, (call.heads, -1)).transpose(1, 2) if call.kwargs.get("skip_output_reshape") else out

    def _weighted(self, call: Call, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> Tensor:
        """The attention with bias [b, K] added to its logits, without a mask, which would be slow (attention.py)."""
        func, heads, kwargs, d = call.func, call.heads, dict(call.kwargs), call.d
        if bias is None:
            return self._run(func, q, k, v, heads, **kwargs)
        scale = kwargs.pop("scale", None) or d**-0.5
        if self._joint.kernels and may_join(call):
            made = kernels.attend(*(call.by_head(x) for x in (q, k, v)), bias, scale)  # (B, H, L, d)
            if made is not None:
                return made if kwargs.get("skip_output_reshape") else made.transpose(1, 2).flatten(2)
        if not call.split:
            q, k, v = (x.unflatten(-1, (-1, d)) for x in (q, k, v))  # (B, L, H, d)
        bias = bias[:, None] if call.split else bias[:, :, None]
        q, k, v = extend_heads(q, k, v, bias * (d**-0.5 / scale))
        if self._override is None:
            func, kwargs["scale"] = any_size(func), scale
        else:
            # Another node's attention may know a few sizes only and may not mind `scale`: what it would take by
            # itself must be right.
            width = next(size for size in _SAFE_SIZES if size >= q.shape[-1])
            q, k, v = (F.pad(x, (0, width - x.shape[-1])) for x in (q, k, v))
            q = q * (scale * width**0.5)
        width = q.shape[-1]
        if not call.split:
            q, k, v = (x.flatten(2) for x in (q, k, v))  # (B, L, H * width)
        out = self._run(func, q, k, v, heads, **kwargs)
        if kwargs.get("skip_output_reshape"):
            return out[..., :d]  # (B, H, L, d)
        return out.unflatten(-1, (heads, width))[..., :d].flatten(2)  # (B, L, H * d)


def _prompt(args: tuple) -> Told:
    """apply_model's c_crossattn, where it comes by place."""
    return {"c_crossattn": args[1]} if len(args) > 1 else {}
