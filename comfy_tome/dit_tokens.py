"""Where the tokens of transformers lie: what the rows of dit_models.py are put together from.

Each function was written from the model's own forward (ComfyUI 0.30, comfy/ldm; Forge, backend/nn). Those that give a
grid take (model, latent's shape, told), those that count tokens (model, told) or (model, told, grid).
"""

from __future__ import annotations

import math
from typing import Any

from ..shared_tome.core.grid import Grid

Shape = tuple[int, ...]
# What a call is told beside its latent: apply_model's keywords, the prompt as "c_crossattn".
CallArguments = dict[str, Any]


def patches(shape: Shape, *patch: int) -> Grid:
    """The grid of a latent that is padded to whole patches."""
    return tuple(-(-size // side) for size, side in zip(shape[-len(patch) :], patch, strict=True))


def image(model: Any, shape: Shape, arguments: CallArguments) -> Grid:
    side = getattr(model, "patch_size", 2)  # Forge's Flux and Chroma name none
    return patches(shape, side, side)


def video(model: Any, shape: Shape, arguments: CallArguments) -> Grid:
    """A picture, [B, C, H, W], is cut by the last two sides of the patch."""
    return patches(shape, *model.patch_size[-(len(shape) - 2) :])


def layers_of_images(model: Any, shape: Shape, arguments: CallArguments) -> Grid:
    return patches(shape, 1, model.patch_size, model.patch_size)


def pixels(model: Any, shape: Shape, arguments: CallArguments) -> Grid:
    """Latents that are no further cut into patches."""
    return tuple(shape[2:])


def video_before_guides(model: Any, shape: Shape, arguments: CallArguments) -> Grid | None:
    """LTXV's guides are further frames at the latent's end, told by their coordinates [B, 3, tokens, ...]."""
    frames, rows, columns = patches(shape, *model.patchifier.patch_size)
    guides = arguments.get("keyframe_idxs")
    guides = 0 if guides is None else guides.shape[2]
    if guides % (rows * columns) or guides // (rows * columns) >= frames:
        return None
    return frames - guides // (rows * columns), rows, columns


def image_without_source(model: Any, shape: Shape, arguments: CallArguments) -> Grid | None:
    """HiDream E1 sets the image to be edited beside the new one, so their rows take turns."""
    return None if arguments.get("image_cond") is not None else image(model, shape, arguments)


def frames_so_far(model: Any, shape: Shape, arguments: CallArguments) -> Grid:
    """Wan CausalAR's cache has the keys of all frames up to those of this call."""
    frames, rows, columns = video(model, shape, arguments)
    return first_frame(arguments) + frames, rows, columns


def first_frame(arguments: CallArguments) -> int:
    state = arguments.get("transformer_options", {}).get("ar_state")
    return 0 if state is None else state["start_frame"]


def nothing(model: Any, arguments: CallArguments, grid: Grid | None = None) -> int:
    return 0


def length(arguments: CallArguments, name: str) -> int:
    """Of a sequence [B, L, C] that a call is told; 0 without one."""
    found = arguments.get(name)
    return 0 if found is None else found.shape[-2]


def prompt(model: Any, arguments: CallArguments, grid: Grid | None = None) -> int:
    return length(arguments, "c_crossattn")


def in_patches(latents: Any, *patch: int) -> int:
    """How many tokens a list of latents [B, C, ...] makes, each padded to whole patches."""
    return sum(math.prod(patches(latent.shape, *patch)) for latent in latents or ())


def references(model: Any, arguments: CallArguments, grid: Grid | None = None) -> int:
    """Reference latents (Flux Kontext, Qwen edit) are cut into patches as the image is."""
    side = getattr(model, "patch_size", 2)
    return in_patches(arguments.get("ref_latents"), side, side)


def frames_of_references(model: Any, arguments: CallArguments, grid: Grid) -> int:
    """Forge Neo sets Anima's behind the picture, as further frames."""
    return in_patches(arguments.get("ref_latents"), model.patch_temporal, model.patch_spatial, model.patch_spatial)


def layers_of_references(model: Any, arguments: CallArguments, grid: Grid) -> int:
    return in_patches(arguments.get("ref_latents"), 1, model.patch_size, model.patch_size)


def krea_references(model: Any, arguments: CallArguments, grid: Grid) -> int:
    """Krea 2 takes them where a method is named, by a node or by the model; Forge Neo's takes them always."""
    if arguments.get("ref_latents_method", getattr(model, "default_ref_method", "index")) is None:
        return 0
    return in_patches(arguments.get("ref_latents"), model.patch, model.patch)


def ids(model: Any, arguments: CallArguments) -> int:
    """HiDream-O1's prompt as numbers, [B, L], and all that its references put in."""
    found = arguments.get("input_ids")
    return 0 if found is None else found.shape[-1]


def patches_of_references(model: Any, arguments: CallArguments, grid: Grid) -> int:
    """HiDream-O1's come cut into patches, [B, tokens, C]."""
    return length(arguments, "ref_patches")


def earlier_frames(model: Any, arguments: CallArguments, grid: Grid) -> int:
    """Wan CausalAR's cache has their keys and values."""
    return first_frame(arguments) * math.prod(grid[1:])


def padding(model: Any, arguments: CallArguments, grid: Grid) -> int:
    """Z-Image fills up the image's tokens to a multiple. ComfyUI 0.3.64 knows Lumina 2 alone, and no multiple."""
    multiple = getattr(model, "pad_tokens_multiple", None)
    return -math.prod(grid) % multiple if multiple else 0


def prepended_frame(model: Any, arguments: CallArguments) -> int:
    """Wan Fun's reference, [B, C, H, W], through a convolution of its own."""
    latent = arguments.get("reference_latent")
    if getattr(model, "ref_conv", None) is None or latent is None:  # Forge's has no such thing
        return 0
    return (latent.shape[-2] // model.patch_size[1]) * (latent.shape[-1] // model.patch_size[2])


def prepended_frames(model: Any, arguments: CallArguments) -> int:
    """SCAIL's references, [B, C, T, H, W], before the video."""
    latent = arguments.get("reference_latent")
    return 0 if latent is None else math.prod(patches(latent.shape, *model.patch_size))


def prompt_of_mochi(model: Any, arguments: CallArguments, grid: Grid) -> int:
    """As many of the prompt's tokens as its mask has."""
    return min(arguments.get("num_tokens", 256), prompt(model, arguments))


def prompt_of_pixeldit(model: Any, arguments: CallArguments) -> int:
    return min(model.txt_max_length, prompt(model, arguments))


def prompts(model: Any, arguments: CallArguments) -> tuple[int, ...]:
    """What a cross-attention may have: the prompt's, an image's (CLIP vision), Anima's filled prompt."""
    return length(arguments, "c_crossattn"), length(arguments, "clip_fea"), 512


def latent_shape(shape: Shape, arguments: CallArguments) -> Shape:
    """Of the image or the video; models with sound get both in one packed latent [B, 1, all]."""
    return tuple(next(iter(arguments.get("latent_shapes") or ()), shape))


def prompts_and_sound(model: Any, arguments: CallArguments) -> tuple[int, ...]:
    """LTX-2's sound [B, C, T, bins] has one token for each of T, behind those of a reference."""
    shapes = arguments.get("latent_shapes") or ()
    sound = shapes[1][2] if len(shapes) > 1 else 0
    reference = arguments.get("ref_audio")
    return *prompts(model, arguments), sound + (0 if reference is None else reference["tokens"].shape[1])


def refined(model: Any, arguments: CallArguments) -> tuple[int, ...]:
    """Text and references go through layers of their own before the image joins them."""
    return prompt(model, arguments), references(model, arguments)


def calls_of_stable_audio(model: Any) -> int:
    """Stable Audio 3 subtracts two attentions in a layer; ComfyUI 0.3.64 does not know that kind."""
    return 2 if getattr(model.transformer.layers[0].self_attn, "differential", False) else 1


def blocks_with_two(model: Any) -> tuple[int, ...]:
    """SD3.5 medium's first blocks attend with the text and without it."""
    blocks = enumerate(model.joint_blocks)
    return tuple(number for number, block in blocks if getattr(block.x_block, "x_block_self_attn", False))


def whole_attentions(model: Any, options: dict[str, Any]) -> list[Any]:
    """Every other layer of ACE-Step attends to 128 tokens each way alone; those stay as they are."""
    found = (layer.self_attn for layer in model.decoder.layers)
    return [attention for attention in found if attention.sliding_window is None]
