"""What ToMe knows of transformers without a U-Net in ComfyUI and Forge: one row of DIT_MODELS each.

A row was written from the model's own forward (ComfyUI 0.30, comfy/ldm/<file of its class>; Forge f2.0.1 and Forge Neo,
backend/nn). A model is known by its class's name, so a program that lacks one loads all the same. A subclass may order
its tokens anew, so it counts only where it is named or changes nothing that it inherits. To add a model, add its row:
nothing else names one. What is left alone, and why: dit_refused.py.
"""

from __future__ import annotations

from typing import Any

from ..shared_tome import ToMeConfig
from . import dit_tokens as of
from .dit_row import DiTModel

DIT_MODELS: tuple[DiTModel, ...] = (
    DiTModel(
        "Flux",
        ("flux.model.Flux",),
        of.image,
        head=of.prompt,
        tail=of.references,
        forge=("flux.IntegratedFluxTransformer2DModel",),
        blocks=("double_blocks", "single_blocks"),
    ),
    DiTModel(
        "Chroma",
        ("chroma.model.Chroma", "chroma_radiance.model.ChromaRadiance"),
        of.image,
        head=of.prompt,
        tail=of.nothing,
        forge=("chroma.IntegratedChromaTransformer2DModel",),
        blocks=("double_blocks", "single_blocks"),
    ),
    DiTModel(
        "SD3",
        ("modules.diffusionmodules.mmdit.OpenAISignatureMMDITWrapper",),
        of.image,
        head=lambda model, arguments: model.register_length + of.prompt(model, arguments),
        tail=of.nothing,
        alone=of.nothing,  # SD3.5 medium's second attention of a block
        twice=of.blocks_with_two,
        compiles=False,
        forge=("mmditx.MMDiTX",),
        blocks=("joint_blocks",),
    ),
    DiTModel(
        "Qwen-Image",
        ("qwen_image.model.QwenImageTransformer2DModel",),
        of.layers_of_images,
        head=of.prompt,
        tail=of.layers_of_references,
        forge=("qwen.QwenImageTransformer2DModel",),
        blocks=("transformer_blocks",),
    ),
    DiTModel(
        "Lumina2 and Z-Image",
        ("lumina.model.NextDiT", "lumina.model.NextDiTPixelSpace"),
        of.image,
        tail=of.padding,  # before the image: the prompt, filled up, and in omni models the references
        numbered=True,
        forge=("lumina.NextDiT",),
        blocks=("layers",),
    ),
    DiTModel(
        "OmniGen2",
        ("omnigen.omnigen2.OmniGen2Transformer2DModel",),
        of.image,
        head=lambda model, arguments: sum(of.refined(model, arguments)),
        tail=of.nothing,
        others=of.refined,
        compiles=False,
    ),
    DiTModel(
        "Boogu",
        ("boogu.model.BooguTransformer2DModel",),
        of.image,
        head=lambda model, arguments: sum(of.refined(model, arguments)),
        tail=of.nothing,
        alone=of.references,  # without any the two layers that refine the noise look the same
        others=of.refined,
        compiles=False,
    ),
    DiTModel(
        "Krea 2",
        ("krea2.model.SingleStreamDiT",),
        lambda model, shape, arguments: of.patches(shape, model.patch, model.patch),
        head=of.prompt,
        tail=of.krea_references,
        numbered=True,
        forge=("krea.SingleStreamDiT",),
        blocks=("blocks.attn",),  # with references it calls these alone
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
        tail=lambda model, arguments, grid: (
            of.in_patches(arguments.get("ref_latents"), *model.patch_size) + of.prompt(model, arguments)
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
        forge=("ernie.ErnieImageModel",),
        blocks=("layers",),
    ),
    DiTModel(
        "PixelDiT and PiD",
        ("pixeldit.model.PixDiT_T2I", "pixeldit.pid.PidNet"),
        of.image,
        head=of.prompt_of_pixeldit,
        tail=of.nothing,
        alone=of.nothing,  # blocks of pixels, which attend patch by patch
        forge=("pixeldit.model.PixDiT_T2I", "pixeldit.pid.PidNet"),
        blocks=("patch_blocks", "pixel_blocks"),
    ),
    DiTModel("HunyuanVideo", ("hunyuan_video.model.HunyuanVideo",), of.video, tail=of.nothing, numbered=True),
    DiTModel(
        "Wan",
        ("wan.model.WanModel", "wan.model_animate.AnimateWanModel", "wan.model_wandancer.WanDancerModel"),
        of.video,
        head=of.prepended_frame,
        others=of.prompts,
        forge=("wan.WanModel",),
        blocks=("blocks",),
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
        lambda model, shape, arguments: of.patches(shape, model.patch_size_t or 1, model.patch_size, model.patch_size),
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
        others=lambda model, arguments: (of.prompt(model, arguments),),
    ),
    DiTModel(
        "Cosmos, Cosmos-Predict2 and Anima",
        ("cosmos.model.GeneralDIT", "cosmos.predict2.MiniTrainDIT", "anima.model.Anima"),
        lambda model, shape, arguments: of.patches(
            shape, model.patch_temporal, model.patch_spatial, model.patch_spatial
        ),
        head=of.nothing,
        tail=of.frames_of_references,
        others=of.prompts,
        forge=("anima.Anima",),
        blocks=("blocks",),
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
        elsewhere=lambda model, arguments, grid: arguments.get(
            "ar_len", 0
        ),  # the prompt, causal and kept from step to step
    ),
    DiTModel(
        "AuraFlow",
        ("aura.mmdit.MMDiT",),
        of.image,
        head=lambda model, arguments: model.register_tokens.shape[1] + of.prompt(model, arguments),
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
        lambda model, shape, arguments: (1, shape[-1] // model.patch_size),
        tail=of.nothing,  # before the sound: memory tokens and conditioning
        others=of.prompts,
        compiles=False,
        calls=of.calls_of_stable_audio,
    ),
    DiTModel(
        "ACE-Step 1.5",
        ("ace.ace_step15.AceStepConditionGenerationModel",),
        lambda model, shape, arguments: (1, -(-shape[-1] // model.decoder.patch_size)),
        head=of.nothing,
        tail=of.nothing,
        compiles=False,
        silent=of.whole_attentions,
    ),
)
_BY_CLASS = {f"comfy.ldm.{name}": row for row in DIT_MODELS for name in row.classes} | {
    f"backend.nn.{name}": row for row in DIT_MODELS for name in row.forge
}
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


def why_not(facts: DiTModel, config: ToMeConfig) -> str | None:
    """Why a transformer is not merged with options that only a U-Net has; None: it is."""
    for option in ("cross_attention", "mlp"):
        if getattr(config, option):
            return f"{option} needs a model with a U-Net; {facts.name} is served at its self-attention alone"
    levels = config.level_set
    if levels is not None and 0 not in levels:
        return f"{facts.name} has one resolution, level 0; levels {config.levels!r} would merge nothing"
    return None


def unwrapped(model: Any) -> Any:
    """The diffusion model itself, where torch.compile has wrapped it."""
    return getattr(model, "_orig_mod", model)
