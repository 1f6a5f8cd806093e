"""Trains the small model within a budget of minutes: ``python -m quality.train --minutes 8 --out DIR``.

Writes into DIR, every two minutes and at the end: model.safetensors (averaged weights in float16, the classes'
tokens, the noise schedule, and in the metadata all that is needed to run it), samples.png (a row a class) and
log.csv.
"""

from __future__ import annotations

import argparse
import csv
import json
import sys
import time
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from tqdm import tqdm

from .data import CLASS_NAMES, SIZE, make_bank
from .diffusion import Ema, cosine_sigmas, learning_rate, loss_weights, noisy, sample, stratified_steps
from .unet import UNet, UNetConfig

UNET_PREFIX = "model.diffusion_model."
TOKENS_KEY, SIGMAS_KEY = "class_tokens", "sigmas"


@dataclass(frozen=True)
class TrainConfig:
    """What to train and how; batch and rate may be overridden on the command line."""

    unet: UNetConfig
    tokens: int = 4
    batch: int = 96
    rate: float = 5e-4
    ema: float = 0.999
    class_dropout: float = 0.12
    per_class: int = 4096


CONFIGS: dict[str, TrainConfig] = {
    # 7.3M parameters; five transformer blocks at full resolution, as in Stable Diffusion 1.x. One H200, torch
    # 2.11: 0.085 s a step (0.135 without torch.compile, whose 88 s pay within four minutes), 4,180 steps in
    # 7.6 minutes, loss 0.030.
    "demo": TrainConfig(UNetConfig()),
    # 36M parameters, for measurements that deserve a better painter.
    "lab": TrainConfig(
        UNetConfig(model_channels=96, channel_mult=(1, 2, 3), num_res_blocks=(2, 2, 2)), batch=72, rate=3e-4
    ),
    # For tests.
    "tiny": TrainConfig(
        UNetConfig(model_channels=32, channel_mult=(1, 1), num_res_blocks=(1, 1), transformer_depth=(0, 1)),
        batch=4,
        per_class=2,
    ),
}


class ClassModel(nn.Module):
    """A U-Net and the tokens of its classes; the last row of the tokens is "any class", for guidance."""

    def __init__(self, config: UNetConfig, classes: int, tokens: int) -> None:
        super().__init__()
        self.unet = UNet(config)
        self.class_tokens = nn.Parameter(torch.randn(classes + 1, tokens, config.context_dim))

    def context(self, classes: Tensor) -> Tensor:
        """Tokens [B, M, D] of class numbers [B]."""
        return self.class_tokens[classes]


def save_model(path: Path, model: ClassModel, sigmas: Tensor, training: dict) -> None:
    """Write weights (float16), tokens and schedule, with what they mean in the metadata."""
    state = {UNET_PREFIX + k: v for k, v in model.unet.state_dict().items()}
    state[TOKENS_KEY] = model.class_tokens.detach()
    tensors = {k: v.detach().to("cpu", torch.float16).contiguous() for k, v in state.items()}
    tensors[SIGMAS_KEY] = sigmas.cpu().contiguous()
    metadata = {
        "format": "pt",
        "classes": json.dumps(list(CLASS_NAMES)),
        "unet": json.dumps(model.unet.config.to_dict()),
        "prediction": "v",
        "size": str(SIZE),
        "training": json.dumps(training),
    }
    partial = path.with_suffix(".part")
    save_file(tensors, partial, metadata=metadata)
    partial.replace(path)  # a run that is stopped while writing leaves the last whole file


def load_model(path: Path | str) -> tuple[ClassModel, Tensor, dict[str, str]]:
    """A trained model in float32 on the CPU, its sigmas [1000] and its metadata."""
    with safe_open(str(path), framework="pt") as file:
        metadata = file.metadata()
        tensors = {k: file.get_tensor(k) for k in file.keys()}
    sigmas, tokens = tensors.pop(SIGMAS_KEY), tensors.pop(TOKENS_KEY).float()
    model = ClassModel(UNetConfig.from_dict(json.loads(metadata["unet"])), tokens.shape[0] - 1, tokens.shape[1])
    model.unet.load_state_dict({k.removeprefix(UNET_PREFIX): v.float() for k, v in tensors.items()})
    model.class_tokens.data.copy_(tokens)
    return model.eval(), sigmas, metadata


def autocast(device: torch.device) -> AbstractContextManager:
    return torch.autocast("cuda", torch.bfloat16) if device.type == "cuda" else nullcontext()


