"""Small transformers of diffusers' own classes, with fixed random weights, and one call of each.

A video's grid is (frames, rows, columns). Two rows, each with an image and a text of its own.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .models import ALL, diffusers, noise, seeded

TEXT = 5
# Made of a size at which attention shows in the output.
LOUD = ("proj_out.weight", "adaLN_modulation.0.weight", "norm1.linear.weight")
HEADS = {"attention_head_dim": 16, "num_attention_heads": 2}


def flux_ids(rows: int, columns: int) -> Tensor:
    y, x = torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij")
    return torch.stack((torch.zeros_like(y), y, x), dim=-1).reshape(-1, 3).float()


def text(rows: slice, tokens: int = TEXT) -> Tensor:
    return noise(2, tokens, 16, seed=2)[rows]


def times(rows: slice, timestep: float) -> Tensor:
    return torch.full((2,), timestep)[rows]


def chroma() -> nn.Module:
    return diffusers.ChromaTransformer2DModel(
        in_channels=8, num_layers=1, num_single_layers=1, joint_attention_dim=16, axes_dims_rope=(4, 6, 6),
        approximator_num_channels=16, approximator_hidden_dim=16, approximator_layers=1, **HEADS,
    )  # fmt: skip


def run_chroma(model: nn.Module, grid: tuple, rows: slice, mask: Tensor | None = None, **told: Any) -> Tensor:
    ids = flux_ids(*grid)
    if mask is not None:  # as its pipeline makes it
        mask = torch.cat((mask[rows].float(), torch.ones(len(mask[rows]), len(ids))), dim=1)
    return model(
        noise(2, len(ids), 8, seed=1)[rows], text(rows), times(rows, 0.5), ids, torch.zeros(TEXT, 3), mask, **told
    ).sample  # fmt: skip


def qwen(**more: Any) -> nn.Module:
    return diffusers.QwenImageTransformer2DModel(
        patch_size=1, in_channels=8, out_channels=8, num_layers=2, joint_attention_dim=16, axes_dims_rope=(4, 6, 6),
        **HEADS, **more,
    )  # fmt: skip


def run_qwen(
    model: nn.Module,
    grid: tuple,
    rows: slice,
    mask: Tensor | None = None,
    reference: tuple[int, int] = (0, 0),
    shapes: list | None = None,
    **told: Any,
) -> Tensor:
    shapes = shapes or [(1, *grid), *([(1, *reference)] if reference[0] else [])]
    count = sum(a * b * c for a, b, c in shapes)
    return model(
        hidden_states=noise(2, count, 8, seed=1)[rows], encoder_hidden_states=text(rows),
        encoder_hidden_states_mask=None if mask is None else mask[rows], timestep=times(rows, 0.5),
        img_shapes=[shapes] * len(text(rows)), **told,
    ).sample  # fmt: skip


def latent(grid: tuple, rows: slice) -> Tensor:
    """[B, 4, 2 H, 2 W], or [B, 4, T, 2 H, 2 W]."""
    return noise(2, 4, *grid[:-2], 2 * grid[-2], 2 * grid[-1], seed=1)[rows]


def wan(**more: Any) -> nn.Module:
    return diffusers.WanTransformer3DModel(
        in_channels=4, out_channels=4, text_dim=16, freq_dim=8, ffn_dim=32, num_layers=2, rope_max_seq_len=32, **HEADS,
        **more,
    )  # fmt: skip


def run_wan(
    model: nn.Module, grid: tuple, rows: slice, timestep: Any = 500.0, tokens: int = TEXT, **told: Any
) -> Tensor:
    """tokens: of the text, 512 where a picture's stand before them."""
    timestep = timestep[rows] if isinstance(timestep, Tensor) else times(rows, timestep)
    return model(latent(grid, rows), timestep, text(rows, tokens), **told).sample


def hunyuan_video(**more: Any) -> nn.Module:
    return diffusers.HunyuanVideoTransformer3DModel(
        in_channels=4, out_channels=4, num_layers=1, num_single_layers=1, num_refiner_layers=1, text_embed_dim=16,
        pooled_projection_dim=8, rope_axes_dim=(4, 6, 6), guidance_embeds=False, **HEADS, **more,
    )  # fmt: skip


def run_hunyuan_video(model: nn.Module, grid: tuple, rows: slice, mask: Tensor | None = None, **told: Any) -> Tensor:
    mask = torch.ones(2, TEXT) if mask is None else mask
    return model(
        latent(grid, rows), times(rows, 500.0), text(rows), mask[rows], noise(2, 8, seed=3)[rows], **told
    ).sample  # fmt: skip


def ltx() -> nn.Module:
    return diffusers.LTXVideoTransformer3DModel(
        in_channels=4, out_channels=4, cross_attention_dim=32, num_layers=2, caption_channels=16, **HEADS
    )


def run_ltx(model: nn.Module, grid: tuple, rows: slice, **told: Any) -> Tensor:
    frames, height, width = grid
    return model(
        noise(2, frames * height * width, 4, seed=1)[rows], text(rows), times(rows, 500.0), torch.ones(2, TEXT)[rows],
        **{"num_frames": frames, "height": height, "width": width, **told},
    ).sample  # fmt: skip


