"""The node "ToMe Compare": how far two pictures are from each other, as a picture, in words and in numbers."""

from __future__ import annotations

from statistics import fmean
from typing import Any

import torch
from comfy_api.latest import io, ui

from ..shared_tome.inspect.likeness import PEAK, SAME, WINDOW, difference, psnr, ssim
from .log import logger
from .schema import make
from .shown import show_on_node


def check_alike(image: torch.Tensor, other: torch.Tensor) -> None:
    """Raise ValueError where the pictures [B, H, W, C] cannot be compared pixel by pixel."""
    if image.shape != other.shape:
        one, two = (f"{b} of {w}x{h} with {c} channels" for b, h, w, c in (image.shape, other.shape))
        raise ValueError(f"ToMe Compare needs as many pictures of one size: image is {one}, other is {two}")
    if not len(image):
        raise ValueError("ToMe Compare needs at least one picture, got none")
    if min(image.shape[1:3]) < WINDOW:
        raise ValueError(f"ToMe Compare needs at least {WINDOW} pixels a side, got {image.shape[2]}x{image.shape[1]}")


def as_shown(image: torch.Tensor) -> torch.Tensor:
    """A picture as it is shown and saved: within 0 to 1, black where it is NaN (a VAE in float16 that overflows)."""
    return image.nan_to_num(nan=0.0, posinf=1.0, neginf=0.0).clamp(0, 1)


def measure(image: torch.Tensor, other: torch.Tensor) -> list[tuple[float, float, float, float]]:
    """(PSNR in dB, SSIM, mean and largest difference of 255) of each pair of pictures [B, H, W, C] of 0 to 1.

    PSNR is SAME where the pictures are equal, and never more. See as_shown.
    """
    found = []
    for pair in zip(image, other, strict=True):  # one at a time: a video in float64 would need gigabytes
        a, b = (as_shown(one.detach().cpu()).movedim(-1, 0)[None].double() * PEAK for one in pair)  # (1, C, H, W)
        gap = (a - b).abs()
        found.append((min(SAME, psnr(a, b).item()), ssim(a, b).item(), gap.mean().item(), gap.max().item()))
    return found


def in_words(found: list[tuple[float, float, float, float]]) -> str:
    """A line on all pictures, and one for each where there are several."""

    def line(psnr: float, ssim: float, mean: float, most: float) -> str:
        if psnr >= SAME:
            return "the same"
        return f"PSNR {psnr:.2f} dB, SSIM {ssim:.4f}, difference {mean:.2f} of 255 on average, {most:.0f} at most"

    numbers = list(zip(*found, strict=True))
    whole = line(*(fmean(values) for values in numbers[:3]), max(numbers[3]))
    if len(found) == 1:
        return whole
    return "\n".join([f"{len(found)} pictures: {whole}", *(f"{n}: {line(*one)}" for n, one in enumerate(found))])


class ToMeCompare(io.ComfyNode):
    """PSNR and SSIM (Wang et al. 2004) of two pictures, and their difference."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return make(
            io.Schema,
            node_id="ToMeCompare",
            display_name="ToMe Compare",
            category="image",
            description="How near two pictures are: their difference as a picture, PSNR and SSIM as text and as "
            "numbers. For one seed without ToMe and with it.",
            search_aliases=["ToMe", "psnr", "ssim", "difference", "fidelity"],
            is_output_node=True,
            inputs=[
                io.Image.Input("image", tooltip="The picture without ToMe."),
                io.Image.Input("other", tooltip="The picture with ToMe: as many pictures, of the same size."),
                io.Int.Input(
                    "factor", default=8, min=1, max=64,
                    tooltip="How much brighter the difference is drawn. The numbers do not depend on it.",
                ),
            ],
            outputs=[
                io.Image.Output(display_name="difference", tooltip="Black where the pictures are equal."),
                io.String.Output(display_name="text"),
                io.Float.Output(
                    display_name="PSNR",
                    tooltip="In dB, the mean of all pictures. Over 50 nobody sees a difference. 100: the same.",
                ),
                io.Float.Output(display_name="SSIM", tooltip="The mean of all pictures. 1: the same."),
            ],
            hidden=[io.Hidden.unique_id],
        )  # fmt: skip

    @classmethod
    def execute(cls, image: torch.Tensor, other: torch.Tensor, factor: int = 8) -> io.NodeOutput:
        check_alike(image, other)
        found = measure(image, other)
        text = in_words(found)
        logger.info("[ToMe] ToMe Compare: %s", text.partition("\n")[0])
        show_on_node(getattr(cls.hidden, "unique_id", None), text, everywhere=True)
        means: list[Any] = [fmean(values) for values in list(zip(*found, strict=True))[:2]]
        drawn = difference(as_shown(image), as_shown(other.to(image.device)), float(factor))
        return io.NodeOutput(drawn, text, *means, ui=ui.PreviewText(text))
