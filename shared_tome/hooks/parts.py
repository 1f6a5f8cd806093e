"""Hooks that the hosts' blocks have in common: around attn2 and ff, where queries meet keys, and on the projections.

Each class here asks its heir what to do now. A hook is a bound method, or a partial of one, and no closure: a deep copy
of a model gets hooks of its own.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from ..attention.sdpa import NOT_AS_TRIED, Handler, HostAttention, SdpaHooks, attend_with_self_token
from ..attention.sequence import JointCall
from ..merging.plan import Plan
from ..merging.residual import ResidualCall
from .heads import PROJECTIONS, narrow, widen_key, widen_query, widen_value


def argument(args: tuple, kwargs: dict[str, Any], place: int, *names: str) -> Any:
    """An argument by place or by one of its names."""
    if len(args) > place:
        return args[place]
    for name in names:
        if name in kwargs:
            return kwargs[name]
    return None


def with_tokens(args: tuple, kwargs: dict[str, Any], name: str, x: Tensor) -> tuple[tuple, dict[str, Any]]:
    """(args, kwargs) with other tokens, which are the first argument or the one of that name."""
    return ((x, *args[1:]), kwargs) if args else (args, {**kwargs, name: x})


class AroundParts:
    """Merges what attn2 and ff are given, by the match of their block, and unmerges what they give.

    say: tells a line once.
    """

    say: Callable[[str], None]

    def part_plan(self, name: str, module: nn.Module, x: Any, kwargs: dict[str, Any]) -> Plan | None:
        """The plan for what a part is given, x [B, N, C]; None where the part is left alone, which is said."""
        raise NotImplementedError

    def open_plans(self) -> dict[str, Plan]:
        """By part, those whose outputs are to come."""
        raise NotImplementedError

    def hook_part(self, name: str, module: nn.Module) -> list[Any]:
        """Register; returns the handles. name: "attn2" or "ff"."""
        # Ours is the last to see the input and the first to see the output.
        return [
            module.register_forward_pre_hook(functools.partial(self._before_part, name), with_kwargs=True),
            module.register_forward_hook(functools.partial(self._after_part, name), prepend=True),
        ]

    def _before_part(self, name: str, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple | None:
        x = argument(args, kwargs, 0, "hidden_states", "x")
        plan = self.part_plan(name, module, x, kwargs)
        if plan is None:
            return None
        self.open_plans()[name] = plan
        return with_tokens(args, kwargs, "hidden_states" if "hidden_states" in kwargs else "x", plan.merge(x))

    def _after_part(self, name: str, module: nn.Module, args: tuple, out: Any) -> Tensor | None:
        return self.unmerge(self.open_plans().pop(name, None), out)

    def unmerge(self, plan: Plan | None, out: Any) -> Tensor | None:
        """What replaces a module's output [B, M, C]: [B, N, C]; None where it stays."""
        if plan is None:
            return None
        if not isinstance(out, Tensor) or out.shape[:2] != (plan.batch, plan.kept):
            self.say("an attention returned other tokens than ToMe gave it; ToMe does not change its output")
            return None
        return plan.unmerge(out)


class AtSdpa:
    """Draws a layer's keys where they meet the queries, at torch's scaled_dot_product_attention, for hosts whose own
    patches around a layer do not run after an exception in it. say: tells a line once. keeping: of the layer that runs
    now, what has some steps exact, and the layer's name; None: nothing has."""

    say: Callable[[str], None]
    keeping: Callable[[], tuple[ResidualCall, Hashable] | None]

    def meeting(self) -> tuple[JointCall | None, Plan | None]:
        """Of the layer that runs now: what lets queries keep their own tokens, and the plan by which keys are drawn,
        None where none are."""
        raise NotImplementedError

    def hook_sdpa(self, attn1: nn.Module) -> list[Any]:
        """Register; returns the handles."""
        return SdpaHooks(attn1, self._begin, self._missed).handles

    def _begin(self, attn1: nn.Module, args: tuple, kwargs: dict[str, Any]) -> Handler | None:
        return None if self.meeting()[1] is None else self._attend

    def _attend(self, attention: HostAttention, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """q, k, v [B, H, N, d] -> [B, H, N, d]. Asks anew: an interrupt can leave the mode on that calls it."""
        return attend_with_self_token(*self.meeting(), self._missed, attention, q, k, v, self.keeping())

    def _missed(self, attn1: nn.Module | None = None) -> None:
        self.say(NOT_AS_TRIED)


@dataclass(eq=False)
class Wide:
    """How a layer's heads are widened: the attention code's rule (heads.find_rule), the keys' bias [B, M], and d."""

    rule: str
    bias: Tensor
    d: int


class Widening:
    """Heads that carry their keys' weights in further channels, between the projections. say: tells a line once."""

    say: Callable[[str], None]

    def wide(self) -> Wide | None:
        """Of the layer that runs now; None where its heads stay as they are."""
        raise NotImplementedError

    def hook_projections(self, attn1: nn.Module, heads: int) -> list[Any]:
        """Register; returns the handles."""
        return [
            *(
                getattr(attn1, name).register_forward_hook(functools.partial(self._widen, name, heads))
                for name in PROJECTIONS
            ),
            output_of(attn1).register_forward_pre_hook(functools.partial(self._narrow, heads), prepend=True),
        ]

    def _widen(self, name: str, heads: int, module: nn.Module, args: tuple, out: Tensor) -> Tensor | None:
        wide = self.wide()
        if wide is None:
            return None
        if name == "to_q":
            return widen_query(out, heads, wide.rule)
        if name == "to_v":
            return widen_value(out, heads)
        bias = wide.bias
        if out.shape[:2] != bias.shape:
            self.say("an attention makes keys from other tokens than ToMe gave it; these keys have no weights")
            bias = bias.new_zeros(out.shape[:2])
        return widen_key(out, heads, wide.rule, bias)

    def _narrow(self, heads: int, module: nn.Module, args: tuple) -> tuple | None:
        wide = self.wide()
        return None if wide is None else (narrow(args[0], heads, wide.d), *args[1:])


def output_of(attn1: nn.Module) -> nn.Module:
    """The output projection of an attention."""
    to_out = attn1.to_out
    return to_out[0] if isinstance(to_out, (nn.Sequential, nn.ModuleList)) else to_out
