"""Small models of diffusers' own classes with fixed random weights."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from shared_tome.scripts.hooks import served_blocks

diffusers = pytest.importorskip("diffusers", reason="diffusers is not installed, see requirements/test.txt")


def seeded(make: Any, seed: int = 0) -> Any:
    """make() with weights that depend on nothing else."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = make().eval()
        for name, weight in model.named_parameters():
            if name.endswith(("attn1.to_q.weight", "attn1.to_k.weight")):
                weight.data *= 4  # attention that tells tokens apart
    return model.requires_grad_(False)


def sd15(**more: Any) -> nn.Module:
    """Attention at levels 0 and 1, as SD 1.x."""
    return seeded(
        lambda: diffusers.UNet2DConditionModel(
            sample_size=16, in_channels=4, out_channels=4, block_out_channels=(16, 32), layers_per_block=1,
            down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
            cross_attention_dim=16, attention_head_dim=2, norm_num_groups=8, **more,
        )
    )  # fmt: skip


def one_level() -> nn.Module:
    """Three layers of attention, for what is compiled."""
    return seeded(
        lambda: diffusers.UNet2DConditionModel(
            sample_size=16, in_channels=4, out_channels=4, block_out_channels=(16,), layers_per_block=1,
            down_block_types=("CrossAttnDownBlock2D",), up_block_types=("CrossAttnUpBlock2D",), mid_block_type=None,
            cross_attention_dim=16, attention_head_dim=2, norm_num_groups=8,
        )
    )  # fmt: skip


def two_levels() -> nn.Module:
    """Three layers of level 0 and one of level 1, for what is compiled."""
    return seeded(
        lambda: diffusers.UNet2DConditionModel(
            sample_size=16, in_channels=4, out_channels=4, block_out_channels=(16, 32), layers_per_block=1,
            down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D"), mid_block_type=None,
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
            cross_attention_dim=16, attention_head_dim=2, norm_num_groups=8,
        )
    )  # fmt: skip


def sdxl() -> nn.Module:
    """Attention at levels 1 and 2, several blocks deep, as SDXL."""
    return seeded(
        lambda: diffusers.UNet2DConditionModel(
            sample_size=16, in_channels=4, out_channels=4, block_out_channels=(16, 32, 32), layers_per_block=1,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            cross_attention_dim=16, attention_head_dim=(2, 4, 4), transformer_layers_per_block=(1, 2, 3),
            use_linear_projection=True, addition_embed_type="text_time", addition_time_embed_dim=8,
            projection_class_embeddings_input_dim=6 * 8 + 16, norm_num_groups=8,
        )
    )  # fmt: skip


UNETS = {"sd15": sd15, "sdxl": sdxl}


