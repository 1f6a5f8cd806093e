"""What a call of ComfyUI's `apply_model` carries: its transformer_options, and how far the sampler is."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from ..shared_tome import ModelCall, ToMeConfig

KEY = "ToMe"
APPLY_MODEL = "apply_model"  # comfy.patcher_extension.WrappersMP.APPLY_MODEL
DIFFUSION_MODEL = "diffusion_model"  # comfy.patcher_extension.WrappersMP.DIFFUSION_MODEL


def find_options(args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
    """apply_model(x, t, c_concat, c_crossattn, control, transformer_options): by place or by name."""
    if len(args) > 3:
        return args, args[3]
    return args, kwargs.get("transformer_options", {})


def put_options(args: tuple, kwargs: dict[str, Any], options: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
    if len(args) > 3:
        return (*args[:3], options, *args[4:]), kwargs
    return args, {**kwargs, "transformer_options": options}


def call_key(call: ModelCall) -> str:
    """What a compiled graph takes for granted of a call: all options but the seed, which is a tensor there."""
    return _config_key(call.config, call.alike)


@functools.lru_cache(maxsize=64)
def _config_key(config: ToMeConfig, alike: bool) -> str:
    return repr(config.replace(seed=0)) + (" alike" if alike and config.share_match else "")


def halves_alike(options: dict[str, Any]) -> bool:
    """Whether both halves of the batch are the same images: prompted and unprompted."""
    return sorted(options.get("cond_or_uncond", ())) == [0, 1]


def step_of(options: dict[str, Any], device: torch.device) -> Tensor | int:
    """Which step of the sampler this is, as a 0-d tensor on the device: no synchronisation.

    Counted in noise levels and not in calls: samplers that call the model twice a step, area conditioning and
    split batches all come to the same number.
    """
    sigmas, sigma = options.get("sample_sigmas"), options.get("sigmas")
    if sigmas is None or sigma is None:
        return 0
    return (sigmas.to(device) > sigma.to(device).flatten()[0] * (1 + 1e-4)).sum()


def progress_of(options: dict[str, Any]) -> float:
    """How far the sampler is, 0 to 1 in steps. Synchronises, once a step and only for a schedule."""
    sigmas = options.get("sample_sigmas")
    if sigmas is None or len(sigmas) < 2:
        return 0.0
    return int(step_of(options, sigmas.device)) / (len(sigmas) - 1)
