"""A video alone in its self-attention, the prompt in a cross-attention by the same function; heads by keyword."""

from __future__ import annotations

from torch import nn

from backend.attention import attention_function

from .parts import HEADS, PROMPT, WIDTH, Projections, into_patches, out_of_patches


def attention(*args, **kwargs):
    return attention_function(*args, **kwargs)


class WanAttentionBlock(nn.Module):
    def __init__(self):
        super().__init__()
        self.self_attn, self.cross_attn = Projections(), Projections()

    def forward(self, x, context, transformer_options):
        x = x + self.self_attn.out(
            attention(*self.self_attn.of(x), heads=HEADS, transformer_options=transformer_options)
        )
        q, k, v = self.cross_attn.of(x)[0], *self.cross_attn.of(context)[1:]
        return x + self.cross_attn.out(attention_function(q, k, v, heads=HEADS))


class WanModel(nn.Module):
    def __init__(self):
        super().__init__()
        self.patch_size = (1, 2, 2)
        self.patch_embedding, self.text_embedding = nn.Linear(16, WIDTH), nn.Linear(PROMPT, WIDTH)
        self.head = nn.Linear(WIDTH, 16)
        self.blocks = nn.ModuleList([WanAttentionBlock(), WanAttentionBlock()])

    def forward(self, x, timestep, context, transformer_options=None, **kwargs):
        frames, size = x.shape[2], x.shape[-2:]  # (B, C, T, H, W)
        tokens = into_patches(x.transpose(1, 2).flatten(0, 1)).unflatten(0, (-1, frames)).flatten(1, 2)
        tokens, context = self.patch_embedding(tokens), self.text_embedding(context)
        for block in self.blocks:
            tokens = block(tokens, context, transformer_options)
        out = out_of_patches(self.head(tokens).unflatten(1, (frames, -1)).flatten(0, 1), size)
        return out.unflatten(0, (-1, frames)).transpose(1, 2)
