"""A real ComfyUI in this process, with small U-Nets of its own classes.

`start()` must run before any other import of comfy. Weights are random but fixed, so that pictures can be compared
bit for bit.
"""

from __future__ import annotations

import asyncio
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

REPO = Path(__file__).resolve().parents[2]


def comfyui_dir() -> Path | None:
    """The ComfyUI checkout named by COMFYUI_DIR (`python install.py test` sets it)."""
    named = os.environ.get("COMFYUI_DIR")
    return Path(named) if named and (Path(named) / "comfy").is_dir() else None


def start() -> dict[str, Any]:
    """Import ComfyUI, load this repository as a custom node, and return all node classes by id."""
    sys.path.insert(0, str(REPO))
    from installer import inprocess

    inprocess.start(comfyui_dir(), ["--cpu"])
    import nodes

    async def load() -> None:
        for name in (
            "tomesd",
            "hypertile",
            "model_downscale",
            "freelunch",
            "pag",
            "sag",
            "torch_compile",
            "context_windows",
        ):
            await nodes.load_custom_node(
                str(comfyui_dir() / "comfy_extras" / f"nodes_{name}.py"), module_parent="comfy_extras"
            )
        assert await nodes.load_custom_node(str(REPO), module_parent="custom_nodes"), "the pack did not load"

    asyncio.run(load())
    return nodes.NODE_CLASS_MAPPINGS


def run_node(node: Any, **inputs: Any) -> Any:
    """A node's first output."""
    if hasattr(node, "define_schema"):
        out = node.execute(**inputs)
        return out[0] if isinstance(out, tuple) else out.result[0]
    return getattr(node(), node.FUNCTION)(**inputs)[0]


def cached(caches: dict[str, Any], name: str, model: Any, **options: Any) -> Any:
    """The model behind EasyCache or LazyCache, which by default answers whatever it may."""
    defaults = {"reuse_threshold": 50.0, "start_percent": 0.0, "end_percent": 1.0, "verbose": False}
    return run_node(caches[name], model=model, **{**defaults, **options})


