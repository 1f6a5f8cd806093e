"""A transformer block of the ldm or sgm classes: the policy of the core's hooks/engine.py in A1111."""

from __future__ import annotations

import functools
import re
import weakref
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from ..shared_tome.autotune.detached import about_model, run_detached
from ..shared_tome.core.grid import Grid
from ..shared_tome.hooks.call import HookedCall, Pass
from ..shared_tome.hooks.engine import MergedBlock
from ..shared_tome.hooks.guard import is_replaced, why_left_whole
from ..shared_tome.hooks.heads import width
from ..shared_tome.inspect.reasons import counted, why_not_served
from ..shared_tome.merging.plan import Plan

if TYPE_CHECKING:
    from .hooks import PassAttachment

NO_WEIGHTS = "the active attention optimization takes no weights of keys; proportional attention is off"


class WebUIBlock(MergedBlock):
    """The hooks of one transformer block."""

    owner: PassAttachment
    NO_WEIGHTS = NO_WEIGHTS
    OTHER_KEYS = "ToMe skips calls in which another extension gives the self-attention other keys"

    def __init__(self, owner: PassAttachment, block: nn.Module, name: str):
        super().__init__(owner)
        self.where, self.part = block_place(name)
        self._block = weakref.ref(block)

    def hook(self) -> list[Any]:
        """Register; returns the handles."""
        block = self._block()
        return [] if block is None else self.hook_layers(block)

    def code_of(self, attn1: nn.Module) -> Any:
        if is_taken(attn1):
            return None
        return plain_forward(attn1) if "forward" in attn1.__dict__ else type(attn1).forward

    def decision(
        self, call: HookedCall, now: Pass, attn1: nn.Module, x: Tensor, grid: Grid, kernels: tuple[str, ...]
    ) -> Any:
        about, heads = functools.partial(about_model, attn1, x.device, is_left_behind), getattr(attn1, "heads", None)
        return call.decisions.decision(x, grid, heads, kernels=kernels, block=self._run_detached, about=about)

    def off_grid(self, call: HookedCall, x: Tensor) -> str:
        return (
            f"{x.shape[1]} tokens in {counted(x.shape[0], 'row')} are no level of {call.model.full[0]}x"
            f"{call.model.full[1]} in {counted(call.batch, 'row')}; ToMe skips such layers"
        )

    def leave(self, call: HookedCall, reason: str, grid: Grid | None = None) -> None:
        is_said = call.unpaid is not None and reason.startswith(call.unpaid)
        if not is_said:
            self.say(reason)
        self._tell_left(call, call.unpaid if is_said else reason.partition(";")[0], grid)

    def leave_unserved(self, call: HookedCall, grid: Grid) -> None:
        self._tell_left(call, why_not_served(call.model.config, grid, call.model.full), grid)

    def tell(self, call: HookedCall, now: Pass, plan: Plan | None, exact: str | None = None) -> None:
        if exact is not None:
            self._tell_left(call, exact, now.kind.grid)
        else:
            call.tally.layer(self.where, now.kind.grid, plan, self.part, now.kind.decision)

    def _tell_left(self, call: HookedCall, reason: str, grid: Grid | None) -> None:
        if call.tally is not None:
            call.tally.left_alone(reason, self.where, grid, self.part)

    def why_left(self, name: str, module: nn.Module, x: Any, kwargs: dict[str, Any], plan: Plan) -> str | None:
        return why_left_whole(name, x, plan.batch, plan.tokens, is_taken(module))

    def pass_over(self, call: HookedCall, grid: Grid) -> None:
        super().pass_over(call, grid)
        if call.tally is not None:
            call.tally.count(grid)

    def hook_projections(self, attn1: nn.Module, heads: int) -> list[Any]:
        before_query = attn1.to_q.register_forward_pre_hook(self._before_query, prepend=True)
        return [before_query, *super().hook_projections(attn1, heads)]

    def widened_input(self, now: Pass, q: Tensor, heads: int, d: int) -> Tensor:
        # The sdp code takes the head size from x's channels: it gets a stand-in of that shape (no memory), and
        # to_q gets the real one.
        now.query = q
        return q.new_zeros(1, 1, 1).expand(*q.shape[:2], width(heads, d))

    def _before_query(self, module: nn.Module, args: tuple) -> tuple | None:
        now = self.now
        if now is None or now.query is None:
            return None
        query, now.query = now.query, None
        return (query,)

    def _run_detached(self, x: Tensor) -> Callable[[], Any] | None:
        """What runs this block by itself, to be timed."""
        block = self._block()
        return None if block is None else run_detached(block, x, rejoin=is_left_behind)


def block_place(name: str) -> tuple[str, int]:
    """A transformer block's module name as (block as reports name it, which transformer of that block)."""
    found = re.search(r"(input|middle|output)_blocks?\b(?:\.(\d+))?", name)
    part = re.search(r"transformer_blocks\.(\d+)$", name)
    if found is None:
        return name or "unnamed block", 0
    number = found[2] if found[1] != "middle" else "0"  # the numbers within the middle block are not of blocks
    return f"{found[1]} block {number}", int(part[1]) if part else 0


# Whose code the hosts' models run: torch, the models' packages, the hosts themselves, A1111's own LoRA.
HOSTS = {"torch", "einops", "ldm", "sgm", "modules", "networks", "backend", "modules_forge", "ldm_patched"}


def package_of(made: Any) -> str:
    """The package that a class or a function is of."""
    return (getattr(made, "__module__", None) or "").partition(".")[0]


def _under_hypertile(module: Any) -> Any:
    """The layer's own forward(self, ...) under the wrapper that HyperTile leaves where it was on in an earlier picture.
    None where none stands, where it is on, and where another extension stands above or below it."""
    params, wrapper = (getattr(module, "__dict__", {}).get(name) for name in ("__webui_hypertile_params", "forward"))
    if params is None or getattr(params, "enabled", True) or getattr(wrapper, "__wrapped__", None) != params.forward:
        return None
    return params.forward.__func__ if getattr(params.forward, "__self__", None) is module else None


def is_taken(module: Any) -> bool:
    """Whether somebody replaced this very layer's forward: what stands there may go by the number of tokens."""
    if "forward" not in getattr(module, "__dict__", ()) or not is_replaced(module):
        return False
    forward = _under_hypertile(module)  # the host's own, though perhaps of an attention that was chosen before
    return forward is not type(module).forward and (forward is None or package_of(forward) not in HOSTS)


def is_left_behind(module: Any, _: Any = None) -> bool:
    """Whether all that stands in the place of a layer's forward is HyperTile's, which runs the class's own."""
    return _under_hypertile(module) is type(module).forward


def plain_forward(attn1: nn.Module) -> Any:
    """The function that runs between the projections: forward(self, x, context)."""
    return _under_hypertile(attn1) or type(attn1).forward
