"""The prompt is fused before the blocks by the same function. With references parts of the blocks are called alone."""

from __future__ import annotations

import torch
from torch import nn

from backend.attention import attention_function

from .parts import HEADS, PROMPT, WIDTH, Projections, by_head, into_patches, out_of_patches


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.all = Projections()

    def forward(self, x):
        q, k, v = (by_head(part) for part in self.all.of(x))
        return self.all.out(attention_function(q, k, v, HEADS, mask=None, skip_reshape=True))


class SingleStreamBlock(nn.Module):
    def __init__(self):
        super().__init__()
        self.attn = Attention()

    def forward(self, x):
        return x + self.attn(x)


class SingleStreamDiT(nn.Module):
    def __init__(self):
        super().__init__()
        self.patch = 2
        self.first, self.txtmlp, self.last = nn.Linear(16, WIDTH), nn.Linear(PROMPT, WIDTH), nn.Linear(WIDTH, 16)
        self.txtfusion, self.blocks = SingleStreamBlock(), nn.ModuleList([SingleStreamBlock(), SingleStreamBlock()])

    def forward(self, x, timesteps, context, ref_latents=None, transformer_options=None, **kwargs):
        text, image = self.txtmlp(context), into_patches(x)
        text = self.txtfusion(text.flatten(0, 1)[:, None]).view_as(text)  # each of the prompt's tokens a row
        tokens = image.shape[1]
        for ref in ref_latents or ():
            image = torch.cat((image, into_patches(ref).expand(len(x), -1, -1)), dim=1)
        both = torch.cat((text, self.first(image)), dim=1)
        for block in self.blocks:
            both = both + block.attn(both) if ref_latents else block(both)
        return out_of_patches(self.last(both[:, text.shape[1] : text.shape[1] + tokens]), x.shape[-2:])
