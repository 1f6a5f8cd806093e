"""Small diffusion transformers of ComfyUI's own classes, and one call of each with what it wants to be told.

Two blocks, two or four heads, float32. Weights are random but fixed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

from . import host

FLUX = {
    "in_channels": 16, "out_channels": 16, "vec_in_dim": 32, "context_in_dim": 48, "hidden_size": 64, "mlp_ratio": 2.0,
    "num_heads": 2, "depth": 1, "depth_single_blocks": 1, "axes_dim": [8, 12, 12], "theta": 10000, "patch_size": 2,
    "qkv_bias": True, "guidance_embed": False, "txt_ids_dims": [], "image_model": "flux",
}  # fmt: skip
WAN = {
    "image_model": "wan2.1", "model_type": "t2v", "dim": 64, "out_dim": 16, "in_dim": 16, "ffn_dim": 128,
    "num_heads": 2, "num_layers": 2, "text_dim": 48, "freq_dim": 32, "patch_size": (1, 2, 2), "qk_norm": True,
    "cross_attn_norm": True,
}  # fmt: skip
LUMINA = {
    "image_model": "lumina2", "patch_size": 2, "in_channels": 16, "dim": 64, "n_layers": 2, "n_refiner_layers": 1,
    "n_heads": 2, "n_kv_heads": 1, "qk_norm": True, "axes_dims": [8, 12, 12], "axes_lens": [300, 512, 512],
    "cap_feat_dim": 48, "multiple_of": 32,
}  # fmt: skip


@dataclass(frozen=True)
class Small:
    """One small model.

    supported: its class in comfy.supported_models; unet_config; latent: a shape [B, C, ...] for two rows.
    image, others: how many tokens its attention sees of the image, and beside it. layers: attentions to be served.
    elsewhere: how many of a layer's queries never come to them.
    told: further keywords of apply_model, made from a generator.
    """

    supported: str
    unet_config: dict[str, Any]
    latent: tuple[int, ...]
    image: int
    others: int
    layers: int = 2
    elsewhere: int = 0
    text: tuple[int, int] = (7, 48)
    told: dict[str, tuple[int, ...]] = field(default_factory=dict)
    constants: dict[str, Any] = field(default_factory=dict)
    made: Callable[[Any], dict[str, Any]] | None = None  # further keywords, from the latent
    absent: tuple[str, ...] = ()  # parts that this call does not use and that come in one size, a large one


CHROMA = {
    **{key: value for key, value in FLUX.items() if key != "guidance_embed"}, "image_model": "chroma", "in_dim": 64,
    "out_dim": 64, "hidden_dim": 64, "n_layers": 1,
}  # fmt: skip
COSMOS = {
    "max_img_h": 64, "max_img_w": 64, "max_frames": 16, "in_channels": 16, "out_channels": 16, "patch_spatial": 2,
    "patch_temporal": 1, "model_channels": 64, "num_blocks": 2, "num_heads": 2, "crossattn_emb_channels": 48,
    "pos_emb_cls": "rope3d", "use_adaln_lora": True, "adaln_lora_dim": 16, "rope_enable_fps_modulation": False,
}  # fmt: skip
STABLE_AUDIO = {
    "audio_model": "dit1.0", "io_channels": 16, "embed_dim": 64, "depth": 2, "num_heads": 2, "cond_token_dim": 32,
    "global_cond_dim": 64, "project_cond_tokens": False, "num_memory_tokens": 3,
}  # fmt: skip
VIDEO = (2, 16, 3, 8, 12)  # 3 x 4 x 6 = 72 tokens
PICTURE = (2, 16, 16, 24)  # 8 x 12 = 96 tokens


SMALL: dict[str, Small] = {
    "flux": Small("FluxSchnell", FLUX, PICTURE, 96, 7, told={"y": (2, 32)}),
    "chroma": Small(
        "Chroma", {**CHROMA, "in_channels": 64, "out_channels": 64}, PICTURE, 96, 7, told={"guidance": (2,)}
    ),
    "radiance": Small(
        "ChromaRadiance",
        {**CHROMA, "image_model": "chroma_radiance", "in_channels": 3, "out_channels": 3, "patch_size": 4,
         "nerf_hidden_size": 8, "nerf_mlp_ratio": 2, "nerf_depth": 1, "nerf_max_freqs": 4, "nerf_tile_size": 0,
         "nerf_final_head_type": "conv", "nerf_embedder_dtype": None, "use_x0": False,
         "use_sequential_txt_ids": False},
        (2, 3, 32, 48), 96, 7, told={"guidance": (2,)},
    ),
    "sd3": Small(
        "SD3",
        {"in_channels": 16, "depth": 2, "patch_size": 2, "pos_embed_max_size": 32, "num_patches": 1024,
         "adm_in_channels": 32, "context_size": 48, "qk_norm": "rms", "x_block_self_attn_layers": [0],
         "context_embedder_config": {"target": "torch.nn.Linear", "params": {"in_features": 48, "out_features": 128}}},
        PICTURE, 96, 7, layers=3, told={"y": (2, 32)},
    ),
    "qwen": Small(
        "QwenImage",
        {"image_model": "qwen_image", "in_channels": 64, "out_channels": 16, "num_layers": 2,
         "attention_head_dim": 32, "num_attention_heads": 2, "joint_attention_dim": 48, "axes_dims_rope": (8, 12, 12)},
        (2, 16, 1, 16, 24), 96, 7,
    ),
    "lumina": Small("Lumina2", LUMINA, PICTURE, 96, 7, constants={"num_tokens": 7}),
    "zimage": Small(
        "ZImage", {**LUMINA, "dim": 256, "n_heads": 8, "n_kv_heads": 8, "z_image_modulation": True,
                   "pad_tokens_multiple": 20},
        PICTURE, 96, 20 + 4, constants={"num_tokens": 7},
    ),
    "hunyuan": Small(
        "HunyuanVideo",
        {"image_model": "hunyuan_video", "in_channels": 16, "out_channels": 16, "patch_size": [1, 2, 2],
         "vec_in_dim": 32, "context_in_dim": 48, "hidden_size": 64, "mlp_ratio": 2.0, "num_heads": 2, "depth": 1,
         "depth_single_blocks": 1, "axes_dim": [8, 12, 12], "theta": 256, "qkv_bias": True, "guidance_embed": False,
         "byt5": False, "meanflow": False, "use_cond_type_embedding": False, "vision_in_dim": None,
         "meanflow_sum": False},
        VIDEO, 72, 7, told={"y": (2, 32)},
    ),
    "wan": Small("WAN21_T2V", WAN, VIDEO, 72, 0),
    "wan_fun": Small(
        "WAN21_T2V", {**WAN, "in_dim_ref_conv": 16}, VIDEO, 72, 24,
        told={"reference_latent": (2, 16, 8, 12)},
    ),
    "ltxv": Small(
        "LTXV",
        {"image_model": "ltxv", "in_channels": 16, "cross_attention_dim": 64, "attention_head_dim": 32,
         "num_attention_heads": 2, "caption_channels": 48, "num_layers": 2},
        (2, 16, 3, 4, 6), 72, 0, constants={"attention_mask": None},
    ),
    "vace": Small(
        "WAN21_Vace", {**WAN, "model_type": "vace", "vace_layers": 1, "vace_in_dim": 96}, VIDEO, 72, 0, layers=3,
        told={"vace_context": (2, 1, 96, 3, 8, 12)}, constants={"vace_strength": [1.0]},
    ),
    "camera": Small(
        "WAN21_Camera", {**WAN, "model_type": "camera"}, VIDEO, 72, 0, told={"clip_fea": (2, 11, 1280)}
    ),
    "s2v": Small(
        "WAN22_S2V", {**WAN, "model_type": "s2v", "audio_inject_layers": [0], "audio_dim": 64}, VIDEO, 72, 24,
        told={"reference_latent": (2, 16, 1, 8, 12)},
    ),
    "humo": Small(
        "WAN21_HuMo", {**WAN, "model_type": "humo"}, VIDEO, 72, 24, told={"reference_latent": (2, 16, 1, 8, 12)}
    ),
    "scail": Small(
        "WAN21_SCAIL", {**WAN, "model_type": "scail"}, VIDEO, 72, 24 + 12,
        told={"reference_latent": (2, 16, 1, 8, 12), "pose_latents": (2, 16, 2, 4, 6), "clip_fea": (2, 11, 1280)},
    ),
    "cosmos": Small("CosmosT2IPredict2", {**COSMOS, "image_model": "cosmos_predict2"}, VIDEO, 72, 0),
    "anima": Small(
        "Anima", {**COSMOS, "image_model": "anima"}, (2, 16, 1, 16, 24), 96, 0, absent=("anima.model.LLMAdapter",)
    ),
    "hidream": Small(
        "HiDream",
        {"image_model": "hidream", "patch_size": 2, "in_channels": 16, "out_channels": 16, "num_layers": 1,
         "num_single_layers": 1, "attention_head_dim": 32, "num_attention_heads": 2, "caption_channels": [48, 40],
         "text_emb_dim": 32, "num_routed_experts": 2, "num_activated_experts": 1, "axes_dims_rope": (8, 12, 12),
         "max_resolution": (64, 64), "llama_layers": [0, 1]},
        PICTURE, 96, 7 + 5 + 5, told={"y": (2, 32), "encoder_hidden_states_llama3": (2, 2, 5, 40)},
    ),
    "aura": Small(
        "AuraFlow",
        {"in_channels": 4, "out_channels": 4, "patch_size": 2, "dim": 64, "n_layers": 2, "n_double_layers": 1,
         "n_heads": 2, "global_conddim": 64, "cond_seq_dim": 48, "max_seq": 1024},
        (2, 4, 16, 24), 96, 7 + 8,
    ),
    "stable_audio": Small(
        "StableAudio", STABLE_AUDIO, (2, 16, 96), 96, 1 + 3, text=(7, 32), told={"global_embed": (2, 64)},
        absent=("audio.embedders.NumberConditioner",),
    ),
    "stable_audio_3": Small(
        "StableAudio", {**STABLE_AUDIO, "attn_kwargs": {"differential": True}, "global_cond_type": "adaLN"},
        (2, 16, 96), 96, 3, layers=4, text=(7, 32), told={"global_embed": (2, 64)},
        absent=("audio.embedders.NumberConditioner",),
    ),
    "ltx2": Small(
        "LTXAV",
        {"image_model": "ltxav", "in_channels": 16, "cross_attention_dim": 64, "audio_cross_attention_dim": 32,
         "attention_head_dim": 32, "num_attention_heads": 2, "audio_attention_head_dim": 16,
         "audio_num_attention_heads": 2, "caption_channels": 48, "num_layers": 2, "connector_attention_head_dim": 16,
         "connector_num_attention_heads": 3},
        (2, 1, 16 * 72 + 8 * 20 * 16), 72, 0, text=(7, 96),
        constants={"attention_mask": None, "latent_shapes": [(2, 16, 3, 4, 6), (2, 8, 20, 16)]},
    ),
    "omnigen": Small(
        "Omnigen2",
        {"image_model": "omnigen2", "hidden_size": 64, "num_layers": 2, "num_refiner_layers": 1,
         "num_attention_heads": 4, "num_kv_heads": 2, "multiple_of": 32, "axes_dim_rope": (8, 4, 4),
         "text_feat_dim": 48},
        PICTURE, 96, 7, constants={"num_tokens": 7},
    ),
    "boogu": Small(
        "Boogu",
        {"image_model": "boogu", "hidden_size": 64, "num_layers": 1, "num_double_stream_layers": 1,
         "num_refiner_layers": 1, "num_attention_heads": 4, "num_kv_heads": 2, "multiple_of": 32,
         "axes_dim_rope": (8, 4, 4), "instruction_feat_dim": 48},
        PICTURE, 96, 7, layers=4, constants={"num_tokens": 7},
    ),
    "krea": Small(
        "Krea2",
        {"image_model": "krea2", "features": 64, "tdim": 32, "txtdim": 16, "heads": 4, "kvheads": 2, "multiplier": 2,
         "layers": 2, "txtlayers": 3, "txtheads": 2, "txtkvheads": 2},
        (2, 16, 1, 16, 24), 96, 7,
    ),
    "ideogram": Small(
        "Ideogram4",
        {"image_model": "ideogram4", "in_channels": 16, "num_layers": 2, "num_attention_heads": 2,
         "attention_head_dim": 32, "intermediate_size": 64, "adaln_dim": 32, "llm_features_dim": 48,
         "mrope_section": (6, 5, 5)},
        (2, 16, 8, 12), 96, 7,
    ),
    "mage": Small(
        "MageFlow",
        {"image_model": "mage_flow", "in_channels": 16, "out_channels": 16, "num_layers": 2,
         "attention_head_dim": 32, "num_attention_heads": 2, "joint_attention_dim": 48, "axes_dims_rope": (8, 12, 12)},
        (2, 16, 8, 12), 96, 7,
    ),
    "lens": Small(
        "Lens",
        {"image_model": "lens", "in_channels": 16, "out_channels": 4, "num_layers": 2, "attention_head_dim": 32,
         "num_attention_heads": 2, "enc_hidden_dim": 12, "axes_dims_rope": (8, 12, 12)},
        (2, 16, 8, 12), 96, 7,
    ),
    "joy": Small(
        "JoyImage",
        {"image_model": "joyimage", "hidden_size": 64, "num_attention_heads": 2, "text_dim": 48, "num_layers": 2,
         "rope_dim_list": [8, 12, 12]},
        (2, 16, 1, 16, 24), 96, 7,
    ),
    "pixeldit": Small(
        "PixelDiTT2I",
        {"image_model": "pixeldit_t2i", "num_groups": 2, "hidden_size": 64, "pixel_hidden_size": 4,
         "pixel_attn_hidden_size": 32, "pixel_num_groups": 2, "patch_depth": 1, "pixel_depth": 1, "patch_size": 4,
         "txt_embed_dim": 48},
        (2, 3, 32, 48), 96, 7,
    ),
    "pid": Small(
        "PiD",
        {"image_model": "pid", "num_groups": 2, "hidden_size": 64, "pixel_hidden_size": 4,
         "pixel_attn_hidden_size": 32, "pixel_num_groups": 2, "patch_depth": 1, "pixel_depth": 1, "patch_size": 4,
         "txt_embed_dim": 48, "lq_hidden_dim": 32, "lq_num_res_blocks": 1, "latent_spatial_down_factor": 2,
         "rope_ref_h": 64, "rope_ref_w": 64},
        (2, 3, 32, 48), 96, 7, told={"lq_latent": (2, 16, 4, 6), "degrade_sigma": (2,)},
    ),
    "mochi": Small(
        "GenmoMochi",
        {"image_model": "mochi_preview", "depth": 2, "num_heads": 2, "in_channels": 12, "hidden_size_x": 64,
         "hidden_size_y": 32, "mlp_ratio_x": 192.0, "mlp_ratio_y": 2.0, "use_t5": True, "t5_feat_dim": 48,
         "t5_token_length": 7, "learn_sigma": False, "qk_norm": True, "qkv_bias": False, "out_bias": True},
        (2, 12, 3, 8, 12), 72, 5, told={"attention_mask": (2, 7)}, constants={"num_tokens": 5},
    ),
    "cogvideo": Small(
        "CogVideoX_T2V",
        {"image_model": "cogvideox", "num_attention_heads": 2, "attention_head_dim": 48, "time_embed_dim": 32,
         "text_embed_dim": 48, "num_layers": 2, "sample_width": 12, "sample_height": 8, "sample_frames": 9,
         "max_text_seq_length": 7},
        VIDEO, 72, 7,
    ),
    "cogvideo15": Small(
        "CogVideoX_T2V",
        {"image_model": "cogvideox", "num_attention_heads": 2, "attention_head_dim": 32, "time_embed_dim": 32,
         "text_embed_dim": 48, "num_layers": 2, "max_text_seq_length": 7, "patch_size_t": 2, "ofs_embed_dim": 32,
         "use_rotary_positional_embeddings": True},
        (2, 16, 5, 8, 12), 72, 7, told={"ofs": (2,)},
    ),
    "kandinsky": Small(
        "Kandinsky5",
        {"image_model": "kandinsky5", "in_text_dim": 48, "in_text_dim2": 32, "time_dim": 32, "model_dim": 64,
         "ff_dim": 64, "visual_embed_dim": 64, "num_text_blocks": 1, "num_visual_blocks": 2, "axes_dims": (8, 12, 12)},
        VIDEO, 72, 0, told={"y": (2, 32)},
    ),
    "minimax": Small(
        "MiniMaxH3",
        {"image_model": "minimax_h3", "hidden_size": 64, "num_layers": 2, "token_refiner_num_layers": 1,
         "num_attention_heads": 2, "attention_head_dim": 32, "ffn_hidden_size": 64, "text_dim": 48,
         "timestep_input_dim": 32, "time_embed_hidden_size": 64, "time_embed_dim": 32, "rope_inv_freq_len": 4},
        (1, 1, 24 * 3 * 8 * 12 + 32 * 2 * 5), 72, 7 + 10,
        constants={"latent_shapes": [(1, 24, 3, 8, 12), (1, 32, 2, 5)]},
    ),
    "cosmos1": Small(
        "CosmosT2V",
        {**{key: value for key, value in COSMOS.items() if key != "rope_enable_fps_modulation"},
         "image_model": "cosmos", "block_config": "FA-CA-MLP", "block_x_format": "THWBD",
         "affline_emb_norm": True, "extra_per_block_abs_pos_emb": True,
         "extra_per_block_abs_pos_emb_type": "learnable"},
        VIDEO, 72, 0,
    ),
    "hidream_o1": Small(
        "HiDreamO1",
        {"image_model": "hidream_o1",
         "text_config_overrides": {"vocab_size": 151680, "hidden_size": 64, "intermediate_size": 64,
                                   "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
                                   "head_dim": 16, "rope_dims": [4, 2, 2]},
         "vision_config_overrides": {"hidden_size": 32, "num_heads": 2, "intermediate_size": 32, "depth": 1,
                                     "num_position_embeddings": 16}},
        (2, 3, 8 * 32, 12 * 32), 96, 7, elsewhere=6, made=lambda x: hidream_o1_told(x),
    ),
}  # fmt: skip

# Models that are served in another way; small() and call() know them too.
APART: dict[str, Small] = {
    "ace": Small(
        "ACEStep15",
        {"audio_model": "ace1.5", "in_channels": 24, "hidden_size": 64, "text_hidden_dim": 32, "timbre_hidden_dim": 8,
         "audio_acoustic_hidden_dim": 8, "num_dit_layers": 4, "num_lyric_layers": 1, "num_timbre_layers": 1,
         "num_tokenizer_layers": 1, "num_heads": 4, "num_kv_heads": 2, "head_dim": 16, "intermediate_size": 64,
         "fsq_dim": 64, "encoder_hidden_size": 64, "encoder_intermediate_size": 64, "encoder_num_heads": 4},
        (2, 8, 192), 96, 0, text=(7, 32), told={"lyric_embed": (2, 5, 32), "refer_audio": (2, 8, 192)},
        constants={"is_covers": False},
    ),
    "ernie": Small(
        "ErnieImage",
        {"image_model": "ernie", "hidden_size": 64, "num_attention_heads": 2, "num_layers": 2, "ffn_hidden_size": 64,
         "in_channels": 16, "out_channels": 16, "text_in_dim": 48, "rope_axes_dim": (8, 12, 12)},
        (2, 16, 8, 12), 96, 7,
    ),
    "pixart": Small(
        "PixArtAlpha",
        {"image_model": "pixart_alpha", "input_size": None, "hidden_size": 64, "depth": 2, "num_heads": 2,
         "caption_channels": 48, "model_max_length": 7, "micro_condition": False, "pe_interpolation": None,
         "patch_size": 4},
        (2, 4, 32, 48), 96, 0,
    ),
    "hydit": Small(
        "HunyuanDiT",
        {"image_model": "hydit", "hidden_size": 64, "depth": 2, "num_heads": 2, "text_states_dim": 48,
         "text_states_dim_t5": 64, "text_len": 7, "text_len_t5": 9, "mlp_ratio": 2.0},
        (2, 4, 16, 24), 96, 0, told={"encoder_hidden_states_t5": (2, 9, 64), "text_embedding_mask": (2, 7),
                                     "text_embedding_mask_t5": (2, 9)},
    ),
    "causal": Small("WAN21_CausalAR_T2V", {**WAN, "image_model": "wan2.1"}, VIDEO, 72, 0),
}  # fmt: skip


def small(name: str, **changes: Any) -> Any:
    """A ModelPatcher around the small model; changes to its unet_config."""
    import comfy.model_patcher
    import comfy.supported_models
    import torch

    which = {**SMALL, **APART}[name]
    unet_config = {**which.unet_config, **changes, "dtype": torch.float32}
    model_config = comfy.supported_models.__dict__[which.supported](unet_config)
    model_config.unet_config = unet_config  # BASE.__init__ adds to it
    with ExitStack() as stack:
        for path in which.absent:
            stack.enter_context(mock.patch(f"comfy.ldm.{path}", _Absent))
        model = model_config.get_model({}, "")
    host.fill(model.diffusion_model)
    with torch.no_grad():
        for key, x in (*model.diffusion_model.named_buffers(), *model.diffusion_model.named_parameters()):
            if key == "pos_embed":
                x.copy_(torch.randn(x.shape, generator=torch.Generator().manual_seed(9)))
            elif key.endswith(".gamma"):
                x.fill_(1.0)
            elif key.endswith("inv_freq"):  # a checkpoint brings it; without one it is whatever lay in memory
                x.copy_(1e4 ** -torch.linspace(0, 1, len(x)))
    return comfy.model_patcher.ModelPatcher(model, torch.device("cpu"), torch.device("cpu"))


class _Absent:
    def __init__(self, *args: Any, **kwargs: Any):
        pass

    def load_state_dict(self, *args: Any, **kwargs: Any) -> None:
        pass


def call(
    model: Any, name: str, *, latent: tuple[int, ...] | None = None, seed: int = 0, sigma: float = 0.7, **told: Any
) -> Any:
    """The model's outcome, through apply_model with the patcher's options and wrappers.

    sigma: the sampler's noise level, one of three; the model itself is told 0.7.
    """
    import torch

    which = {**SMALL, **APART}[name]
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(latent or which.latent, generator=generator)
    given = {"c_crossattn": torch.randn(len(x), *which.text, generator=generator)}
    given.update({key: torch.randn(len(x), *shape[1:], generator=generator) for key, shape in which.told.items()})
    given.update(which.constants)
    given.update({} if which.made is None else which.made(x))
    given.update(told)
    if hasattr(model.model.diffusion_model, "clear_kv_cache"):
        model.model.diffusion_model.clear_kv_cache()  # HiDream-O1's, of its prompt
    with torch.no_grad():
        return model.model.apply_model(
            x, torch.full((len(x),), 0.7), transformer_options=options_of(model, sigma), **given
        )


def hidream_o1_told(x: Any, **references: Any) -> dict[str, Any]:
    """What ComfyUI tells HiDream-O1 of a prompt of 7 tokens, the last of which stands for the time."""
    import torch
    from comfy.ldm.hidream_o1.conditioning import build_extra_conds
    from comfy.ldm.hidream_o1.model import TMS_TOKEN_ID

    return build_extra_conds(torch.tensor([[1, 2, 3, 4, 5, 6, TMS_TOKEN_ID]]), x, **references)


def kept(image: int, ratio: float) -> int:
    """How many of the image's tokens `sample` keeps."""
    return max(-(-image // 64), image - int(image * ratio))


def served(seen: list[Seen], which: Small, image: int | None = None) -> list[Seen]:
    """The calls whose keys were sampled, or would be: those of an unmerged run with the image's tokens in them.

    Refiners (Lumina's) look like the image alone; they run first. A prompt has 7 tokens, a picture's features 11, sound
    20.
    """
    image = which.image if image is None else image
    calls = [one for one in seen if one.q.shape[-2] >= image and one.k.shape[-2] not in (7, 11, 20)]
    return calls[len(calls) - which.layers :]


def options_of(model: Any, sigma: float) -> dict[str, Any]:
    """transformer_options as the sampler makes them."""
    import torch

    options = dict(model.model_options["transformer_options"])
    options["wrappers"] = {kind: {key: list(x) for key, x in keyed.items()} for kind, keyed in model.wrappers.items()}
    return {
        **options,
        "sigmas": torch.tensor([sigma]),
        "sample_sigmas": torch.tensor([1.0, 0.7, 0.3, 0.0]),
        "cond_or_uncond": [0, 1],
    }


@dataclass(eq=False)
class Seen:
    """One attention call: what reached the kernel. q, k, v: [B, H, L, d]."""

    q: Any
    k: Any
    v: Any
    mask: Any
    scale: float | None


@contextmanager
def watch() -> Iterator[list[Seen]]:
    """What reaches torch's attention, whatever ran before it."""
    import comfy.ops

    seen: list[Seen] = []
    kept = comfy.ops.scaled_dot_product_attention

    def spy(q, k, v, *args, **kwargs):
        seen.append(Seen(q, k, v, kwargs.get("attn_mask"), kwargs.get("scale")))
        return kept(q, k, v, *args, **kwargs)

    comfy.ops.scaled_dot_product_attention = spy
    try:
        yield seen
    finally:
        comfy.ops.scaled_dot_product_attention = kept


def lengths(seen: list[Seen]) -> list[tuple[int, int]]:
    """(queries, keys) of each call."""
    return [(one.q.shape[-2], one.k.shape[-2]) for one in seen]


def sample(model: Any, name: str, *, steps: int = 2, seed: int = 1, cfg: float = 3.0, **latent: Any) -> Any:
    """The latent that ComfyUI's own KSampler makes of one picture (or as many as `batch`)."""
    import nodes
    import torch

    which = {**SMALL, **APART}[name]
    shape = (latent.get("batch", 1), *which.latent[1:])

    def conditioning(seed: int) -> list:
        generator = torch.Generator().manual_seed(seed)
        pooled = torch.randn(1, 32, generator=generator)
        return [[torch.randn(1, *which.text, generator=generator), {"pooled_output": pooled}]]

    return nodes.KSampler().sample(
        model,
        seed,
        steps,
        cfg,
        "euler",
        "simple",
        conditioning(1),
        conditioning(2),
        {"samples": torch.zeros(shape)},
        1.0,
    )[0]["samples"]


def attention_alone(
    grid: tuple[int, ...],
    head: int = 0,
    tail: int | None = 0,
    override: Any = None,
    by_times: bool = False,
    layout: Any = None,
    **values: Any,
) -> Any:
    """attention(q, k, v, heads, **kwargs) of one layer of a call, without a model around it.

    Unless values say so, no query keeps its own token: what is compared is the weighing of the drawn keys.
    """
    import torch
    from comfy.ldm.modules.attention import optimized_attention

    dit, table = host.pack_module("dit"), host.pack_module("dit_models")
    config = host.pack_module("dit_patch").ToMeConfig(**{"min_tokens": 0, "own_token": False, **values})
    options = {} if override is None else {"optimized_attention_override": override}
    made = dit.ModelCall(config, grid, torch.device("cpu"))
    layout = dit.Layout(grid, head, tail) if layout is None else layout
    patch = dit.DiTCall(made, table.DIT_MODELS[0], layout, options, by_times=by_times)
    told = {**patch.options, "block_index": 0}
    return lambda q, k, v, heads, **kwargs: optimized_attention(q, k, v, heads, transformer_options=told, **kwargs)
