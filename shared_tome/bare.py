"""A model's own transformer block, by itself, to be timed (auto.py)."""

from __future__ import annotations

import copy
import inspect
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

# Of nn.Module.
_HOOKS = (
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
)
_PROMPT = 77  # tokens


def run_bare(block: nn.Module, x: Tensor) -> Callable[[], Any] | None:
    """What runs a copy of a block on tokens x [B, N, C] and a prompt of zeros: without hooks, and with weights of its
    own, since some hosts write a LoRA into them on the way.

    block: diffusers' or ldm's BasicTransformerBlock. None where it attends to no prompt, where something else stands in
    the place of a module's forward (offloading, another patch), and where it does not run by itself.
    """
    try:
        width = block.attn2.to_k.in_features
        made = _bare(block)
        names = inspect.signature(type(block).forward).parameters
        name = "encoder_hidden_states" if "encoder_hidden_states" in names else "context"
        context = {name: x.new_zeros(x.shape[0], _PROMPT, width)}

        def run() -> Any:
            return made(x, **context)

        with torch.no_grad():
            out = run()
    except torch.cuda.OutOfMemoryError:
        raise
    except Exception:  # whatever a foreign block wants besides
        return None
    return run if isinstance(out, Tensor) and out.shape == x.shape else None


def _bare(module: nn.Module) -> nn.Module:
    """A copy without hooks, its parameters and buffers copied too. Raises ValueError for another's forward."""
    if "forward" in module.__dict__:
        raise ValueError(f"{type(module).__name__} has a forward of its own")
    made = copy.copy(module)
    state = made.__dict__
    state["_modules"] = {name: child if child is None else _bare(child) for name, child in module._modules.items()}
    for kind in ("_parameters", "_buffers"):
        state[kind] = {name: x if x is None else _cloned(x) for name, x in module.__dict__[kind].items()}
    for hooks in _HOOKS:
        state[hooks] = OrderedDict()
    return made


def _cloned(x: Tensor) -> Tensor:
    clone = x.detach().clone()
    return nn.Parameter(clone, requires_grad=False) if isinstance(x, nn.Parameter) else clone
