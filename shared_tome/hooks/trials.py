"""What a host's attention codes do with heads, each found out once by trying (heads.py)."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import _disable_current_modes

from ..core.curve import is_compiling
from .heads import find_rule, head_size, meets_at_sdpa, trial_dtype

# Of a layer in a call: the channels of a head, the device, and a dtype to try its code in.
Kind = tuple[int, torch.device, torch.dtype]


def kind_of(attn1: nn.Module, heads: int, x: Tensor) -> Kind:
    """Of a layer that is given x [B, N, C]."""
    return head_size(attn1, heads, x), x.device, trial_dtype(x)


class Trials:
    """Owned by what holds a model's hooks.

    Args:
        code: what a layer's behaviour hangs on beside its kind.
        how: a layer's forward and the further arguments of heads.find_rule, asked for at the layer's first trial.
    """

    def __init__(
        self, code: Callable[[nn.Module], tuple], how: Callable[[nn.Module], tuple[Callable[..., Tensor], dict]]
    ):
        self._code, self._how = code, how
        self._rules: dict[tuple, str | None] = {}
        self._meets: dict[tuple, bool] = {}

    def rule(self, attn1: nn.Module, kind: Kind) -> str | None:
        """How a layer's code scales (heads.find_rule)."""
        # What torch.compile makes of a look-up among keys that hold functions fails its own guards.
        return (torch.compiler.disable(self._find_rule) if is_compiling() else self._find_rule)(attn1, kind)

    def _find_rule(self, attn1: nn.Module, kind: Kind) -> str | None:
        key = *self._code(attn1), *kind
        if key not in self._rules:
            forward, more = self._how(attn1)
            with _disable_current_modes(), torch._C.DisableTorchFunction():  # a trace has stand-ins, and no numbers
                self._rules[key] = find_rule(forward, *kind, **more)
        return self._rules[key]

    def meets(self, attn1: nn.Module, kind: Kind) -> bool:
        """heads.meets_at_sdpa of a layer."""
        key = *self._code(attn1), *kind
        if key not in self._meets:
            forward, more = self._how(attn1)
            more = {name: value for name, value in more.items() if name not in ("context", "widens_x")}
            self._meets[key] = meets_at_sdpa(forward, *kind, **more)
        return self._meets[key]
