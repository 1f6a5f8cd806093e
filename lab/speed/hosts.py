"""A real ComfyUI's KSampler with its full-size U-Nets: `COMFYUI_DIR=... python -m lab.speed.hosts`.

Weights are random: what is timed does not depend on them. Whole steps are timed, guidance included, from the
sampler's callback, the GPU synchronised at each. The variants take turns, a short run of the sampler each, so that a
drift of the machine meets them all; the first run of each and the first two steps of every run do not count. "limit"
leaves the merged layers' attention out altogether: no method can be faster at the same levels.
"""

from __future__ import annotations

import time
from argparse import Namespace
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import lru_cache
from importlib import import_module
from typing import Any

import torch

from installer import inprocess

from ..timing import take_turns
from .common import BACKENDS, DTYPES, Arguments, Job, options_of, priority, run_jobs, step_columns
from .step import left_out

# name: (class in comfy.supported_models, channels of the prompt, channels of level 0, min_tokens). tiny: for a try.
MODELS = {"sd15": ("SD15", 768, 320, 2048), "sdxl": ("SDXL", 2048, 320, 2048), "tiny": ("SD15", 768, 32, 64)}
VARIANTS = (
    "unmerged",
    "unmerged again",  # how far two rows of the same lie apart
    *("sample 0.5", "sample 0.75", "sample 0.9375"),
    "sample 0.9375 from 0.1",  # the sampler is asked how far it is before each step: the GPU is waited for
    *("sample 0.75, own token", "sample 0.9375, own token", "downsample 0.75", "merge 0.5", "merge 0.75"),
    *("comfyui core 0.5", "limit"),
)


def build(kind: str, device: torch.device, dtype: torch.dtype, seed: int | None = None) -> Any:
    """A ModelPatcher around a full-size U-Net of ComfyUI's with random weights.

    seed: for outcomes to be compared: always the same weights, and such that each layer counts.
    """
    import comfy.supported_models

    name, _, channels, _ = MODELS[kind]
    model_class = getattr(comfy.supported_models, name)
    unet = dict(model_class.unet_config)
    common = {
        "image_size": 32, "in_channels": 4, "out_channels": 4, "model_channels": channels,
        "use_spatial_transformer": True, "legacy": False, "dtype": dtype,
    }  # fmt: skip
    if name == "SD15":
        layout = {
            "num_res_blocks": [2, 2, 2, 2], "channel_mult": [1, 2, 4, 4], "transformer_depth": [1, 1, 1, 1, 1, 1, 0, 0],
            "transformer_depth_output": [1, 1, 1, 1, 1, 1, 1, 1, 1, 0, 0, 0], "transformer_depth_middle": 1,
            "num_heads": 8,
        }  # fmt: skip
    else:
        layout = {
            "num_res_blocks": [2, 2, 2], "channel_mult": [1, 2, 4], "transformer_depth_middle": 10,
            "transformer_depth_output": [0, 0, 0, 2, 2, 2, 10, 10, 10],
            "num_head_channels": 64, "num_heads": -1, "num_classes": "sequential",
        }  # fmt: skip
    unet.update(common, **layout)
    config = model_class(unet)
    config.unet_config = unet  # the model class overwrites the number of heads
    config.set_inference_dtype(dtype, None)
    generator = None if seed is None else torch.Generator(device).manual_seed(seed)

    def fill(name: str, parameter: torch.Tensor) -> None:
        if parameter.dim() > 1:
            deviation = 0.02 if seed is None else parameter[0].numel() ** -0.5
            parameter.normal_(0.0, deviation, generator=generator)
        else:
            parameter.fill_(0.5 if seed is None else float(name.endswith("weight")))

    return patcher(config, device, fill)


def patcher(config: Any, device: torch.device, fill: Callable[[str, torch.Tensor], Any]) -> Any:
    """A ModelPatcher around the model of one of ComfyUI's configurations. fill: sets a parameter by its name."""
    import comfy.model_patcher

    with torch.device(device):
        model = config.get_model({}, "", device=device)
    with torch.no_grad():
        for name, parameter in model.diffusion_model.named_parameters():
            fill(name, parameter)
    return comfy.model_patcher.ModelPatcher(model.to(device), device, device)


def with_tome(model: Any, options: dict[str, Any]) -> Any:
    """A clone of a ModelPatcher with the node ToMe on it."""
    patch = inprocess.pack_module("comfy_tome.patch")
    return patch.apply_to_model(model, patch.ToMeConfig(**options))


def core_node(model: Any, module: str, node: str, *inputs: Any) -> Any:
    """A clone with one of ComfyUI's own nodes on it."""
    return getattr(import_module(f"comfy_extras.{module}"), node).execute(model, *inputs)[0]


