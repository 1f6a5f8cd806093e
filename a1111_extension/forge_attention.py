"""The attentions of Forge's transformers: where the modules of backend/nn call them, and PyTorch's among them."""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import ModuleType

import torch
from torch import Tensor, nn

from ..comfy_tome.dit_attention import Attentions

# A module, and the name in it by which an attention is called.
Places = list[tuple[ModuleType, str]]


class _Forge(Attentions):
    @property
    def module(self) -> ModuleType:
        from backend import attention

        return attention

    @property
    def operations(self) -> ModuleType:
        from backend import operations

        return operations


FORGE = _Forge()
# By what name a module of backend/nn calls its attention; SD3's has a function of its own.
_NAME = "attention_function"
_OWN = {"backend.nn.mmditx": "attention"}


def functions_of(model: nn.Module) -> Places:
    """Where a model's attention functions are called: modules, and the name in each."""
    names = {kind.__module__ for module in model.modules() for kind in type(module).__mro__}
    modules = ((sys.modules.get(name), _OWN.get(name, _NAME)) for name in sorted(names) if name.startswith("backend."))
    return [(module, name) for module, name in modules if callable(getattr(module, name, None))]


def functions_at(places: Places) -> list[Callable[..., Tensor]]:
    """What stands there, but for what answers another call."""
    found = [getattr(module, name) for module, name in places]
    return [getattr(func, "original", func) for func in found]


def handed(func: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """SD3's function is PyTorch's attention in the simplest form."""
    own = _OWN.get(getattr(func, "__module__", None))
    return FORGE.torchs if own is not None and getattr(func, "__name__", None) == own else func


def order_of(places: Places, device: torch.device) -> tuple[str, ...]:
    """The kernels of torch that the attentions try, in their order; none where one of them is not PyTorch's."""
    found = list(map(handed, functions_at(places)))
    return FORGE.order(device) if found and all(map(FORGE.is_torchs, found)) else ()
