"""Bipartite soft matching, the specification: plain torch, any device.

Bolya et al. (arXiv 2210.09461), section 3: of two sets, each src token finds its most similar dst; the r most
similar pairs merge. Never writes more than a chunk of the score matrix; one topk selects; the result is an index map.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from ..config import ToMeConfig
from .grid import Grid, split_frames
from .groups import spread_rows, take
from .partition import cells_of, partition, split_off

# Scores held at one time: 16M are 32 MiB in half precision.
CHUNK = 2**24


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
    rows = max(1, CHUNK // max(1, b.shape[0] * b.shape[2]))
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
    tiny = torch.finfo(x.dtype).tiny
    # Squares may overflow, vanish or lose digits where their token does not: half precision's are float32.
    least = 2.0**12 * torch.finfo(torch.promote_types(x.dtype, torch.float32)).tiny ** 0.5
    lost = (norm.isinf() & largest.isfinite()) | (norm < (0.5 * largest).clamp_min(least))
    x = x / torch.where(lost, largest.clamp_min(tiny), 1.0)  # by 1, exact, as a rule
    return x / x.norm(dim=-1, keepdim=True).clamp_min(tiny)


def grouped(
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


def distill_second(index: Tensor, groups: Tensor, stay_count: int) -> tuple[Tensor, Tensor]:
    """Move the first dst from behind the src that stay to right behind the class token."""
    first, stay, distill, dst = index.split((1, stay_count - 1, 1, index.shape[1] - stay_count - 1), dim=1)
    index = torch.cat((first, distill, stay, dst), dim=1)  # (B, M)
    shifted = groups + ((groups > 0) & (groups < stay_count)).long()
    return index, torch.where(groups == stay_count, 1, shifted)


def match(
    metric: Tensor,
    src: Tensor,
    dst: Tensor,
    goes: int,
    class_token: bool = False,
    distill_token: bool = False,
    find: Callable[..., tuple[Tensor, Tensor]] = nearest,
    group: Callable[..., tuple[Tensor, Tensor]] = grouped,
) -> tuple[Tensor, Tensor]:
    """Which tokens merge: a plan's index [B, M] and groups [B, N].

    Args:
        metric: [B, N, C], src: [b, S], dst: [b, D], ascending. goes: how many src go, 0 < goes <= S.
        class_token, distill_token: see match_tokens. find, group: or kernels in their place.
    """
    similarity, target = find(metric, src, dst, distill_token)
    if class_token:  # the first src, similar to nothing, so that it stays
        similarity = torch.cat((torch.full_like(similarity[:, :1], -torch.inf), similarity[:, 1:]), dim=1)
    index, groups = group(similarity, target, src, dst, goes, class_token)
    return distill_second(index, groups, src.shape[1] - goes) if distill_token else (index, groups)


def downsample(grid: Grid, goes: int, config: ToMeConfig, device: torch.device) -> tuple[Tensor, Tensor, bool]:
    """ToDo (Smith et al., arXiv 2402.13573): the top-left token of each cell; below the cap some others stay too.

    config: of this method; its stride counts. Returns a plan's index [1, M], groups [1, N], and whether all groups are
    of one size.
    """
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
    return index, groups, even
