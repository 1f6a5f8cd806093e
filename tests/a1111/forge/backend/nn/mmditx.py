"""SD3: an attention function of its own; in some blocks the image attends to itself a second time."""

from __future__ import annotations

import torch
from torch import nn

from .parts import HEADS, PROMPT, WIDTH, Projections, into_patches, out_of_patches


def attention(q, k, v, heads, mask=None):
    q, k, v = (x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in (q, k, v))
    return torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2).flatten(2)


class JointBlock(nn.Module):
    def __init__(self, twice):
        super().__init__()
        self.context_block, self.x_block, self.twice = Projections(), Projections(), twice

    def forward(self, context, x):
        parts = zip(self.context_block.of(context), self.x_block.of(x), strict=True)
        out = attention(*(torch.cat(part, dim=1) for part in parts), HEADS)
        again = attention(*self.x_block.of(x), HEADS) if self.twice else 0.0
        context = context + self.context_block.out(out[:, : context.shape[1]])
        return context, x + self.x_block.out(out[:, context.shape[1] :] + again)


class MMDiTX(nn.Module):
    def __init__(self):
        super().__init__()
        self.patch_size, self.register_length = 2, 0
        self.x_embedder, self.context_embedder = nn.Linear(16, WIDTH), nn.Linear(PROMPT, WIDTH)
        self.final_layer = nn.Linear(WIDTH, 16)
        self.joint_blocks = nn.ModuleList([JointBlock(True), JointBlock(False)])

    def forward(self, x, t, context=None, transformer_options=None, **kwargs):
        image, text = self.x_embedder(into_patches(x)), self.context_embedder(context)
        for block in self.joint_blocks:
            text, image = block(text, image)
        return out_of_patches(self.final_layer(image), x.shape[-2:])
