"""A small classifier of the lab's pictures; a Frechet distance is taken between its features.

`python -m lab.models.classifier --data fine --out FILE` trains it on pictures of a set drawn anew (under a minute on a
GPU, some minutes on one CPU core) and keeps with it the features of real pictures that neither it nor the painter was
trained on. Inception's features (what "FID" means) would need pictures that look like ImageNet's.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from .data import DEMO, PictureSet, make_bank
from .data_moving import SETS
from .optimize import as_pictures, load_tensors, save_tensors

FEATURES = 32
TRAIN_SEED, REAL_SEED = 101, 202  # the painter's own pictures have seed 0
MODEL_KEY, REAL_KEY, ACCURACY_KEY = "model.", "real", "accuracy"


class Classifier(nn.Module):
    """Pictures [B, 3, H, W], -1 to 1, to features [B, FEATURES] and class scores [B, K].

    Each of its layers halves the side: four of them see 31 pixels around a place, the fifth that larger pictures get,
    63.
    """

    def __init__(self, pictures: PictureSet = DEMO):
        super().__init__()
        layers: list[nn.Module] = []
        channels = 3
        for out in (24, 48, *(96,) * (2 if pictures.size <= 64 else 3)):
            layers += [nn.Conv2d(channels, out, 3, 2, 1), nn.BatchNorm2d(out), nn.SiLU()]
            channels = out
        self.body = nn.Sequential(*layers)
        self.squeeze = nn.Linear(channels, FEATURES)
        self.head = nn.Linear(FEATURES, len(pictures.classes))

    def features(self, x: Tensor) -> Tensor:
        return self.squeeze(self.body(x).mean(dim=(2, 3)))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.silu(self.features(x)))


@dataclass(frozen=True)
class Judge:
    """A trained classifier, features [n, FEATURES] of real pictures, the share it names rightly, the set's name."""

    classifier: Classifier
    real: Tensor
    accuracy: float
    data: str = DEMO.name

    @torch.no_grad()
    def features(self, pictures: Tensor) -> Tensor:
        """Of pictures [B, 3, H, W], -1 to 1: [B, FEATURES] in float32 on the CPU."""
        self.classifier.to(pictures.device)
        return self.classifier.features(pictures.clamp(-1, 1)).float().cpu()


def _flat(bank) -> tuple[Tensor, Tensor]:
    """(pixels [n, H, W, 3], bytes; classes [n]) of a bank [K, n / K, H, W, 3]."""
    x = torch.from_numpy(bank)
    return x.flatten(0, 1), torch.arange(x.shape[0]).repeat_interleave(x.shape[1])


def train(
    per_class: int = 256, real_per_class: int = 100, epochs: int = 6, device: str = "cpu", workers: int | None = None,
    data: PictureSet = DEMO,
) -> Judge:  # fmt: skip
    """Train from a fixed seed; every picture once an epoch."""
    pixels, classes = _flat(make_bank(per_class, TRAIN_SEED, workers, data))
    real, real_classes = _flat(make_bank(real_per_class, REAL_SEED, workers, data))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(TRAIN_SEED)
        classifier = Classifier(data).to(device)
    generator = torch.Generator().manual_seed(TRAIN_SEED)
    on_cpu = torch.device(device).type == "cpu"
    grain = generator if on_cpu else torch.Generator(device).manual_seed(TRAIN_SEED)
    batch = min(64, len(pixels))
    steps = max(1, epochs * len(pixels) // batch)
    optimizer = torch.optim.AdamW(classifier.parameters(), lr=3e-3, weight_decay=0.02)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=steps + 1)
    index = torch.cat([torch.randperm(len(pixels), generator=generator) for _ in range(epochs + 1)])
    for step in tqdm(range(steps), desc="classifier", unit="step"):
        at = index[step * batch : (step + 1) * batch]
        x = as_pictures(pixels[at].to(device)).contiguous()
        # Nuisances that its features should not see as a change of kind.
        x = x + 0.05 * torch.randn(x.shape, generator=grain, device=device)
        loss = F.cross_entropy(classifier(x), classes[at].to(device), label_smoothing=0.05)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        schedule.step()
    classifier.eval()
    with torch.no_grad():
        parts = (as_pictures(part.to(device)).contiguous() for part in real.split(256))
        features = torch.cat([classifier.features(part).cpu() for part in parts])
        scores = classifier.cpu().head(F.silu(features))
    return Judge(classifier, features, (scores.argmax(-1) == real_classes).float().mean().item(), data.name)


def save(judge: Judge, path: Path) -> None:
    state = {MODEL_KEY + k: v for k, v in judge.classifier.state_dict().items()}
    given = {REAL_KEY: judge.real, ACCURACY_KEY: torch.tensor(judge.accuracy)}
    save_tensors(path, state | given, {"data": judge.data})


def load(path: Path) -> Judge:
    state, metadata = load_tensors(path)
    data = metadata.get("data", DEMO.name)
    real, accuracy = state.pop(REAL_KEY), state.pop(ACCURACY_KEY).item()
    classifier = Classifier(SETS[data]).eval()
    classifier.load_state_dict({k.removeprefix(MODEL_KEY): v for k, v in state.items()})
    return Judge(classifier, real, accuracy, data)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m lab.models.classifier", description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--data", choices=SETS, default=DEMO.name, help="which pictures")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--workers", type=int, help="processes that draw pictures (default: one a core)")
    args = parser.parse_args(argv)
    judge = train(device=args.device, workers=args.workers, data=SETS[args.data])
    save(judge, args.out)
    print(f"names {judge.accuracy:.1%} of {len(judge.real)} real pictures rightly")


if __name__ == "__main__":
    main()