def noise(*shape: int, seed: int = 0) -> Tensor:
    """Random numbers that depend on the seed alone."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def run(unet: nn.Module, height: int = 16, width: int = 20, timestep: Any = 500, batch: int = 2) -> Tensor:
    """One call of a U-Net. Each row has an image and a prompt of its own."""
    kwargs = {}
    if unet.config.addition_embed_type == "text_time":
        kwargs["added_cond_kwargs"] = {"text_embeds": noise(batch, 16, seed=3), "time_ids": noise(batch, 6, seed=4)}
    x, context = noise(batch, 4, height, width, seed=1), noise(batch, 7, 16, seed=2)
    return unet(x, timestep, encoder_hidden_states=context, **kwargs).sample


def check_threads(unet: nn.Module, parts: Any) -> None:
    """Two calls of different sizes that are in the same parts of each block at once come out as each alone.

    parts: of a block, the modules at which they wait for each other.
    """
    sizes, found = [(16, 20), (8, 24)], {}
    wanted = {size: run(unet, *size) for size in sizes}
    barrier = threading.Barrier(2, timeout=20)

    def meet(module: nn.Module, args: tuple) -> None:
        barrier.wait()

    for block in served_blocks(unet):
        for part in parts(block):
            part.register_forward_pre_hook(meet)

    def work(size: tuple[int, int]) -> None:
        found[size] = run(unet, *size)

    threads = [threading.Thread(target=work, args=(size,)) for size in sizes]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 2 and all(torch.equal(found[size], wanted[size]) for size in sizes)


def pipeline(unet: nn.Module | None = None) -> Any:
    """A pipeline around a U-Net; prompts come as embeddings."""
    vae = seeded(lambda: diffusers.AutoencoderKL(block_out_channels=(8,), latent_channels=4, norm_num_groups=8))
    pipe = diffusers.StableDiffusionPipeline(
        vae=vae, text_encoder=None, tokenizer=None, unet=unet or sd15(),
        scheduler=diffusers.DDIMScheduler(steps_offset=1, clip_sample=False),
        safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip
    pipe.set_progress_bar_config(disable=True)
    return pipe


def generate(pipe: Any, steps: int = 3, seed: int = 7) -> Tensor:
    """A latent of the pipeline, [1, 4, 16, 16]."""
    return pipe(
        prompt_embeds=noise(1, 7, 16, seed=2), negative_prompt_embeds=noise(1, 7, 16, seed=3),
        latents=noise(1, 4, 16, 16), num_inference_steps=steps, output_type="latent",
        generator=torch.Generator().manual_seed(seed),
    ).images  # fmt: skip


def flux() -> nn.Module:
    return seeded(
        lambda: diffusers.FluxTransformer2DModel(
            patch_size=1, in_channels=8, num_layers=1, num_single_layers=2, attention_head_dim=16,
            num_attention_heads=2, joint_attention_dim=16, pooled_projection_dim=8, axes_dims_rope=(4, 6, 6),
        )
    )  # fmt: skip


ALL = slice(None)


@torch.no_grad()
def run_flux(
    model: nn.Module,
    height: int = 6,
    width: int = 10,
    reference: int = 0,
    timestep: float = 0.5,
    rows: slice = ALL,
    **told: Any,
) -> Tensor:
    """One call, with as many reference tokens behind the image's. rows: which of the batch of two."""
    y, x = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    ids = torch.stack((torch.zeros_like(y), y, x), dim=-1).reshape(-1, 3).float()
    ids = torch.cat((ids, torch.tensor([[1.0, 0.0, 0.0]]).expand(reference, 3)))
    return model(
        hidden_states=noise(2, len(ids), 8, seed=1)[rows], encoder_hidden_states=noise(2, 5, 16, seed=2)[rows],
        pooled_projections=noise(2, 8, seed=3)[rows], timestep=torch.full((2,), timestep)[rows],
        img_ids=ids, txt_ids=torch.zeros(5, 3), **told,
    ).sample  # fmt: skip


def sd3() -> nn.Module:
    return seeded(
        lambda: diffusers.SD3Transformer2DModel(
            sample_size=16, patch_size=2, in_channels=4, num_layers=2, attention_head_dim=16, num_attention_heads=2,
            joint_attention_dim=16, caption_projection_dim=32, pooled_projection_dim=8, out_channels=4,
            pos_embed_max_size=16, dual_attention_layers=(0,), qk_norm="rms_norm",
        )
    )  # fmt: skip


@torch.no_grad()
def run_sd3(
    model: nn.Module, height: int = 6, width: int = 10, timestep: float = 500.0, rows: slice = ALL, **told: Any
) -> Tensor:
    return model(
        hidden_states=noise(2, 4, 2 * height, 2 * width, seed=1)[rows],
        encoder_hidden_states=noise(2, 5, 16, seed=2)[rows],
        pooled_projections=noise(2, 8, seed=3)[rows], timestep=torch.full((2,), timestep)[rows], **told,
    ).sample  # fmt: skip


class Torchs:
    """Another's processor that meets there: torch's attention, of keys from what is given or from the tokens."""

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, **kwargs):
        context = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        q, k, v = (
            project(x).unflatten(-1, (attn.heads, -1)).transpose(1, 2)
            for project, x in ((attn.to_q, hidden_states), (attn.to_k, context), (attn.to_v, context))
        )
        return attn.to_out[0](F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


def put_forward(module: nn.Module) -> None:
    """In the place of its forward, as another's code would."""
    kept = module.forward
    module.forward = lambda *args, **kwargs: kept(*args, **kwargs)


def put_processor(attention: nn.Module) -> None:
    """One in a module that is not diffusers', as those that collect maps."""
    kept = type(attention.processor)
    attention.set_processor(type("Keeps", (kept,), {"__module__": __name__})())


def count_hooks(model: nn.Module) -> int:
    """How many hooks are on a model and all its parts."""
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())
