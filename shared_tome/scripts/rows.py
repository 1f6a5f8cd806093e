"""What ToMe knows of diffusers' transformers: one row of ROWS each.

A row was written from the model's own forward and its attention processor (diffusers 0.42, models/transformers). All of
them call torch's attention with queries and keys of all heads, behind norms and rotary positions; a row says where the
image's tokens lie there: [head, image, tail]. A model is known by its class's name (hooks/served.py).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..core.grid import Grid
from .steps import Clock

# A call's arguments by name.
CallArguments = dict[str, Any]
# of_ids(ids): the grid of position ids and how many tokens stand behind it, kept for the next call (joint.py).
OfIds = Callable[[Tensor], tuple[Grid, int]]

# To what multiple Z-Image fills up captions and images with tokens of its own.
_MULTIPLE = 32


@dataclass(frozen=True, eq=False)
class Place:
    """Where the image's tokens lie in the attentions of one call.

    grid: (rows, columns) or (frames, rows, columns); a 0 in it: these tokens lie on no grid. head, tail: tokens before
    and behind them. latent: [B, ...], all rows.
    mask: what the model was told of padding, or None. valid(mask on the CPU, head + tail): [B, head + tail] bool, which
    of the tokens beside the image others attend to; None: the mask's first ones as they are.
    """

    grid: Grid
    latent: Tensor
    head: int = 0
    tail: int = 0
    mask: Tensor | None = None
    valid: Callable[[Tensor, int], Tensor] | None = None


@dataclass(frozen=True, eq=False)
class Row:
    """One model.

    lists: its lists of blocks. attentions: a block's attentions that are merged, by their names in it.
    place(model, told, of_ids): see Place. timestep: its argument's name; clock: how pipelines make it.
    """

    place: Callable[[Any, CallArguments, OfIds], Place]
    lists: tuple[str, ...] = ("transformer_blocks", "single_transformer_blocks")
    attentions: tuple[str, ...] = ("attn",)
    timestep: str = "timestep"
    clock: Clock = Clock()


def _patches(sizes: tuple[int, ...], *patch: int) -> Grid:
    return tuple(size // side for size, side in zip(sizes[-len(patch) :], patch, strict=True))


def _text(arguments: CallArguments) -> int:
    return arguments["encoder_hidden_states"].shape[1]


def _flux(model: Any, arguments: CallArguments, of_ids: OfIds) -> Place:
    """The text, the image, and references behind it (Kontext)."""
    grid, reference = of_ids(arguments["img_ids"])
    return Place(grid, arguments["hidden_states"], _text(arguments), reference)


def _chroma(model: Any, arguments: CallArguments, of_ids: OfIds) -> Place:
    grid, reference = of_ids(arguments["img_ids"])
    return Place(grid, arguments["hidden_states"], _text(arguments), reference, arguments.get("attention_mask"))


def _sd3(model: Any, arguments: CallArguments, of_ids: OfIds) -> Place:
    """The image, and the text behind it; a second attention of some blocks is to the image alone."""
    x, patch = arguments["hidden_states"], model.config.patch_size
    return Place(_patches(x.shape, patch, patch), x, tail=_text(arguments))


def _image(model: Any, arguments: CallArguments, of_ids: OfIds) -> Place:
    """The image alone: the text has an attention of its own."""
    x, patch = arguments["hidden_states"], model.config.patch_size
    return Place(_patches(x.shape, patch, patch), x)


def _aura_flow(model: Any, arguments: CallArguments, of_ids: OfIds) -> Place:
    """Registers, the text, the image."""
    x, patch = arguments["hidden_states"], model.config.patch_size
    return Place(_patches(x.shape, patch, patch), x, model.register_tokens.shape[1] + _text(arguments))


def _qwen(model: Any, arguments: CallArguments, of_ids: OfIds) -> Place:
    """The text, the image, and references behind it (Edit). Layers of one image (Layered) are its frames; behind them
    stands the image that they are made from."""
    x, shapes = arguments["hidden_states"], arguments.get("img_shapes") or [(0, 0, 0)]
    shapes = shapes[0] if isinstance(shapes[0], list) else shapes[:1]
    images = len(shapes) - 1 if model.config.use_layer3d_rope else 1
    frames, rows, columns = shapes[0]
    is_whole = sum(map(math.prod, shapes)) == x.shape[1] and len(set(shapes[:images])) == 1
    grid = (frames * images, rows, columns) if is_whole else (0, 0)
    grid = grid[1:] if grid[0] == 1 else grid
    return Place(grid, x, _text(arguments), x.shape[1] - math.prod(grid), arguments.get("encoder_hidden_states_mask"))


def _wan(model: Any, arguments: CallArguments, of_ids: OfIds) -> Place:
    x = arguments["hidden_states"]
    return Place(_patches(x.shape, *model.config.patch_size), x)


def _hunyuan_video(model: Any, arguments: CallArguments, of_ids: OfIds) -> Place:
    """The video, and the text behind it, whose first tokens count, as many as its mask has."""
    x, config = arguments["hidden_states"], model.config
    grid = _patches(x.shape, config.patch_size_t, config.patch_size, config.patch_size)

    def valid(mask: Tensor, beside: int) -> Tensor:
        return torch.arange(beside) < mask.sum(1, dtype=torch.int64)[:, None]

    return Place(grid, x, tail=_text(arguments), mask=arguments["encoder_attention_mask"], valid=valid)


def _ltx(model: Any, arguments: CallArguments, of_ids: OfIds) -> Place:
    """Where the pipeline tells coordinates instead, further frames may stand among the video's."""
    x = arguments["hidden_states"]
    grid = tuple(int(arguments.get(name) or 0) for name in ("num_frames", "height", "width"))
    is_whole = arguments.get("video_coords") is None and math.prod(grid) == x.shape[1]
    return Place(grid if is_whole else (0, 0), x)


