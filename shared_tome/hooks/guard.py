"""Whether an attention or a feed-forward layer still gets the tokens that its block's plan was made for.

Other nodes and extensions replace such a layer, repeat its rows (regional prompts) or change its tokens (tiles). Then
ToMe leaves the layer alone: what they do there goes by the picture's own tokens. Every host says the same sentences.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

NAMES = {"attn1": "self-attention", "attn2": "cross-attention", "ff": "feed-forward layer"}


def is_replaced(module: Any) -> bool:
    """Whether somebody has put a forward of their own on this very module. (ComfyUI puts the class's own there when it
    takes another one off.)"""
    forward = getattr(module, "__dict__", {}).get("forward")
    if forward is None:
        return False
    return getattr(forward, "__self__", None) is not module or forward.__func__ is not type(module).forward


def anothers_part(
    model: nn.Module, hooks: bool = True, is_idle: Callable[[nn.Module], bool] = lambda module: False
) -> nn.Module | None:
    """A part of a model whose forward somebody has replaced, or hooked if hooks count; None: there is none. is_idle:
    whether what stands in the place of a part's forward does nothing else."""
    for module in model.modules():
        is_changed = is_replaced(module) and not is_idle(module)
        if is_changed or (hooks and (module._forward_hooks or module._forward_pre_hooks)):
            return module
    return None


def why_left_whole(part: str, x: Any, rows: int, tokens: int, replaced: bool = False) -> str | None:
    """Why a layer is left alone, or None where it may be merged.

    Args:
        part: "attn1", "attn2" or "ff", a block's layers.
        x: what the layer gets, [B, N, C] as a rule; rows, tokens: B and N of the block's plan.
        replaced: whether another node or extension computes the layer.
    """
    if replaced:
        return f"ToMe skips a {NAMES[part]} that another node or extension replaces"
    if not isinstance(x, Tensor) or x.shape[:2] != (rows, tokens):
        return (
            f"ToMe skips a {NAMES[part]} whose rows or tokens are not those of its block: another node or extension "
            "changes them"
        )
    return None