@torch.no_grad()
def sample_grid(model: ClassModel, sigmas: Tensor, columns: int = 8, steps: int = 30, seed: int = 0) -> Image.Image:
    """A picture with a row for each class; the same noise for the same seed on every device."""
    device = sigmas.device
    classes = torch.arange(len(CLASS_NAMES), device=device).repeat_interleave(columns)
    noise = torch.randn((len(classes), 3, SIZE, SIZE), generator=torch.Generator().manual_seed(seed))
    with autocast(device):
        pictures = sample(
            model.unet, noise.to(device), model.context(classes), model.class_tokens[-1:], sigmas, steps=steps
        )
    pixels = ((pictures.clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1)  # (B, SIZE, SIZE, 3)
    rows = pixels.cpu().numpy().reshape(len(CLASS_NAMES), columns, SIZE, SIZE, 3)
    canvas = np.full((len(CLASS_NAMES) * (SIZE + 2), columns * (SIZE + 2), 3), 255, np.uint8)
    for row, pictures_of_class in enumerate(rows):
        for column, picture in enumerate(pictures_of_class):
            top, left = row * (SIZE + 2), column * (SIZE + 2)
            canvas[top : top + SIZE, left : left + SIZE] = picture
    return Image.fromarray(canvas)


class Trainer:
    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.config = CONFIGS[args.config]
        self.batch = args.batch or self.config.batch
        self.rate = args.rate or self.config.rate
        self.device = torch.device(args.device)
        self.out = Path(args.out)
        self.out.mkdir(parents=True, exist_ok=True)
        torch.manual_seed(args.seed)
        self.generator = torch.Generator(self.device).manual_seed(args.seed)
        self.sigmas = cosine_sigmas().to(self.device)

        if args.resume:
            self.model, _, metadata = load_model(args.resume)
            if json.loads(metadata["classes"]) != list(CLASS_NAMES):
                raise ValueError(f"{args.resume} was trained on other classes: {metadata['classes']}")
        else:
            self.model = ClassModel(self.config.unet, len(CLASS_NAMES), self.config.tokens)
        self.model.to(self.device, memory_format=torch.channels_last).train()
        self.painter = deepcopy(self.model).eval()  # carries the averaged weights when pictures are made
        self.network: nn.Module = self.model.unet
        decay = [p for p in self.model.unet.parameters() if p.ndim > 1]
        plain = [p for p in self.model.parameters() if not any(p is d for d in decay)]
        groups = [{"params": decay, "weight_decay": 0.01}, {"params": plain, "weight_decay": 0.0}]
        fused = self.device.type == "cuda"
        self.optimizer = torch.optim.AdamW(groups, lr=self.rate, betas=(0.9, 0.99), fused=fused)
        self.ema = Ema(self.model.parameters(), self.config.ema)

        per_class = args.per_class or self.config.per_class
        bank = torch.from_numpy(make_bank(per_class, args.seed, args.photos, args.workers))
        self.bank = bank.flatten(0, 1).to(self.device)  # (K * per_class, SIZE, SIZE, 3), uint8
        self.per_class = per_class
        self.step = 0
        self.rows: list[tuple[int, float, float]] = []
        self.parameters = sum(p.numel() for p in self.model.parameters())

    def log(self, text: str) -> None:
        tqdm.write(text, file=sys.stderr)

    def loss(self) -> Tensor:
        """The loss of one fresh batch."""
        draw = {"generator": self.generator, "device": self.device}
        index = torch.randint(len(self.bank), (self.batch,), **draw)
        x0 = self.bank[index].permute(0, 3, 1, 2).float() / 127.5 - 1  # (B, 3, SIZE, SIZE), channels last
        steps = stratified_steps(self.batch, len(self.sigmas), self.generator, self.device)
        sigmas = self.sigmas[steps]  # (B,)
        x, target = noisy(x0, torch.randn(x0.shape, **draw).contiguous(memory_format=torch.channels_last), sigmas)
        any_class = torch.rand(self.batch, **draw) < self.config.class_dropout
        classes = torch.where(any_class, len(CLASS_NAMES), index // self.per_class)
        with autocast(self.device):
            v = self.network(x, steps.float(), self.model.context(classes))
        error = (v.float() - target).square().mean(dim=(1, 2, 3))  # (B,)
        return (error * loss_weights(sigmas)).mean()

    def train_step(self, progress: float) -> Tensor:
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(self.step, progress, self.rate)
        loss = self.loss()
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.ema.update()
        self.step += 1
        return loss.detach()

    def _seconds_a_step(self, count: int = 8) -> float:
        """Time of real training steps at the start of the schedule: they count as training."""
        self.train_step(0.0).item()
        start = time.perf_counter()
        for _ in range(count):
            loss = self.train_step(0.0)
        loss.item()
        return (time.perf_counter() - start) / count

    def try_to_compile(self) -> None:
        """Use torch.compile where it works and is faster; train plainly where not."""
        if self.args.no_compile or self.device.type != "cuda":
            return
        plain = self._seconds_a_step()
        start = time.perf_counter()
        try:
            self.network = torch.compile(self.model.unet)
            compiled = self._seconds_a_step()
        except Exception as error:  # whatever the compiler fails with, training goes on without it
            self.network = self.model.unet
            self.optimizer.zero_grad(set_to_none=True)
            self.log(f"torch.compile failed, training without it: {type(error).__name__}: {str(error)[:500]}")
            return
        if compiled > plain:
            self.network = self.model.unet
        took = time.perf_counter() - start
        self.log(f"seconds a step: plain {plain:.4f}, compiled {compiled:.4f} (ready after {took:.0f} s)")

    def save(self, seconds: float, pictures: bool = True) -> None:
        self.ema.copy_to(self.painter.parameters())
        training = {
            "config": self.args.config,
            "parameters": self.parameters,
            "steps": self.step,
            "batch": self.batch,
            "seconds": round(seconds),
            "loss": round(self.rows[-1][1], 5) if self.rows else None,
            "seed": self.args.seed,
            "resumed": bool(self.args.resume),
        }
        save_model(self.out / "model.safetensors", self.painter, self.sigmas, training)
        with (self.out / "log.csv").open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(("step", "loss", "seconds"))
            writer.writerows((s, f"{loss:.5f}", f"{t:.2f}") for s, loss, t in self.rows)
        if pictures:
            grid = sample_grid(self.painter, self.sigmas, self.args.columns, self.args.sample_steps)
            grid.save(self.out / "samples.png")

    def run(self) -> None:
        args = self.args
        self.log(f"{self.parameters / 1e6:.2f}M parameters, {len(self.bank)} pictures, batch {self.batch}")
        budget = args.minutes * 60
        start = saved = time.perf_counter()
        self.try_to_compile()
        recent: list[Tensor] = []
        total, unit = (args.steps, "steps") if args.steps else (round(budget), "s")
        form = "{percentage:3.0f}%|{bar:30}| {n_fmt} of {total_fmt} {unit}{postfix}"
        bar = tqdm(total=total, unit=unit, bar_format=form, file=sys.stderr, mininterval=5)
        while True:
            seconds = time.perf_counter() - start
            done = self.step / args.steps if args.steps else seconds / budget
            if done >= 1:
                break
            recent.append(self.train_step(done))
            bar.update((self.step if args.steps else round(seconds)) - bar.n)
            if len(recent) == args.log_every:
                self._note(recent, start, bar)
            if time.perf_counter() - saved > args.save_every:
                self.save(time.perf_counter() - start)
                saved = time.perf_counter()
        if recent:
            self._note(recent, start, bar)
        bar.close()
        self.save(time.perf_counter() - start, pictures=False)  # the weights first: pictures take a while
        self.save(time.perf_counter() - start)
        last = self.rows[-1]
        self.log(f"{self.step} steps, loss {last[1]:.4f}, {last[2]:.0f} s")

    def _note(self, recent: list[Tensor], start: float, bar: tqdm) -> None:
        """Write down the mean of recent losses; reading them waits for the device, so the clock is honest."""
        loss = torch.stack(recent).mean().item()
        recent.clear()
        self.rows.append((self.step, loss, time.perf_counter() - start))
        bar.set_postfix(step=self.step, loss=f"{loss:.4f}")
        if not np.isfinite(loss):
            raise FloatingPointError(f"the loss is {loss} at step {self.step}: lower --rate")


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m quality.train", description=__doc__.splitlines()[0])
    parser.add_argument("--out", required=True, help="folder for the model, the pictures and the log")
    parser.add_argument("--minutes", type=float, default=8.0, help="time to train, compiling included (default 8)")
    parser.add_argument("--steps", type=int, help="train so many steps instead")
    parser.add_argument("--config", choices=CONFIGS, default="demo")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--batch", type=int, help="pictures a step")
    parser.add_argument("--rate", type=float, help="peak learning rate")
    parser.add_argument("--per-class", type=int, help="pictures drawn for each class")
    parser.add_argument("--resume", help="a model.safetensors to go on from")
    parser.add_argument("--photos", type=Path, help="folder of the photographs (default: scikit-image's)")
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
