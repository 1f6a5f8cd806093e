"""What ToMe knows of ComfyUI's transformers without a U-Net: one row of DIT_MODELS each.

A row was written from the model's own forward (ComfyUI 0.30, comfy/ldm/<file of its class>). A model is known by its
class's name, so a ComfyUI that lacks one loads all the same. A subclass may order its tokens anew, so it counts only
where it is named or changes nothing that it inherits. To add a model, add its row: nothing else names one. What is
left alone, and why: dit_refused.py.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from ..shared_tome.core.grid import Grid
from . import dit_tokens as of
from .dit_tokens import Shape, Told


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
    numbered: the model tells the number of its block, and what runs without one (refiners) is to be left alone. Not of
        models that have nothing of that kind: ComfyUI tells no numbers up to 0.3.64, of Cosmos-Predict2 up to 0.27.
    alone(model, told): some layers attend without the text; how many tokens stand before the image's there.
    others(model, told): lengths of attentions to other tokens (cross-attentions, refiners, sound), to be told from the
        image's by their length alone.
    calls(model): attention calls of one layer that want the same tokens.
    parts: some layers call attention with a part of the queries and all keys, once or several times.
    elsewhere(model, told, grid): queries of each layer that never come, because the model has them already or asks
        another attention.
    compiles: forward hands keywords that it does not know to its wrappers, which torch.compile can guard (unet.py).
    silent(model, options): self-attentions to be served whose calls do not tell their options, so that no override
        reaches them: they are met where they call torch (shared_tome/attention/sdpa.py). options: the call's.
    """

    name: str
    classes: tuple[str, ...]
    grid: Callable[[Any, Shape, Told], Grid | None]
    head: Callable[[Any, Told], int] | None = None
    tail: Callable[[Any, Told, Grid], int] | None = None
    numbered: bool = False
    alone: Callable[[Any, Told], int] | None = None
    others: Callable[[Any, Told], tuple[int, ...]] | None = None
    calls: Callable[[Any], int] = _one
    parts: bool = False
    elsewhere: Callable[[Any, Told, Grid], int] = of.nothing
    compiles: bool = True
    silent: Callable[[Any, dict[str, Any]], list[Any]] | None = None


