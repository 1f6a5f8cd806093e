"""Which vision transformers are served, and where in one its blocks are."""

from __future__ import annotations

import inspect
from dataclasses import dataclass

from torch import nn

from ..hooks.served import served_as

SERVED = (
    "timm's VisionTransformer and NaFlexVit, transformers' vision towers of CLIP, SigLIP, AltCLIP, BLIP-2, Chinese "
    "CLIP, CLIPSeg, InstructBLIP, Janus, MetaCLIP 2, OWL-ViT, OWLv2, SigLIP 2, ViT, DeiT, ViT-MSN, DINOv2, DINOv2 with "
    "registers and DINOv3 ViT, and ComfyUI's CLIP and SigLIP encoders"
)
_TIMM = ("VisionTransformer", "VisionTransformerDistilled", "NaFlexVit")
_TIMM_BLOCKS = ("vision_transformer.Block",)
# Layers of transformers' and ComfyUI's towers, by the names of their attention, of the norm before the MLP and of the
# last module of the MLP's branch (which may stand behind the attention too). Others may add a bias for each place.
_LAYERS = {
    name: parts
    for parts, names in {
        ("self_attn", "layer_norm2", "mlp"): (
            "AltCLIPEncoderLayer Blip2EncoderLayer CLIPEncoderLayer CLIPSegEncoderLayer ChineseCLIPVisionLayer "
            "InstructBlipEncoderLayer JanusVisionEncoderLayer MetaClip2EncoderLayer OwlViTEncoderLayer "
            "Owlv2EncoderLayer Siglip2EncoderLayer SiglipEncoderLayer clip_model.CLIPLayer"
        ),
        ("attention", "layernorm_after", "dropout"): "ViTLayer DeiTLayer ViTMSNLayer",
        ("attention", "norm2", "drop_path"): "Dinov2Layer Dinov2WithRegistersLayer DINOv3ViTLayer",
    }.items()
    for name in names.split()
}
# Those that turn queries and keys by their place.
_ROTATING = ("DINOv3ViTLayer",)

# Models that read the tokens between the blocks, or have a part that does.
_READERS = ("CLIPSegForImageSegmentation", "DINOv3ViTBackbone", "Dinov2Backbone", "Dinov2WithRegistersBackbone")


@dataclass(frozen=True, eq=False)
class Tower:
    """A vision transformer's blocks, and how to reach the parts of one.

    attention, norm, tail: names of the attention, of the norm before the MLP, and of the last module of the MLP's
    branch. prefix: how many tokens stand before the patches. explicit: the host hands the attention function to the
    attention (ComfyUI). rotates: it turns queries and keys by their place.
    """

    blocks: list[nn.Module]
    attention: str
    norm: str
    tail: str
    prefix: int
    explicit: bool = False
    rotates: bool = False


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
        raise ValueError("ToMe does not work with gradient checkpointing, which runs blocks twice; turn it off")
    tail = next(name for name in ("drop_path2", "ls2", "mlp") if hasattr(blocks[0], name))
    return Tower(blocks, "attn", "norm2", tail, model.num_prefix_tokens)


def _clip_tower(model: nn.Module) -> Tower | None:
    """transformers' and ComfyUI's towers have a list of layers each, and embeddings before it."""
    found = []
    for path, module in model.named_modules():
        layers = getattr(module, "layers", getattr(module, "layer", None))
        if "text_model" in path.split(".") or not isinstance(layers, nn.ModuleList) or not len(layers):
            continue
        names = {served_as(layer, _LAYERS) for layer in layers}
        if len(names) == 1 and None not in names:
            found.append((names.pop(), list(layers)))
    embeddings = [
        m  # makes a tower's tokens
        for m in model.modules()
        if hasattr(m, "patch_embedding") or (hasattr(m, "patch_embeddings") and hasattr(m, "cls_token"))
    ]
    if len(found) != 1 or len(embeddings) != 1:
        return None
    (name, layers), (embedding,) = *found, embeddings
    parts = _LAYERS[name]
    if not all(isinstance(getattr(layer, part, None), nn.Module) for layer in layers for part in parts):
        return None  # of another version, with other parts
    attention = getattr(layers[0], parts[0])
    kernel = getattr(getattr(attention, "config", None), "_attn_implementation", "sdpa")
    if kernel != "sdpa":
        raise ValueError(f"ToMe needs attn_implementation='sdpa', this model has {kernel!r}")
    explicit = "optimized_attention" in inspect.signature(type(attention).forward).parameters
    return Tower(layers, *parts, _prefix_of(embedding), explicit, name in _ROTATING)


def _prefix_of(embedding: nn.Module) -> int:
    """How many tokens it puts before the patches."""
    tokens = (getattr(embedding, name, None) for name in ("cls_token", "distillation_token", "register_tokens"))
    single = getattr(embedding, "class_embedding", None) is not None
    return int(single) + sum(x.shape[1] for x in tokens if x is not None)


def reads_between(model: nn.Module) -> bool:
    """Whether a model takes from its tower more than the output: some of transformers' (LLaVA and its kind: -2)."""
    layer = getattr(getattr(model, "config", None), "vision_feature_layer", None)
    reads = any(served_as(module, _READERS) is not None for module in model.modules())
    return reads or layer not in (None, -1, [-1], (-1,))
