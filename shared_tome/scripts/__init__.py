"""ToMe for scripts: diffusers pipelines and U-Nets, ldm's models. tomesd's two verbs, with tomesd's arguments.

    from shared_tome import apply_patch, remove_patch

    apply_patch(pipe, ratio=0.5)                                  # what tomesd does
    apply_patch(pipe, config=ToMeConfig(method="sample", ratio=0.75))   # faster and closer to the unmerged picture

Sources: Bolya and Hoffman, Token Merging for Fast Stable Diffusion (arXiv 2303.17604). Module hooks do the work
(hooks.py); the host's classes and forwards stay what they are.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from ..autotune.decision_log import together
from ..config import ToMeConfig
from ..hooks.served import find_served, is_tomesds, served_as
from .hooks import UNetAttachment, served_blocks
from .joint import JointAttachment
from .parallel import why_not_parallel
from .rows import REFUSED, ROWS, TRANSFORMERS

_NAME = "_shared_tome"  # the attribute of the patched module that keeps its attachment
_LEVELS = {1: "0", 2: "0,1", 4: "0,1,2", 8: "0,1,2,3"}
# diffusers'; those of ldm, of generative-models (sgm) and of ControlNet's repository (cldm). See served.served_as.
UNETS = ("UNet2DConditionModel", "UNetControlNetXSModel", "openaimodel.UNetModel", "cldm.ControlledUnetModel")
SERVED = (
    "diffusers pipelines with a U-Net (SD 1.x, SD 2.x, SDXL) and UNet2DConditionModel; diffusers' pipelines and "
    f"transformers of {TRANSFORMERS}; ldm's LatentDiffusion, DiffusionWrapper and UNetModel"
)


def apply_patch(
    model: Any,
    ratio: float = 0.5,
    max_downsample: int = 1,
    sx: int = 2,
    sy: int = 2,
    use_rand: bool = True,
    merge_attn: bool = True,
    merge_crossattn: bool = False,
    merge_mlp: bool = False,
    config: ToMeConfig | None = None,
    **options: Any,
) -> Any:
    """Merge the model's tokens from now on, in place. A second call replaces the first.

    With tomesd's arguments alone it does what tomesd does: method "merge" with plain means, without proportional
    attention, whatever the size of the layer; with use_rand off the outputs equal tomesd's. A config is faster and
    stays closer to the unmerged picture: `config=ToMeConfig(method="sample", ratio=0.75)`.

    Args:
        model: a pipeline, U-Net or latent diffusion model, see SERVED.
        ratio: the share of the tokens that goes, at most 1 - 1 / (sx * sy).
        max_downsample: 1, 2, 4 or 8: layers that are halved up to 0, 1, 2 or 3 times. SDXL's attention begins at 2.
        sx, sy: width and height of the cell that keeps one token.
        use_rand: a random token of each cell (from the seed and never from the global generator); otherwise the
            top left one.
        merge_attn, merge_crossattn, merge_mlp: which of a block's three parts are merged. Transformers have the first
            alone.
        config: replaces all of the arguments above and reaches every method.
        options: further options of ToMeConfig by name (seed=..., method=..., proportional=...), on top of both.
    Returns:
        the model.
    Raises:
        ValueError: an argument out of range, or a model that is not served.
    """
    if config is not None and not isinstance(config, ToMeConfig):
        raise ValueError(f"config must be a ToMeConfig, got {config!r}")
    if config is None:
        if max_downsample not in list(_LEVELS):
            raise ValueError(f"max_downsample must be one of 1, 2, 4, 8, got {max_downsample!r}")
        config = ToMeConfig(
            **{
                "ratio": ratio,
                "stride": (sx, sy),
                "method": "merge",
                "partition": "random_2d" if use_rand else "fixed_2d",
                "levels": _LEVELS[max_downsample],
                "cross_attention": merge_crossattn,
                "mlp": merge_mlp,
                "proportional": False,
                "min_tokens": 0,
                **options,
            }
        )
    else:
        config = config.replace(**options)
        merge_attn = True
    denoisers = find_denoisers(model)
    for denoiser in denoisers:
        _check(denoiser, config)
    remove_patch(model)
    first = None
    for denoiser in denoisers:
        pipe = model if model is not denoiser else None
        kind = JointAttachment if served_as(denoiser, ROWS) is not None else UNetAttachment
        attachment = kind(denoiser, config, pipe, merge_attn)
        first = first or attachment
        attachment.speak_as(first)
        setattr(denoiser, _NAME, attachment)
    return model


def _check(denoiser: nn.Module, config: ToMeConfig) -> None:
    """Raises ValueError where a served network cannot be patched with these options."""
    reason = why_not_parallel(denoiser)
    if reason is not None:
        raise ValueError(reason)
    if is_tomesds(denoiser):
        raise ValueError("tomesd has patched this model; call tomesd.remove_patch(model) first")
    for name in ("cross_attention", "mlp"):
        if getattr(config, name) and served_as(denoiser, ROWS) is not None:
            raise ValueError(
                f"{name} needs a model with a U-Net; {type(denoiser).__name__} is served at its attention to the "
                "image's tokens alone"
            )


def remove_patch(model: Any) -> Any:
    """Undo apply_patch: the model is what it was, without a hook. Does nothing where there is none."""
    for denoiser in _denoisers(model):
        attachment = getattr(denoiser, _NAME, None)
        if attachment is not None:
            attachment.detach(denoiser)
            delattr(denoiser, _NAME)
    return model


def decisions_of(model: Any) -> str:
    """What autotune has decided of a patched model so far, as the option `decisions` takes it: with it another run, on
    another GPU, merges the same layers. "" where nothing was decided yet, or levels are named."""
    found = (getattr(denoiser, _NAME, None) for denoiser in _denoisers(model))
    return together(attachment.decided for attachment in found if attachment is not None).text


def find_denoisers(model: Any) -> list[nn.Module]:
    """The networks inside a pipeline or latent diffusion model: one, or those that share a run (Wan 2.2).

    Raises ValueError where there is none, or one that is not served.
    """
    found = _denoisers(model)
    for denoiser in found or [None]:
        names = [type(part).__name__ for part in ((model,) if denoiser is None else (model, denoiser))]
        what = " with ".join(dict.fromkeys(names))
        if denoiser is not None and type(denoiser).__name__ in REFUSED:
            raise ValueError(f"ToMe does not serve {what}: {REFUSED[type(denoiser).__name__]}. It serves {SERVED}")
        if denoiser is None or served_as(denoiser, (*UNETS, *ROWS)) is None:
            raise ValueError(f"ToMe does not know {what}. It serves {SERVED}")
        if served_as(denoiser, ROWS) is None and not any(served_blocks(denoiser)):
            raise ValueError(f"ToMe knows none of the attention layers in {what}. It serves {SERVED}")
    return found


def _denoisers(model: Any) -> list[nn.Module]:
    """The served networks; the first that is found, where none is served."""
    for path in (("unet",), ("transformer",), ("model", "diffusion_model"), ("diffusion_model",), ()):
        found = model
        for name in path:
            found = getattr(found, name, None)
        others = [getattr(model, "transformer_2", None)] if path == ("transformer",) else []
        networks = [network for network in (found, *others) if isinstance(network, nn.Module)]
        if networks:
            return [_served_in(getattr(network, "_orig_mod", network)) for network in networks]  # as of torch.compile
    return []


def _served_in(network: nn.Module) -> nn.Module:
    return find_served(network, (*UNETS, *ROWS)) or network
