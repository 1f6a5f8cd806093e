"""Which tokens of a layer merge: a plan from the tokens, the grid and the options."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable

import torch
from torch import Tensor

from .. import kernels
from ..config import ToMeConfig
from ..core.curve import curve_order, is_traced, remembered
from ..core.grid import Grid
from ..core.matching import downsample
from ..core.multires import shares_of, work
from ..core.noise import fold_seed
from ..core.partition import dst_count
from ..core.sampling import kept_count
from .plan import MergePlan, MultiresPlan, Plan, SamplePlan


def match_tokens(
    metric: Tensor,
    grid: Grid,
    config: ToMeConfig,
    generator: torch.Generator | None = None,
    *,
    seed: int | Tensor | None = None,
    step: int | Tensor = 0,
    layer: int = 0,
    parts: tuple[Tensor, Tensor] | None = None,
    class_token: bool = False,
    distill_token: bool = False,
) -> Plan:
    """Decide which tokens merge.

    Args:
        metric: [B, N, C], what similarity is measured on. Methods that match nothing use its shape alone.
        grid: (height, width) with height * width == N; for video (frames, height, width).
        config: ratio, stride, method, partition, reduce, seed and share_match count here.
        generator: where random choices come from, instead of the seed. The global generator never is.
        seed: instead of config.seed: a number, a tensor [] or one number for each row [B] (int64).
        step, layer: further words of the random key, so that each step and layer chooses anew.
        parts: the layer's own (src, dst) out of kernels.split, where many layers were split at once.
        class_token, distill_token: token 0 (a src of "alternate") and 1 (a dst) stay alone and where they are, so
            that merged tokens can be matched again; the other src that stay then keep their order.
    Returns:
        a Plan; the identity where nothing is to go. A ratio above what the partition allows is capped: see
        plan.ratio. Its merged tokens are the src that stay, then all dst; in which order those src come differs
        between plain torch (most similar first, as tomesd has them) and the kernels (as they lie), but where there
        is a class token. Attention does not see it; plan.index tells.
    Raises:
        ValueError: the grid does not have N tokens, or a protected token is asked for where nothing is matched by
            "alternate", or a distillation token without a class token.
    """
    batch, tokens, _ = metric.shape
    check_tokens(grid, metric=metric)
    if (class_token or distill_token) and not (config.kind.matches and config.partition == "alternate"):
        raise ValueError(
            "class and distillation tokens need a method that matches and partition 'alternate', "
            f"got {config.method!r} and {config.partition!r}"
        )
    if distill_token and not class_token:
        raise ValueError("a distillation token comes after a class token: distill_token needs class_token")
    seed = _seed(config, generator, seed, metric.device)
    if config.samples:

        def draw(kept: int) -> Tensor:
            return kernels.draw(curve_order(grid, seed.device), kept, seed, step, layer, 1)

        return sampled(batch, grid, config, draw, seed, step, layer)
    dst_tokens = dst_count(grid, config)
    goes = min(int(tokens * config.ratio), tokens - dst_tokens - int(class_token))
    if goes <= 0 or dst_tokens <= int(distill_token):
        return Plan(batch, tokens, tokens, metric.device)
    if config.method == "downsample":
        if is_traced():
            return _downsample(batch, grid, goes, config, metric.device)
        return _remembered_downsample(batch, grid, goes, config.stride, metric.device)
    src, dst = parts or kernels.split(grid, config, seed, step, layer, 1)[0]
    shared = metric[: max(1, batch // 2)] if config.share_match and batch % 2 == 0 else metric
    src, dst = src[: shared.shape[0]], dst[: shared.shape[0]]
    index, groups, chain = kernels.match(shared, src, dst, goes, class_token, distill_token)
    kind = config.kind
    means = (kind.reduce or config.reduce) == "mean"
    return MergePlan(batch, index, groups, mean=means, fills=kind.fills, chain=chain)


def check_tokens(grid: Grid, **given: Tensor) -> None:
    """Raises ValueError where one of these [B, N, C] has more or fewer tokens than the grid."""
    tokens = math.prod(grid)
    for name, x in given.items():
        if x.shape[1] != tokens:
            shape = "x".join(map(str, grid))
            raise ValueError(f"a grid of {shape} has {tokens} tokens, the {name} has {x.shape[1]}")


def kept_of(grid: Grid, config: ToMeConfig) -> int:
    """How many of the grid's tokens are drawn, where keys are drawn (config.samples); as many as multires works on."""
    tokens = math.prod(grid)
    ratio = 1.0 - work(*shares_of(config)) if config.shares_by_hand else config.ratio
    return kept_count(tokens, int(tokens * min(ratio, config.ratio_cap)))


def sampled(
    batch: int,
    grid: Grid,
    config: ToMeConfig,
    draw: Callable[[int], Tensor],
    seed: Tensor,
    step: int | Tensor,
    layer: int,
) -> Plan:
    """One layer's plan of the tokens that draw(kept) gives, [T, b, kept], by the method: sample or multires."""
    kept = kept_of(grid, config)
    if kept == math.prod(grid):
        return Plan(batch, kept, kept, seed.device)
    if config.method == "multires":
        return MultiresPlan(batch, grid, kept, functools.partial(draw, kept), shares_of(config), seed, step, layer)
    return SamplePlan(batch, grid, draw(kept))


@remembered
def _remembered_downsample(batch: int, grid: Grid, goes: int, stride: tuple[int, int], device: torch.device) -> Plan:
    """The same for every layer and step: about thirty launches once."""
    return _downsample(batch, grid, goes, ToMeConfig(method="downsample", stride=stride), device)


def _downsample(batch: int, grid: Grid, goes: int, config: ToMeConfig, device: torch.device) -> Plan:
    index, groups, even = downsample(grid, goes, config, device)
    return MergePlan(batch, index, groups, even=even)


def _seed(config: ToMeConfig, generator: torch.Generator | None, seed: int | Tensor | None, device) -> Tensor:
    """The seed as an int64 tensor [] or [B] on the device, without a synchronisation."""
    if generator is not None:
        return torch.randint(2**31, (), generator=generator, device=generator.device).to(device)
    if seed is None:
        seed = config.seed
    if isinstance(seed, Tensor):
        return seed.to(device=device, dtype=torch.int64)
    return torch.full((), fold_seed(seed), dtype=torch.int64, device=device)
