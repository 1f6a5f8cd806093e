"""How near two pictures are: PSNR, SSIM and the picture of their difference."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

PEAK = 255.0
WINDOW = 11
"""Pixels a side of SSIM's window: no picture may be smaller."""
SAME = 100.0
"""What is said in place of an infinite PSNR where a number is wanted, in dB."""


def psnr(a: Tensor, b: Tensor) -> Tensor:
    """Peak signal to noise ratio in dB of each pair of pictures [B, C, H, W] (0 to 255), [B]; inf where equal."""
    error = (a.double() - b.double()).square().mean(dim=(1, 2, 3))  # (B,)
    return 10 * (PEAK**2 / error).log10()


def ssim(a: Tensor, b: Tensor) -> Tensor:
    """Structural similarity of each pair of pictures [B, C, H, W] (0 to 255), [B].

    Wang et al., "Image quality assessment" (2004): Gaussian window of 11, sigma 1.5, each channel by itself, the
    border left out.
    """
    offset = torch.arange(-(WINDOW // 2), WINDOW // 2 + 1, dtype=torch.float64, device=a.device)
    window = (-offset.square() / (2 * 1.5**2)).softmax(0)  # (11,)

    # [side - 10, side] each: a window a row. A product with it is faster than a convolution in float64.
    down, across = (
        torch.stack([F.pad(window, (i, n - WINDOW - i)) for i in range(n - WINDOW + 1)]) for n in a.shape[2:]
    )

    def blur(x: Tensor) -> Tensor:
        return down @ x @ across.T  # (B, C, H - 10, W - 10)

    a, b = a.double(), b.double()
    mean_a, mean_b = blur(a), blur(b)
    var_a, var_b = blur(a * a) - mean_a**2, blur(b * b) - mean_b**2
    both = blur(a * b) - mean_a * mean_b
    c1, c2 = (0.01 * PEAK) ** 2, (0.03 * PEAK) ** 2
    likeness = (2 * mean_a * mean_b + c1) * (2 * both + c2)
    return (likeness / ((mean_a**2 + mean_b**2 + c1) * (var_a + var_b + c2))).mean(dim=(1, 2, 3))


def difference(a: Tensor, b: Tensor, factor: float) -> Tensor:
    """The distance of each pixel of pictures of 0 to 1, times `factor`, clipped to 0 to 1; of their shape."""
    return ((a - b).abs() * factor).clamp(0, 1)