DIT_MODELS: tuple[DiTModel, ...] = (
    DiTModel("Flux", ("flux.model.Flux",), of.image, head=of.prompt, tail=of.references),
    DiTModel(
        "Chroma",
        ("chroma.model.Chroma", "chroma_radiance.model.ChromaRadiance"),
        of.image,
        head=of.prompt,
        tail=of.nothing,
    ),
    DiTModel(
        "SD3",
        ("modules.diffusionmodules.mmdit.OpenAISignatureMMDITWrapper",),
        of.image,
        head=lambda model, told: model.register_length + of.prompt(model, told),
        tail=of.nothing,
        alone=of.nothing,  # SD3.5 medium's second attention of a block
        compiles=False,
    ),
    DiTModel(
        "Qwen-Image",
        ("qwen_image.model.QwenImageTransformer2DModel",),
        of.layers_of_images,
        head=of.prompt,
        tail=of.layers_of_references,
    ),
    DiTModel(
        "Lumina2 and Z-Image",
        ("lumina.model.NextDiT", "lumina.model.NextDiTPixelSpace"),
        of.image,
        tail=of.padding,  # before the image: the prompt, filled up, and in omni models the references
        numbered=True,
    ),
    DiTModel(
        "OmniGen2",
        ("omnigen.omnigen2.OmniGen2Transformer2DModel",),
        of.image,
        head=lambda model, told: sum(of.refined(model, told)),
        tail=of.nothing,
        others=of.refined,
        compiles=False,
    ),
    DiTModel(
        "Boogu",
        ("boogu.model.BooguTransformer2DModel",),
        of.image,
        head=lambda model, told: sum(of.refined(model, told)),
        tail=of.nothing,
        alone=of.references,  # without any the two layers that refine the noise look the same
        others=of.refined,
        compiles=False,
    ),
    DiTModel(
        "Krea 2",
        ("krea2.model.SingleStreamDiT",),
        lambda model, shape, told: of.patches(shape, model.patch, model.patch),
        head=of.prompt,
        tail=of.krea_references,
        numbered=True,
    ),
    DiTModel(
        "Ideogram 4", ("ideogram4.model.Ideogram4Transformer2DModel",), of.pixels, head=of.prompt, tail=of.nothing
    ),
    DiTModel(
        "Mage-Flow",
        ("mage_flow.model.MageFlowTransformer2DModel",),
        of.image,
        head=of.prompt,
        tail=of.references,
        numbered=True,
    ),
    DiTModel("Lens", ("lens.model.LensTransformer2DModel",), of.pixels, head=of.nothing, tail=of.prompt, numbered=True),
    DiTModel(
        "JoyImage",
        ("joyimage.model.JoyImageTransformer3DModel",),
        of.video,
        head=of.nothing,
        tail=lambda model, told, grid: (
            of.in_patches(told.get("ref_latents"), *model.patch_size) + of.prompt(model, told)
        ),
        numbered=True,
    ),
    DiTModel(
        "Ernie-Image",
        ("ernie.model.ErnieImageModel",),
        of.image,
        head=of.nothing,
        tail=of.prompt,
        compiles=False,
        silent=lambda model, options: [layer.self_attention for layer in model.layers],
    ),
    DiTModel(
        "PixelDiT and PiD",
        ("pixeldit.model.PixDiT_T2I", "pixeldit.pid.PidNet"),
        of.image,
        head=of.prompt_of_pixeldit,
        tail=of.nothing,
        alone=of.nothing,  # blocks of pixels, which attend patch by patch
    ),
    DiTModel("HunyuanVideo", ("hunyuan_video.model.HunyuanVideo",), of.video, tail=of.nothing, numbered=True),
    DiTModel(
        "Wan",
        ("wan.model.WanModel", "wan.model_animate.AnimateWanModel", "wan.model_wandancer.WanDancerModel"),
        of.video,
        head=of.prepended_frame,
        others=of.prompts,
    ),
    DiTModel(
        "Wan VACE, Camera, S2V and HuMo",
        ("wan.model.VaceWanModel", "wan.model.CameraWanModel", "wan.model.WanModel_S2V", "wan.model.HumoWanModel"),
        of.video,
        head=of.nothing,
        others=of.prompts,
    ),
    DiTModel(
        "Wan SCAIL",
        ("wan.model.SCAILWanModel", "wan.model.SCAIL2WanModel"),
        of.video,
        head=of.prepended_frames,
        others=of.prompts,
    ),
    DiTModel(
        "Wan CausalAR",
        ("wan.ar_model.CausalWanModel",),
        of.frames_so_far,
        head=of.nothing,
        others=of.prompts,
        parts=True,
        elsewhere=of.earlier_frames,
        compiles=False,
        # Frame by frame it tells no options; at once it is Wan.
        silent=lambda model, options: [block.self_attn for block in model.blocks if "ar_state" in options],
    ),
    DiTModel(
        "LTXV",
        ("lightricks.model.LTXVModel",),
        of.video_before_guides,
        head=of.nothing,
        others=of.prompts,
        parts=True,  # guides of a strength other than 1
    ),
    DiTModel(
        "LTX-2",
        ("lightricks.av_model.LTXAVModel",),
        of.video_before_guides,
        head=of.nothing,
        others=of.prompts_and_sound,  # the sound has 25 tokens a second: nothing to gain
        parts=True,
    ),
    DiTModel(
        "Mochi",
        ("genmo.joint_model.asymm_models_joint.AsymmDiTJoint",),
        of.layers_of_images,
        head=of.nothing,
        tail=of.prompt_of_mochi,
        compiles=False,
    ),
    DiTModel(
        "CogVideoX",
        ("cogvideo.model.CogVideoXTransformer3DModel",),
        lambda model, shape, told: of.patches(shape, model.patch_size_t or 1, model.patch_size, model.patch_size),
        head=of.prompt,
        tail=of.nothing,
    ),
    DiTModel(
        "Kandinsky 5",
        ("kandinsky5.model.Kandinsky5",),
        of.video,
        head=of.nothing,
        tail=of.nothing,
        numbered=True,  # the prompt's own blocks run before
        others=of.prompts,
    ),
    DiTModel(
        "MiniMax H3",
        ("minimax.model.MiniMaxH3Model",),
        of.video,
        tail=of.nothing,  # before the video: prompt, references, sound
        others=lambda model, told: (of.prompt(model, told),),
    ),
    DiTModel(
        "Cosmos, Cosmos-Predict2 and Anima",
        ("cosmos.model.GeneralDIT", "cosmos.predict2.MiniTrainDIT", "anima.model.Anima"),
        lambda model, shape, told: of.patches(shape, model.patch_temporal, model.patch_spatial, model.patch_spatial),
        head=of.nothing,
        tail=of.nothing,
        others=of.prompts,
    ),
    DiTModel(
        "HiDream",
        ("hidream.model.HiDreamImageTransformer2DModel",),
        of.image_without_source,
        head=of.nothing,
        compiles=False,
    ),
    DiTModel(
        "HiDream-O1",
        ("hidream_o1.model.HiDreamO1Transformer",),
        of.image,
        head=of.ids,
        tail=of.patches_of_references,
        parts=True,
        elsewhere=lambda model, told, grid: told.get("ar_len", 0),  # the prompt, causal and kept from step to step
    ),
    DiTModel(
        "AuraFlow",
        ("aura.mmdit.MMDiT",),
        of.image,
        head=lambda model, told: model.register_tokens.shape[1] + of.prompt(model, told),
        tail=of.nothing,
    ),
    DiTModel(
        "PixArt",
        ("pixart.pixartms.PixArtMS",),
        of.image,
        head=of.nothing,
        tail=of.nothing,
        compiles=False,
        silent=lambda model, options: [block.attn for block in model.blocks],
    ),
    DiTModel(
        "HunyuanDiT",
        ("hydit.models.HunYuanDiT",),
        of.image,
        head=of.nothing,
        tail=of.nothing,
        compiles=False,
        silent=lambda model, options: [block.attn1 for block in model.blocks],
    ),
    DiTModel(
        "Stable Audio",
        ("audio.dit.AudioDiffusionTransformer",),
        lambda model, shape, told: (1, shape[-1] // model.patch_size),
        tail=of.nothing,  # before the sound: memory tokens and conditioning
        others=of.prompts,
        compiles=False,
        calls=of.calls_of_stable_audio,
    ),
    DiTModel(
        "ACE-Step 1.5",
        ("ace.ace_step15.AceStepConditionGenerationModel",),
        lambda model, shape, told: (1, -(-shape[-1] // model.decoder.patch_size)),
        head=of.nothing,
        tail=of.nothing,
        compiles=False,
        silent=of.whole_attentions,
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


def unwrapped(model: Any) -> Any:
    """The diffusion model itself, where torch.compile has wrapped it."""
    return getattr(model, "_orig_mod", model)
