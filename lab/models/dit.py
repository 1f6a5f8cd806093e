"""A small diffusion transformer in the layout of Flux and Stable Diffusion 3, in plain torch.

Pictures (or latents) are cut into patches, one token each. Text and image tokens attend to each other in one softmax
(Esser et al., arXiv 2403.03206, figure 2): first in double blocks, which have weights for either, then in single
blocks, which have the same for both and run the MLP beside the attention (Dehghani et al., arXiv 2302.05442, section
2.1). Time modulates every block (Peebles and Xie, arXiv 2212.09748, adaLN-Zero). Rotated queries and keys tell a
token's place (Su et al., arXiv 2104.09864); text is not rotated. A video is a picture with its frames one below the
other.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from shared_tome.attention.bias import attend
from shared_tome.core.grid import Grid

from .unet import timestep_embedding, zeroed

TIME_CHANNELS = 256
THETA = 10_000.0


@dataclass(frozen=True)
class DiTConfig:
    """Size of a DiT: patch pixels (or latents) a side of a token; double and single: how many blocks of each kind;
    frames: of a video, 1 for pictures."""

    in_channels: int = 3
    out_channels: int = 3
    patch: int = 2
    width: int = 384
    heads: int = 6
    double: int = 2
    single: int = 6
    context_dim: int = 128
    frames: int = 1

    def __post_init__(self) -> None:
        pairs = 4 if self.frames == 1 else 16
        if self.width % self.heads or self.head_channels % pairs:
            raise ValueError(
                f"width {self.width} in {self.heads} heads must give each a multiple of {pairs} channels: pairs to "
                "rotate for rows, for columns and for frames"
            )
        for name, least in (("patch", 1), ("double", 0), ("single", 0), ("frames", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} must be {least} or more, got {getattr(self, name)}")

    @property
    def head_channels(self) -> int:
        return self.width // self.heads


Rotations = tuple[Tensor, Tensor]
"""Cosines and sines [L, 1, d / 2] of each token's angles."""


def rope_rotations(text: int, grid: Grid, d: int, device: torch.device) -> Rotations:
    """Of ``text`` tokens, which stay as they are, and then those of a grid (rows, columns), row by row; float32.

    d: channels of a head. The first d / 4 pairs turn with the row, the others with the column; on a grid (frames, rows,
    columns) d / 8 turn with the frame and 3 d / 16 each with row and column.
    """
    pairs = (d // 4, d // 4) if len(grid) == 2 else (d // 8, 3 * d // 16, 3 * d // 16)
    turned = []
    for axis, (side, count) in enumerate(zip(grid, pairs, strict=True)):
        rate = THETA ** -(torch.arange(count, dtype=torch.float32, device=device) / count)
        angles = torch.arange(side, dtype=torch.float32, device=device)[:, None] * rate  # (side, count)
        turned.append(angles.view(*(side if each == axis else 1 for each in range(len(grid))), count).expand(*grid, -1))
    angles = F.pad(torch.cat(turned, dim=-1).flatten(0, -2), (0, 0, text, 0))[:, None]  # (L, 1, d / 2)
    return angles.cos(), angles.sin()


def rotate(x: Tensor, rotations: Rotations) -> Tensor:
    """x [B, L, H, d]: its pairs of neighbouring channels turned by each token's angles."""
    cos, sin = rotations
    a, b = x.float().unflatten(-1, (-1, 2)).unbind(-1)  # (B, L, H, d / 2)
    return torch.stack((a * cos - b * sin, a * sin + b * cos), dim=-1).flatten(-2).to(x.dtype)


class RMSNorm(nn.Module):
    """Zhang and Sennrich, "Root Mean Square Layer Normalization" (arXiv 1910.07467), of x [..., d]."""

    def __init__(self, d: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(d))

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x.float(), self.scale.shape, self.scale.float(), 1e-6).to(x.dtype)


