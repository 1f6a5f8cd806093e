"""Token Merging: Your ViT But Faster (Bolya et al., arXiv 2210.09461) for timm's and transformers' vision transformers.

    import shared_tome.vit

    shared_tome.vit.apply_patch(model, r=16)     # 16 tokens fewer in each block
    shared_tome.vit.remove_patch(model)

In each block, between attention and MLP, the r most similar pairs of tokens become one: keys averaged over the heads
as metric, cosine similarity, alternating sets, class and distillation tokens kept, means weighted by size. In the next
block a key that stands for s tokens weighs s times as much. Gradients flow, so it serves training too. The hooks are
in hooks.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from .autotune import AutoPause
from .hooks import NAME, attach, detach
from .options import Options


@dataclass(frozen=True, eq=False)
class Trace:
    """What became of the tokens of the last call. Prefix tokens (class, distillation, registers) count as tokens.

    sources: [B, N], the merged token that each of the first block's tokens went into.
    sizes: [B, M], how many tokens each of the last block's stands for.
    counts: how many tokens each block's MLP had.
    steps: for each block the sources [B, N] behind it; the last is `sources`.
    """

    sources: Tensor
    sizes: Tensor
    counts: tuple[int, ...]
    steps: tuple[Tensor, ...]


def apply_patch(
    model: nn.Module,
    r: int | Sequence[int] | None = None,
    *,
    ratio: float | None = None,
    schedule: str = "constant",
    proportional: bool = True,
    restore: str = "last",
    trace: bool = False,
    auto: bool = False,
) -> nn.Module:
    """Merge the tokens of a vision transformer from now on, in place. A second call replaces the first.

    Args:
        model: timm's VisionTransformer (DeiT, distilled ones, registers) or NaFlexVit, or a transformers model with one
            vision tower of those in towers.SERVED (its text tower is left alone).
        r: how many tokens fewer in each block, or a list with one number a block. Never more than half of a block's.
        ratio: instead of r, the share of the tokens that is gone after the last block.
        schedule: "constant", or "falling": from twice as many in the first block in a straight line to none in the
            last, with the same sum (the paper's faster one). A list is its own schedule.
        proportional: weigh keys by the tokens that they stand for.
        restore: "last": the tower's output has all tokens again, each with the value of its merged one, so that
            every head and pooling works and means are weighted by size; "all": each block's output too, for hosts
            that read hidden states; "none": the merged tokens leave the tower, as in the paper (for heads that read
            the class token).
        trace: keep what `trace(model)` tells.
        auto: on a GPU, outside training and under no_grad, time the model at its first picture of a size, whole and
            merged, and leave it alone where merging does not pay. A call of a part of the model is merged.
    Returns:
        the model.
    Raises:
        ValueError: an argument out of range, or a model that is not served.
    """
    tower, attachment = attach(model, Options(r, ratio, schedule, proportional, restore, trace))
    if auto:
        AutoPause(model, tower, attachment)
    return model


def remove_patch(model: nn.Module) -> nn.Module:
    """Undo apply_patch: the model is what it was, without a hook. Does nothing where there is none."""
    detach(model)
    return model


def trace(model: Any) -> Trace:
    """The last call's trace. Raises ValueError where there was none."""
    attachment = getattr(model, NAME, None)
    if attachment is None or not attachment.options.trace or attachment.last is None:
        raise ValueError("nothing was traced: call apply_patch(model, ..., trace=True) and then the model")
    return Trace(*attachment.last)
