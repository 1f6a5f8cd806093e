"""A small convolutional autoencoder, so that a U-Net can paint latents a quarter of the picture's side.

Pixels -> latents of zero mean and unit variance -> pixels, as Rombach et al. (arXiv 2112.10752) do it, without an
adversary: the loss is L1 on the pixels and on their differences. Instead of a KL term the latents are normalised
without parameters and get a little noise while training, which keeps near latents alike.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .optimize import adamw, as_pictures, autocast, budgeted, descend, learning_rate
from .unet import GroupNorm, zeroed

FACTOR = 4
NOISE = 0.1


@dataclass(frozen=True)
class AutoencoderConfig:
    """width: channels at a half of the picture's side; twice as many at a quarter. depth: residual blocks there."""

    channels: int = 4
    width: int = 64
    depth: int = 3


class Residual(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        first, last = (nn.Conv2d(channels, channels, 3, padding=1) for _ in range(2))
        self.body = nn.Sequential(GroupNorm(16, channels), nn.SiLU(), first, nn.SiLU(), zeroed(last))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.body(x)


class Autoencoder(nn.Module):
    """Pictures [B, 3, H, W], -1 to 1, H and W multiples of FACTOR, and latents [B, channels, H / 4, W / 4]."""

    def __init__(self, config: AutoencoderConfig) -> None:
        super().__init__()
        self.config = config
        half, quarter = config.width, 2 * config.width
        self.encoder = nn.Sequential(
            nn.PixelUnshuffle(2),
            nn.Conv2d(12, half, 3, padding=1),
            Residual(half),
            nn.Conv2d(half, quarter, 4, stride=2, padding=1),
            *(Residual(quarter) for _ in range(config.depth)),
            nn.Conv2d(quarter, config.channels, 3, padding=1),
        )
        self.normal = nn.BatchNorm2d(config.channels, affine=False, momentum=0.05)
        self.decoder = nn.Sequential(
            nn.Conv2d(config.channels, quarter, 3, padding=1),
            *(Residual(quarter) for _ in range(config.depth)),
            nn.Conv2d(quarter, 4 * half, 3, padding=1),
            nn.PixelShuffle(2),
            Residual(half),
            Residual(half),
            nn.Conv2d(half, 4 * (half // 2), 3, padding=1),
            nn.PixelShuffle(2),
            nn.SiLU(),
            nn.Conv2d(half // 2, 3, 3, padding=1),
        )

    def encode(self, pictures: Tensor) -> Tensor:
        return self.normal(self.encoder(pictures).float())

    def decode(self, latents: Tensor) -> Tensor:
        return self.decoder(latents)

    def loss(self, pictures: Tensor, generator: torch.Generator) -> Tensor:
        latents = self.encode(pictures)
        noise = torch.randn(latents.shape, generator=generator, device=latents.device)
        out = self.decode(latents + NOISE * noise).float()
        error = out - pictures
        down, right = error.diff(dim=2).abs().mean(), error.diff(dim=3).abs().mean()
        return F.l1_loss(out, pictures) + 0.5 * (down + right)

    @torch.no_grad()
    def settle(self, pictures: Iterable[Tensor]) -> None:
        """Set the normalisation to the mean and the variance over batches of pictures, exactly."""
        self.eval()
        count, total, squares = 0, 0.0, 0.0
        for batch in pictures:
            found = self.encoder(batch).double()  # (B, C, H / 4, W / 4)
            count += found.numel() // found.shape[1]
            total = total + found.sum(dim=(0, 2, 3))
            squares = squares + found.square().sum(dim=(0, 2, 3))
        mean = total / count
        self.normal.running_mean.copy_(mean)
        self.normal.running_var.copy_(squares / count - mean**2)


def train(
    autoencoder: Autoencoder, bank: Tensor, seed: int, seconds: float | None, steps: int | None = None, batch: int = 32,
    rate: float = 1e-3,
) -> None:  # fmt: skip
    """Train on pictures [n, H, W, 3] (uint8, on the autoencoder's device) for some seconds or some steps."""
    device = bank.device
    generator = torch.Generator(device).manual_seed(seed)
    optimizer = adamw(autoencoder.train().requires_grad_(True), rate)
    for step, done in budgeted(seconds, steps, "autoencoder"):
        index = torch.randint(len(bank), (batch,), generator=generator, device=device)
        with autocast(device):
            loss = autoencoder.loss(as_pictures(bank[index]), generator)
        loss = descend(optimizer, loss, learning_rate(step, done, rate))
        if step % 20 == 0:
            loss.item()  # wait for the device now and then, so that the clock is honest
    autoencoder.requires_grad_(False)
    with autocast(device):
        autoencoder.settle(as_pictures(part) for part in bank.split(66))


@torch.no_grad()
def round_trip(autoencoder: Autoencoder, pictures: Tensor) -> float:
    """PSNR in dB of pictures [B, 3, H, W], -1 to 1, encoded and decoded; the mean over pictures."""
    back = autoencoder.decode(autoencoder.encode(pictures)).clamp(-1, 1)
    error = (back - pictures).square().mean(dim=(1, 2, 3)) / 4
    return (-10 * error.log10()).mean().item()
