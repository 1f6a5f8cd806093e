"""What every training of the lab does: steps within a budget, and one step of the optimizer."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from itertools import count

import torch
from torch import Tensor, nn
from tqdm import tqdm


def budgeted(seconds: float | None, steps: int | None, desc: str) -> Iterator[tuple[int, float]]:
    """(step, share done) until the seconds or the steps are over, whichever is first, with a bar on stderr.

    The first step's start-up does not count.
    """
    bar = tqdm(total=100, unit="%", desc=desc, file=sys.stderr, mininterval=5)
    start = time.monotonic()
    for step in count():
        now = time.monotonic()
        start = now if step == 1 else start
        done = max(step / steps if steps else 0.0, (now - start) / seconds if seconds else 0.0)
        bar.update(int(100 * min(done, 1.0)) - bar.n)
        if done >= 1:
            bar.close()
            return
        yield step, done


def adamw(
    module: nn.Module, rate: float, decay: float = 0.01, last_beta: float = 0.99, keeps: tuple[str, ...] = ()
) -> torch.optim.AdamW:
    """AdamW on what is trained of a module. Vectors do not decay, nor the parameters named in `keeps`."""
    named = [(name, p) for name, p in module.named_parameters() if p.requires_grad]
    decays = [p for name, p in named if p.ndim > 1 and name not in keeps]
    others = [p for name, p in named if p.ndim <= 1 or name in keeps]
    groups = [{"params": decays, "weight_decay": decay}, {"params": others, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, rate, betas=(0.9, last_beta), fused=named[0][1].device.type == "cuda")


def descend(optimizer: torch.optim.Optimizer, loss: Tensor, rate: float | None = None) -> Tensor:
    """One step at this rate (None: the optimizer's own), gradients clipped to a norm of 1. Gives the loss back."""
    for group in optimizer.param_groups:
        group["lr"] = group["lr"] if rate is None else rate
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    nn.utils.clip_grad_norm_([p for group in optimizer.param_groups for p in group["params"]], 1.0)
    optimizer.step()
    return loss.detach()
