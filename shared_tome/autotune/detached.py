"""A model, or a transformer block of it, by itself, to be timed (layer.py, step.py), and what its times depend on."""

from __future__ import annotations

import copy
import inspect
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ..core.failures import is_out_of_memory
from ..hooks.guard import is_replaced

# Of nn.Module.
_HOOKS = (
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
)
_PROMPT = 77  # tokens


# rejoin(module, copy): whether all that stands in the place of a module's forward was put on its copy, too.
Rejoin = Callable[[nn.Module, nn.Module], bool]


def run_detached(block: nn.Module, x: Tensor, rejoin: Rejoin | None = None) -> Callable[[], Any] | None:
    """What runs a copy of a block on tokens x [B, N, C] and a prompt of zeros: without hooks, and with weights of its
    own, since some hosts write a LoRA into them on the way.

    block: diffusers' or ldm's BasicTransformerBlock. None where it attends to no prompt, where something else stands in
    the place of a module's forward (offloading, another patch), and where it does not run by itself.
    """
    try:
        width = block.attn2.to_k.in_features
        made = _detached(block, _cloned, rejoin)
        names = inspect.signature(type(block).forward).parameters
        name = "encoder_hidden_states" if "encoder_hidden_states" in names else "context"
        context = {name: x.new_zeros(x.shape[0], _PROMPT, width)}

        def run() -> Any:
            return made(x, **context)

        with torch.no_grad():
            out = run()
    except Exception as error:  # whatever a foreign block wants besides
        if is_out_of_memory(error):
            raise
        return None
    return run if isinstance(out, Tensor) and out.shape == x.shape else None


def detached_model(model: nn.Module, rejoin: Rejoin | None = None, without: tuple[str, ...] = ()) -> nn.Module | None:
    """A copy of a whole model without hooks, which shares its parameters and buffers; for hosts that write into none.

    without: attributes of the modules that the copies do not get, such as those by which a host would write into them.
    None where something else stands in the place of a module's forward, or where one that is not diffusers' own does an
    attention's work: it may keep what it sees.
    """
    for module in model.modules():
        processor = getattr(module, "processor", None)
        if processor is not None and type(processor).__module__.partition(".")[0] != "diffusers":
            return None
        if getattr(module, "_compiled_call_impl", None) is not None:
            return None
    try:
        return _detached(model, lambda x: x, rejoin, without)
    except ValueError:
        return None


def about_model(
    model: nn.Module, device: torch.device, is_idle: Callable[[nn.Module], bool] = lambda module: False
) -> str:
    """In words, what a model's times on a device depend on beside its shapes: the codes of its attentions, how its
    weights are stored, and whether all of them lie there. is_idle: whether what stands in the place of a module's
    forward does nothing else."""
    codes, stored, elsewhere = set(), set(), False
    for module in model.modules():
        if hasattr(module, "to_q"):
            processor = getattr(module, "processor", None)
            backend = getattr(processor, "_attention_backend", None)
            codes.add(_code(type(module).forward if processor is None else type(processor)))
            codes.update(() if backend is None else (str(backend),))
        # Offloading and quantization stand in the place of a forward, or bring classes of their own.
        if is_replaced(module) and not is_idle(module):
            stored.add("replaced forwards")
        weight = module._parameters.get("weight")
        if weight is not None:
            stored.add(str(weight.dtype).removeprefix("torch."))
            if not type(module).__module__.startswith("torch.nn.") and weight.dim() == 2:
                stored.add(_code(type(module)))
            elsewhere = elsewhere or weight.device != device
    words = [*sorted(codes), f"weights {' '.join(sorted(stored))}", *(["partly elsewhere"] if elsewhere else [])]
    return ", ".join(words)


def _code(made: Any) -> str:
    return f"{made.__module__}.{getattr(made, '__qualname__', type(made).__qualname__)}"


def _detached(
    module: nn.Module,
    taken: Callable[[Tensor], Tensor],
    rejoin: Rejoin | None = None,
    without: tuple[str, ...] = (),
) -> nn.Module:
    """A copy without hooks; taken: what it gets for a parameter or buffer; without: see detached_model. Raises
    ValueError for another's forward."""
    made = copy.copy(module)
    state = made.__dict__
    # The first: the class's own, put back by a host; it is bound to the module copied from.
    for name in ("forward", *without):
        state.pop(name, None)
    state["_modules"] = {
        name: child if child is None else _detached(child, taken, rejoin, without)
        for name, child in module._modules.items()
    }
    for kind in ("_parameters", "_buffers"):
        state[kind] = {name: x if x is None else taken(x) for name, x in module.__dict__[kind].items()}
    for hooks in _HOOKS:
        state[hooks] = OrderedDict()
    if is_replaced(module) and not (rejoin is not None and rejoin(module, made)):
        raise ValueError(f"{type(module).__name__} has a forward of its own")
    return made


def _cloned(x: Tensor) -> Tensor:
    clone = x.detach().clone()
    return nn.Parameter(clone, requires_grad=False) if isinstance(x, nn.Parameter) else clone
