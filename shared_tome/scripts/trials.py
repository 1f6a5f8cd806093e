"""What an attention of diffusers or ldm does with its heads and keys: found out by trying (hooks/trials.py)."""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..core.failures import is_out_of_memory
from ..hooks.engine import names_of
from ..hooks.guard import is_replaced as is_replaced_here
from ..hooks.heads import PROJECTIONS, stand_in
from ..hooks.trials import Kind, Trials, kind_of
from . import base


def is_replaced(module: nn.Module) -> bool:
    """guard.is_replaced, but for accelerate's forward, which moves weights and then runs the class's."""
    return is_replaced_here(module) and not hasattr(module, "_hf_hook")


@functools.lru_cache(maxsize=64)
def is_diffusers(processor: type) -> bool:
    """Whether a class is one of diffusers'."""
    return processor.__module__.partition(".")[0] == "diffusers"


def is_answered(module: nn.Module) -> bool:
    """Whether diffusers' own hooks on an attention may answer in its place: caches (PyramidAttentionBroadcast,
    TaylorSeer), guidance that skips layers."""
    return bool(getattr(getattr(module, "_diffusers_hook", None), "hooks", None))


class _Itself(weakref.ref):
    """Of an object without a hash (a dataclass): equal to those of this very object alone."""

    __slots__ = ("_hash",)

    def __init__(self, of: Any):
        super().__init__(of)
        self._hash = id(of)

    def __hash__(self) -> int:
        return self._hash

    def __eq__(self, other: object) -> bool:
        return self is other or (isinstance(other, _Itself) and self() is not None and self() is other())

    def __deepcopy__(self, memo: dict) -> _Itself:  # as that of weakref.ref
        return self


def code_of(attention: nn.Module) -> tuple | None:
    """What decides how a layer attends: its class's forward and whether another stands in its place, its processor with
    that one's settings, the mark of fused projections, and torch's function, which may have been replaced. None where a
    cache may answer: what it answers was given with another step's merged tokens."""
    if is_answered(attention):
        return None
    processor, state = getattr(attention, "processor", None), ()
    if processor is not None and is_diffusers(type(processor)):
        for key, x in getattr(processor, "__dict__", {}).items():
            if isinstance(x, (bool, int, float, str)):
                state += ((key, x),)
    elif hasattr(type(processor), "__weakref__"):  # the class's: torch.compile cannot guard the processor's own
        state = weakref.ref(processor) if type(processor).__hash__ else _Itself(processor)
    mark = getattr(attention, "fused_projections", False)
    own = "forward" in attention.__dict__ and is_replaced(attention)
    return type(attention).forward, own, type(processor), state, mark, F.scaled_dot_product_attention


class ScriptTrials(Trials):
    """On copies of the layers, since processors read what diffusers keeps there."""

    def __init__(self) -> None:
        super().__init__(lambda attn1: (*code_of(attn1), attn1.heads), _how)
        self._itself: dict[tuple, bool] = {}

    def __reduce__(self) -> tuple:
        return ScriptTrials, ()

    def rule(self, attn1: nn.Module, kind: Kind) -> str | None:
        # A forward of its own, or keys in fewer heads, are not what a trial runs.
        channels = attn1.heads * kind[0]
        alike = all(getattr(getattr(attn1, name), "out_features", channels) == channels for name in PROJECTIONS)
        return super().rule(attn1, kind) if alike and not is_replaced(attn1) else None

    def projects_itself(self, attn1: nn.Module, x: Tensor) -> bool:
        """Whether a layer that is given x [B, N, C] has a processor that may mind whether it is given what keys are
        made of, and makes them of just that; of x where it is given nothing."""
        processor = getattr(attn1, "processor", None)
        if processor is None or type(processor).__module__.startswith("diffusers.models."):
            return False
        key = *code_of(attn1), attn1.heads, *(kind := kind_of(attn1, attn1.heads, x))
        if key not in self._itself:
            self._itself[key] = _projects_itself(attn1, *kind)
        return self._itself[key]

    def meets(self, attn1: nn.Module, kind: Kind) -> bool:
        return not base.compiles() and super().meets(attn1, kind)


def _how(attn1: nn.Module) -> tuple[Callable[..., Tensor], dict[str, Any]]:
    forward = type(attn1).forward
    return forward, {"layer": stand_in(attn1), "heads": attn1.heads, "context": names_of(forward)[1], "widens_x": False}


def _projects_itself(attn1: nn.Module, d: int, device: torch.device, dtype: torch.dtype) -> bool:
    """See ScriptTrials. Runs the processor on a few tokens in place of the layer, without other keys and with some."""
    forward = type(attn1).forward
    x, keys = (torch.zeros(2, tokens, attn1.heads * d, device=device, dtype=dtype) for tokens in (6, 5))
    for context, wanted in (({}, x), ({names_of(forward)[1]: keys}, keys)):
        seen = []

        def project(tokens: Tensor, seen: list = seen) -> Tensor:
            seen.append(tokens.shape)
            return tokens

        parts = {"to_q": nn.Identity(), "to_k": project, "to_v": project}
        layer = stand_in(attn1)(**parts, to_out=nn.Sequential(nn.Identity(), nn.Identity()))
        try:
            with torch.no_grad():
                forward(layer, x, **context)
        except Exception as error:  # whatever another's processor raises, behind its projections
            if is_out_of_memory(error):
                raise
        if seen != [wanted.shape] * 2:
            return False
    return True