def cogvideox(**more: Any) -> nn.Module:
    return diffusers.CogVideoXTransformer3DModel(
        in_channels=4, out_channels=4, time_embed_dim=8, text_embed_dim=16, num_layers=2, max_text_seq_length=TEXT,
        use_rotary_positional_embeddings=True, **HEADS, **more,
    )  # fmt: skip


def run_cogvideox(model: nn.Module, grid: tuple, rows: slice, **told: Any) -> Tensor:
    frames = grid[0] * (model.config.patch_size_t or 1)
    x = noise(2, frames, 4, 2 * grid[1], 2 * grid[2], seed=1)[rows]
    turns = noise(grid[0] * grid[1] * grid[2], 16, seed=4)
    return model(x, text(rows), times(rows, 500.0), image_rotary_emb=(turns.cos(), turns.sin()), **told).sample


def z_image() -> nn.Module:
    return diffusers.ZImageTransformer2DModel(
        in_channels=4, dim=32, n_layers=2, n_refiner_layers=1, n_heads=2, n_kv_heads=2, cap_feat_dim=16,
        axes_dims=[4, 6, 6], axes_lens=[160, 32, 32],
    )  # fmt: skip


def run_z_image(
    model: nn.Module, grid: tuple, rows: slice, lengths: tuple[int, ...] = (TEXT, TEXT), **told: Any
) -> Tensor:
    captions = [noise(length, 16, seed=2 + row) for row, length in enumerate(lengths)]
    return torch.stack(model(list(latent((1, *grid), rows)), times(rows, 0.5), captions[rows], **told).sample)


def aura_flow() -> nn.Module:
    return diffusers.AuraFlowTransformer2DModel(
        sample_size=16, num_mmdit_layers=1, num_single_dit_layers=1, joint_attention_dim=16, caption_projection_dim=32,
        pos_embed_max_size=256, **HEADS,
    )  # fmt: skip


def run_plain(model: nn.Module, grid: tuple, rows: slice, **told: Any) -> Tensor:
    return model(latent(grid, rows), encoder_hidden_states=text(rows), timestep=times(rows, 0.5), **told).sample


def pixart() -> nn.Module:
    return diffusers.PixArtTransformer2DModel(
        in_channels=4, out_channels=8, num_layers=2, cross_attention_dim=32, sample_size=16, caption_channels=16,
        norm_num_groups=1, **HEADS,
    )  # fmt: skip


def hunyuan_dit() -> nn.Module:
    return diffusers.HunyuanDiT2DModel(
        in_channels=4, patch_size=2, sample_size=16, hidden_size=32, num_layers=4, cross_attention_dim=16,
        cross_attention_dim_t5=16, pooled_projection_dim=8, text_len=TEXT, text_len_t5=4, **HEADS,
    )  # fmt: skip


def run_hunyuan_dit(model: nn.Module, grid: tuple, rows: slice, **told: Any) -> Tensor:
    turns = noise(grid[0] * grid[1], 16, seed=4)
    return model(
        latent(grid, rows), times(rows, 500.0), text(rows), torch.ones(2, TEXT)[rows], noise(2, 4, 16, seed=5)[rows],
        torch.ones(2, 4)[rows], torch.ones(2, 6)[rows], torch.zeros(2, dtype=torch.long)[rows],
        (turns.cos(), turns.sin()), **told,
    ).sample  # fmt: skip


@dataclass(frozen=True)
class Dit:
    """make(**config), call(model, grid, rows, **told). head: tokens before the image's in its attentions; layers: how
    many of these a call has; is_video: whether its grid has frames. sharp: how much larger queries and keys are made,
    for an attention that tells tokens apart."""

    make: Callable[..., nn.Module]
    call: Callable[..., Tensor]
    layers: int = 2
    head: int = 0
    is_video: bool = False
    sharp: float = 4.0

    def model(self, **more: Any) -> nn.Module:
        def sharp() -> nn.Module:
            model = self.make(**more)
            for name, weight in model.named_parameters():
                if weight.dim() == 2 and name.endswith(("to_q.weight", "to_k.weight")):
                    weight.data *= self.sharp
                if "scale_shift" in name or name.endswith(LOUD):
                    weight.data.normal_()
            return model

        return seeded(sharp)

    @torch.no_grad()
    def run(self, model: nn.Module, grid: tuple = (6, 10), rows: slice = ALL, **told: Any) -> Tensor:
        """grid: an image's (rows, columns); a video has three such frames."""
        return self.call(model, (3, *grid) if self.is_video and len(grid) == 2 else grid, rows, **told)


DITS = {
    "Chroma": Dit(chroma, run_chroma, head=TEXT),
    "QwenImage": Dit(qwen, run_qwen, head=TEXT),
    "AuraFlow": Dit(aura_flow, run_plain, head=8 + TEXT),
    "ZImage": Dit(z_image, run_z_image),
    "PixArt": Dit(pixart, run_plain, sharp=0.5),  # without norms of queries and keys
    "HunyuanDiT": Dit(hunyuan_dit, run_hunyuan_dit, layers=4),
    "Wan": Dit(wan, run_wan, is_video=True),
    "HunyuanVideo": Dit(hunyuan_video, run_hunyuan_video, is_video=True),
    "LTXVideo": Dit(ltx, run_ltx, is_video=True),
    "CogVideoX": Dit(cogvideox, run_cogvideox, head=TEXT, is_video=True),
}
