"""What ToMe knows of ComfyUI's transformers without a U-Net: one row of DIT_MODELS each.

A row was written from the model's own forward (ComfyUI 0.30, comfy/ldm/<file of its class>). A model is known by its
class's name, so a ComfyUI that lacks one loads all the same. A subclass may order its tokens anew, so it counts only
where it is named or changes nothing that it inherits. To add a model, add its row: nothing else names one.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from ..shared_tome.core.grid import Grid

Shape = tuple[int, ...]
# What a call is told beside its latent: apply_model's keywords, the prompt as "c_crossattn".
Told = dict[str, Any]


def _one(model: Any) -> int:
    return 1


@dataclass(frozen=True)
class DiTModel:
    """A family of models with one order of tokens: [head, image, tail].

    name: for people. classes: below comfy.ldm.
    grid(model, latent's shape, told): the image's (rows, columns) or (frames, rows, columns); None where this call's
        tokens do not lie on one.
    head(model, told): how many tokens stand before the image's; None: as many as are left over.
    tail(model, told, grid): how many stand after them; None: as many as are left over. At least one of the two.
    numbered: the model tells the number of its block, and what runs without one (refiners) is to be left alone.
    alone: some layers attend to the image without head and tail.
    crosses: has cross-attention, to be told from self-attention by its length alone.
    calls(model): attention calls of one layer that want the same tokens.
    parts: some layers call attention several times, each time with a part of the queries and all keys.
    compiles: forward hands keywords that it does not know to its wrappers, which torch.compile can guard (unet.py).
    silent(model): self-attentions to be served whose calls do not tell their options, so that no override reaches them:
        they are met where they call torch (shared_tome/attention/sdpa.py).
    """

    name: str
    classes: tuple[str, ...]
    grid: Callable[[Any, Shape, Told], Grid | None]
    head: Callable[[Any, Told], int] | None = None
    tail: Callable[[Any, Told, Grid], int] | None = None
    numbered: bool = False
    alone: bool = False
    crosses: bool = False
    calls: Callable[[Any], int] = _one
    parts: bool = False
    compiles: bool = True
    silent: Callable[[Any], list[Any]] | None = None


def _patches(shape: Shape, *patch: int) -> Grid:
    """The grid of a latent that is padded to whole patches."""
    return tuple(-(-size // side) for size, side in zip(shape[-len(patch) :], patch, strict=True))


def _image(model: Any, shape: Shape, told: Told) -> Grid:
    return _patches(shape, model.patch_size, model.patch_size)


def _video(model: Any, shape: Shape, told: Told) -> Grid:
    return _patches(shape, *model.patch_size)


def _none(model: Any, told: Told, grid: Grid | None = None) -> int:
    return 0


def _prompt(model: Any, told: Told) -> int:
    return _length(told, "c_crossattn")


def _length(told: Told, name: str) -> int:
    found = told.get(name)
    return 0 if found is None else found.shape[-2]


def _references(model: Any, told: Told, grid: Grid) -> int:
    """Reference latents (Flux Kontext, Qwen edit) are cut into patches as the image is and stand after it."""
    return sum(
        math.prod(_patches(latent.shape, *(1,) * (len(grid) - 2), model.patch_size, model.patch_size))
        for latent in told.get("ref_latents") or ()
    )


def _layers_of_images(model: Any, shape: Shape, told: Told) -> Grid:
    return _patches(shape, 1, model.patch_size, model.patch_size)


def _padding(model: Any, told: Told, grid: Grid) -> int:
    """Z-Image fills up the image's tokens to a multiple."""
    return -math.prod(grid) % model.pad_tokens_multiple if model.pad_tokens_multiple else 0


def _prepended_frame(model: Any, told: Told) -> int:
    """Wan Fun's reference, [B, C, H, W], through a convolution of its own."""
    latent = told.get("reference_latent")
    if model.ref_conv is None or latent is None:
        return 0
    return (latent.shape[-2] // model.patch_size[1]) * (latent.shape[-1] // model.patch_size[2])


def _prepended_frames(model: Any, told: Told) -> int:
    """SCAIL's references, [B, C, T, H, W], before the video."""
    latent = told.get("reference_latent")
    return 0 if latent is None else math.prod(_patches(latent.shape, *model.patch_size))


def _video_before_guides(model: Any, shape: Shape, told: Told) -> Grid | None:
    """LTXV's guides are further frames at the latent's end, told by their coordinates [B, 3, tokens, ...]."""
    frames, rows, columns = _patches(shape, *model.patchifier.patch_size)
    guides = told.get("keyframe_idxs")
    guides = 0 if guides is None else guides.shape[2]
    if guides % (rows * columns) or guides // (rows * columns) >= frames:
        return None
    return frames - guides // (rows * columns), rows, columns


def _whole_attentions(model: Any) -> list[Any]:
    """Every other layer of ACE-Step attends to 128 tokens each way alone; those stay as they are."""
    attentions = (layer.self_attn for layer in model.decoder.layers)
    return [attention for attention in attentions if attention.sliding_window is None]


def _image_without_source(model: Any, shape: Shape, told: Told) -> Grid | None:
    """HiDream E1 sets the image to be edited beside the new one, so their rows take turns."""
    return None if told.get("image_cond") is not None else _image(model, shape, told)


DIT_MODELS: tuple[DiTModel, ...] = (
    DiTModel("Flux", ("flux.model.Flux",), _image, head=_prompt, tail=_references, numbered=True),
    DiTModel(
        "Chroma",
        ("chroma.model.Chroma", "chroma_radiance.model.ChromaRadiance"),
        _image,
        head=_prompt,
        tail=_none,
        numbered=True,
    ),
    DiTModel(
        "SD3",
        ("modules.diffusionmodules.mmdit.OpenAISignatureMMDITWrapper",),
        _image,
        head=lambda model, told: model.register_length + _prompt(model, told),
        tail=_none,
        alone=True,  # SD3.5 medium's second attention of a block
        compiles=False,
    ),
    DiTModel(
        "Qwen-Image",
        ("qwen_image.model.QwenImageTransformer2DModel",),
        _layers_of_images,
        head=_prompt,
        tail=_references,
        numbered=True,
    ),
    DiTModel(
        "Lumina2 and Z-Image",
        ("lumina.model.NextDiT", "lumina.model.NextDiTPixelSpace"),
        _image,
        tail=_padding,  # before the image: the prompt, filled up, and in omni models the references
        numbered=True,
    ),
    DiTModel("HunyuanVideo", ("hunyuan_video.model.HunyuanVideo",), _video, tail=_none, numbered=True),
    DiTModel(
        "Wan",
        ("wan.model.WanModel", "wan.model_animate.AnimateWanModel", "wan.model_wandancer.WanDancerModel"),
        _video,
        head=_prepended_frame,
        numbered=True,
        crosses=True,
    ),
    DiTModel(
        "Wan VACE, Camera, S2V and HuMo",
        ("wan.model.VaceWanModel", "wan.model.CameraWanModel", "wan.model.WanModel_S2V", "wan.model.HumoWanModel"),
        _video,
        head=_none,
        numbered=True,
        crosses=True,
    ),
    DiTModel(
        "Wan SCAIL",
        ("wan.model.SCAILWanModel", "wan.model.SCAIL2WanModel"),
        _video,
        head=_prepended_frames,
        numbered=True,
        crosses=True,
    ),
    DiTModel(
        "LTXV",
        ("lightricks.model.LTXVModel",),
        _video_before_guides,
        head=_none,
        crosses=True,
        parts=True,  # guides of a strength other than 1
    ),
    DiTModel(
        "Cosmos-Predict2 and Anima",
        ("cosmos.predict2.MiniTrainDIT", "anima.model.Anima"),
        lambda model, shape, told: _patches(shape, model.patch_temporal, model.patch_spatial, model.patch_spatial),
        head=_none,
        tail=_none,
        crosses=True,  # and not numbered: it has no refiner, and tells no numbers up to ComfyUI 0.27
    ),
    DiTModel(
        "HiDream", ("hidream.model.HiDreamImageTransformer2DModel",), _image_without_source, head=_none, compiles=False
    ),
    DiTModel(
        "AuraFlow",
        ("aura.mmdit.MMDiT",),
        _image,
        head=lambda model, told: model.register_tokens.shape[1] + _prompt(model, told),
        tail=_none,
    ),
    DiTModel(
        "Stable Audio",
        ("audio.dit.AudioDiffusionTransformer",),
        lambda model, shape, told: (1, shape[-1] // model.patch_size),
        tail=_none,  # before the sound: memory tokens and conditioning
        crosses=True,
        compiles=False,
        calls=lambda model: 2 if model.transformer.layers[0].self_attn.differential else 1,
    ),
    # ACE-Step 1.0's self-attention is linear: it has no keys to spare.
    DiTModel(
        "ACE-Step 1.5",
        ("ace.ace_step15.AceStepConditionGenerationModel",),
        lambda model, shape, told: (1, -(-shape[-1] // model.decoder.patch_size)),
        head=_none,
        tail=_none,
        compiles=False,
        silent=_whole_attentions,
    ),
)
_BY_CLASS = {f"comfy.ldm.{name}": row for row in DIT_MODELS for name in row.classes}
SERVED = ", ".join(row.name for row in DIT_MODELS)


# What a subclass may have of its own without running in another way.
_OF_ANY_CLASS = {"__init__", "__module__", "__doc__", "__annotations__", "__static_attributes__", "__firstlineno__"}


def dit_model(model: Any) -> DiTModel | None:
    """The row of a diffusion model, or None. A subclass that changes nothing it inherits has the row of its base: a
    node may swap the class of a loaded model."""
    kinds = type(model).__mro__
    for place, kind in enumerate(kinds):
        row = _BY_CLASS.get(f"{kind.__module__}.{kind.__qualname__}")
        if row is not None:
            changed = {name for own in kinds[:place] for name in vars(own) if hasattr(kind, name)}
            return None if changed - _OF_ANY_CLASS else row
    return None


def cross_lengths(told: Told) -> tuple[int, ...]:
    """How many tokens a cross-attention may have: the prompt's, an image's (CLIP vision), Anima's filled prompt."""
    return _length(told, "c_crossattn"), _length(told, "clip_fea"), 512


def unwrapped(model: Any) -> Any:
    """The diffusion model itself, where torch.compile has wrapped it."""
    return getattr(model, "_orig_mod", model)
