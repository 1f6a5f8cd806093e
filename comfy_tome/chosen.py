"""Which attention a call of the model runs without ToMe: what users chose is kept.

ComfyUI takes the first of these: an override, the function that a layer's weights prefer (ComfyAttention), the one that
it was started with. An override is another node's, or stands for a backend: ComfyUI's node Model Attention Backend puts
one there that drops the function which it is given. ToMe's override is one too. It would make ComfyUI forget what
layers prefer, so that is found here. (Read in ComfyUI 0.38: comfy/ldm/modules/attention.py, model_patcher.py,
comfy_extras/nodes_sparse_attention.py. Older ones have overrides alone.)
"""

from __future__ import annotations

import types
import weakref
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn

from ..shared_tome import ToMeConfig
from ..shared_tome.attention.self_token import NOT_KEPT
from ..shared_tome.attention.sequence import NOT_MULTIRES, JointCall
from ..shared_tome.hooks.running import follow_modules
from .dit_attention import COMFYUI, is_sparse
from .log import say_once

OVERRIDE = "optimized_attention_override"
INSIDE = "_inside_attn_wrapper"  # by which ComfyUI's attentions know that the override was asked
_BACKEND = "comfy.model_patcher", "ModelPatcher.set_model_optimized_attention."
_LOST = (
    "under torch.compile ToMe cannot use the attention that the weights of some layers prefer, because ComfyUI does "
    "not pass it to an override"
)


class Chosen:
    """The attentions of one call of the model.

    Args:
        options: the call's transformer_options. model: the diffusion model, to see what its layers prefer.
        compiled: whether torch.compile runs it, which asks no hooks.

    Attributes:
        override: another node's; None where there is none, or where it stands for a backend.
        sparse: whether that is a sparse attention (dit_attention.is_sparse).
        host: what runs where no override does and no layer has a preference of its own.
        changes: whether another function than the one that ComfyUI gives may run (`func`).
        options: transformer_options with which a block alone runs the same attention.
    """

    def __init__(self, options: dict[str, Any], model: Any = None, compiled: bool = False):
        given = options.get(OVERRIDE)
        self._backend = backend_of(given)
        self.override = given if self._backend is None else None
        self.sparse = self.override is not None and any(map(is_sparse, (given, *_functions_of(given))))
        self.options = {} if self._backend is None else {OVERRIDE: given}
        self._preferred = {} if given is not None else preferred_by(model)
        functions = set(self._preferred.values())
        self._everywhere = next(iter(functions)) if len(functions) == 1 else None
        self._by_layer = len(functions) > 1 and not compiled
        self._running: list[Callable[..., Tensor] | None] = []
        if len(functions) > 1 and compiled:
            say_once(_LOST)
        self.host = self._backend or self._everywhere or _started_with()
        self.changes = self.override is None and bool(self._backend or self._preferred)

    def func(self, func: Callable[..., Tensor]) -> Callable[..., Tensor]:
        """What runs where ComfyUI gives func to an override."""
        if self.override is not None:
            return func
        preferred = self._running[-1] if self._running else self._everywhere
        return self._backend or preferred or func

    def kernels(self, device: torch.device, declined: bool = False) -> tuple[str, ...]:
        """The kernels of torch that the attention would try, in its order; none where it is not ComfyUI's PyTorch
        attention (--use-sage-attention and the like), or not torch's own.

        declined: of the calls that a sparse override declines, where there is one.
        """
        if self.override is None:
            return COMFYUI.order(device) if COMFYUI.is_torchs(self.host) else ()
        if not declined or not self.sparse:
            return ()
        return COMFYUI.order(device) if COMFYUI.is_torchs(backend_behind(self.override) or self.host) else ()

    def followed(self) -> AbstractContextManager[None]:
        """Around the model's call: func knows which layer runs, where layers prefer different functions."""
        return follow_modules(self._preferred if self._by_layer else {}, self._running)


def _started_with() -> Callable[..., Tensor]:
    from comfy.ldm.modules import attention

    return attention.optimized_attention


def backend_of(override: Any) -> Callable[..., Tensor] | None:
    """The attention function that an override of ComfyUI's own stands for, without ComfyUI's wrapper, or None. A sparse
    function is not taken for one: it wants all tokens."""
    held = _functions_of(override)
    return held[0] if len(held) == 1 and not is_sparse(held[0]) else None


def _functions_of(override: Any) -> list[Callable[..., Tensor]]:
    """What an override that ComfyUI's ModelPatcher has made calls, without ComfyUI's wrapper; nothing of others'."""
    module, name = (str(getattr(override, part, "")) for part in ("__module__", "__qualname__"))
    if module != _BACKEND[0] or not name.startswith(_BACKEND[1]):
        return []
    return [getattr(one, "__wrapped__", one) for one in _held_by(override) if callable(one)]


def backend_behind(override: Any) -> Callable[..., Tensor] | None:
    """The same of the override that another node's falls back on, which its closure holds."""
    return next(filter(None, map(backend_of, _held_by(override))), None)


def _held_by(function: Any) -> list[Any]:
    """The values in a function's closure."""
    empty = types.CellType()
    return [cell.cell_contents for cell in getattr(function, "__closure__", None) or () if cell != empty]


# Walking through a model takes longer than a step may. A fact about a model, not state of a call.
_known: weakref.WeakKeyDictionary[Any, list[tuple[weakref.ref, weakref.ref]]] = weakref.WeakKeyDictionary()


def preferred_by(model: Any) -> dict[nn.Module, Callable[..., Tensor] | None]:
    """What the attention modules of a model prefer by their weights, without ComfyUI's wrapper; empty: none does."""
    from comfy.ldm.modules import attention

    kind, model = getattr(attention, "ComfyAttention", None), getattr(model, "_orig_mod", model)
    if kind is None or not isinstance(model, nn.Module):
        return {}
    if model not in _known:
        pairs = ((module, part) for module in model.modules() for part in module.children() if isinstance(part, kind))
        _known[model] = [(weakref.ref(module), weakref.ref(part)) for module, part in pairs]
    found = {module(): getattr(part(), "function", None) for module, part in _known[model]}
    found = {module: getattr(func, "__wrapped__", func) for module, func in found.items() if module is not None}
    return found if any(found.values()) else {}


def self_tokens(config: ToMeConfig, kernels: tuple[str, ...]) -> JointCall | None:
    """What lets queries keep their own tokens; None where they shall not, or another's attention would run."""
    if not config.wants_heads:
        return None
    if not kernels:
        say_once(why_sampled(config))
        return None
    return JointCall.of(config, kernels, say_once)


def why_sampled(config: ToMeConfig) -> str:
    """What is said where an attention does not get the heads of all tokens: what the method does without."""
    return NOT_KEPT if config.method == "sample" else NOT_MULTIRES
