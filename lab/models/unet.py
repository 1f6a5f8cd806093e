"""A U-Net in the layout of Stable Diffusion 1.x, in plain torch, small enough to train in minutes.

Module names and arithmetic are those of the ``UNetModel`` that Stable Diffusion's hosts run: weights trained here load
into a host's own classes strictly and give the same picture (tests/lab/fidelity/in_comfyui.py proves it). An
``nn.Identity`` stands where they have a dropout of zero. Layout: Rombach et al. (arXiv 2112.10752), figure 3.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from shared_tome.core.grid import Grid


@dataclass(frozen=True)
class UNetConfig:
    """Size of a U-Net; ``transformer_depth[level]`` 0 leaves the level without attention."""

    in_channels: int = 3
    out_channels: int = 3
    model_channels: int = 64
    channel_mult: tuple[int, ...] = (1, 2, 2)
    num_res_blocks: tuple[int, ...] = (2, 1, 1)
    transformer_depth: tuple[int, ...] = (1, 1, 1)
    transformer_depth_middle: int = 1
    head_channels: int = 32
    context_dim: int = 64

    def __post_init__(self) -> None:
        levels = len(self.channel_mult)
        if len(self.num_res_blocks) != levels or len(self.transformer_depth) != levels:
            raise ValueError(f"channel_mult has {levels} levels, num_res_blocks or transformer_depth not")
        if self.channel_mult[0] != 1:
            raise ValueError(f"channel_mult starts with {self.channel_mult[0]}, the hosts' last layer needs 1")
        for mult in self.channel_mult:
            width = mult * self.model_channels
            if width % 32 or width % self.head_channels:
                raise ValueError(f"width {width} is no multiple of 32 (group norm) and {self.head_channels} (heads)")


def timestep_embedding(timesteps: Tensor, dim: int) -> Tensor:
    """Sinusoids of ``timesteps`` [B] -> [B, dim]: cosines first, then sines (dim is even)."""
    half = dim // 2
    exponent = torch.arange(half, dtype=torch.float32, device=timesteps.device) / half
    angles = timesteps.float()[:, None] * torch.exp(-math.log(10_000.0) * exponent)[None]  # (B, half)
    return torch.cat((angles.cos(), angles.sin()), dim=-1)  # (B, dim)


class GroupNorm(nn.GroupNorm):
    """In the input's dtype: autocast would lift it to float32, which doubles the traffic of the widest tensors; the
    kernel accumulates the statistics in float32 anyway."""

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            return F.group_norm(x, self.num_groups, self.weight.to(x.dtype), self.bias.to(x.dtype), self.eps)


class LayerNorm(nn.LayerNorm):
    """In the input's dtype, as :class:`GroupNorm`."""

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            return F.layer_norm(x, self.normalized_shape, self.weight.to(x.dtype), self.bias.to(x.dtype), self.eps)


class CrossAttention(nn.Module):
    """Multi-head attention of ``x`` [B, N, C] on ``context`` [B, M, C'], or on itself."""

    def __init__(self, query_dim: int, context_dim: int | None, heads: int, dim_head: int) -> None:
        super().__init__()
        inner = heads * dim_head
        source = query_dim if context_dim is None else context_dim
        self.heads = heads
        self.to_q = nn.Linear(query_dim, inner, bias=False)
        self.to_k, self.to_v = (nn.Linear(source, inner, bias=False) for _ in range(2))
        self.to_out = nn.Sequential(nn.Linear(inner, query_dim), nn.Identity())

    def _split(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)  # (B, H, N, C / H)

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        source = x if context is None else context
        q, k, v = self._split(self.to_q(x)), self._split(self.to_k(source)), self._split(self.to_v(source))
        out = F.scaled_dot_product_attention(q, k, v)  # (B, H, N, C / H)
        return self.to_out(out.transpose(1, 2).flatten(2))  # (B, N, C)


class GEGLU(nn.Module):
    """Shazeer, "GLU Variants Improve Transformer" (arXiv 2002.05202)."""

    def __init__(self, dim_in: int, dim_out: int) -> None:
        super().__init__()
        self.proj = nn.Linear(dim_in, 2 * dim_out)

    def forward(self, x: Tensor) -> Tensor:
        value, gate = self.proj(x).chunk(2, dim=-1)
        return value * F.gelu(gate)


class BasicTransformerBlock(nn.Module):
    """Self-attention, cross-attention and an MLP on tokens ``x`` [B, N, C], each normalised before."""

    def __init__(self, dim: int, heads: int, dim_head: int, context_dim: int) -> None:
        super().__init__()
        self.attn1 = CrossAttention(dim, None, heads, dim_head)
        self.ff = _named(net=nn.Sequential(GEGLU(dim, 4 * dim), nn.Identity(), nn.Linear(4 * dim, dim)))
        self.attn2 = CrossAttention(dim, context_dim, heads, dim_head)
        self.norm1, self.norm2, self.norm3 = (LayerNorm(dim) for _ in range(3))

    def forward(self, x: Tensor, context: Tensor | None) -> Tensor:
        x = x + self.attn1(self.norm1(x))
        x = x + self.attn2(self.norm2(x), context)
        return x + self.ff(self.norm3(x))


