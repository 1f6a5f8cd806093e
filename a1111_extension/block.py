"""A transformer block of the ldm or sgm classes: the policy of the core's hooks/engine.py in A1111."""

from __future__ import annotations

import functools
import re
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from ..shared_tome.attention.combine import TORCHS
from ..shared_tome.autotune.detached import about_model, run_detached
from ..shared_tome.core.grid import Grid
from ..shared_tome.hooks import engine
from ..shared_tome.hooks.engine import Given, MergedBlock, Pass
from ..shared_tome.hooks.guard import is_replaced, why_left_whole
from ..shared_tome.hooks.heads import width
from ..shared_tome.inspect.reasons import counted, why_not_served
from ..shared_tome.inspect.report import CallTally
from ..shared_tome.merging.plan import Plan

if TYPE_CHECKING:
    from .hooks import PassAttachment

NO_WEIGHTS = "the active attention optimization takes no weights of keys; proportional attention is off"


@dataclass(eq=False)
class WebUICall(engine.HookedCall):
    """One call of the model. call_tally: where somebody wants a report or a map. unpaid: why no layer is merged after
    all, which was said already."""

    call_tally: CallTally | None = None
    unpaid: str | None = None


class WebUIBlock(MergedBlock):
    """The hooks of one transformer block."""

    owner: PassAttachment
    NO_WEIGHTS = NO_WEIGHTS

    def __init__(self, owner: PassAttachment, block: nn.Module, name: str):
        super().__init__(owner)
        self.where, self.part = block_place(name)
        self.heads = getattr(block.attn1, "heads", None)
        self._block = weakref.ref(block)

    def hook(self) -> list[Any]:
        """Register; returns the handles."""
        block = self._block()
        if block is None:
            return []
        handles = self.hook_layers(block)
        if self.owner.config.weighs_keys and self.heads:
            handles.append(block.attn1.to_q.register_forward_pre_hook(self._before_query, prepend=True))
            handles += self.hook_projections(block.attn1, self.heads)
        return handles

    def begin(self, attn1: nn.Module) -> Pass | None:
        call = self.owner.call
        if call is None:
            return None
        now = call.passes[self] = Pass()
        return now

    def is_served(self, now: Pass, given: Given) -> bool:
        if not isinstance(given.x, Tensor) or given.x.dim() != 3:
            return False
        if not given.is_itself:
            self.leave("ToMe skips calls in which another extension gives the self-attention other keys")
        return given.is_itself

    def off_grid(self, x: Tensor) -> str:
        call = self.owner.call
        return (
            f"{x.shape[1]} tokens in {counted(x.shape[0], 'row')} are no level of {call.model.full[0]}x"
            f"{call.model.full[1]} in {counted(call.batch, 'row')}; ToMe skips such layers"
        )

    def leave(self, reason: str, grid: Grid | None = None) -> None:
        self.say(reason)
        if self.owner.call.call_tally is not None:
            self.owner.call.call_tally.left_alone(reason.partition(";")[0], self.where, grid, self.part)

    def leave_unpaid(self, reason: str, tokens: int, grid: Grid) -> None:
        call = self.owner.call
        if call.unpaid is None:
            super().leave_unpaid(reason, tokens, grid)
        elif call.call_tally is not None:
            call.call_tally.left_alone(reason, self.where, grid, self.part)

    def leave_unserved(self, grid: Grid) -> None:
        call = self.owner.call
        if call.call_tally is not None:
            call.call_tally.left_alone(
                why_not_served(call.model.config, grid, call.model.full), self.where, grid, self.part
            )

    def why_left(self, name: str, module: nn.Module, x: Any, kwargs: dict[str, Any], plan: Plan) -> str | None:
        return why_left_whole(name, x, plan.batch, plan.tokens, is_taken(module))

    def why_attention_left(self, attn1: nn.Module, given: Given) -> str | None:
        return why_left_whole("attn1", given.x, *given.x.shape[:2], is_taken(attn1))

    def pass_over(self, grid: Grid) -> None:
        super().pass_over(grid)
        if self.owner.call.call_tally is not None:
            self.owner.call.call_tally.count(grid)

    def why_not_paid(self, now: Pass, attn1: nn.Module, x: Tensor, grid: Grid, keeps_self: bool) -> str | None:
        if self.owner.call.unpaid is not None:
            return self.owner.call.unpaid
        decisions, about = self.owner.call.decisions, functools.partial(about_model, attn1, x.device, is_left_behind)
        kernels = TORCHS if keeps_self else ()
        now.decision = decisions.decision(x, grid, self.heads, kernels=kernels, block=self._run_detached, about=about)
        return decisions.why_not_paid(now.decision)

    def tell(self, now: Pass, grid: Grid, plan: Plan | None) -> None:
        if self.owner.call.call_tally is not None:
            self.owner.call.call_tally.layer(self.where, grid, plan, self.part, now.decision)

    def tell_exact(self, grid: Grid, reason: str) -> None:
        if self.owner.call.call_tally is not None:
            self.owner.call.call_tally.left_alone(reason, self.where, grid, self.part)

    def widened_input(self, now: Pass, attn1: nn.Module, d: int) -> Tensor:
        # The sdp code takes the head size from x's channels: it gets a stand-in of that shape (no memory), and
        # to_q gets the real one.
        now.query = now.layer.q
        return now.query.new_zeros(1, 1, 1).expand(*now.query.shape[:2], width(self.heads, d))

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
    if not is_replaced(module):
        return False
    forward = _under_hypertile(module)  # the host's own, though perhaps of an attention that was chosen before
    return forward is not type(module).forward and (forward is None or package_of(forward) not in HOSTS)


def is_left_behind(module: Any, _: Any = None) -> bool:
    """Whether all that stands in the place of a layer's forward is HyperTile's, which runs the class's own."""
    return _under_hypertile(module) is type(module).forward


def plain_forward(attn1: nn.Module) -> Any:
    """The function that runs between the projections: forward(self, x, context)."""
    return _under_hypertile(attn1) or type(attn1).forward
