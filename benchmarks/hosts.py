"""A real ComfyUI's KSampler with its full-size U-Nets: `COMFYUI_DIR=... python -m benchmarks.hosts`.

Weights are random: what is timed does not depend on them. Whole steps are timed, guidance included, from the
sampler's callback, the GPU synchronised at each. "limit" leaves the merged layers' attention out altogether: no
method can be faster at the same levels.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from installer import inprocess

from .common import machine, save, show

MODELS = {"sd15": ("SD15", 768), "sdxl": ("SDXL", 2048)}
VARIANTS: dict[str, dict[str, Any] | None] = {
    "unmerged": None,
    "sample 0.5": {"ratio": 0.5},
    "sample 0.75": {"ratio": 0.75},
    "sample 0.9375": {"ratio": 0.9375},
    "downsample 0.75": {"ratio": 0.75, "method": "downsample"},
    "merge 0.5": {"ratio": 0.5, "method": "merge"},
    "merge 0.75": {"ratio": 0.75, "method": "merge"},
    "comfyui core 0.5": None,
    "limit": None,
}


def build(kind: str, device: torch.device, dtype: torch.dtype) -> Any:
    """A ModelPatcher around a full-size U-Net of ComfyUI's with random weights."""
    import comfy.model_management
    import comfy.model_patcher
    import comfy.supported_models

    name, context = MODELS[kind]
    model_class = getattr(comfy.supported_models, name)
    unet = dict(model_class.unet_config)
    common = {
        "image_size": 32, "in_channels": 4, "out_channels": 4, "model_channels": 320, "context_dim": context,
        "use_spatial_transformer": True, "legacy": False, "use_temporal_attention": False, "dtype": dtype,
    }  # fmt: skip
    if kind == "sd15":
        layout = {
            "num_res_blocks": [2, 2, 2, 2], "channel_mult": [1, 2, 4, 4], "transformer_depth": [1, 1, 1, 1, 1, 1, 0, 0],
            "transformer_depth_output": [1, 1, 1, 1, 1, 1, 1, 1, 1, 0, 0, 0], "transformer_depth_middle": 1,
            "num_heads": 8, "adm_in_channels": None, "use_linear_in_transformer": False,
        }  # fmt: skip
    else:
        layout = {
            "num_res_blocks": [2, 2, 2], "channel_mult": [1, 2, 4], "transformer_depth": [0, 0, 2, 2, 10, 10],
            "transformer_depth_output": [0, 0, 0, 2, 2, 2, 10, 10, 10], "transformer_depth_middle": 10,
            "num_head_channels": 64, "num_heads": -1, "adm_in_channels": 2816, "num_classes": "sequential",
            "use_linear_in_transformer": True,
        }  # fmt: skip
    unet.update(common, **layout)
    config = model_class(unet)
    config.unet_config = unet  # the model class overwrites the number of heads
    config.set_inference_dtype(dtype, None)
    with torch.device(device):
        model = config.get_model({}, "", device=device)
    with torch.no_grad():
        for parameter in model.diffusion_model.parameters():
            parameter.normal_(0.0, 0.02) if parameter.dim() > 1 else parameter.fill_(0.5)
    return comfy.model_patcher.ModelPatcher(model.to(device), device, device)


