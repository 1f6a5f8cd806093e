"""diffusers' U-Nets with random weights, and what can be put on them: for step.py."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from shared_tome import ToMeConfig, apply_patch
from shared_tome.core.grid import grid_at
from shared_tome.scripts.hooks import served_blocks

from .variants import options_of

STEPS = 20
# Named levels are merged whatever it costs; "default": where it pays. The last two are other people's rules in this
# project's code.
OURS = (
    *("sample 0.5", "sample 0.75", "sample 0.9375", "sample 0.75, own token", "sample 0.9375, own token", "default"),
    *("merge 0.5", "merge 0.5, shared", "downsample 0.75", "merge_queries 0.5"),
)
TOMESD, FREE, LIMIT = "tomesd 0.5", "half at no cost", "limit"
# The same once more: how far two rows of the same lie apart.
AGAIN = "unmerged again"
# tomesd is the last to be captured: where that fails, the others are done.
VARIANTS = ("unmerged", AGAIN, *OURS, FREE, LIMIT, TOMESD)


@dataclass(frozen=True)
class UNet:
    """A model, its sizes to time, and the fewest tokens of a layer that is merged.

    config: what diffusers' default, which is Stable Diffusion 1.x, has not. pooled: channels of SDXL's pooled prompt;
    0 without.
    """

    config: dict[str, Any]
    pixels: tuple[int, ...]
    pooled: int = 0
    min_tokens: int = ToMeConfig().min_tokens


MODELS: dict[str, UNet] = {
    "sd15": UNet(
        {
            "sample_size": 64, "cross_attention_dim": 768,
            "down_block_types": (*("CrossAttnDownBlock2D",) * 3, "DownBlock2D"),
        },
        (512, 768, 1024, 1536, 2048),
    ),
    "sdxl": UNet(
        {
            "sample_size": 128, "block_out_channels": (320, 640, 1280), "cross_attention_dim": 2048,
            "attention_head_dim": (5, 10, 20),
            "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            "transformer_layers_per_block": (1, 2, 10), "use_linear_projection": True,
            "addition_embed_type": "text_time", "addition_time_embed_dim": 256,
            "projection_class_embeddings_input_dim": 2816,
        },
        (1024, 1536, 2048),
        pooled=1280,
    ),
    "tiny": UNet(
        {
            "sample_size": 16, "layers_per_block": 1, "norm_num_groups": 8,
            "block_out_channels": (16, 32), "cross_attention_dim": 24, "attention_head_dim": 2,
            "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
            "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
        },
        (128,),
        min_tokens=128,
    ),
}  # fmt: skip


def build(name: str, device: str, dtype: torch.dtype) -> nn.Module:
    """The U-Net, with weights as torch draws them: what is timed does not depend on them."""
    from diffusers import UNet2DConditionModel
    from diffusers.utils import logging

    logging.set_verbosity_error()  # it warns of casts
    torch.manual_seed(0)
    with torch.device(device):
        return UNet2DConditionModel(**MODELS[name].config).to(dtype).eval()


def sharing(model: nn.Module) -> nn.Module:
    """A copy with the same weights in memory."""
    return copy.deepcopy(model, {id(x): x for x in (*model.parameters(), *model.buffers())})


def levels_of(name: str, pixels: int) -> tuple[int, ...]:
    """The levels that have layers of at least min_tokens, counted from the latent's own grid."""
    model, full = MODELS[name], (pixels // 8, pixels // 8)
    with_attention = [level for level, kind in enumerate(model.config["down_block_types"]) if "CrossAttn" in kind]
    grids = ((level, grid_at(full, level)) for level in with_attention)
    return tuple(level for level, grid in grids if grid is not None and math.prod(grid) >= model.min_tokens)


class Inputs:
    """What one step is called with: a picture with guidance. The timestep is a tensor, which a captured graph reads."""

    def __init__(self, name: str, pixels: int, device: str, dtype: torch.dtype):
        model = MODELS[name]
        generator = torch.Generator().manual_seed(1)  # on the CPU: nothing is drawn from the device's own generator

        def draw(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator).to(device, dtype)

        self.latent = draw(2, 4, pixels // 8, pixels // 8)[:1].repeat(2, 1, 1, 1)  # prompted and not: one picture
        self.prompt = draw(2, 77, model.config["cross_attention_dim"])
        self.timesteps = torch.linspace(999, 0, STEPS, device=device).round().long()
        self.timestep = self.timesteps[STEPS // 2].clone()
        self.further = None
        if model.pooled:
            sizes = torch.tensor([[float(pixels), float(pixels), 0.0, 0.0, float(pixels), float(pixels)]] * 2)
            self.further = {"text_embeds": draw(2, model.pooled), "time_ids": sizes.to(device, dtype)}


class Step:
    """One call of a U-Net with a variant on it.

    model: shared by all variants; each has modules of its own around the same parameters.
    Raises ImportError for tomesd where it is not installed.
    """

    def __init__(self, model: nn.Module, name: str, variant: str, inputs: Inputs, levels: tuple[int, ...]):
        self.inputs = inputs
        self.out: Tensor | None = None  # the last call's; a captured call's is where its graph writes
        self.unet = sharing(model)
        if variant in OURS:
            fixed = {"min_tokens": MODELS[name].min_tokens, "levels": levels or "auto"}
            config = ToMeConfig(**fixed | ({"levels": "auto"} if variant == "default" else options_of(variant)))
            # A pipeline as far as ToMe looks into it: its scheduler tells which step a timestep is.
            scheduler = SimpleNamespace(timesteps=inputs.timesteps, num_inference_steps=STEPS)
            self.pipe = apply_patch(SimpleNamespace(unet=self.unet, scheduler=scheduler), config=config)
        elif variant == TOMESD and levels:
            import tomesd

            tomesd.apply_patch(self.unet, ratio=0.5, max_downsample=2 ** max(levels))
        elif variant in (LIMIT, FREE):
            for block in served_blocks(self.unet):
                bound = _on_half if variant == FREE else left_out
                block.attn1.forward = bound(block.attn1.forward, MODELS[name].min_tokens)

    @torch.no_grad()
    def __call__(self) -> Tensor:
        given = self.inputs
        self.out = self.unet(given.latent, given.timestep, given.prompt, added_cond_kwargs=given.further).sample
        return self.out

    def generators(self) -> list[torch.Generator]:
        """What tomesd draws from; everybody else draws from nothing."""
        told = getattr(self.unet, "_tome_info", None)
        return [] if told is None or told["args"]["generator"] is None else [told["args"]["generator"]]


def left_out(forward: Callable[..., Tensor], min_tokens: int) -> Callable[..., Tensor]:
    """An attention that gives its input back, at no cost, where ToMe would merge."""

    def run(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return x if x.shape[1] >= min_tokens else forward(x, *args, **kwargs)

    return run


def _on_half(forward: Callable[..., Tensor], min_tokens: int) -> Callable[..., Tensor]:
    """What "merge" at 0.5 would be if matching, merging and unmerging cost nothing: attention among half the tokens."""

    def run(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        batch, tokens, channels = x.shape
        if tokens < min_tokens:
            return forward(x, *args, **kwargs)
        half = x.reshape(-1, channels)[: batch * (tokens // 2)].reshape(batch, -1, channels)  # a view (B, N / 2, C)
        forward(half, *args, **kwargs)
        return x

    return run
