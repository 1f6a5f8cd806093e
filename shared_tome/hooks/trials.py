"""What a host's attention codes do with heads, each found out once by trying (heads.py)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from .heads import find_rule, meets_at_sdpa, trial_dtype, why_not_own


class Trials:
    """Owned by what holds a model's hooks.

    Args:
        code: what a layer's behaviour hangs on beside its heads, the device and the dtype.
        how: a layer's forward and the further arguments of heads.find_rule, asked for at the layer's first trial.
    """

    def __init__(
        self, code: Callable[[nn.Module], tuple], how: Callable[[nn.Module], tuple[Callable[..., Tensor], dict]]
    ):
        self._code, self._how = code, how
        self._rules: dict[tuple, str | None] = {}
        self._meets: dict[tuple, bool] = {}

    def rule(self, attn1: nn.Module, d: int, x: Tensor) -> str | None:
        """How the code of a layer with heads of d channels scales, which is given x [B, N, C] (heads.find_rule)."""
        key = self._key(attn1, d, x)
        if key not in self._rules:
            forward, more = self._how(attn1)
            self._rules[key] = find_rule(forward, d, x.device, trial_dtype(x), **more)
        return self._rules[key]

    def meets(self, attn1: nn.Module, d: int, x: Tensor) -> bool:
        """heads.meets_at_sdpa of such a layer."""
        key = self._key(attn1, d, x)
        if key not in self._meets:
            forward, more = self._how(attn1)
            more = {name: value for name, value in more.items() if name != "context"}
            self._meets[key] = meets_at_sdpa(forward, d, x.device, trial_dtype(x), **more)
        return self._meets[key]

    def why_not_own(self, attn1: nn.Module, d: int, x: Tensor) -> str | None:
        """Why the queries of such a layer cannot keep their own tokens, or None."""
        return why_not_own(lambda: self.meets(attn1, d, x), d, x.device, trial_dtype(x))

    def _key(self, attn1: nn.Module, d: int, x: Tensor) -> tuple[Any, ...]:
        return *self._code(attn1), d, x.device, trial_dtype(x)
