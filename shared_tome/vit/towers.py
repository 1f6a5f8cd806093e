"""Which vision transformers are served, and where in one its blocks are."""

from __future__ import annotations

import inspect
from dataclasses import dataclass

from torch import nn

from ..hooks.served import served_as

SERVED = (
    "timm's VisionTransformer, transformers' vision towers of CLIP, SigLIP, AltCLIP, BLIP-2, Chinese CLIP, CLIPSeg, "
    "InstructBLIP, Janus, MetaCLIP 2, OWL-ViT and OWLv2, and ComfyUI's CLIP and SigLIP encoders"
)
_TIMM = ("VisionTransformer", "VisionTransformerDistilled")
_TIMM_BLOCKS = ("vision_transformer.Block",)
# Layers of transformers' and ComfyUI's towers. Others may turn keys by their place or mask some of the patches.
_LAYERS = (
    "AltCLIPEncoderLayer",
    "Blip2EncoderLayer",
    "CLIPEncoderLayer",
    "CLIPSegEncoderLayer",
    "ChineseCLIPVisionLayer",
    "InstructBlipEncoderLayer",
    "JanusVisionEncoderLayer",
    "MetaClip2EncoderLayer",
    "OwlViTEncoderLayer",
    "Owlv2EncoderLayer",
    "SiglipEncoderLayer",
    "clip_model.CLIPLayer",
)

_READERS = ("CLIPSegForImageSegmentation",)  # models that read the tokens between the blocks


@dataclass(frozen=True, eq=False)
class Tower:
    """A vision transformer's blocks, and how to reach the parts of one.

    attention, norm, tail: names of the attention, of the norm before the MLP, and of the last module of the MLP's
    branch. prefix: how many tokens stand before the patches. explicit: the host hands the attention function to the
    attention (ComfyUI).
    """

    blocks: list[nn.Module]
    attention: str
    norm: str
    tail: str
    prefix: int
    explicit: bool = False


def find_tower(model: nn.Module) -> Tower:
    """Raises ValueError where there is none that is served."""
    tower = _timm_tower(model) or _clip_tower(model)
    if tower is None:
        raise ValueError(f"ToMe does not know {type(model).__name__} as a vision transformer. It serves {SERVED}")
    return tower


def _timm_tower(model: nn.Module) -> Tower | None:
    if served_as(model, _TIMM) is None:
        return None
    blocks = list(getattr(model, "blocks", ()))
    if not blocks or not hasattr(model, "num_prefix_tokens"):
        return None
    for block in blocks:
        attention = getattr(block, "attn", None)
        if served_as(block, _TIMM_BLOCKS) is None or type(attention).__name__ != "Attention":
            return None  # others turn keys by their place or have no residual between attention and MLP
        if not getattr(attention, "fused_attn", False):
            raise ValueError("ToMe needs timm's fused attention; see timm.layers.set_fused_attn")
    if getattr(model, "grad_checkpointing", False):
        raise ValueError("ToMe does not go with gradient checkpointing, which runs blocks twice; turn it off")
    tail = next(name for name in ("drop_path2", "ls2", "mlp") if hasattr(blocks[0], name))
    return Tower(blocks, "attn", "norm2", tail, model.num_prefix_tokens)


def _clip_tower(model: nn.Module) -> Tower | None:
    """transformers' and ComfyUI's towers have the same layout."""
    found = []
    for path, module in model.named_modules():
        layers = getattr(module, "layers", None)
        if "text_model" in path.split(".") or not isinstance(layers, nn.ModuleList) or not len(layers):
            continue
        if all(served_as(layer, _LAYERS) is not None for layer in layers):
            found.append(list(layers))
    embeddings = [m for path, m in model.named_modules() if hasattr(m, "patch_embedding")]
    if len(found) != 1 or len(embeddings) != 1:
        return None
    prefix = int(getattr(embeddings[0], "class_embedding", None) is not None)
    attention = found[0][0].self_attn
    kernel = getattr(getattr(attention, "config", None), "_attn_implementation", "sdpa")
    if kernel != "sdpa":
        raise ValueError(f"ToMe needs attn_implementation='sdpa', this model has {kernel!r}")
    explicit = "optimized_attention" in inspect.signature(type(attention).forward).parameters
    return Tower(found[0], "self_attn", "layer_norm2", "mlp", prefix, explicit)


def reads_between(model: nn.Module) -> bool:
    """Whether a model takes from its tower more than the output: some of transformers' (LLaVA and its kind: -2)."""
    layer = getattr(getattr(model, "config", None), "vision_feature_layer", None)
    return served_as(model, _READERS) is not None or layer not in (None, -1, [-1], (-1,))
