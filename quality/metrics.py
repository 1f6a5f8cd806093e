"""How far pictures are from each other: PSNR, SSIM, a Frechet distance, and standard errors."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

PEAK = 255.0


def to_range(pictures: Tensor) -> Tensor:
    """Pictures of about -1 to 1, clipped, on the scale of 8 bits (0 to 255) but not rounded."""
    return (pictures.clamp(-1, 1) + 1) * (PEAK / 2)


def psnr(a: Tensor, b: Tensor) -> Tensor:
    """Peak signal to noise ratio in dB of each pair of pictures [B, C, H, W] (0 to 255), [B]; inf where equal."""
    error = (a.double() - b.double()).square().mean(dim=(1, 2, 3))  # (B,)
    return 10 * (PEAK**2 / error).log10()


def ssim(a: Tensor, b: Tensor) -> Tensor:
    """Structural similarity of each pair of pictures [B, C, H, W] (0 to 255), [B].

    Wang et al., "Image quality assessment" (2004): Gaussian window of 11, sigma 1.5, each channel by itself, the
    border left out.
    """
    batch, channels = a.shape[:2]
    offset = torch.arange(-5, 6, dtype=torch.float64, device=a.device)
    window = (-offset.square() / (2 * 1.5**2)).exp()
    window = window / window.sum()  # (11,)

    def blur(x: Tensor) -> Tensor:
        x = x.reshape(batch * channels, 1, *x.shape[-2:])
        x = F.conv2d(F.conv2d(x, window[None, None, :, None]), window[None, None, None])
        return x.reshape(batch, channels, *x.shape[-2:])  # (B, C, H - 10, W - 10)

    a, b = a.double(), b.double()
    mean_a, mean_b = blur(a), blur(b)
    var_a, var_b = blur(a * a) - mean_a**2, blur(b * b) - mean_b**2
    both = blur(a * b) - mean_a * mean_b
    c1, c2 = (0.01 * PEAK) ** 2, (0.03 * PEAK) ** 2
    likeness = (2 * mean_a * mean_b + c1) * (2 * both + c2)
    return (likeness / ((mean_a**2 + mean_b**2 + c1) * (var_a + var_b + c2))).mean(dim=(1, 2, 3))


def standard_error(values: Tensor) -> float:
    """Of the mean of values [n]; 0 where they cannot tell (one value, or pictures that are equal)."""
    values = values.double()
    if len(values) < 2 or not torch.isfinite(values).all():
        return 0.0
    return (values.std() / len(values) ** 0.5).item()


def frechet(a: Tensor, b: Tensor) -> float:
    """Frechet distance of two sets of features [n, D] and [m, D], taken as Gaussian.

    Heusel et al. (arXiv 1706.08500); the trace of the root of S_a S_b from the eigenvalues of the symmetric
    R S_b R, R the root of S_a.
    """
    a, b = a.double(), b.double()
    cov_a, cov_b = a.T.cov(), b.T.cov()  # (D, D)
    values, vectors = torch.linalg.eigh(cov_a)
    root = (vectors * values.clamp_min(0).sqrt()) @ vectors.T
    cross = torch.linalg.eigvalsh(root @ cov_b @ root).clamp_min(0).sqrt().sum()
    distance = (a.mean(0) - b.mean(0)).square().sum() + cov_a.trace() + cov_b.trace() - 2 * cross
    return max(0.0, distance.item())


def frechet_gap(a: Tensor, base: Tensor, real: Tensor, draws: int = 50, seed: int = 0) -> tuple[float, float]:
    """How much farther from ``real`` [m, D] features a [n, D] are than base [n, D], and its standard error.

    The error is a bootstrap over pairs: a[i] and base[i] come from the same noise and are drawn together.
    """
    gap = frechet(a, real) - frechet(base, real)
    generator = torch.Generator().manual_seed(seed)
    gaps = []
    for _ in range(draws):
        index = torch.randint(len(a), (len(a),), generator=generator)
        gaps.append(frechet(a[index], real) - frechet(base[index], real))
    return gap, torch.tensor(gaps, dtype=torch.float64).std().item()
