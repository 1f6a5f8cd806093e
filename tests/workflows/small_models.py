"""Loaded by a test's server as a custom node: small models under the official file names, for the ordinary loaders.

The files have random weights and the layouts of the real ones. ComfyUI tells a model by its sizes, so its table of
models is extended by small ones; Flux, Wan and LTX-2 are told by layout and by what their files say. Text encoders take
their sizes from ComfyUI's own files; here those are made smaller, and a CLIP stands in where the real one's tokenizer
comes with its weights (Wan's T5, LTX-2's Gemma) or where its sizes are fixed (Qwen-Image's).
"""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import comfy.ldm.flux.model
import comfy.ldm.lightricks.av_model
import comfy.ldm.lightricks.vae.audio_vae
import comfy.ldm.lightricks.vae.causal_video_autoencoder
import comfy.ldm.qwen_image.model
import comfy.ldm.wan.model
import comfy.ldm.wan.vae
import comfy.model_patcher
import comfy.ops
import comfy.sd
import comfy.sd1_clip
import comfy.supported_models as supported
import comfy.taesd.taesd
import comfy.text_encoders.lt
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


def _small(base: type, untold: dict[str, Any] | None = None, **unet_config: Any) -> type:
    """A row of ComfyUI's table of models: `base` with other sizes. untold: those that it does not read from a file."""
    changes = {"unet_config": {**base.unet_config, **unet_config}}
    if untold is not None:
        changes["unet_extra_config"] = {**base.unet_extra_config, **untold}
    row = type(f"Small{base.__name__}", (base,), changes)
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
    """Wan 2.1's model and Wan 2.2's two, a VAE for Wan and Qwen-Image, a text encoder for all that stand-ins serve."""
    sizes = {"text_dim": TEXT}
    for seed, name in enumerate(
        (
            "wan2.1_t2v_1.3B_fp16.safetensors",
            "wan2.2_t2v_high_noise_14B_fp8_scaled.safetensors",
            "wan2.2_t2v_low_noise_14B_fp8_scaled.safetensors",
        )
    ):
        model = comfy.ldm.wan.model.WanModel(
            model_type="t2v", dim=128, in_dim=16, out_dim=16, ffn_dim=256, num_heads=1, num_layers=2, freq_dim=256,
            device="cpu", dtype=torch.float32, operations=comfy.ops.disable_weight_init, **sizes,
        )  # fmt: skip
        fill(model, seed)
        _write("diffusion_models", name, model.state_dict(), config=json.dumps({"transformer": sizes}))
    vae = comfy.ldm.wan.vae.WanVAE(dim=8, z_dim=16, temperal_downsample=[False, True, True])
    fill(vae)
    for name in ("wan_2.1_vae.safetensors", "qwen_image_vae.safetensors"):
        _write("vae", name, vae.state_dict())
    text = comfy.sd1_clip.SDClipModel()
    fill(text)
    for name in (
        "umt5_xxl_fp8_e4m3fn_scaled.safetensors",
        "qwen_2.5_vl_7b_fp8_scaled.safetensors",
        "gemma_3_12B_it_fp4_mixed.safetensors",
    ):
        _write("text_encoders", name, text.transformer.state_dict())


def write_qwen() -> None:
    untold = {"num_attention_heads": 1, "joint_attention_dim": TEXT}
    _small(supported.QwenImage, untold, num_layers=2)
    model = comfy.ldm.qwen_image.model.QwenImageTransformer2DModel(
        num_layers=2, device="cpu", dtype=torch.float32, operations=comfy.ops.disable_weight_init, **untold
    )
    fill(model)
    _write("diffusion_models", "qwen_image_edit_2509_fp8_e4m3fn.safetensors", model.state_dict())


def write_ltx2() -> None:
    """One file of model, video VAE, audio VAE and vocoder, as the real one; a CLIP reads the text."""
    comfy.text_encoders.lt.ltxav_te = lambda **told: comfy.sd1_clip.SD1ClipModel
    comfy.text_encoders.lt.LTXAVGemmaTokenizer = comfy.sd1_clip.SD1Tokenizer
    blocks = [["res_x", {"num_layers": 1}], *[["compress_all", {}]] * 3, ["res_x", {"num_layers": 1}]]
    sound = {
        "double_z": True, "mel_bins": 64, "z_channels": 8, "resolution": 256, "in_channels": 2, "out_ch": 2, "ch": 8,
        "ch_mult": [1, 2, 4], "num_res_blocks": 1, "attn_resolutions": [], "mid_block_add_attention": False,
        "norm_type": "pixel", "causality_axis": "height",
    }  # fmt: skip
    config = {
        "transformer": {
            "in_channels": 128, "cross_attention_dim": 128, "attention_head_dim": 64, "num_attention_heads": 2,
            "audio_cross_attention_dim": 64, "audio_attention_head_dim": 32, "audio_num_attention_heads": 2,
            "caption_channels": TEXT, "connector_attention_head_dim": TEXT // 2, "connector_num_attention_heads": 2,
        },
        "vae": {
            "dims": 3, "latent_channels": 128, "blocks": blocks, "encoder_base_channels": 16,
            "decoder_base_channels": 16, "norm_layer": "pixel_norm", "patch_size": 4, "latent_log_var": "uniform",
        },
        "audio_vae": {"model": {"params": {"ddconfig": sound, "sampling_rate": 16000}}},
        "vocoder": {"upsample_initial_channel": 64},
    }  # fmt: skip
    parts = {
        "model.diffusion_model.": comfy.ldm.lightricks.av_model.LTXAVModel(
            num_layers=2, device="cpu", dtype=torch.float32, operations=comfy.ops.disable_weight_init,
            **config["transformer"],
        ),
        "vae.": comfy.ldm.lightricks.vae.causal_video_autoencoder.VideoVAE(config=config["vae"]),
        "": comfy.ldm.lightricks.vae.audio_vae.AudioVAE({"config": config}),
    }  # fmt: skip
    weights = {}
    for prefix, module in parts.items():
        fill(module)
        for name, buffer in module.named_buffers():
            if "of-means" in name:  # what the latents were normalized by
                buffer.fill_(float("std" in name))
        weights.update({prefix + key: x for key, x in module.state_dict().items()})
    weights = comfy.utils.state_dict_prefix_replace(weights, {"autoencoder.": "audio_vae."})
    _write("checkpoints", "ltx-2-19b-dev-fp8.safetensors", weights, config=json.dumps(config))


make_text_encoders_small()
write_checkpoints()
write_wan()
write_qwen()
write_ltx2()
NODE_CLASS_MAPPINGS: dict[str, type] = {}
