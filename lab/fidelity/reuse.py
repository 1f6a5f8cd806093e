"""What a user would take in place of merging: outputs of earlier steps used again, whole or of each attention.

EasyCache (Zhou et al., arXiv 2507.02860) and LazyCache are written here as the pinned ComfyUI has them (0.30.0,
comfy_extras/nodes_easycache.py), from their description and for many pictures at once; a test drives ComfyUI's own
code through the same sampler and finds the same steps skipped and the same pictures. ComfyUI decides once for a batch;
here each picture decides for itself, as where it is made alone, and those that run make up the batch.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ..models.samplers import Denoised, denoiser

SUBSAMPLE = 8
"""Every 8th row and column of pixels or latents is looked at."""
Which = Tensor | None
"""Numbers of the pictures that are worked out [b]; None: all."""
Ask = Callable[[Tensor, Which], Tensor]
"""(x [R, b, C, H, W], which) -> the model's output for them, of the same shape. R: rows of a picture."""


@dataclass(frozen=True)
class Reuse:
    """Whole outputs used again.

    kind: one of KINDS. threshold: of the caches, 0 to 3. start, end: shares of the sampling between which they may
    skip. every: of the other kinds, how many steps there are for each one that runs, after `start`.
    """

    kind: str
    threshold: float = 0.2
    start: float = 0.15
    end: float = 0.95
    every: int = 2

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"kind must be one of {', '.join(KINDS)}, got {self.kind!r}")
        if self.every < 2:
            raise ValueError(f"every must be 2 or more, got {self.every}")


@dataclass(frozen=True)
class Hold:
    """Each self-attention exact every `every`-th step after a share `start` of the steps, and until then.

    between: "held": its last exact output stands; "drawn": the variant's own method; "residual": that with the draws
    of the last exact step, plus what was missing there (as DiTFastAttn's windows, Yuan et al., arXiv 2406.08552).
    """

    every: int
    between: str
    start: float = 0.2

    def __post_init__(self) -> None:
        if self.between not in ("held", "drawn", "residual"):
            raise ValueError(f"between must be held, drawn or residual, got {self.between!r}")
        if self.every < 2:
            raise ValueError(f"every must be 2 or more, got {self.every}")

    def since(self, step: int, steps: int) -> int:
        """Steps since the last exact one; 0: this one is exact."""
        return behind(step, steps, self.start) % self.every

    def begun(self, step: int, steps: int) -> bool:
        return step >= self.start * steps


def behind(step: int, steps: int, start: float) -> int:
    """How many steps after the first one that is at or behind a share `start` of them; 0 before."""
    first = next(i for i in range(steps + 1) if i >= start * steps)
    return max(0, step - first)


class Cache:
    """EasyCache's and LazyCache's rule for pictures that decide each for themselves. x and outputs: [R, B, C, H, W].

    A step is skipped where the changes of the output that the changes of the input since the last run foretell stay,
    summed up since then, below a threshold; then the last run's output less its input is added to the input. How much
    an output changes with its input is known from the last two runs. Only the last of a picture's R rows is looked at:
    ComfyUI has the unprompted row first and asks its first row. LazyCache looks at what the sampler sees, the guided
    prediction of the picture (R is 1), and learns from runs before `start` too.
    """

    def __init__(self, spec: Reuse) -> None:
        self.spec = spec
        self.gap: Tensor | None = None  # [R, B, C, H, W], output less input of the last run
        self.near: Tensor | None = None  # [B, C, h, w], of the last run's input
        self.far: Tensor | None = None  # of its output
        self.size: Tensor | None = None  # [B], the mean size of its output
        self.rate: Tensor | None = None  # [B], the output's change for the input's
        self.total: Tensor | None = None  # [B], changes foretold since the last run

    def __call__(self, x: Tensor, share: float, ask: Ask) -> Tensor:
        """The output at a share of the sampling."""
        if share >= self.spec.end:
            return ask(x, None)
        doing, seen = share >= self.spec.start, _few(x)
        moved = _mean(seen - self.near) if doing and self.near is not None else None  # (B,)
        skip = None
        if moved is not None and self.rate is not None:
            self.total = self.total + self.rate * moved / self.size
            skip = self.total < self.spec.threshold
            self.total = self.total.where(skip, 0.0)
        if skip is None or not skip.any():
            which, out = None, ask(x, None)
        elif skip.all():
            return x + self.gap
        else:
            which, out = (~skip).nonzero().flatten(), x + self.gap
            out[:, which] = ask(x[:, which], which).to(out.dtype)
        self._learn(x, out, seen, moved, skip, doing)
        return out

    def _learn(self, x: Tensor, out: Tensor, seen: Tensor, moved: Tensor | None, skip: Which, doing: bool) -> None:
        """From the pictures that ran."""
        ran = x.new_ones(x.shape[1], dtype=torch.bool) if skip is None else ~skip

        def put(old: Tensor | None, new: Tensor, axis: int = 0) -> Tensor:
            mask = ran.view([1] * axis + [-1] + [1] * (new.dim() - axis - 1))
            return new if old is None else new.where(mask, old)

        far = _few(out)
        if moved is not None:
            self.rate = put(self.rate, _mean(far - self.far) / moved)
            self.total = x.new_zeros(x.shape[1], dtype=torch.float32) if self.total is None else self.total
        self.gap = put(self.gap, out - x, 1)
        if doing or self.spec.kind == "LazyCache":
            self.near, self.far = put(self.near, seen), put(self.far, far)
            self.size = put(self.size, _mean(out.transpose(0, 1)))


