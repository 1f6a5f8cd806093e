"""What decoding a latent takes: ComfyUI's own autoencoder of Stable Diffusion's size, random weights.

Flux's has the same decoder for 16 channels in place of 4.
"""

from __future__ import annotations

import torch

from ..timing import spread
from .common import seconds_of

LAYOUT = {
    "double_z": True, "resolution": 256, "in_channels": 3, "out_ch": 3, "ch_mult": [1, 2, 4, 4], "num_res_blocks": 2,
    "attn_resolutions": [], "dropout": 0.0,
}  # fmt: skip


@torch.no_grad()
def decode_seconds(shape: tuple[int, ...], device: str, width: int = 128, repeats: int = 3) -> float:
    """The median of some decodings of a latent [B, C, h, w], warm; in bfloat16 on a GPU, as ComfyUI does there.

    width: channels of the first level; Stable Diffusion's and Flux's have 128.
    """
    from comfy.ldm.models.autoencoder import AutoencoderKL

    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    with torch.device(device):
        model = AutoencoderKL(ddconfig={**LAYOUT, "z_channels": shape[1], "ch": width}, embed_dim=shape[1]).to(dtype)
        latent = torch.randn(shape, dtype=dtype)
    for parameter in model.parameters():
        parameter.normal_(0.0, 0.02) if parameter.dim() > 1 else parameter.fill_(0.5)
    model.decode(latent)
    return spread([seconds_of(lambda: model.decode(latent), device) for _ in range(repeats)])["median"]
