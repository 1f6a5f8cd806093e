"""Refiners before the blocks; the prompt and the image are filled up; one mask by place."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from backend.attention import attention_function

from .parts import HEADS, PROMPT, WIDTH, Projections, by_head, into_patches, out_of_patches


class JointTransformerBlock(nn.Module):
    def __init__(self):
        super().__init__()
        self.all = Projections()

    def forward(self, x, mask):
        q, k, v = (by_head(part) for part in self.all.of(x))
        return x + self.all.out(attention_function(q, k, v, HEADS, mask, skip_reshape=True))


class NextDiT(nn.Module):
    def __init__(self):
        super().__init__()
        self.patch_size, self.pad_tokens_multiple = 2, 20
        self.x_in, self.cap_in, self.back = nn.Linear(16, WIDTH), nn.Linear(PROMPT, WIDTH), nn.Linear(WIDTH, 16)
        self.noise_refiner, self.context_refiner = (nn.ModuleList([JointTransformerBlock()]) for _ in range(2))
        self.layers = nn.ModuleList([JointTransformerBlock(), JointTransformerBlock()])

    def forward(self, x, timesteps, context, attention_mask=None, transformer_options=None, **kwargs):
        image, cap = self.x_in(into_patches(x)), self.cap_in(context)
        tokens = image.shape[1]
        image, cap = (F.pad(one, (0, 0, 0, -one.shape[1] % self.pad_tokens_multiple)) for one in (image, cap))
        for block in self.context_refiner:
            cap = block(cap, None)
        for block in self.noise_refiner:
            image = block(image, None)
        both = torch.cat((cap, image), dim=1)
        for block in self.layers:
            both = block(both, attention_mask)
        return out_of_patches(self.back(both[:, cap.shape[1] : cap.shape[1] + tokens]), x.shape[-2:])