def fill(module: Any, seed: int = 0) -> None:
    """Fixed random weights of a size that keeps activations near 1; the last layers are not zero."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    for name, parameter in sorted(module.named_parameters()):
        with torch.no_grad():
            if parameter.dim() > 1:
                fan_in = parameter[0].numel()
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * fan_in**-0.5)
            else:
                parameter.fill_(1.0 if name.endswith("weight") else 0.0)


def small_unet(kind: str = "SD15", manual_cast: Any = None, **changes: Any) -> Any:
    """A ModelPatcher around a small U-Net of ComfyUI's: SD15 (attention from level 0) or SDXL (from level 1).

    manual_cast: the dtype to compute in, where the weights' own (dtype) is for storage alone.
    """
    import comfy.model_patcher
    import comfy.supported_models
    import torch

    config = dict(comfy.supported_models.__dict__[kind].unet_config)
    config.update(
        image_size=32, in_channels=4, out_channels=4, model_channels=32, num_head_channels=32, num_heads=-1,
        use_spatial_transformer=True, context_dim=64, legacy=False, use_temporal_attention=False, dtype=torch.float32,
    )  # fmt: skip
    if kind == "SDXL":
        config.update(
            num_res_blocks=[1, 1, 1], channel_mult=[1, 2, 2], transformer_depth=[0, 1, 2], transformer_depth_middle=2,
            transformer_depth_output=[0, 0, 1, 1, 2, 2], use_linear_in_transformer=True, adm_in_channels=None,
        )  # fmt: skip
    else:
        config.update(
            num_res_blocks=[1, 1, 1], channel_mult=[1, 2, 2], transformer_depth=[1, 1, 1], transformer_depth_middle=1,
            transformer_depth_output=[1, 1, 1, 1, 1, 1], use_linear_in_transformer=False, adm_in_channels=None,
        )  # fmt: skip
    config.update(changes)
    # SDXL's model class insists on a size embedding; what matters here is the layout of its U-Net.
    model_config = comfy.supported_models.SD15(config)
    model_config.manual_cast_dtype = manual_cast
    model_config.unet_config = config  # BASE.__init__ overwrites the number of heads
    model_config.latent_format = comfy.supported_models.__dict__[kind].latent_format()
    model = model_config.get_model({}, "")
    fill(model.diffusion_model)
    return comfy.model_patcher.ModelPatcher(model, torch.device("cpu"), torch.device("cpu"))


def short_unet(manual_cast: Any = None) -> Any:
    """As small_unet, with three layers of attention instead of ten: on either level, before and behind the middle. For
    what is compiled, and for what ten show no better."""
    return small_unet(
        manual_cast=manual_cast, num_res_blocks=[1, 1], channel_mult=[1, 2], transformer_depth=[1, 1],
        transformer_depth_middle=-1, transformer_depth_output=[1, 0, 0, 0],
    )  # fmt: skip


def least_unet() -> Any:
    """The least for what is compiled: two layers of attention, both of level 0, and no middle."""
    return small_unet(
        num_res_blocks=[1], channel_mult=[1], transformer_depth=[1], transformer_depth_middle=-2,
        transformer_depth_output=[1, 0],
    )  # fmt: skip


def pack_module(name: str) -> Any:
    """A module of the pack (comfy_tome.NAME), under the name that ComfyUI loaded it by."""
    import nodes

    package = nodes.NODE_CLASS_MAPPINGS["ToMe"].__module__.removesuffix(".nodes")
    return sys.modules[f"{package}.{name}"]


def forget_log() -> None:
    """Reasons are logged once a process; start afresh."""
    pack_module("log")._said.clear()


def call_options(values: dict[str, Any], grid: tuple[int, int]) -> dict[str, Any]:
    """The transformer_options of one call of a patched model, for tests of single blocks."""
    import torch

    unet = pack_module("unet")
    config = unet.ToMeConfig(**values)
    return unet.UNetCall(unet.ModelCall(config, grid, torch.device("cpu")), {}).options


def conditioning(seed: int, tokens: int = 7, **extra: Any) -> list:
    import torch

    return [[torch.randn(1, tokens, 64, generator=torch.Generator().manual_seed(seed)), extra]]


def sample(
    model: Any,
    *,
    height: int = 256,
    width: int = 256,
    steps: int = 2,
    seed: int = 1,
    cfg: float = 5.0,
    batch: int = 1,
    sampler: str = "euler",
    positive: list | None = None,
    negative: list | None = None,
    latent: Any = None,
    denoise: float = 1.0,
) -> Any:
    """The latent [B, 4, height / 8, width / 8] that ComfyUI's own KSampler makes."""
    import nodes
    import torch

    latent = torch.zeros(batch, 4, height // 8, width // 8) if latent is None else latent
    return nodes.KSampler().sample(
        model, seed, steps, cfg, sampler, "normal", positive or conditioning(1), negative or conditioning(2),
        {"samples": latent}, denoise,
    )[0]["samples"]  # fmt: skip


@contextmanager
def watch(model: Any) -> Iterator[dict[str, list[int]]]:
    """Record the tokens that reach each projection: {"input_blocks.1.1. ... .attn1.to_q": [1024, ...]}."""
    seen: dict[str, list[int]] = {}
    handles = []
    for name, module in model.model.diffusion_model.named_modules():
        if name.endswith((".to_q", ".to_k", ".to_v", ".ff")):
            record = seen.setdefault(name, [])
            # On what comes out: ToMe's own hook on the feed-forward layers changes what goes in.
            handles.append(
                module.register_forward_hook(lambda _m, args, _out, record=record: record.append(args[0].shape[1]))
            )
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def tokens(seen: dict[str, list[int]], part: str) -> dict[str, set[int]]:
    """What `watch` saw of one part ("attn1.to_k"), by the block that it lies in."""
    found: dict[str, set[int]] = {}
    for name, counts in seen.items():
        if name.endswith(f".{part}"):
            found.setdefault(name.split(".transformer_blocks")[0], set()).update(counts)
    return found