@contextmanager
def choose_attention(backend: str) -> Iterator[None]:
    """ComfyUI's PyTorch attention by this kernel where it can; "default" is ComfyUI's own order.

    Raises ValueError where ComfyUI has no such order: on the CPU, or with a torch that cannot set one.
    """
    import comfy.ops

    if backend == "default":
        yield
        return
    kept = getattr(comfy.ops, "SDPA_BACKEND_PRIORITY", None)
    if kept is None:
        raise ValueError(f"this ComfyUI sets no order of attention kernels here, so {backend!r} cannot be chosen")
    comfy.ops.SDPA_BACKEND_PRIORITY = priority(backend)
    try:
        yield
    finally:
        comfy.ops.SDPA_BACKEND_PRIORITY = kept


def sample(
    model: Any, kind: str, size: int, steps: int, images: int = 1, callback: Any = None, scheduler: str = "normal"
) -> torch.Tensor:
    """The latent [images, 4, size / 8, size / 8] that the sampler makes with guidance, always of the same seed.

    callback: called after each step. scheduler: one of ComfyUI's.
    """
    import comfy.sample

    generator = torch.Generator().manual_seed(0)
    context = torch.randn(1, 77, MODELS[kind][1], generator=generator)
    extra = {}
    if kind == "sdxl":
        extra = {"pooled_output": torch.randn(1, 1280, generator=generator), "width": size, "height": size}
    latent = torch.zeros(images, 4, size // 8, size // 8)
    noise = torch.randn(latent.shape, generator=generator)
    return comfy.sample.sample(
        model, noise, steps, 7.0, "euler", scheduler, [[context, dict(extra)]], [[-context, dict(extra)]], latent,
        callback=callback, disable_pbar=True, seed=0,
    )  # fmt: skip


def step_times(model: Any, kind: str, size: int, steps: int, images: int = 1) -> list[float]:
    """Seconds of each step but the first two, with guidance."""
    device = model.load_device
    marks = []

    def mark(*_: Any) -> None:
        # With several GPUs this one waits for the others' outcomes, so it is the last.
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        marks.append(time.perf_counter())

    sample(model, kind, size, steps, images, mark)
    return [b - a for a, b in zip(marks[1:], marks[2:], strict=False)]


def variant(model: Any, kind: str, name: str) -> Any:
    if name == "comfyui core 0.5":
        return core_node(model, "nodes_tomesd", "TomePatchModel", 0.5)
    if name in ("unmerged", "unmerged again", "limit"):
        return model
    return with_tome(model, {**options_of(name), "min_tokens": MODELS[kind][3]})


@contextmanager
def without_attention(model: Any, kind: str) -> Iterator[None]:
    """The self-attention of the layers that the defaults merge gives its input back, at no cost."""
    layers = [m.attn1 for m in model.model.diffusion_model.modules() if hasattr(m, "attn1") and hasattr(m, "attn2")]
    for layer in layers:
        layer.forward = left_out(layer.forward, MODELS[kind][3])
    try:
        yield
    finally:
        for layer in layers:
            del layer.forward


def measure(model: Any, job: Job, names: Sequence[str], args: Namespace) -> Iterator[dict[str, Any]]:
    """The rows of one model and size, all from the same rounds."""
    kind, size = job["model"], job["pixels"]

    def turn(name: str, steps: int = args.steps) -> list[float]:
        with without_attention(model, kind) if name == "limit" else nullcontext():
            return step_times(variant(model, kind, name), kind, size, steps)

    with choose_attention(job["backend"]):
        for name in names:
            turn(name, 2)  # warm
        found = take_turns({name: lambda name=name: turn(name) for name in names}, args.seconds, args.least)
    for name, times in found.items():
        columns = step_columns(found["unmerged"], times)
        yield {"variant": name, **columns, "steps": len(times), "device": args.device}


def main() -> None:
    parser = Arguments(__doc__, rounds=(12.0, 3), comfyui=True, steps=6)
    parser.some_of("--models", MODELS, ["sd15", "sdxl"])
    parser.some_of("--sizes", None, [512, 768, 1024, 1536, 2048], type=int)
    parser.some_of("--variants", VARIANTS, VARIANTS)
    parser.some_of("--attention", ["default", *BACKENDS], ["default"], dest="backends")
    args = parser.parsed()
    jobs = [
        {"host": "ComfyUI", "model": kind, "pixels": size, "backend": backend}
        for backend in args.backends
        for kind in args.models
        for size in args.sizes
        if kind != "sdxl" or size >= 1024
    ]
    dtype = DTYPES["float16" if args.on_gpu else "float32"]
    model = lru_cache(lambda kind: build(kind, torch.device(args.device), dtype))
    run_jobs(args, jobs, measure, model=model)


if __name__ == "__main__":
    main()
