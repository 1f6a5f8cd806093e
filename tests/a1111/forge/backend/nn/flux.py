"""Text, image, references in one sequence; heads apart; options are told."""

from __future__ import annotations

import torch
from torch import nn

from backend.args import dynamic_args
from backend.attention import attention_function

from .parts import HEADS, PROMPT, WIDTH, Projections, by_head, into_patches, out_of_patches


def attention(q, k, v, transformer_options):
    return attention_function(
        by_head(q), by_head(k), by_head(v), HEADS, skip_reshape=True, mask=None, transformer_options=transformer_options
    )


class DoubleStreamBlock(nn.Module):
    def __init__(self):
        super().__init__()
        self.img, self.txt = Projections(), Projections()

    def forward(self, img, txt, transformer_options):
        q, k, v = (torch.cat(both, dim=1) for both in zip(self.txt.of(txt), self.img.of(img), strict=True))
        out = attention(q, k, v, transformer_options)
        return img + self.img.out(out[:, txt.shape[1] :]), txt + self.txt.out(out[:, : txt.shape[1]])


class SingleStreamBlock(nn.Module):
    def __init__(self):
        super().__init__()
        self.all = Projections()

    def forward(self, x, transformer_options):
        return x + self.all.out(attention(*self.all.of(x), transformer_options))


class IntegratedFluxTransformer2DModel(nn.Module):
    def __init__(self):
        super().__init__()
        self.patch_size = 2
        self.img_in, self.txt_in, self.back = nn.Linear(16, WIDTH), nn.Linear(PROMPT, WIDTH), nn.Linear(WIDTH, 16)
        self.double_blocks = nn.ModuleList([DoubleStreamBlock()])
        self.single_blocks = nn.ModuleList([SingleStreamBlock(), SingleStreamBlock()])

    def forward(self, x, timestep, context, ref_latents=None, transformer_options=None, **kwargs):
        img, txt = into_patches(x), self.txt_in(context)
        tokens = img.shape[1]
        for ref in ref_latents or dynamic_args.ref_latents:
            img = torch.cat((img, into_patches(ref).expand(len(x), -1, -1)), dim=1)
        img = self.img_in(img)
        for block in self.double_blocks:
            img, txt = block(img, txt, transformer_options)
        both = torch.cat((txt, img), dim=1)
        for block in self.single_blocks:
            both = block(both, transformer_options)
        image = both[:, txt.shape[1] : txt.shape[1] + tokens]
        return out_of_patches(self.back(image), x.shape[-2:])
