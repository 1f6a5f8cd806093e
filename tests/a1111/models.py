"""Small U-Nets of the genuine ldm classes with random weights, as the host's sd_model."""

from __future__ import annotations

import sys
import types
from typing import Any

import pytest
import torch
from torch import nn


def ldm_unet() -> type:
    """ldm's UNetModel. Skips where stable-diffusion-sdkit is not installed."""
    if "omegaconf" not in sys.modules:
        try:
            import omegaconf  # noqa: F401
        except ImportError:  # ldm only asks whether a list is one of omegaconf's
            stub, inner = types.ModuleType("omegaconf"), types.ModuleType("omegaconf.listconfig")
            inner.ListConfig = type("ListConfig", (), {})
            stub.listconfig = inner
            sys.modules.update({"omegaconf": stub, "omegaconf.listconfig": inner})
    pytest.importorskip("ldm", reason="stable-diffusion-sdkit is not installed")
    from ldm.modules.diffusionmodules import openaimodel

    openaimodel.th = _TorchOfTheHost()
    return openaimodel.UNetModel


class _TorchOfTheHost:
    """The host gives the U-Net a torch whose cat makes sizes fit: with odd sizes, twice the half is one too many."""

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)

    def cat(self, tensors: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
        one, *others = tensors
        if others and one.dim() == 4 and one.shape[-2:] != others[0].shape[-2:]:
            one = nn.functional.interpolate(one, others[0].shape[-2:], mode="nearest")
        return torch.cat([one, *others], *args, **kwargs)


class Loaded(nn.Module):
    """What the host calls sd_model: the U-Net is sd_model.model.diffusion_model."""

    def __init__(self, diffusion_model: nn.Module):
        super().__init__()
        self.model = nn.Module()
        self.model.diffusion_model = diffusion_model
        self.applied_token_merged_ratio = 0


def small_model(seed: int = 0, mult: tuple[int, ...] = (1, 2), **more: Any) -> Loaded:
    """A model with attention at as many levels as `mult` has entries."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        unet = ldm_unet()(
            image_size=32,
            in_channels=4,
            out_channels=4,
            model_channels=32,
            attention_resolutions=[2**level for level in range(len(mult))],
            num_res_blocks=1,
            channel_mult=list(mult),
            num_heads=2,
            use_spatial_transformer=True,
            transformer_depth=1,
            context_dim=16,
            use_checkpoint=False,
            legacy=False,
            **more,
        )
        for name, weight in unet.named_parameters():
            if weight.dim() > 1 and not weight.any():  # ldm starts with zeros where a block ends
                nn.init.normal_(weight, std=0.1)
            if name.endswith(("attn1.to_q.weight", "attn1.to_k.weight")):
                weight.data *= 4  # attention that tells tokens apart
    return Loaded(unet.eval())


def count_hooks(model: nn.Module) -> int:
    """How many hooks are on a model and all its parts."""
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())
