"""What the hooks on a model's blocks know of one call: owned by the call, and gone with it."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from ..attention.sdpa import AroundSdpa
from ..attention.sequence import JointCall
from ..core.grid import Grid
from ..merging.call import MergedAttention, ModelCall
from ..merging.plan import Plan
from ..merging.residual import ResidualCall
from .blocks import LayersSeen
from .parts import Wide

# In a rule's place (heads.find_rule): keys get their weights where they meet the queries, or have none.
MET, NONE = "met", "none"


@dataclass(eq=False)
class Pass:
    """One block in one call: what its hooks hand to each other.

    metric: [B, N, C], the block's input, which similarity is measured on; None: attn1's own tokens. block: the module,
    where the pass began with it.
    """

    metric: Tensor | None = None
    block: nn.Module | None = None
    layer: MergedAttention | None = None
    is_drawn: bool = False  # its plan's keys and values are taken where they meet the queries
    plan: Plan | None = None  # the block's match, for attn2, ff, and attn1's queries alone
    open: dict[str, Plan] = field(default_factory=dict)
    bias: Tensor | None = None  # [b, M], of keys that get it where they meet the queries
    wide: Wide | None = None  # of keys that get it in wider heads
    kind: LayerKind | None = None  # attn1's
    query: Tensor | None = None  # what to_q gets in the place of attn1's input
    keys: Tensor | None = None  # [B, M, C], what to_k and to_v get in its place
    mode: AroundSdpa | None = None  # while attn1 runs, where something is to be done where keys meet the queries


@dataclass(eq=False)
class LayerKind:
    """What self-attentions of one kind have in common in a call, found out at the first one.

    code: what their behaviour hangs on (code_of). grid: None where their tokens are no level of the latent. decision:
    what is known of their times. unpaid: why merging does not pay in them. meets: whether their queries meet all keys,
    for their own tokens or three resolutions. weights: a rule of heads.find_rule, MET or NONE; None: not asked yet. d:
    the channels of a head, once it is.
    """

    code: Any
    is_itself: bool  # they attend to their own tokens
    grid: Grid | None = None
    is_served: bool = False
    is_merged: bool = False
    meets: bool = False
    wants_heads: bool = False
    decision: Any = None
    unpaid: str | None = None
    weights: str | None = None
    d: int = 0


@dataclass(eq=False)
class HookedCall:
    """One call of the model. decisions: what tells which layers pay. joint: what lets queries keep their own tokens,
    None where they shall not. residual: what has some steps exact, None where nothing has. kind, layers_seen: see
    BlockHooks. tally: who is told what becomes of the layers, or None. unpaid: why none is merged after all,
    which was said already."""

    model: ModelCall
    decisions: Any
    batch: int
    joint: JointCall | None = None
    residual: ResidualCall | None = None
    kind: tuple = ()
    tally: Any = None
    unpaid: str | None = None
    layers_seen: LayersSeen = field(default_factory=LayersSeen)
    passes: dict[Hashable, Pass] = field(default_factory=dict)
    kinds: dict[tuple, LayerKind] = field(default_factory=dict)
