"""One step of diffusers' SD1.5 and SDXL U-Nets, full size, random weights: `python -m lab.speed.step --out step.csv`.

One picture with guidance, half precision. Everything is counted: seeds, draws, matches, merging and unmerging. The
variants take turns on the same inputs, eagerly or each captured as a CUDA graph (then without the gaps between
launches). In a graph timestep and step number are tensors, so that a host could replay it for every step; after
capturing, each is replayed at another timestep and compared with an eager call there.

"limit" leaves the attention of the layers that are merged out altogether: nothing at the same layers can be faster.
"half at no cost" runs it among half the tokens and counts nothing else: the bound of "merge" and tomesd at 0.5.
tomesd merges at the same levels; "unmerged again" shows how far two rows of the same lie apart. "downsample" is ToDo's
rule and "merge_queries" the one of ComfyUI's own node, both in this project's code. Steps that a schedule leaves
unmerged are not timed: they cost what "unmerged" does.
"""

from __future__ import annotations

import copy
import math
from argparse import Namespace
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from shared_tome import ToMeConfig, apply_patch
from shared_tome.core.grid import grid_at
from shared_tome.scripts.hooks import served_blocks

from ..timing import take_turns
from .common import (
    BACKENDS,
    DTYPES,
    Arguments,
    Job,
    attention_by,
    captured,
    options_of,
    run_jobs,
    step_columns,
    turn_of,
)

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


def made_ready(
    model: nn.Module, name: str, variant: str, inputs: Inputs, levels: tuple[int, ...], mode: str
) -> tuple[Callable[[], Any] | None, str]:
    """(what is timed, warmed up; a remark). None where this variant cannot run here, and the remark says why."""
    try:
        step = Step(model, name, variant, inputs, levels)
    except ImportError as error:
        return None, f"not installed: {error.name}"
    step()
    if mode == "eager":
        return step, ""
    try:
        replay = captured(step, step.generators)
    except Exception as error:  # whatever a foreign patch does that a capture does not allow
        torch.cuda.synchronize()
        return None, f"cannot be captured: {type(error).__name__}: {str(error).splitlines()[0][:80]}"
    return replay, "" if variant == TOMESD else differs(step, replay, inputs)  # tomesd draws anew in each call


def differs(step: Step, replay: Callable[[], Any], inputs: Inputs) -> str:
    """Says so where a graph, replayed at another timestep, is not what an eager call gives there."""
    out = step.out
    before = inputs.timestep.clone()
    inputs.timestep.copy_(inputs.timesteps[1])
    replay()
    found, expected = out.clone(), step()
    inputs.timestep.copy_(before)
    if torch.equal(found, expected):
        return ""
    worst = float((found.float() - expected.float()).abs().max() / expected.float().abs().max())
    return f"replayed at another step: off by {worst:.1e} of the largest value"


def measure(model: nn.Module, job: Job, variants: Sequence[str], args: Namespace) -> Iterator[dict[str, Any]]:
    """The rows of one model, size, mode and attention backend, all from the same rounds."""
    name, pixels = job["model"], job["pixels"]
    inputs, levels = Inputs(name, pixels, args.device, DTYPES[args.dtype]), levels_of(name, pixels)
    turns, remarks = {}, {}
    with attention_by(job["backend"]):
        for variant in variants:
            call, remarks[variant] = made_ready(model, name, variant, inputs, levels, job["mode"])
            if call is not None:
                turns[variant] = turn_of(call, args.device)
        found = take_turns(turns, args.seconds, args.least)
    for variant in variants:
        times = found.get(variant)
        yield {
            "levels": " ".join(map(str, levels)), "batch": 2, "variant": variant,
            **step_columns(found["unmerged"], times), "rounds": len(times or ()), "remark": remarks[variant],
            "device": args.device,
        }  # fmt: skip


def main() -> None:
    parser = Arguments(__doc__, "float16", (3.0, 5))
    parser.some_of("--models", MODELS, ["sd15", "sdxl"], ["tiny"])
    parser.add_argument("--pixels", nargs="+", type=int, help="those of the model's sizes alone")
    parser.some_of("--modes", ["graph", "eager"], ["graph", "eager"], ["eager"])
    parser.some_of("--backends", ["default", *BACKENDS], ["cudnn", "flash", "efficient"], ["default"])
    parser.some_of("--variants", VARIANTS, VARIANTS)
    args = parser.parsed()
    if not args.on_gpu and "graph" in args.modes:
        parser.error("mode graph needs a GPU")
    jobs = [
        {"model": name, "pixels": pixels, "mode": mode, "backend": backend, "dtype": args.dtype}
        for backend in args.backends
        for mode in args.modes
        for name in args.models
        for pixels in MODELS[name].pixels
        if args.pixels is None or pixels in args.pixels
    ]
    model = lru_cache(lambda name: build(name, args.device, DTYPES[args.dtype]))
    run_jobs(args, jobs, measure, model=model, packages=("diffusers", "tomesd", "triton"))


if __name__ == "__main__":
    main()