class Every:
    """One step of several runs; between, the last output, or the input plus the last output less its input."""

    def __init__(self, spec: Reuse, steps: int) -> None:
        self.spec, self.steps, self.step = spec, steps, -1
        self.kept: Tensor | None = None

    def __call__(self, x: Tensor, share: float, ask: Ask) -> Tensor:
        self.step += 1
        adds = x if self.spec.kind == "difference" else torch.zeros_like(x)
        if behind(self.step, self.steps, self.spec.start) % self.spec.every:
            return self.kept + adds
        out = ask(x, None)
        self.kept = out - adds
        return out


KINDS = ("EasyCache", "LazyCache", "output", "difference")


def _few(x: Tensor) -> Tensor:
    """The last row of each picture, coarsely: [R, B, C, H, W] -> [B, C, h, w] in float32."""
    return x[-1, ..., ::SUBSAMPLE, ::SUBSAMPLE].float()


def _mean(x: Tensor) -> Tensor:
    """Mean size of each [B, ...] -> [B]."""
    return x.float().abs().flatten(1).mean(1)


Network = Callable[[Tensor, Tensor, Tensor, Which], Tensor]
"""(x [2 * b, C, H, W], training steps [2 * b], context [2 * b, M, D], which) -> its prediction."""


def reusing(
    spec: Reuse | None, network: Network, context: Tensor, order: list[int], sigmas: list[float], prediction: str,
    guidance: float, last: int,
) -> Denoised:  # fmt: skip
    """samplers.denoiser with some of its outputs used again. last: the last training step, where sampling begins."""

    def guided(x: Tensor, step: int, which: Which, wrapped: Callable[..., Tensor] | None = None) -> Tensor:
        rows = context if which is None else context.unflatten(0, (2, -1))[:, which].flatten(0, 1)
        call = wrapped or (lambda x, times, rows: network(x, times, rows, which))
        return denoiser(call, rows, order, sigmas, prediction, guidance)(x, step)

    if spec is None:
        return lambda x, step: guided(x, step, None)
    if spec.kind == "LazyCache":
        lazy = Cache(spec)

        def denoised(x: Tensor, step: int) -> Tensor:
            # A flow's sampler sees (1 - t) x0 + t noise, the others x0 + sigma noise.
            scale = 1 / (1 + sigmas[step]) if prediction == "flow" else 1.0
            share = 1 - order[step] / last
            return lazy((x * scale)[None], share, lambda x, which: guided(x[0] / scale, step, which)[None])[0]

        return denoised
    rule = Cache(spec) if spec.kind == "EasyCache" else Every(spec, len(order))

    def around(x: Tensor, times: Tensor, rows: Tensor) -> Tensor:
        def ask(x: Tensor, which: Which) -> Tensor:
            some = (x, *(given.unflatten(0, (2, -1)) for given in (times, rows)))
            if which is not None:
                some = (x, *(given[:, which] for given in some[1:]))
            return network(*(given.flatten(0, 1) for given in some), which).unflatten(0, (2, -1))

        share = 1 - times[0].item() / last
        return rule(x.unflatten(0, (2, -1)), share, ask).flatten(0, 1)

    return lambda x, step: guided(x, step, None, around)
