"""Bipartite soft matching, the specification: plain torch, any device.

Bolya et al. (arXiv 2210.09461), section 3: of two sets, each src token finds its most similar dst; the r most
similar pairs merge. Never writes more than a chunk of the score matrix; one topk selects; the result is an index map.
"""

from __future__ import annotations

import functools
import math

import torch
from torch import Tensor

from .. import kernels
from ..config import ToMeConfig
from ..merging.plan import MergePlan, Plan, spread_rows, take
from .curve import is_compiling
from .grid import Grid, split_frames
from .noise import fold_seed, key
from .partition import cells_of, dst_count, partition, split_off
from .sampling import sample_plan

# Scores held at one time: 16M are 32 MiB in half precision.
CHUNK = 2**24


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
        parts: the layer's own (src, dst) out of split_layers, where it was called.
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
    if math.prod(grid) != tokens:
        raise ValueError(f"a grid of {'x'.join(map(str, grid))} has {math.prod(grid)} tokens, the metric has {tokens}")
    if (class_token or distill_token) and not (config.kind.matches and config.partition == "alternate"):
        raise ValueError(
            "class and distillation tokens need a method that matches and partition 'alternate', "
            f"got {config.method!r} and {config.partition!r}"
        )
    if distill_token and not class_token:
        raise ValueError("a distillation token comes after a class token: distill_token needs class_token")
    goes = int(tokens * config.ratio)
    seed = _seed(config, generator, seed, metric.device)
    if config.method == "sample":
        return sample_plan(batch, grid, goes, seed, step, layer)
    dst_tokens = dst_count(grid, config)
    goes = min(goes, tokens - dst_tokens - int(class_token))
    if goes <= 0 or dst_tokens <= int(distill_token):
        return Plan(batch, tokens, tokens, metric.device)
    if config.method == "downsample":
        if is_compiling():
            return _downsample(batch, grid, goes, config, metric.device)
        return _remembered_downsample(batch, grid, goes, config.stride, metric.device)
    src, dst = parts or _split(grid, config, seed, step, layer)
    shared = metric[: max(1, batch // 2)] if config.share_match and batch % 2 == 0 else metric
    src, dst = src[: shared.shape[0]], dst[: shared.shape[0]]
    made = kernels.match(shared, src, dst, goes, class_token, distill_token)
    index, groups, chain = made or (*_matched(shared, src, dst, goes, class_token, distill_token), None)
    kind = config.kind
    means = (kind.reduce or config.reduce) == "mean"
    return MergePlan(batch, index, groups, mean=means, fills=kind.fills, chain=chain)


def split_layers(
    grid: Grid, config: ToMeConfig, seed: Tensor, step: int | Tensor, layer: int, count: int
) -> list[tuple[Tensor, Tensor]] | None:
    """The (src, dst) of the `count` layers from `layer` on, for match_tokens, in one launch; None where no kernel
    serves: plain torch gains nothing by splitting ahead. seed: [] or [B], int64."""
    if not config.kind.matches or config.partition not in ("random_2d", "fixed_2d"):
        return None
    random = config.partition == "random_2d"
    cell = cells_of(grid, config.stride)[2:]
    made = kernels.split(grid, cell, random, seed, step, layer, count if random else 1)
    if made is None:
        return None
    parts = list(zip(made[0].unbind(), made[1].unbind(), strict=True))
    return parts if random else parts * count


def _matched(
    metric: Tensor, src: Tensor, dst: Tensor, goes: int, class_token: bool, distill_token: bool
) -> tuple[Tensor, Tensor]:
    """A plan's index [B, M] and groups [B, N], a step after the other, each by its kernel where that serves."""
    found = kernels.nearest(metric, src, dst, distill_token)
    similarity, target = nearest(metric, src, dst, distill_token) if found is None else found
    if class_token:
        similarity = torch.cat((torch.full_like(similarity[:, :1], -torch.inf), similarity[:, 1:]), dim=1)
    made = kernels.select(similarity, target, src, dst, goes)
    index, groups = _grouped(similarity, target, src, dst, goes, class_token) if made is None else made
    if distill_token:
        index, groups = _distill_second(index, groups, src.shape[1] - goes)
    return index, groups


def _seed(config: ToMeConfig, generator: torch.Generator | None, seed: int | Tensor | None, device) -> Tensor:
    """The seed as an int64 tensor [] or [B] on the device, without a synchronisation."""
    if generator is not None:
        return torch.randint(2**31, (), generator=generator, device=generator.device).to(device)
    if seed is None:
        seed = config.seed
    if isinstance(seed, Tensor):
        return seed.to(device=device, dtype=torch.int64)
    return torch.full((), fold_seed(seed), dtype=torch.int64, device=device)


def _split(grid: Grid, config: ToMeConfig, seed: Tensor, step: int | Tensor, layer: int) -> tuple[Tensor, Tensor]:
    """The layer's src [b, S] and dst [b, D]."""
    parts = split_layers(grid, config, seed, step, layer, 1)
    if parts is not None:
        return parts[0]
    return partition(grid, config, key(seed, step, layer, 1))


@torch.no_grad()
def nearest(metric: Tensor, src: Tensor, dst: Tensor, distill_token: bool = False) -> tuple[Tensor, Tensor]:
    """For each src its most similar dst by cosine.

    Args:
        metric: [B, N, C], src: [b, S], dst: [b, D].
    Returns:
        similarity [B, S] in metric's dtype and target [B, S], a position in dst. Zero tokens are similar to
        nothing (0), never NaN.
    """
    metric = _unit(metric)
    a, b = take(metric, src), take(metric, dst).transpose(1, 2)  # (B, S, C), (B, C, D)
    rows = max(1, CHUNK // (b.shape[0] * b.shape[2]))
    best = []
    for chunk in a.split(rows, dim=1):
        scores = chunk @ b  # (B, rows, D)
        if distill_token:
            scores[..., 0] = -torch.inf
        best.append(scores.max(dim=-1))
    return torch.cat([x.values for x in best], dim=1), torch.cat([x.indices for x in best], dim=1)


def _unit(x: Tensor) -> Tensor:
    """Finite x [B, N, C] with tokens of length 1; zero tokens stay."""
    norm, largest = x.norm(dim=-1, keepdim=True), x.abs().amax(dim=-1, keepdim=True)  # (B, N, 1)
    # Squares may overflow or vanish where their token does neither.
    lost = (norm.isinf() & largest.isfinite()) | (norm < 0.5 * largest)
    x = x / torch.where(lost, largest, 1.0)  # by 1, exact, as a rule
    return x / x.norm(dim=-1, keepdim=True).clamp_min(torch.finfo(x.dtype).tiny)


def _grouped(
    similarity: Tensor, target: Tensor, src: Tensor, dst: Tensor, goes: int, in_order: bool
) -> tuple[Tensor, Tensor]:
    """Merge the `goes` most similar pairs: a plan's index [B, M] and groups [B, N].

    Merged tokens: the src that stay (most similar first, or in_order), then all dst.
    """
    rows, src_count = similarity.shape
    stay_count = src_count - goes
    kept = stay_count + dst.shape[1]
    src, dst = spread_rows(src, rows), spread_rows(dst, rows)
    # Those that stay are the least similar: the same topk selects both sides. Ascending, so turned round.
    stay = similarity.topk(stay_count, dim=-1, largest=False, sorted=True).indices.flip(-1)  # (B, stay)
    if in_order:
        stay = split_off(stay, src_count)[1]
    place = torch.arange(stay_count, device=src.device).expand(rows, -1)
    src_group = (target + stay_count).scatter(1, stay, place)  # (B, S)
    own_group = torch.arange(stay_count, kept, device=src.device).expand(rows, -1)
    groups = src_group.new_empty(rows, src_count + dst.shape[1])
    groups = groups.scatter(1, src, src_group).scatter(1, dst, own_group)  # (B, N)
    return torch.cat((src.gather(1, stay), dst), dim=1), groups


def _distill_second(index: Tensor, groups: Tensor, stay_count: int) -> tuple[Tensor, Tensor]:
    """Move the first dst from behind the src that stay to right behind the class token."""
    first, stay, distill, dst = index.split((1, stay_count - 1, 1, index.shape[1] - stay_count - 1), dim=1)
    index = torch.cat((first, distill, stay, dst), dim=1)  # (B, M)
    shifted = groups + ((groups > 0) & (groups < stay_count)).long()
    return index, torch.where(groups == stay_count, 1, shifted)


@functools.lru_cache(maxsize=64)
def _remembered_downsample(
    batch: int, grid: Grid, goes: int, stride: tuple[int, int], device: torch.device
) -> MergePlan:
    """The same for every layer and step: about thirty launches once."""
    with torch.inference_mode(False), torch.no_grad():
        return _downsample(batch, grid, goes, ToMeConfig(method="downsample", stride=stride), device)


def _downsample(batch: int, grid: Grid, goes: int, config: ToMeConfig, device: torch.device) -> MergePlan:
    """ToDo (Smith et al., arXiv 2402.13573): the top-left token of each cell; below the cap some others stay too."""
    tokens = math.prod(grid)
    zero = torch.zeros((), dtype=torch.int64, device=device)
    src, dst = partition(grid, config, zero)
    stay_count = src.shape[1] - goes
    # Which others stay is spread evenly and never drawn.
    spread = torch.arange(stay_count, device=device) * src.shape[1] // max(1, stay_count)
    gone, index = split_off(torch.cat((src[:, spread], dst), dim=1), tokens)
    rows, columns, cell_height, cell_width = cells_of(grid, config.stride)
    frames, height, width = split_frames(grid)
    row = (gone // width % height // cell_height).clamp_max(rows - 1) * cell_height
    column = (gone % width // cell_width).clamp_max(columns - 1) * cell_width
    frame = gone // (height * width) * height * width
    # One row each, so searched as plain lists: the place of the cell's own token among those that stay.
    target = torch.searchsorted(index[0].contiguous(), (frame + row * width + column)[0])[None]
    own = torch.arange(index.shape[1], device=device)[None]
    groups = torch.empty(1, tokens, dtype=torch.int64, device=device).scatter(1, gone, target).scatter(1, index, own)
    cells = frames * rows * columns
    even = goes == tokens - cells and cells * cell_height * cell_width == tokens
    return MergePlan(batch, index, groups, even=even)
