"""A small classifier of the lab's pictures; a Frechet distance is taken between its features.

`python -m quality.classifier --out FILE` trains it on pictures drawn anew (under a minute on a GPU, some minutes on
one CPU core) and keeps with it the features of real pictures that neither it nor the painter was trained on.
Inception's features (what "FID" means) would need pictures that look like ImageNet's.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from tqdm import tqdm

from .data import CLASS_NAMES, make_bank

FEATURES = 32
TRAIN_SEED, REAL_SEED = 101, 202  # the painter's own pictures have seed 0
MODEL_KEY, REAL_KEY, ACCURACY_KEY = "model.", "real", "accuracy"


class Classifier(nn.Module):
    """Pictures [B, 3, H, W], -1 to 1, to features [B, FEATURES] and class scores [B, K]."""

    def __init__(self, classes: int = len(CLASS_NAMES), width: int = 24):
        super().__init__()
        layers: list[nn.Module] = []
        channels = 3
        for out in (width, 2 * width, 4 * width, 4 * width):
            layers += [nn.Conv2d(channels, out, 3, 2, 1), nn.BatchNorm2d(out), nn.SiLU()]
            channels = out
        self.body = nn.Sequential(*layers)
        self.squeeze = nn.Linear(channels, FEATURES)
        self.head = nn.Linear(FEATURES, classes)

    def features(self, x: Tensor) -> Tensor:
        return self.squeeze(self.body(x).mean(dim=(2, 3)))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.silu(self.features(x)))


@dataclass(frozen=True)
class Judge:
    """A trained classifier, the features [n, FEATURES] of real pictures, and how many of those it names rightly."""

    classifier: Classifier
    real: Tensor
    accuracy: float

    @torch.no_grad()
    def features(self, pictures: Tensor) -> Tensor:
        """Of pictures [B, 3, H, W], -1 to 1: [B, FEATURES] in float32 on the CPU."""
        self.classifier.to(pictures.device)
        return self.classifier.features(pictures.clamp(-1, 1)).float().cpu()


def _as_pictures(bank) -> tuple[Tensor, Tensor]:
    """(pictures [n, 3, H, W], -1 to 1; classes [n]) of a bank [K, n / K, H, W, 3]."""
    x = torch.from_numpy(bank)
    classes = torch.arange(x.shape[0]).repeat_interleave(x.shape[1])
    return x.flatten(0, 1).permute(0, 3, 1, 2).float() / 127.5 - 1, classes


def train(
    per_class: int = 256,
    real_per_class: int = 100,
    epochs: int = 6,
    device: str = "cpu",
    photos: Path | None = None,
    workers: int | None = None,
) -> Judge:
    """Train from a fixed seed; every picture once an epoch."""
    pictures, classes = _as_pictures(make_bank(per_class, TRAIN_SEED, photos, workers))
    real, real_classes = _as_pictures(make_bank(real_per_class, REAL_SEED, photos, workers))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(TRAIN_SEED)
        classifier = Classifier().to(device)
    generator = torch.Generator().manual_seed(TRAIN_SEED)
    batch = min(64, len(pictures))
    steps = max(1, epochs * len(pictures) // batch)
    optimizer = torch.optim.AdamW(classifier.parameters(), lr=3e-3, weight_decay=0.02)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=steps + 1)
    index = torch.cat([torch.randperm(len(pictures), generator=generator) for _ in range(epochs + 1)])
    for step in tqdm(range(steps), desc="classifier", unit="step"):
        at = index[step * batch : (step + 1) * batch]
        x = pictures[at].to(device)
        # Nuisances that its features should not see as a change of kind.
        x = x + 0.05 * torch.randn(x.shape, generator=generator).to(device)
        loss = F.cross_entropy(classifier(x), classes[at].to(device), label_smoothing=0.05)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        schedule.step()
    classifier.eval()
    with torch.no_grad():
        features = torch.cat([classifier.features(part.to(device)).cpu() for part in real.split(256)])
        scores = classifier.cpu().head(F.silu(features))
    return Judge(classifier, features, (scores.argmax(-1) == real_classes).float().mean().item())


def save(judge: Judge, path: Path) -> None:
    state = {MODEL_KEY + k: v.contiguous() for k, v in judge.classifier.state_dict().items()}
    state[REAL_KEY], state[ACCURACY_KEY] = judge.real.contiguous(), torch.tensor(judge.accuracy)
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(state, path)


def load(path: Path) -> Judge:
    state = load_file(path)
    real, accuracy = state.pop(REAL_KEY), state.pop(ACCURACY_KEY).item()
    classifier = Classifier().eval()
    classifier.load_state_dict({k.removeprefix(MODEL_KEY): v for k, v in state.items()})
    return Judge(classifier, real, accuracy)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m quality.classifier", description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--photos", type=Path, help="folder of the photographs (default: scikit-image's)")
    parser.add_argument("--workers", type=int, help="processes that draw pictures (default: one a core)")
    parser.add_argument("--per-class", type=int, default=256)
    parser.add_argument("--epochs", type=int, default=6)
    args = parser.parse_args(argv)
    judge = train(args.per_class, epochs=args.epochs, device=args.device, photos=args.photos, workers=args.workers)
    save(judge, args.out)
    print(f"names {judge.accuracy:.1%} of {len(judge.real)} real pictures rightly")


if __name__ == "__main__":
    main()
