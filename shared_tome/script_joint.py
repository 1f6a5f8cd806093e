"""scripts.py on diffusers' Flux and SD3, which attend to text and image together.

The image's keys and values come from a sample of its tokens, each weighted by how many it stands for; text tokens and
all queries stay. Keys are taken behind the rotary positions, where they meet the queries (sdpa.py).
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .call import ModelCall
from .config import ToMeConfig
from .grid import Grid
from .script_hooks import BaseAttachment, argument
from .sdpa import Handler, HostAttention, SdpaHooks

# Class of the transformer: whether its text comes first, and what the pipeline divides timesteps by.
_JOINT = {"FluxTransformer2DModel": (True, 1000.0), "SD3Transformer2DModel": (False, 1.0)}


def joint_blocks(model: nn.Module) -> Iterator[nn.Module]:
    """The attentions of a transformer that we know."""
    if type(model).__name__ not in _JOINT:
        return
    for name in ("transformer_blocks", "single_transformer_blocks"):
        for block in getattr(model, name, ()):
            yield from (part for part in (block.attn, getattr(block, "attn2", None)) if part is not None)


@dataclass(eq=False)
class _Call:
    """One call of the model. grid: the image's; text, reference: tokens beside it, reference ones behind it."""

    model: ModelCall
    grid: Grid
    batch: int
    text: int
    reference: int


class JointAttachment(BaseAttachment):
    """On a transformer of _JOINT."""

    def __init__(self, model: nn.Module, config: ToMeConfig, pipe: Any, merge_attn: bool = True):
        self.text_first, scale = _JOINT[type(model).__name__]
        super().__init__(config, pipe, scale)
        self._grid: tuple[weakref.ref, Grid, int] | None = None
        self._handles += [
            model.register_forward_pre_hook(self._before_model, with_kwargs=True),
            model.register_forward_hook(self._after_model),
        ]
        for attention in joint_blocks(model):
            self._handles += SdpaHooks(attention, self._before_attention).handles

    def _before_model(self, model: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        self.call = None  # also of one that ended in an exception
        x, text = argument(args, kwargs, 0, "hidden_states"), argument(args, kwargs, 1, "encoder_hidden_states")
        if self.text_first:
            grid, reference = self._grid_of(argument(args, kwargs, 4, "img_ids"))
        else:
            patch = model.config.patch_size
            grid, reference = (x.shape[-2] // patch, x.shape[-1] // patch), 0
        if math.prod(grid) == 0:
            self.say("image tokens that are not rows of one image are left alone")
            return
        call = self.model_call(grid, argument(args, kwargs, 3, "timestep"), x.device)
        if call is not None:
            self.call = _Call(call, grid, x.shape[0], text.shape[1], reference)

    def _grid_of(self, ids: Tensor) -> tuple[Grid, int]:
        """The image's grid from its position ids [N, 3] (number, row, column), and the reference tokens behind it.

        Read once for each tensor of ids: reading waits for the device. (0, 0) where they are no grid.
        """
        if self._grid is None or self._grid[0]() is not ids:
            rows = (ids[0] if ids.dim() == 3 else ids).detach().cpu().float()  # (N, 3)
            own = int((rows[:, 0] == 0).sum())
            image = rows[:own]
            height, width = (int(image[:, i].max() - image[:, i].min()) + 1 for i in (1, 2)) if own else (0, 0)
            count = torch.arange(height * width)
            place = torch.stack((count // max(1, width), count % max(1, width)), dim=1)  # (H * W, 2)
            regular = height * width == own and torch.equal((image - image[:1])[:, 1:].long(), place)
            self._grid = (weakref.ref(ids), (height, width) if regular else (0, 0), len(rows) - own)
        return self._grid[1:]

    def _before_attention(self, attention: nn.Module, args: tuple, kwargs: dict[str, Any]) -> Handler | None:
        return self._sample if self.call is not None else None

    def _sample(self, attention: HostAttention, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """q, k, v [B, H, L, d] -> [B, H, L, d]."""
        call = self.call
        image = math.prod(call.grid)
        beside = k.shape[2] - image
        if beside not in (0, call.reference, call.text + call.reference) or k.shape[0] != call.batch:
            self.say("an attention with other tokens than the text's and the image's is left alone")
            return attention(q, k, v)
        if not attention.is_plain:
            self.say("an attention with a mask is left alone")
            return attention(q, k, v)
        plan = call.model.plan(k[:, 0].narrow(1, 0, image), call.grid)
        if plan is None:
            return attention(q, k, v)
        before = call.text if self.text_first and beside >= call.text else 0
        merged = []
        for x in (k, v):
            x = x.transpose(1, 2).flatten(2)  # (B, L, H * d)
            x = torch.cat((x[:, :before], plan.merge(x[:, before : before + image]), x[:, before + image :]), dim=1)
            merged.append(x.unflatten(2, (k.shape[1], -1)).transpose(1, 2))  # (B, H, M, d)
        bias = None
        if self.config.proportional:
            sizes = plan.sizes[:1].log()  # (1, M)
            bias = torch.nn.functional.pad(sizes, (before, beside - before))
        return attention(q, *merged, bias=bias)
