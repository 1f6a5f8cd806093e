"""What a newer ComfyUI (0.38) does with attentions, played on the one that is here.

Written from what its attention.py, model_patcher.py and nodes_sparse_attention.py were seen to do: models hand q, k and
v over in containers, which an attention empties; a layer's weights may prefer a function, which an override makes
ComfyUI forget; a node chooses a backend for a model by an override that drops the function which it is given; the node
for sparse attention puts its override on top again whenever a sampler prepares a step, and falls back on what it found.
"""

from __future__ import annotations

import functools
import types
from typing import Any

import torch

INSIDE, OVERRIDE = "_inside_attn_wrapper", "optimized_attention_override"


class Container:
    """Holds a tensor until an attention takes it."""

    def __init__(self, tensor: torch.Tensor):
        self.held = [tensor]

    def take(self) -> torch.Tensor:
        return self.held.pop()  # a second time is an IndexError


class ComfyAttention(torch.nn.Module):
    """The part of an attention module by which its weights prefer a function."""

    def __init__(self) -> None:
        super().__init__()
        self.function = None


def asked(func: Any) -> Any:
    """func as a newer ComfyUI has it in the place of `wrap_attn(func)`."""
    raw = getattr(func, "__wrapped__", func)

    @functools.wraps(raw)
    def run(q: Any, k: Any, v: Any, heads: int, *args: Any, preferred_attention: Any = None, **kwargs: Any) -> Any:
        options = kwargs.get("transformer_options") or {}
        outside = INSIDE not in kwargs
        kwargs[INSIDE] = True
        whole = [x.take() if isinstance(x, Container) else x for x in (q, k, v)]
        if outside and OVERRIDE in options:
            return options[OVERRIDE](raw, *whole, heads, *args, **kwargs)
        if outside and preferred_attention is not None and preferred_attention.function is not None:
            return preferred_attention.function(*whole, heads, *args, **kwargs)
        return raw(*whole, heads, *args, **kwargs)

    return run


class Newer:
    """A ComfyUI whose attentions are asked in the newer way, for the models of Flux's kind, Wan and the U-Nets."""

    def __init__(self, monkeypatch: Any):
        import comfy.clip_model
        import comfy.ldm.flux.math
        import comfy.ldm.wan.model
        from comfy.ldm.modules import attention

        self._owners, self.brought = [], 0
        self._encoders_forward = comfy.clip_model.CLIPAttention.forward
        for name in ("basic", "sub_quad", "split", "pytorch"):
            monkeypatch.setattr(attention, f"attention_{name}", asked(getattr(attention, f"attention_{name}")))
        monkeypatch.setattr(attention, "ComfyAttention", ComfyAttention, raising=False)
        chosen = asked(attention.optimized_attention)

        @functools.wraps(chosen.__wrapped__)
        def by_model(q: Any, k: Any, v: Any, *args: Any, **kwargs: Any) -> Any:
            """What a model calls: its tensors are in containers, and its own preference is named."""
            self.brought += 1
            preferred = self._owners[-1] if self._owners else None
            return chosen(*(Container(x) for x in (q, k, v)), *args, preferred_attention=preferred, **kwargs)

        for module in (attention, comfy.ldm.flux.math, comfy.ldm.wan.model):
            monkeypatch.setattr(module, "optimized_attention", by_model)

    def prefer(self, model: Any, function: Any, which: Any = lambda name: True) -> Any:
        """The patcher's model, whose attention modules prefer a function; which: of those names."""
        for name, module in list(model.model.diffusion_model.named_modules()):
            if type(module).__name__ in ("CrossAttention", "WanSelfAttention", "WanT2VCrossAttention"):
                module.comfy_attention = ComfyAttention()
                module.comfy_attention.function = asked(function) if which(name) else None
                module.register_forward_pre_hook(lambda owner, _: self._owners.append(owner.comfy_attention))
                module.register_forward_hook(lambda *_: self._owners.pop() and None)
        return model

    def encoder(self, monkeypatch: Any, function: Any = None) -> None:
        """CLIP vision encoders that bring containers, and prefer a function."""
        import comfy.clip_model

        preferred, plain = ComfyAttention(), self._encoders_forward
        preferred.function = None if function is None else asked(function)

        def forward(owner: Any, x: Any, mask: Any = None, optimized_attention: Any = None) -> Any:
            def brought(q: Any, k: Any, v: Any, *args: Any) -> Any:
                held = (Container(x) for x in (q, k, v))
                return optimized_attention(*held, *args, preferred_attention=preferred)

            return plain(owner, x, mask, brought)

        monkeypatch.setattr(comfy.clip_model.CLIPAttention, "forward", forward)

    def backend(self, model: Any, function: Any) -> Any:
        """As the node Model Attention Backend."""
        return with_override(model, backend(asked(function)))


