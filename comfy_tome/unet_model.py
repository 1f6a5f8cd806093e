"""What is known of a U-Net of ComfyUI before it runs: its attention layers, and which of them other nodes replace."""

from __future__ import annotations

import re
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ..shared_tome.hooks.guard import is_replaced

# Walking through a model takes longer than a step may.
_known_layers: weakref.WeakKeyDictionary[Any, list[tuple[int, int, int]]] = weakref.WeakKeyDictionary()


def layers_of(model: Any) -> list[tuple[int, int, int]]:
    """(level, channels, heads) of a U-Net's self-attention layers, each once."""
    model = getattr(model, "_orig_mod", model)
    if not isinstance(model, nn.Module):  # another node's stand-in
        return []
    if model not in _known_layers:
        _known_layers[model] = _find_layers(model)
    return _known_layers[model]


def _find_layers(model: Any) -> list[tuple[int, int, int]]:
    """On every level that is as wide as the layer: SD 1.x has two of 1,280 channels."""
    widths = [model.model_channels * mult for mult in getattr(model, "channel_mult", ())]
    attentions = (block.attn1 for block in model.modules() if hasattr(block, "attn1") and hasattr(block, "attn2"))
    found = sorted({(attention.to_q.in_features, attention.heads) for attention in attentions})
    return [
        (level, width, heads) for channels, heads in found for level, width in enumerate(widths) if width == channels
    ]


_known_blocks: weakref.WeakKeyDictionary[Any, list[tuple[tuple, weakref.ref]]] = weakref.WeakKeyDictionary()
_BLOCK = re.compile(r"(input|middle|output)_blocks?\.(\d+)(?:\.\d+)*\.transformer_blocks\.(\d+)$")


def replaced_layers(model: Any, parts: tuple[str, ...]) -> frozenset[tuple]:
    """(part, (kind, number, place)) of the layers in a U-Net's blocks that have a forward of another node's."""
    model = getattr(model, "_orig_mod", model)
    if not isinstance(model, nn.Module):
        return frozenset()
    if model not in _known_blocks:
        found = ((_BLOCK.search(name), module) for name, module in model.named_modules())
        _known_blocks[model] = [
            ((at[1], 0 if at[1] == "middle" else int(at[2]), int(at[3])), weakref.ref(module))
            for at, module in found
            if at is not None
        ]
    return frozenset(
        (part, place)
        for place, block in _known_blocks[model]
        for part in parts
        if is_replaced(getattr(block(), part, None))
    )


def run_block(model: Any, heads: int, x: Tensor, options: dict[str, Any]) -> Callable[[], Any] | None:
    """What runs the model's first block of as many channels and heads on tokens x [B, N, C] and a prompt, without any
    node's patches; None where there is none. options: the transformer_options of its attention."""
    for block in model.modules() if isinstance(model, nn.Module) else ():
        if hasattr(block, "attn1") and hasattr(block, "attn2") and block.attn2 is not None:
            if (block.attn1.to_q.in_features, block.attn1.heads) == (x.shape[2], heads):
                context = x.new_zeros(x.shape[0], 77, block.attn2.to_k.in_features)
                return lambda: block(x, context=context, transformer_options=dict(options))
    return None


def dtype_of(base: Any) -> torch.dtype:
    """What a model computes in: comfy.model_base.BaseModel, or its U-Net alone."""
    return getattr(base, "manual_cast_dtype", None) or (base.get_dtype() if hasattr(base, "get_dtype") else base.dtype)