def step_times(model: Any, kind: str, size: int, steps: int) -> list[float]:
    """Seconds of each step but the first two, of one image with guidance."""
    import comfy.sample

    device = model.load_device
    context = torch.randn(1, 77, MODELS[kind][1])
    extra = {"pooled_output": torch.randn(1, 1280), "width": size, "height": size} if kind == "sdxl" else {}
    latent = torch.zeros(1, 4, size // 8, size // 8)
    marks = []

    def mark(*_: Any) -> None:
        if device.type == "cuda":
            torch.cuda.synchronize()
        marks.append(time.perf_counter())

    comfy.sample.sample(
        model, torch.randn_like(latent), steps, 7.0, "euler", "normal", [[context, dict(extra)]],
        [[-context, dict(extra)]], latent, callback=mark, disable_pbar=True, seed=0,
    )  # fmt: skip
    return [b - a for a, b in zip(marks[1:], marks[2:], strict=False)]


def variant(model: Any, name: str) -> Any:
    """The model with one variant on it."""
    if name == "comfyui core 0.5":
        from comfy_extras.nodes_tomesd import TomePatchModel

        return TomePatchModel.execute(model, 0.5)[0]
    if VARIANTS[name] is None:
        return model
    patch = inprocess.pack_module("comfy_tome.patch")
    return patch.apply_to_model(model, patch.ToMeConfig(**VARIANTS[name]))


@contextmanager
def without_attention(model: Any, kind: str, size: int, min_tokens: int) -> Iterator[None]:
    """The self-attention of the layers that the defaults merge gives its input back, at no cost."""
    from shared_tome.grid import grid_at

    served = {
        320 * mult
        for level, mult in enumerate((1, 2, 4))
        if (grid := grid_at((size // 8, size // 8), level)) and grid[0] * grid[1] >= min_tokens
    }
    layers = [m.attn1 for m in model.model.diffusion_model.modules() if hasattr(m, "attn1") and hasattr(m, "attn2")]
    layers = [layer for layer in layers if layer.to_q.in_features in served]
    for layer in layers:
        layer.forward = lambda x, **_: x
    try:
        yield
    finally:
        for layer in layers:
            del layer.forward


def measure(kind: str, size: int, args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """The rows of one model and size. Variants take turns, so that a drift of the machine meets them all."""
    from contextlib import nullcontext

    from shared_tome import ToMeConfig

    device = torch.device(args.device)
    model = build(kind, device, torch.float16 if args.device == "cuda" else torch.float32)
    times: dict[str, list[float]] = {name: [] for name in args.variants}
    for _ in range(args.rounds):
        for name in times:
            with without_attention(model, kind, size, ToMeConfig().min_tokens) if name == "limit" else nullcontext():
                times[name] += step_times(variant(model, name), kind, size, args.steps)
    base = statistics.median(times["unmerged"]) if "unmerged" in times else float("nan")
    for name, found in times.items():
        fifths = statistics.quantiles(found, n=5, method="inclusive")
        yield {
            "host": "ComfyUI",
            "model": kind,
            "pixels": size,
            "variant": name,
            "step_ms": 1e3 * statistics.median(found),
            "step_p20": 1e3 * fifths[0],
            "step_p80": 1e3 * fifths[-1],
            "speedup": base / statistics.median(found),
            "steps": len(found),
            "device": args.device,
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--comfyui", type=Path, default=os.environ.get("COMFYUI_DIR"), required="COMFYUI_DIR" not in os.environ
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=["cpu", "cuda"])
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=list(MODELS))
    parser.add_argument("--sizes", nargs="+", type=int, default=[512, 768, 1024, 1536, 2048])
    parser.add_argument("--variants", nargs="+", default=list(VARIANTS), choices=list(VARIANTS))
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--commit", default=None, help="where the tree is no git checkout")
    parser.add_argument("--json", action="store_true", help="one JSON list on stdout instead of CSV")
    parser.add_argument("--out", type=Path, help="a CSV file to write as well")
    args = parser.parse_args()
    inprocess.start(Path(args.comfyui), ["--cpu"] if args.device == "cpu" else ["--gpu-only"], absent=["av"])
    about = machine(args.device, args.commit)
    rows: list[dict[str, Any]] = []
    jobs = [(kind, size) for kind in args.models for size in args.sizes if kind == "sd15" or size >= 1024]
    for kind, size in tqdm(jobs, file=sys.stderr):
        rows += [{**row, **about} for row in measure(kind, size, args)]
        save(rows, args.out)  # as it goes, so that an interrupted run keeps what it has
    show(rows, args.json)


if __name__ == "__main__":
    main()
