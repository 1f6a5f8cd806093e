"""Loaded by a test's server as a custom node: small models under the official file names, for the ordinary loaders.

The files have random weights and the layouts of the real ones. ComfyUI tells a model by its sizes, so its table of
models is extended by small ones; Flux and Wan are told by layout and need none. Text encoders take their sizes from
ComfyUI's own files; here those are made smaller, and where the real one is a T5 of Wan's kind, whose tokenizer comes
with its weights, a CLIP stands in.
"""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import comfy.ldm.flux.model
import comfy.ldm.wan.model
import comfy.ldm.wan.vae
import comfy.model_patcher
import comfy.ops
import comfy.sd
import comfy.sd1_clip
import comfy.supported_models as supported
import comfy.taesd.taesd
import comfy.utils
import folder_paths
import torch

TEXT = 64  # channels of a text encoder
TEXT_SIZES = {
    "hidden_size": TEXT, "intermediate_size": 128, "num_attention_heads": 2, "num_hidden_layers": 3,
    "d_model": TEXT, "d_ff": 128, "d_kv": 32, "num_heads": 2, "num_layers": 1,
}  # fmt: skip
UNET = {
    "image_size": 32, "in_channels": 4, "out_channels": 4, "num_res_blocks": [1, 1], "channel_mult": [1, 2],
    "use_spatial_transformer": True, "legacy": False, "dtype": torch.float32, "use_temporal_attention": False,
}  # fmt: skip
LAYERS = {
    "transformer_depth": [1, 1],
    "transformer_depth_output": [1] * 4,
    "transformer_depth_middle": 1,
    "num_head_channels": -1,
}


def _host() -> Any:
    """tests/comfyui/host.py, for its weights."""
    path = Path(__file__).resolve().parents[1] / "comfyui" / "host.py"
    spec = importlib.util.spec_from_file_location("tome_tests_host", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


fill = _host().fill


def make_text_encoders_small() -> None:
    """Every text encoder made from now on has TEXT_SIZES."""
    made = comfy.sd1_clip.SDClipModel.__init__
    default = Path(comfy.sd1_clip.__file__).with_name("sd1_clip_config.json")

    def small(self: Any, *args: Any, textmodel_json_config: Any = None, **kwargs: Any) -> None:
        config = textmodel_json_config or default
        if not isinstance(config, dict):
            config = json.loads(Path(config).read_text(encoding="utf-8"))
        config = {key: TEXT_SIZES.get(key, value) for key, value in config.items()}
        made(self, *args, textmodel_json_config=config, **kwargs)

    comfy.sd1_clip.SDClipModel.__init__ = small


def _small(base: type, **unet_config: Any) -> type:
    """A row of ComfyUI's table of models: `base` with other sizes."""
    row = type(f"Small{base.__name__}", (base,), {"unet_config": {**base.unet_config, **unet_config}})
    supported.models.insert(0, row)
    return row


def _taesd(channels: int) -> comfy.sd.VAE:
    module = comfy.taesd.taesd.TAESD(latent_channels=channels)
    fill(module)
    with torch.no_grad():
        module.vae_scale.fill_(1.0)
    return comfy.sd.VAE(sd=module.state_dict())


def _checkpoint(name: str, row: type, channels: int, unet_config: dict[str, Any]) -> None:
    """A checkpoint of model, text encoders and VAE, saved by ComfyUI itself."""
    config = row(dict(unet_config))
    model = config.get_model({}, "")
    fill(model.diffusion_model)
    clip = comfy.sd.CLIP(config.clip_target(state_dict={}), parameters=1)
    fill(clip.cond_stage_model)
    patcher = comfy.model_patcher.ModelPatcher(model, torch.device("cpu"), torch.device("cpu"))
    comfy.sd.save_checkpoint(_place("checkpoints", name), patcher, clip, _taesd(channels))


def _write(folder: str, name: str, weights: dict[str, torch.Tensor], **metadata: str) -> None:
    weights = {key: x.contiguous() for key, x in weights.items()}
    comfy.utils.save_torch_file(weights, _place(folder, name), metadata=metadata)


def _place(folder: str, name: str) -> str:
    place = Path(folder_paths.get_folder_paths(folder)[0], name)
    place.parent.mkdir(parents=True, exist_ok=True)
    return str(place)


def write_checkpoints() -> None:
    sd15 = _small(supported.SD15, context_dim=TEXT, model_channels=32)
    _checkpoint(
        "v1-5-pruned-emaonly-fp16.safetensors", sd15, 4,
        {**UNET, **LAYERS, **sd15.unet_config, "num_heads": 8},
    )  # fmt: skip
    sd20 = _small(supported.SD20, context_dim=TEXT, model_channels=64)
    _checkpoint(
        "512-inpainting-ema.safetensors", sd20, 4,
        {**UNET, **LAYERS, **sd20.unet_config, "in_channels": 9, "num_head_channels": 64},
    )  # fmt: skip
    sdxl = _small(
        supported.SDXL, model_channels=32, context_dim=2 * TEXT, adm_in_channels=TEXT + 6 * 256,
        transformer_depth=[0, 1],
    )  # fmt: skip
    _checkpoint(
        "sd_xl_base_1.0.safetensors", sdxl, 4,
        {**UNET, **LAYERS, **sdxl.unet_config, "transformer_depth_output": [0, 0, 1, 1], "num_classes": "sequential",
         "num_head_channels": 64},
    )  # fmt: skip
    flux = {
        "image_model": "flux", "in_channels": 16, "out_channels": 16, "patch_size": 2, "vec_in_dim": TEXT,
        "context_in_dim": TEXT, "hidden_size": 128, "mlp_ratio": 4.0, "num_heads": 1, "depth": 1,
        "depth_single_blocks": 1, "axes_dim": [16, 56, 56], "theta": 10000, "qkv_bias": True, "guidance_embed": True,
        "txt_ids_dims": [], "dtype": torch.float32,
    }  # fmt: skip
    _checkpoint("flux1-dev-fp8.safetensors", supported.Flux, 16, flux)


def write_wan() -> None:
    sizes = {"text_dim": TEXT}
    model = comfy.ldm.wan.model.WanModel(
        model_type="t2v", dim=128, in_dim=16, out_dim=16, ffn_dim=256, num_heads=1, num_layers=2, freq_dim=256,
        device="cpu", dtype=torch.float32, operations=comfy.ops.disable_weight_init, **sizes,
    )  # fmt: skip
    fill(model)
    _write(
        "diffusion_models", "wan2.1_t2v_1.3B_fp16.safetensors", model.state_dict(),
        config=json.dumps({"transformer": sizes}),
    )  # fmt: skip
    vae = comfy.ldm.wan.vae.WanVAE(dim=16, z_dim=16, temperal_downsample=[False, True, True])
    fill(vae)
    _write("vae", "wan_2.1_vae.safetensors", vae.state_dict())
    text = comfy.sd1_clip.SDClipModel()
    fill(text)
    _write("text_encoders", "umt5_xxl_fp8_e4m3fn_scaled.safetensors", text.transformer.state_dict())


make_text_encoders_small()
write_checkpoints()
write_wan()
NODE_CLASS_MAPPINGS: dict[str, type] = {}