def _cogvideox(model: Any, arguments: CallArguments, of_ids: OfIds) -> Place:
    """The text, and the video, [B, frames, C, rows, columns]."""
    x, config = arguments["hidden_states"], model.config
    frames = x.shape[1] // (config.patch_size_t or 1)
    return Place((frames, *_patches(x.shape, config.patch_size, config.patch_size)), x, _text(arguments))


def _z_image(model: Any, arguments: CallArguments, of_ids: OfIds) -> Place:
    """The image, what fills it up, the caption, what fills it up; behind these, padding to the longest of the batch."""
    images, captions = arguments["x"], arguments["cap_feats"]
    if isinstance(images[0], list) or len({x.shape for x in images}) > 1:  # omni: several images a row
        return Place((0, 0), images[0] if isinstance(images[0], Tensor) else images[0][-1])
    side = arguments.get("patch_size", 2)
    grid = _patches(images[0].shape, arguments.get("f_patch_size", 1), side, side)
    filled = -math.prod(grid) % _MULTIPLE
    lengths = torch.tensor([filled + len(caption) + -len(caption) % _MULTIPLE for caption in captions])
    grid = grid[1:] if grid[0] == 1 else grid

    def valid(lengths: Tensor, beside: int) -> Tensor:
        return torch.arange(beside) < lengths[:, None]

    return Place(grid, torch.stack(list(images)), tail=int(lengths.max()), mask=lengths, valid=valid)


ROWS = {
    "FluxTransformer2DModel": Row(_flux, clock=Clock(1000.0)),
    "SD3Transformer2DModel": Row(_sd3, attentions=("attn", "attn2")),
    "ChromaTransformer2DModel": Row(_chroma, clock=Clock(1000.0)),
    "QwenImageTransformer2DModel": Row(_qwen, clock=Clock(1000.0)),
    "AuraFlowTransformer2DModel": Row(
        _aura_flow, ("joint_transformer_blocks", "single_transformer_blocks"), clock=Clock(1000.0, rounds_first=False)
    ),
    "ZImageTransformer2DModel": Row(
        _z_image, ("layers",), ("attention",), timestep="t", clock=Clock(1000.0, rises=True)
    ),
    "PixArtTransformer2DModel": Row(_image, attentions=("attn1",)),
    "HunyuanDiT2DModel": Row(_image, ("blocks",), ("attn1",)),
    "WanTransformer3DModel": Row(_wan, ("blocks",), ("attn1",)),
    "HunyuanVideoTransformer3DModel": Row(_hunyuan_video),
    "LTXVideoTransformer3DModel": Row(_ltx, attentions=("attn1",)),
    "CogVideoXTransformer3DModel": Row(_cogvideox, attentions=("attn1",)),
}
# For people.
TRANSFORMERS = (
    "Flux, SD3, Chroma, Qwen-Image, AuraFlow, Z-Image, PixArt, HunyuanDiT, Wan, HunyuanVideo, LTX-Video and CogVideoX"
)

_LINEAR = "its self-attention is linear in the tokens, so that fewer of them save nothing"
# Models that were looked at and are refused, and why.
REFUSED = {"SanaTransformer2DModel": _LINEAR, "SanaVideoTransformer3DModel": _LINEAR}


def attentions_of(model: nn.Module, row: Row) -> list[nn.Module]:
    """The attentions that are merged, block by block."""
    blocks = [block for name in row.lists for block in getattr(model, name, ())]
    found = (getattr(block, name, None) for block in blocks for name in row.attentions)
    return [attention for attention in found if attention is not None]