class JointAttention(nn.Module):
    """One softmax over text and image tokens. ToMe's stand-in (fidelity/hooks.py) takes its place."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor, text: int) -> Tensor:
        """q, k, v [B, L, H, d] -> [B, L, H * d]. The first ``text`` of the L tokens are text."""
        return attend(*(x.transpose(1, 2) for x in (q, k, v))).transpose(1, 2).flatten(2)


class Heads(nn.Module):
    """Projections [B, L, 3 * width] into q, k and v [B, L, H, d], q and k normalised."""

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        self.heads = config.heads
        self.q_norm, self.k_norm = RMSNorm(config.head_channels), RMSNorm(config.head_channels)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = x.unflatten(-1, (3, self.heads, -1)).unbind(2)
        return self.q_norm(q), self.k_norm(k), v


class Modulation(nn.Module):
    """``count`` vectors [B, 1, width] from that of the time [B, width]; zeros at first."""

    def __init__(self, width: int, count: int) -> None:
        super().__init__()
        self.count = count
        self.linear = zeroed(nn.Linear(width, count * width))

    def forward(self, time: Tensor) -> tuple[Tensor, ...]:
        return self.linear(F.silu(time))[:, None].chunk(self.count, dim=-1)


def modulated(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """x [B, L, width], normalised, times (1 + scale) plus shift [B, 1, width]."""
    return F.layer_norm(x, x.shape[-1:], eps=1e-6) * (1 + scale) + shift


class Stream(nn.Module):
    """The half of a double block that is for text alone, or for the image."""

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        width = config.width
        self.modulation = Modulation(width, 6)
        self.qkv = nn.Linear(width, 3 * width)
        self.heads = Heads(config)
        self.out = nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU("tanh"), nn.Linear(4 * width, width))

    def ask(self, x: Tensor, parts: tuple[Tensor, ...]) -> tuple[Tensor, Tensor, Tensor]:
        """q, k and v [B, l, H, d] of its tokens [B, l, width]; parts: its modulation."""
        return self.heads(self.qkv(modulated(x, *parts[:2])))

    def answer(self, x: Tensor, attended: Tensor, parts: tuple[Tensor, ...]) -> Tensor:
        """Its tokens after the block; attended: [B, l, width]."""
        gate, shift, scale, mlp_gate = parts[2:]
        x = x + gate * self.out(attended)
        return x + mlp_gate * self.mlp(modulated(x, shift, scale))


class DoubleBlock(nn.Module):
    """Text [B, T, width] and image [B, N, width], each with weights of its own, in one attention."""

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        self.text, self.image = Stream(config), Stream(config)
        self.attention = JointAttention()

    def forward(self, text: Tensor, image: Tensor, time: Tensor, rotations: Rotations) -> tuple[Tensor, Tensor]:
        count = text.shape[1]
        by_text, by_image = self.text.modulation(time), self.image.modulation(time)
        asked = zip(self.text.ask(text, by_text), self.image.ask(image, by_image), strict=True)
        q, k, v = (torch.cat(both, dim=1) for both in asked)  # (B, L, H, d)
        out = self.attention(rotate(q, rotations), rotate(k, rotations), v, count)  # (B, L, width)
        return self.text.answer(text, out[:, :count], by_text), self.image.answer(image, out[:, count:], by_image)


class SingleBlock(nn.Module):
    """Text and image tokens [B, L, width] with the same weights; the MLP runs beside the attention."""

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        width = config.width
        self.parts = (3 * width, 4 * width)
        self.modulation = Modulation(width, 3)
        self.into = nn.Linear(width, sum(self.parts))
        self.heads = Heads(config)
        self.out = nn.Linear(5 * width, width)
        self.attention = JointAttention()

    def forward(self, x: Tensor, text: int, time: Tensor, rotations: Rotations) -> Tensor:
        shift, scale, gate = self.modulation(time)
        qkv, inner = self.into(modulated(x, shift, scale)).split(self.parts, dim=-1)
        q, k, v = self.heads(qkv)
        attended = self.attention(rotate(q, rotations), rotate(k, rotations), v, text)
        return x + gate * self.out(torch.cat((attended, F.gelu(inner, approximate="tanh")), dim=-1))


class DiT(nn.Module):
    """Predicts the flow from a noisy picture or latent."""

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        self.config = config
        width, values = config.width, config.patch**2
        self.time_embed = nn.Sequential(nn.Linear(TIME_CHANNELS, width), nn.SiLU(), nn.Linear(width, width))
        self.text_in = nn.Linear(config.context_dim, width)
        self.image_in = nn.Linear(values * config.in_channels, width)
        self.double_blocks = nn.ModuleList(DoubleBlock(config) for _ in range(config.double))
        self.single_blocks = nn.ModuleList(SingleBlock(config) for _ in range(config.single))
        self.last_modulation = Modulation(width, 2)
        self.out = zeroed(nn.Linear(width, values * config.out_channels))

    def grid(self, height: int, width: int) -> Grid:
        """(rows, columns) of a picture's tokens, (frames, rows, columns) of a video's.

        height: of all frames. Raises ValueError where the sides of a frame are no multiple of the patch.
        """
        patch, frames = self.config.patch, self.config.frames
        if height % (patch * frames) or width % patch:
            raise ValueError(f"sides must be multiples of the patch, {patch}, got {height / frames:g}x{width}")
        rows, columns = height // frames // patch, width // patch
        return (rows, columns) if frames == 1 else (frames, rows, columns)

    def forward(self, x: Tensor, timesteps: Tensor, context: Tensor) -> Tensor:
        """The prediction [B, out_channels, H, W] for noisy pictures or latents.

        x: [B, in_channels, H, W], noisy, of about unit variance; a video's frames are one below the other.
        timesteps: [B], 0 to 999, where 999 is pure noise.
        context: [B, M, context_dim], the tokens of a class: the text.
        """
        grid, count = self.grid(*x.shape[-2:]), context.shape[1]
        time = self.time_embed(timestep_embedding(timesteps, TIME_CHANNELS).to(x.dtype))  # (B, width)
        rotations = rope_rotations(count, grid, self.config.head_channels, x.device)
        patches = F.pixel_unshuffle(x, self.config.patch).flatten(2).transpose(1, 2)  # (B, N, C * p * p), row by row
        text, image = self.text_in(context.to(x.dtype)), self.image_in(patches)
        for block in self.double_blocks:
            text, image = block(text, image, time, rotations)
        both = torch.cat((text, image), dim=1)  # (B, L, width)
        for block in self.single_blocks:
            both = block(both, count, time, rotations)
        out = self.out(modulated(both[:, count:], *self.last_modulation(time)))  # (B, N, C * p * p)
        return F.pixel_shuffle(out.transpose(1, 2).unflatten(2, (-1, grid[-1])), self.config.patch)
