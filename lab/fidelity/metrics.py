"""How far pictures are from each other: PSNR, SSIM, fine texture, flicker, a Frechet distance, and standard errors."""

from __future__ import annotations

import torch
from torch import Tensor

from shared_tome.inspect.likeness import PEAK, psnr, ssim

__all__ = ["PEAK", "frechet", "frechet_gap", "psnr", "ssim", "standard_error", "texture", "to_range"]
LUMA = (0.299, 0.587, 0.114)  # ITU-R BT.601
ROUNDING = 1 / 12  # variance of what rounding to whole numbers takes or adds


def to_range(pictures: Tensor) -> Tensor:
    """Pictures of about -1 to 1, clipped, on the scale of 8 bits (0 to 255) but not rounded."""
    return (pictures.clamp(-1, 1) + 1) * (PEAK / 2)


def fine_energy(pictures: Tensor) -> Tensor:
    """Mean square of the finest detail of pictures [B, 3, H, W] (0 to 255), [B]: luminance less its low-pass.

    The low-pass is binomial, (1, 2, 1) / 4 both ways; the border is left out.
    """
    weights = torch.tensor(LUMA, dtype=torch.float64, device=pictures.device)
    luma = torch.einsum("bchw,c->bhw", pictures.double(), weights)
    rows = (luma[:, :-2] + 2 * luma[:, 1:-1] + luma[:, 2:]) / 4  # (B, H - 2, W)
    low = (rows[..., :-2] + 2 * rows[..., 1:-1] + rows[..., 2:]) / 4  # (B, H - 2, W - 2)
    return (luma[:, 1:-1, 1:-1] - low).square().mean(dim=(1, 2))


def texture(a: Tensor, b: Tensor) -> Tensor:
    """How much more of the finest detail a picture has than another, in dB, [B]; below 0: blurred, above: noise.

    a, b: [B, 3, H, W] (0 to 255). What rounding to 8 bits does counts in both, so where neither shows any, it is 0.
    """
    return 10 * ((fine_energy(a) + ROUNDING) / (fine_energy(b) + ROUNDING)).log10()


def motion(a: Tensor, b: Tensor) -> Tensor:
    """PSNR in dB of the differences between neighbouring frames of videos [n, T, 3, H, W] (0 to 255), [n].

    Errors that are alike in all frames do not count; errors that are new in each frame are 3 dB below the videos' PSNR.
    """
    error = (a.double().diff(dim=1) - b.double().diff(dim=1)).square().mean(dim=(1, 2, 3, 4))
    return 10 * (PEAK**2 / error).log10()


def flicker(a: Tensor, b: Tensor) -> Tensor:
    """How much more a video flickers than another, in dB, [n]: the energy of its second differences in time.

    a, b: [n, T, 3, H, W] (0 to 255), T of 3 or more. Even motion has small second differences, flicker large ones.
    Rounding to 8 bits counts in both as in `texture`; a second difference has six times a frame's.
    """
    of_a, of_b = (x.double().diff(n=2, dim=1).square().mean(dim=(1, 2, 3, 4)) + 6 * ROUNDING for x in (a, b))
    return 10 * (of_a / of_b).log10()


def standard_error(values: Tensor) -> float:
    """Of the mean of values [n]; 0 where they cannot tell (one value, or pictures that are equal)."""
    values = values.double()
    if len(values) < 2 or not torch.isfinite(values).all():
        return 0.0
    return (values.std() / len(values) ** 0.5).item()


def frechet(a: Tensor, b: Tensor) -> float:
    """Frechet distance of two sets of features [n, D] and [m, D], taken as Gaussian.

    Heusel et al. (arXiv 1706.08500); the trace of the root of S_a S_b from the eigenvalues of the symmetric
    R S_a R, R the root of S_b.
    """
    return _distances(a[None], b).item()


def _distances(sets: Tensor, b: Tensor) -> Tensor:
    """Frechet distances [k] of sets of features [k, n, D] to b [m, D]."""
    sets, b = sets.double(), b.double()
    means, cov_b = sets.mean(1), b.T.cov()  # (k, D), (D, D)
    centred = sets - means[:, None]
    covs = centred.mT @ centred / (sets.shape[1] - 1)  # (k, D, D)
    values, vectors = torch.linalg.eigh(cov_b)
    root = (vectors * values.clamp_min(0).sqrt()) @ vectors.T
    cross = torch.linalg.eigvalsh(root @ covs @ root).clamp_min(0).sqrt().sum(-1)
    traces = covs.diagonal(dim1=1, dim2=2).sum(-1) + cov_b.trace()
    return ((means - b.mean(0)).square().sum(-1) + traces - 2 * cross).clamp_min(0)  # (k,)


def frechet_gap(a: Tensor, base: Tensor, real: Tensor, draws: int = 50, seed: int = 0) -> tuple[float, float]:
    """How much farther from ``real`` [m, D] features a [n, D] are than base [n, D], and its standard error.

    The error is a bootstrap over pairs: a[i] and base[i] come from the same noise and are drawn together.
    """
    if torch.equal(a, base):
        return 0.0, 0.0
    generator = torch.Generator().manual_seed(seed)
    index = torch.stack([torch.randint(len(a), (len(a),), generator=generator) for _ in range(draws)])  # (draws, n)
    gaps = _distances(a[index], real) - _distances(base[index], real)
    return frechet(a, real) - frechet(base, real), gaps.std().item()
