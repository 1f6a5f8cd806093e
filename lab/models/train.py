"""Trains a model of the lab within a budget of minutes: ``python -m lab.models.train --minutes 8 --out DIR``.

Writes into DIR, every two minutes and at the end: model.safetensors (averaged weights in float16, the classes'
tokens, the noise schedule, the autoencoder where there is one, and in the metadata all that is needed to run it),
samples.png (a row a class) and log.csv.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from shared_tome.autotune.timing import seconds

from ..store import save
from . import autoencoder
from .autoencoder import AutoencoderConfig
from .data import make_bank
from .data_moving import FRAMES, SETS
from .dit import DiTConfig
from .model import ClassModel, load_model, picture_set, sample_grid, save_model
from .optimize import (
    Ema,
    adamw,
    as_pictures,
    autocast,
    budgeted,
    descend,
    learning_rate,
    loss_weights,
    noisy,
    stratified_steps,
)
from .samplers import SCHEDULES
from .unet import UNetConfig


@dataclass(frozen=True)
class TrainConfig:
    """What to train and how; batch and rate may be overridden on the command line.

    data: a name in SETS; schedule: in SCHEDULES; prediction: in PREDICTIONS. autoencoder: None to paint pixels, else
    it is trained first, for autoencoder_share of the time, in batches of autoencoder_batch.
    """

    network: UNetConfig | DiTConfig
    data: str = "demo"
    prediction: str = "v"
    schedule: str = "cosine"
    autoencoder: AutoencoderConfig | None = None
    autoencoder_share: float = 0.14
    autoencoder_batch: int = 32
    tokens: int = 4
    batch: int = 96
    rate: float = 5e-4
    ema: float = 0.999
    class_dropout: float = 0.12
    per_class: int = 4096


def _flow(network: DiTConfig, data: str, batch: int, **more: Any) -> TrainConfig:
    fixed = {"prediction": "flow", "schedule": "flow3", "tokens": 16, "rate": 8e-4, "ema": 0.998, "per_class": 1500}
    return TrainConfig(network, data, batch=batch, **{**fixed, **more})


CONFIGS: dict[str, TrainConfig] = {
    # 7.3M parameters; five transformer blocks at full resolution, as in Stable Diffusion 1.x. One H200, torch
    # 2.11: 0.085 s a step (0.135 without torch.compile, whose 88 s pay within four minutes), 4,180 steps in
    # 7.6 minutes, loss 0.030.
    "demo": TrainConfig(UNetConfig()),
    # 29M parameters beside an autoencoder of 2.5M: other pictures, latents of 48x48x4, epsilon, the schedule of
    # Stable Diffusion 1.x.
    "lab": TrainConfig(
        UNetConfig(in_channels=4, out_channels=4, model_channels=128, head_channels=64, context_dim=128),
        data="fine", prediction="epsilon", schedule="scaled_linear", autoencoder=AutoencoderConfig(), batch=48,
        rate=4e-4, per_class=1500,
    ),
    # 25M parameters in the layout of Flux and Stable Diffusion 3, on the demo's pictures: 1,024 tokens of 2x2 pixels
    # beside 16 of text, 43 GFLOP forward.
    "dit": _flow(DiTConfig(), "demo", batch=128, schedule="flow", per_class=4096),
    # The same on lab's pictures, without an autoencoder: 2,304 tokens of 4x4 pixels, 132 GFLOP. Nine times the demo's
    # pixels shift the schedule by three.
    "dit-fine": _flow(DiTConfig(patch=4), "fine", batch=64),
    # In patches of 3x3: 4,096 tokens, as many as the tiles of 64 that large pictures get are made for.
    "dit-large": _flow(DiTConfig(patch=3), "fine", batch=32),
    # Videos of eight frames in patches of 2x2: 8,192 tokens, in 17M parameters, so that minutes suffice.
    "video": _flow(DiTConfig(width=320, heads=5, frames=FRAMES), "moving", batch=16, rate=6e-4, ema=0.995),
}  # fmt: skip


class Trainer:
    def __init__(self, args: argparse.Namespace) -> None:
        self.start = time.perf_counter()
        self.args = args
        self.config = config = CONFIGS[args.config]
        self.pictures = SETS[config.data]
        self.batch = args.batch or config.batch
        self.rate = args.rate or config.rate
        self.device = torch.device(args.device)
        self.out = Path(args.out)
        self.out.mkdir(parents=True, exist_ok=True)
        torch.manual_seed(args.seed)
        self.generator = torch.Generator(self.device).manual_seed(args.seed)
        if args.resume:
            self.model, self.sigmas, metadata = load_model(args.resume)
            if json.loads(metadata["classes"]) != list(self.pictures.classes) or picture_set(metadata) != self.pictures:
                raise ValueError(f"{args.resume} was trained on other classes: {metadata['classes']}")
        else:
            classes = len(self.pictures.classes)
            self.model = ClassModel(config.network, classes, config.tokens, config.prediction, config.autoencoder)
            self.sigmas = SCHEDULES[config.schedule]()
        self.sigmas = self.sigmas.to(self.device)
        self.model.to(self.device, memory_format=torch.channels_last)
        self.per_class = args.per_class or config.per_class
        bank = torch.from_numpy(make_bank(self.per_class, args.seed, args.workers, self.pictures))
        bank = bank.flatten(0, 1).to(self.device)  # (K * per_class, size, size, 3), uint8
        self.log(f"{len(bank)} pictures after {self.seconds:.0f} s")
        self.bank = self._latents(bank) if self.model.autoencoder else bank
        self.network: nn.Module = self.model.train().network
        self.optimizer = adamw(self.model, self.rate, keeps=("class_tokens",))
        self.ema = Ema(self.model, config.ema)
        self.step = 0
        self.rows: list[dict[str, object]] = []
        self.parameters = sum(p.numel() for p in self.model.parameters() if p.requires_grad)

    @property
    def seconds(self) -> float:
        return time.perf_counter() - self.start

    def _latents(self, bank: Tensor) -> Tensor:
        """Train the autoencoder unless it came with the model; the bank's latents [n, h, w, C] in float32."""
        args = self.args
        if not args.resume:
            seconds = None if args.steps else self.config.autoencoder_share * args.minutes * 60
            batch = self.config.autoencoder_batch
            autoencoder.train(self.model.autoencoder, bank, args.seed, seconds, args.steps, batch)
        with autocast(self.device):
            latents = [self.model.encode(as_pictures(part)) for part in bank.split(66)]
        fidelity = autoencoder.round_trip(self.model.autoencoder, as_pictures(bank[:: max(1, len(bank) // 64)]))
        self.log(f"autoencoder ready after {self.seconds:.0f} s, there and back {fidelity:.1f} dB")
        return torch.cat(latents).permute(0, 2, 3, 1).contiguous()

    def log(self, text: str) -> None:
        tqdm.write(text, file=sys.stderr)

    def loss(self) -> Tensor:
        """The loss of one fresh batch."""
        draw = {"generator": self.generator, "device": self.device}
        index = torch.randint(len(self.bank), (self.batch,), **draw)
        chosen = self.bank[index]
        # (B, C, h, w), channels last
        x0 = chosen.permute(0, 3, 1, 2) if self.model.autoencoder else as_pictures(chosen)
        steps = stratified_steps(self.batch, len(self.sigmas), self.generator, self.device)
        sigmas = self.sigmas[steps]  # (B,)
        noise = torch.randn(x0.shape, **draw).contiguous(memory_format=torch.channels_last)
        x, target = noisy(x0, noise, sigmas, self.model.prediction)
        any_class = torch.rand(self.batch, **draw) < self.config.class_dropout
        classes = torch.where(any_class, len(self.pictures.classes), index // self.per_class)
        with autocast(self.device):
            out = self.network(x, steps.float(), self.model.context(classes))
        error = (out.float() - target).square().mean(dim=(1, 2, 3))  # (B,)
        return (error * loss_weights(sigmas, self.model.prediction)).mean()

    def train_step(self, progress: float) -> Tensor:
        loss = descend(self.optimizer, self.loss(), learning_rate(self.step, progress, self.rate))
        self.ema.update()
        self.step += 1
        return loss

    def _seconds_a_step(self) -> float:
        """Time of real training steps at the start of the schedule: they count as training."""
        self.train_step(0.0)
        return seconds(lambda: self.train_step(0.0), self.device, 8)

    def try_to_compile(self) -> None:
        """Use torch.compile where it works and is faster; train plainly where not."""
        if self.args.no_compile or self.device.type != "cuda":
            return
        plain = self._seconds_a_step()
        try:
            self.network = torch.compile(self.model.network)
            compiled = self._seconds_a_step()
            self.log(f"seconds a step: plain {plain:.4f}, compiled {compiled:.4f} (after {self.seconds:.0f} s)")
        except Exception as error:  # whatever the compiler fails with, training goes on without it
            compiled = plain + 1
            self.log(f"torch.compile failed, training without it: {type(error).__name__}: {str(error)[:500]}")
        if compiled > plain:
            self.network = self.model.network

    def save(self) -> None:
        loss = float(self.rows[-1]["loss"]) if self.rows else None
        training = {
            "config": self.args.config, "parameters": self.parameters, "steps": self.step, "batch": self.batch,
            "seconds": round(self.seconds), "loss": loss, "seed": self.args.seed, "resumed": bool(self.args.resume),
        }  # fmt: skip
        save_model(self.out / "model.safetensors", self.ema.model, self.sigmas, training, self.pictures)
        save(self.rows, self.out / "log.csv")
        # The weights first: pictures take a while.
        grid = sample_grid(self.ema.model, self.sigmas, self.pictures, self.args.columns, self.args.sample_steps)
        grid.save(self.out / "samples.png")

    def run(self) -> None:
        self.log(f"{self.parameters / 1e6:.2f}M parameters, {len(self.bank)} pictures, batch {self.batch}")
        self.try_to_compile()
        saved, recent = time.perf_counter(), []
        # Of the training alone, else what came before would cost the learning rate its high part.
        left = None if self.args.steps else max(self.args.minutes * 60 - self.seconds, 1.0)
        for _, done in budgeted(left, self.args.steps, self.args.config):
            recent.append(self.train_step(done))
            if len(recent) == self.args.log_every:
                self._note(recent)
            if time.perf_counter() - saved > self.args.save_every:
                self.save()
                saved = time.perf_counter()
        if recent:
            self._note(recent)
        self.save()

    def _note(self, recent: list[Tensor]) -> None:
        """Write down the mean of recent losses; reading them waits for the device, so the clock is honest."""
        loss = torch.stack(recent).mean().item()
        recent.clear()
        self.rows.append({"step": self.step, "loss": f"{loss:.5f}", "seconds": f"{self.seconds:.2f}"})
        self.log(f"step {self.step}: loss {loss:.4f}, {self.seconds:.0f} s")
        if not np.isfinite(loss):
            raise FloatingPointError(f"the loss is {loss} at step {self.step}: lower --rate")


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m lab.models.train", description=__doc__.splitlines()[0])
    parser.add_argument("--out", required=True, help="folder for the model, the pictures and the log")
    parser.add_argument("--minutes", type=float, default=8.0, help="pictures and compiling included (default 8)")
    parser.add_argument("--steps", type=int, help="train so many steps instead")
    parser.add_argument("--config", choices=CONFIGS, default="demo")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--batch", type=int, help="pictures a step")
    parser.add_argument("--rate", type=float, help="peak learning rate")
    parser.add_argument("--per-class", type=int, help="pictures drawn for each class")
    parser.add_argument("--resume", help="a model.safetensors to go on from")
    parser.add_argument("--workers", type=int, help="processes that draw pictures (default: one a core)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--no-compile", action="store_true", help="do not try torch.compile")
    parser.add_argument("--save-every", type=float, default=110.0, help="seconds between checkpoints")
    parser.add_argument("--log-every", type=int, default=25, help="steps in a row of log.csv")
    parser.add_argument("--columns", type=int, default=8, help="pictures of each class in samples.png")
    parser.add_argument("--sample-steps", type=int, default=30)
    Trainer(parser.parse_args(argv)).run()


if __name__ == "__main__":
    main()
