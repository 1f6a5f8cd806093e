"""ToMe in ComfyUI's Flux, Qwen-Image and Wan 14B: `COMFYUI_DIR=... python -m lab.speed.dit --out dit.csv`.

The real classes in bfloat16 with blocks of full size, random weights and few of them, called as the sampler calls
them, ToMe through its node's own way. `step_ms` is what a model of full depth would take: the time
of the blocks, each kind times its depth, and the rest once; `measured_ms` is what was run. One image or video and no
guidance (guidance by two calls doubles both). "limit" leaves the attention itself out, its projections stay.
"unweighted" gives each sampled token the weight of one, which is wrong beside text and shows what weighing costs.
"""

from __future__ import annotations

import math
from argparse import Namespace
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from ..timing import Moment, columns, spread, take_turns
from .common import BACKENDS, DTYPES, Arguments, Job, options_of, run_jobs
from .hosts import choose_attention, patcher, with_tome


@dataclass(frozen=True)
class DiT:
    """A model: its class in comfy.supported_models and unet_config.

    depths: where its blocks are: (how many are made here, how many the real model has).
    text: (tokens, channels) of the prompt; told: further arguments of apply_model by shape.
    latents: [B, C, ...] by the name of the size. patch: of the latent's last dimensions.
    """

    supported: str
    config: dict[str, Any]
    depths: dict[str, tuple[int, int]]
    text: tuple[int, int]
    latents: dict[str, tuple[int, ...]]
    patch: tuple[int, ...]
    told: dict[str, tuple[int, ...]]
    joint: bool = True  # image and text in one attention

    def tokens(self, size: str) -> int:
        """The image's or video's."""
        shape = self.latents[size][-len(self.patch) :]
        return math.prod(-(-length // side) for length, side in zip(shape, self.patch, strict=True))


_FLUX = {
    "image_model": "flux", "in_channels": 16, "out_channels": 16, "vec_in_dim": 768, "context_in_dim": 4096,
    "hidden_size": 3072, "mlp_ratio": 4.0, "num_heads": 24, "depth": 2, "depth_single_blocks": 4,
    "axes_dim": [16, 56, 56], "theta": 10000, "patch_size": 2, "qkv_bias": True, "guidance_embed": True,
    "txt_ids_dims": [],
}  # fmt: skip
_WAN = {
    "image_model": "wan2.1", "model_type": "t2v", "dim": 5120, "in_dim": 16, "out_dim": 16, "ffn_dim": 13824,
    "num_heads": 40, "num_layers": 3, "text_dim": 4096, "freq_dim": 256, "patch_size": (1, 2, 2), "qk_norm": True,
    "cross_attn_norm": True,
}  # fmt: skip
_QWEN = {
    "image_model": "qwen_image", "in_channels": 64, "out_channels": 16, "num_layers": 3, "attention_head_dim": 128,
    "num_attention_heads": 24, "joint_attention_dim": 3584, "axes_dims_rope": (16, 56, 56),
}  # fmt: skip
_IMAGE = (2, 2)

MODELS: dict[str, DiT] = {
    "flux": DiT(
        "Flux", _FLUX, {"double_blocks": (2, 19), "single_blocks": (4, 38)}, (512, 4096),
        {"1024²": (1, 16, 128, 128), "2048²": (1, 16, 256, 256)}, _IMAGE, {"y": (1, 768), "guidance": (1,)},
    ),
    "qwen": DiT(
        "QwenImage", _QWEN, {"transformer_blocks": (3, 60)}, (128, 3584), {"1328²": (1, 16, 1, 166, 166)}, _IMAGE, {},
    ),
    "wan": DiT(
        "WAN21_T2V", _WAN, {"blocks": (3, 40)}, (512, 4096),
        {"832x480, 81 frames": (1, 16, 21, 60, 104), "1280x720, 81 frames": (1, 16, 21, 90, 160)}, (1, 2, 2), {},
        joint=False,
    ),
    "flux-tiny": DiT(
        "Flux",
        {**_FLUX, "vec_in_dim": 32, "context_in_dim": 48, "hidden_size": 64, "num_heads": 2, "axes_dim": [8, 12, 12],
         "depth": 1, "depth_single_blocks": 2},
        {"double_blocks": (1, 19), "single_blocks": (2, 38)}, (7, 48), {"192x128": (1, 16, 16, 24)}, _IMAGE,
        {"y": (1, 32), "guidance": (1,)},
    ),
    "wan-tiny": DiT(
        "WAN21_T2V", {**_WAN, "dim": 64, "ffn_dim": 128, "num_heads": 2, "num_layers": 2, "text_dim": 48},
        {"blocks": (2, 40)}, (7, 48), {"96x64, 9 frames": (1, 16, 3, 8, 12)}, (1, 2, 2), {}, joint=False,
    ),
}  # fmt: skip


_COUNTS = {"double_blocks": "depth", "single_blocks": "depth_single_blocks"}
"""Where blocks are, and what their number is called; elsewhere num_layers."""


def build(name: str, device: torch.device, dtype: torch.dtype, whole: bool = False) -> Any:
    """A ModelPatcher. Call installer.inprocess.start() first. whole: with as many blocks as the real model has."""
    import comfy.supported_models

    which = MODELS[name]
    layout = dict(which.config)
    if whole:
        layout |= {_COUNTS.get(place, "num_layers"): depth for place, (_, depth) in which.depths.items()}
    config = getattr(comfy.supported_models, which.supported)(dict(layout))
    config.unet_config = layout  # the class adds to what it is given
    config.set_inference_dtype(dtype, None)
    return patcher(config, device, lambda _, p: p.normal_(0.0, 0.02) if p.dim() > 1 else p.fill_(0.5))


class ModelInputs:
    """One call of the model at one size, as the sampler makes it."""

    def __init__(self, name: str, size: str, device: torch.device):
        which, generator = MODELS[name], torch.Generator().manual_seed(0)

        def draw(shape: tuple[int, ...]) -> Tensor:
            return torch.randn(shape, generator=generator).to(device)

        self.x = draw(which.latents[size])
        self.sigma = torch.full((1,), 0.7, device=device)
        self.told = {"c_crossattn": draw((1, *which.text)), **{key: draw(shape) for key, shape in which.told.items()}}
        self.levels = torch.linspace(1.0, 0.0, 21, device=device)

    @torch.no_grad()
    def __call__(self, model: Any) -> Tensor:
        options = dict(model.model_options["transformer_options"])
        options["wrappers"] = {kind: dict(keyed) for kind, keyed in model.wrappers.items()}
        options.update(sigmas=self.sigma, sample_sigmas=self.levels, cond_or_uncond=[0])
        return model.model.apply_model(self.x, self.sigma, transformer_options=options, **self.told)


def without_attention(model: Any, tokens: int) -> Any:
    """A clone whose attentions of `tokens` or more to themselves give their queries back, at next to no cost."""

    def skip(func: Any, q: Tensor, k: Tensor, v: Tensor, heads: int, *args: Any, **kwargs: Any) -> Tensor:
        split = kwargs.get("skip_reshape")
        if q.shape[2 if split else 1] != k.shape[2 if split else 1] or q.shape[2 if split else 1] < tokens:
            return func(q, k, v, heads, *args, **kwargs)
        if kwargs.get("skip_output_reshape"):
            return q if split else q.unflatten(-1, (heads, -1)).transpose(1, 2)  # (B, H, L, d)
        return q.transpose(1, 2).flatten(2) if split else q  # (B, L, H * d)

    clone = model.clone()
    clone.model_options["transformer_options"]["optimized_attention_override"] = skip
    return clone


class BlockClock:
    """How long a call and each of its blocks take, the GPU's work included."""

    def __init__(self, model: Any, name: str, device: torch.device):
        self.depths, self.device = MODELS[name].depths, device
        self.kinds = {kind: getattr(model.model.diffusion_model, kind) for kind in self.depths}

    def time(self, call: Any) -> tuple[float, float]:
        """(milliseconds of this call, of one with as many blocks as the real model has)."""
        marks: dict[str, list[Moment]] = {kind: [] for kind in self.kinds}  # before and after each block
        with ExitStack() as hooks:
            for kind, blocks in self.kinds.items():

                def mark(*_: Any, kind: str = kind) -> None:
                    marks[kind].append(Moment(self.device))

                for block in blocks:
                    hooks.callback(block.register_forward_pre_hook(mark).remove)
                    hooks.callback(block.register_forward_hook(mark).remove)
            start = Moment(self.device)
            call()
            total = full = Moment(self.device) - start
        for kind, (made, depth) in self.depths.items():
            times = [after - before for before, after in zip(marks[kind][::2], marks[kind][1::2], strict=True)]
            if len(times) != made:
                raise RuntimeError(f"{len(times)} calls of {kind}, {made} were expected")
            # What a call sets up for all blocks is in its first one, once; that must not be taken for every block's.
            later = times[1:] or times
            full += (depth - made) * sum(later) / len(later)
        return total, full


VARIANTS = (
    *("unmerged", "sample 0.5", "sample 0.75", "sample 0.9375", "sample 0.75, own token", "sample 0.9375, own token"),
    *("sample 0.75, unweighted", "sample 0.9375, unweighted", "multires 0.67", "multires 0.77", "multires 0.84"),
    *("multires 0.77, where it pays", "merge 0.25", "merge 0.5", "limit"),
)


def variant(model: Any, name: str, tokens: int) -> Any:
    if name in ("unmerged", "limit"):
        return without_attention(model, tokens) if name == "limit" else model
    # Whatever it costs: levels "auto" would leave alone what does not pay, and not show what it costs.
    return with_tome(model, {"min_tokens": min(tokens, 2048), "levels": "0", **options_of(name)})


def measure(model: Any, job: Job, names: Sequence[str], args: Namespace) -> Iterator[dict[str, Any]]:
    """The rows of one model and size, all from the same rounds."""
    name, size = job["model"], job["size"]
    which, device = MODELS[name], model.load_device
    call, clock, tokens = ModelInputs(name, size, device), BlockClock(model, name, device), which.tokens(size)
    turns = {}
    with choose_attention(job["backend"]):
        for each in names:
            clone = variant(model, each, tokens)
            call(clone)  # warm
            turns[each] = lambda clone=clone: [clock.time(lambda: call(clone))]
        found = take_turns(turns, args.seconds, args.least)
    full = {each: spread([times[1] for times in all_times]) for each, all_times in found.items()}
    base = full["unmerged"]["median"]
    made, depth = (" + ".join(map(str, counts)) for counts in zip(*which.depths.values(), strict=True))
    for each in names:
        yield {
            "tokens": tokens, "text": which.text[0] if which.joint else 0, "blocks": made, "depth": depth,
            "variant": each, **columns(full[each], "step_ms", "step_"),
            "speedup": f"{base / full[each]['median']:.3f}",
            "measured_ms": spread([times[0] for times in found[each]])["median"],
            "attention_share": f"{1 - full['limit']['median'] / base:.3f}" if "limit" in full else "",
            "rounds": len(found[each]), "device": device.type,
        }  # fmt: skip


def main() -> None:
    parser = Arguments(__doc__, "bfloat16", (4.0, 3), comfyui=True)
    parser.some_of("--models", MODELS, ["flux", "qwen", "wan"], ["flux-tiny", "wan-tiny"])
    parser.some_of("--backends", ["default", *BACKENDS], ["cudnn", "flash"], ["default"])
    parser.some_of("--variants", VARIANTS, VARIANTS)
    args = parser.parsed()
    jobs = [
        {"model": name, "size": size, "backend": backend, "dtype": args.dtype}
        for name in args.models
        for size in MODELS[name].latents
        for backend in args.backends
    ]
    # One at a time: two of them fill a GPU.
    model = lru_cache(1)(lambda name: build(name, torch.device(args.device), DTYPES[args.dtype]))
    run_jobs(args, jobs, measure, model=model)


if __name__ == "__main__":
    main()