class SpatialTransformer(nn.Module):
    """Transformer blocks on the pixels of ``x`` [B, C, H, W], taken as H·W tokens."""

    def __init__(self, channels: int, dim_head: int, depth: int, context_dim: int) -> None:
        super().__init__()
        self.norm = GroupNorm(32, channels, eps=1e-6)
        self.proj_in = nn.Conv2d(channels, channels, 1)
        self.transformer_blocks = nn.ModuleList(
            BasicTransformerBlock(channels, channels // dim_head, dim_head, context_dim) for _ in range(depth)
        )
        self.proj_out = zeroed(nn.Conv2d(channels, channels, 1))

    def forward(self, x: Tensor, context: Tensor | None) -> Tensor:
        height, width = x.shape[-2:]
        tokens = self.proj_in(self.norm(x)).flatten(2).transpose(1, 2)  # (B, H * W, C)
        for block in self.transformer_blocks:
            tokens = block(tokens, context)
        return x + self.proj_out(tokens.transpose(1, 2).unflatten(2, (height, width)))  # (B, C, H, W)


class ResBlock(nn.Module):
    """Two convolutions of ``x`` [B, C, H, W] with the time embedding ``emb`` [B, E] added between."""

    def __init__(self, channels: int, emb_channels: int, out_channels: int) -> None:
        super().__init__()
        self.in_layers = nn.Sequential(
            GroupNorm(32, channels), nn.SiLU(), nn.Conv2d(channels, out_channels, 3, padding=1)
        )
        self.emb_layers = nn.Sequential(nn.SiLU(), nn.Linear(emb_channels, out_channels))
        last = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        self.out_layers = nn.Sequential(GroupNorm(32, out_channels), nn.SiLU(), nn.Identity(), zeroed(last))
        same = channels == out_channels
        self.skip_connection = nn.Identity() if same else nn.Conv2d(channels, out_channels, 1)

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        h = self.in_layers(x) + self.emb_layers(emb)[:, :, None, None]
        return self.skip_connection(x) + self.out_layers(h)


class Upsample(nn.Module):
    """Nearest neighbour to ``size`` (height, width), that of the next skip connection, then a convolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor, size: tuple[int, int]) -> Tensor:
        return self.conv(F.interpolate(x, size=size, mode="nearest"))


class Stage(nn.Sequential):
    """One entry of the U-Net's lists: hands each member the arguments of its kind."""

    def forward(self, x: Tensor, emb: Tensor, context: Tensor | None, size: tuple[int, int]) -> Tensor:
        for layer in self:
            if isinstance(layer, ResBlock):
                x = layer(x, emb)
            elif isinstance(layer, SpatialTransformer):
                x = layer(x, context)
            elif isinstance(layer, Upsample):
                x = layer(x, size)
            else:
                x = layer(x)
        return x


class UNet(nn.Module):
    """Predicts v or the noise from a noisy picture or latent."""

    def __init__(self, config: UNetConfig) -> None:
        super().__init__()
        self.config = config
        base = config.model_channels
        emb = 4 * base
        self.time_embed = nn.Sequential(nn.Linear(base, emb), nn.SiLU(), nn.Linear(emb, emb))

        def stage(channels: int, out_channels: int, depth: int) -> list[nn.Module]:
            layers: list[nn.Module] = [ResBlock(channels, emb, out_channels)]
            if depth:
                layers.append(SpatialTransformer(out_channels, config.head_channels, depth, config.context_dim))
            return layers

        self.input_blocks = nn.ModuleList([Stage(nn.Conv2d(config.in_channels, base, 3, padding=1))])
        skips, channels = [base], base
        last = len(config.channel_mult) - 1
        for level, mult in enumerate(config.channel_mult):
            for _ in range(config.num_res_blocks[level]):
                self.input_blocks.append(Stage(*stage(channels, base * mult, config.transformer_depth[level])))
                skips.append(channels := base * mult)
            if level < last:
                self.input_blocks.append(Stage(_named(op=nn.Conv2d(channels, channels, 3, stride=2, padding=1))))
                skips.append(channels)

        self.middle_block = Stage(
            *stage(channels, channels, config.transformer_depth_middle), ResBlock(channels, emb, channels)
        )

        self.output_blocks = nn.ModuleList()
        for level in range(last, -1, -1):
            width = base * config.channel_mult[level]
            for i in range(config.num_res_blocks[level] + 1):
                layers = stage(channels + skips.pop(), width, config.transformer_depth[level])
                channels = width
                if level and i == config.num_res_blocks[level]:
                    layers.append(Upsample(channels))
                self.output_blocks.append(Stage(*layers))

        last = nn.Conv2d(channels, config.out_channels, 3, padding=1)
        self.out = nn.Sequential(GroupNorm(32, channels), nn.SiLU(), zeroed(last))

    def grid(self, height: int, width: int) -> Grid:
        """(rows, columns) of the tokens of its first level."""
        return height, width

    def forward(self, x: Tensor, timesteps: Tensor, context: Tensor | None) -> Tensor:
        """The prediction [B, out_channels, H, W] for noisy pictures or latents.

        x: [B, in_channels, H, W], noisy, of about unit variance. timesteps: [B], 0 to 999, where 999 is pure noise.
        context: [B, M, context_dim], the tokens of a class.
        """
        emb = self.time_embed(timestep_embedding(timesteps, self.config.model_channels).to(x.dtype))  # (B, E)
        h, skips = x, []
        for block in self.input_blocks:
            h = block(h, emb, context, h.shape[-2:])
            skips.append(h)
        h = self.middle_block(h, emb, context, h.shape[-2:])
        for block in self.output_blocks:
            h = torch.cat((h, skips.pop()), dim=1)  # (B, C + C_skip, H, W)
            h = block(h, emb, context, skips[-1].shape[-2:] if skips else h.shape[-2:])
        return self.out(h)


def zeroed(module: nn.Module) -> nn.Module:
    """The last layer of each residual branch: a young network trains faster where these begin at zero."""
    for parameter in module.parameters():
        nn.init.zeros_(parameter)
    return module


def _named(**modules: nn.Module) -> nn.Sequential:
    """One after the other, by the names that the hosts' files have."""
    return nn.Sequential(OrderedDict(modules))