def with_override(model: Any, override: Any) -> Any:
    model = model.clone()
    model.model_options["transformer_options"][OVERRIDE] = override
    return model


def backend(function: Any) -> Any:
    """The override that ComfyUI's own ModelPatcher makes of an attention function."""

    def optimized_attention_override(_: Any, *args: Any, **kwargs: Any) -> Any:
        return function(*args, **kwargs)

    optimized_attention_override.__module__ = "comfy.model_patcher"
    name = "ModelPatcher.set_model_optimized_attention.<locals>.optimized_attention_override"
    optimized_attention_override.__qualname__ = name
    return optimized_attention_override


def eight_bits(calls: list[tuple[int, int, int]]) -> Any:
    """An attention that rounds, as one of int8 does; calls: (queries, keys, channels of a head) of each call."""
    from comfy.ldm.modules import attention

    raw = attention.attention_pytorch.__wrapped__

    def attention_comfy_kitchen_int8(q, k, v, heads, *args, **kwargs):
        place = 2 if kwargs.get("skip_reshape") else 1
        calls.append((q.shape[place], k.shape[place], q.shape[-1] if place == 2 else q.shape[-1] // heads))
        assert calls[-1][2] <= 128
        q, k, v = ((x * 64).round() / 64 for x in (q, k, v))
        return raw(q, k, v, heads, *args, **kwargs)

    return attention_comfy_kitchen_int8


class Sparse:
    """As ComfyUI's node Model Sparse Attention: on top of whatever override there is, again at each step."""

    def __init__(self, declines: bool):
        self.declines, self.put, self.computed, self.declined = declines, [], [], 0

    def __call__(self, model: Any) -> Any:
        import comfy.patcher_extension

        model = model.clone()
        self.install(model.model_options["transformer_options"])
        kind = comfy.patcher_extension.WrappersMP.CALC_COND_BATCH

        def prepared(executor: Any, base: Any, conds: Any, x: Any, t: Any, model_options: dict[str, Any]) -> Any:
            """A newer ComfyUI tells a callback of the options that a step will have; here a wrapper sees them."""
            self.install(model_options["transformer_options"])
            return executor(base, conds, x, t, model_options)

        model.add_wrapper_with_key(kind, "sparse", prepared)
        return model

    def install(self, options: dict[str, Any]) -> None:
        previous = options.get(OVERRIDE)
        if previous not in self.put:
            self.put.append(self.override(previous))
            options[OVERRIDE] = self.put[-1]

    def override(self, previous: Any) -> Any:
        def override(func, q, k, v, heads, mask=None, attn_precision=None, skip_reshape=False, **kwargs):
            if mask is not None or q.shape != k.shape or self.declines:
                self.declined += 1
                kwargs.update(mask=mask, attn_precision=attn_precision, skip_reshape=skip_reshape)
                first = (func,) if previous is None else (previous, func)
                return first[0](*first[1:], q, k, v, heads, **kwargs)
            self.computed.append(tuple(q.shape))
            return v.transpose(1, 2).flatten(2) if skip_reshape else v  # each token attends to itself alone

        made = types.FunctionType(
            override.__code__, override.__globals__, "override", override.__defaults__, override.__closure__
        )
        made.__qualname__ = "make_attention_override.<locals>.override"
        made.__module__ = "/home/x/ComfyUI/comfy_extras/nodes_sparse_attention"
        return made
