"""One shape's inputs for kernels.py, and whether a kernel's outcome is right."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from shared_tome import ToMeConfig
from shared_tome.core import matching
from shared_tome.core.groups import group_counts, group_sum, take
from shared_tome.core.noise import key
from shared_tome.core.partition import partition


def smooth_tokens(batch: int, grid: tuple[int, int], channels: int, dtype: torch.dtype, device: str) -> Tensor:
    """Tokens [B, N, C] that resemble their neighbours, as a picture's do: groups differ in size."""
    torch.manual_seed(0)
    coarse = torch.randn(batch, channels, max(1, grid[0] // 8), max(1, grid[1] // 8), device=device)
    x = F.interpolate(coarse, size=grid, mode="bilinear") + 0.5 * torch.randn(batch, channels, *grid, device=device)
    return x.flatten(2).transpose(1, 2).to(dtype).contiguous()


class Case:
    """One shape's inputs, made in plain torch."""

    def __init__(self, grid: tuple[int, int], channels: int, batch: int, dtype: torch.dtype):
        self.grid, self.channels, self.tokens = grid, channels, grid[0] * grid[1]
        self.x = smooth_tokens(batch, grid, channels, dtype, "cuda")
        self.seed = torch.full((), 5, dtype=torch.int64, device="cuda")
        self.step = torch.full((), 3, dtype=torch.int64, device="cuda")
        self.config = ToMeConfig(ratio=0.5, method="merge", min_tokens=0)
        self.src, self.dst = partition(grid, self.config, key(self.seed, self.step, 0, 1))
        self.goes = self.tokens // 2
        self.similarity, self.target = matching.nearest(self.x, self.src, self.dst)
        given = (self.similarity, self.target, self.src, self.dst, self.goes, True)
        self.index, self.groups = matching.grouped(*given)
        self.kept = self.index.shape[1]
        self.sizes = group_counts(self.groups, self.kept)


class Reached:
    """The similarity that a choice of dst reaches, in float64, of 512 src of each row."""

    def __init__(self, case: Case):
        self.case = case
        self.sample = torch.arange(0, case.src.shape[1], max(1, case.src.shape[1] // 512), device="cuda")
        x = case.x.double()
        unit = x / x.norm(dim=-1, keepdim=True)
        self.a, self.b = take(unit, case.src[:, self.sample]), take(unit, case.dst)
        self.best = (self.a @ self.b.transpose(1, 2)).amax(-1)  # (B, 512)
        self.plain = self.errors(case.similarity, case.target)

    def errors(self, similarity: Tensor, target: Tensor) -> tuple[float, float]:
        """(how much less similar the chosen are than the best, how far off the similarity is said to be), at worst."""
        chosen = target[:, self.sample][..., None].expand(-1, -1, self.b.shape[-1])
        reached = (self.a * self.b.gather(1, chosen)).sum(-1)
        said = similarity[:, self.sample].double()
        return float((self.best - reached).max()), float((said - self.best).abs().max())

    def check(self, got: tuple[Tensor, Tensor]) -> str:
        found, score = self.errors(*got)
        text = f"{found:.1e} {score:.1e} (torch {self.plain[0]:.1e} {self.plain[1]:.1e})"
        # Both choose wrongly where scores are closer than rounding; torch's are rounded to half precision first.
        return ("" if found <= 2 * self.plain[1] and score <= 2 * self.plain[1] else "WORSE THAN TORCH ") + text


def check_select(case: Case, got: tuple[Tensor, Tensor], similarity: Tensor | None = None) -> str:
    """The same similarities stay as topk keeps; groups and index agree. similarity: the case's own if None."""
    index, groups = got
    similarity = case.similarity if similarity is None else similarity
    stay = case.kept - case.dst.shape[1]
    place = torch.empty_like(groups).scatter_(
        1,
        case.src.expand(groups.shape[0], -1),
        torch.arange(case.src.shape[1], device="cuda").expand(groups.shape[0], -1),
    )
    chosen = similarity.gather(1, place.gather(1, index[:, :stay])).sort(dim=1).values
    expected = similarity.topk(stay, dim=1, largest=False).values.sort(dim=1).values
    own = groups.gather(1, index)
    fine = torch.equal(chosen, expected) and torch.equal(own, torch.arange(case.kept, device="cuda").expand_as(own))
    ascending = bool((index[:, 1:stay] > index[:, : stay - 1]).all())
    total = torch.equal(
        group_counts(groups, case.kept).sum(1), torch.full((groups.shape[0],), float(case.tokens)).cuda()
    )
    return "" if fine and ascending and total else "NOT EQUAL"


def check_links(index: Tensor, groups: Tensor, chain: tuple[Tensor, Tensor]) -> str:
    """The sizes are right; all chains together hold every token that is not its group's own, once."""
    from shared_tome.kernels.impl.mean import LANES

    heads, following = chain
    rows, kept = index.shape
    said, lanes = heads[:, :kept].view(torch.float32), heads[:, kept:].view(rows, -1, LANES)
    sizes, taking = group_counts(groups, kept), lanes.shape[1]
    row = torch.arange(rows, device="cuda")[:, None, None].expand_as(lanes)
    group = torch.arange(kept - taking, kept, device="cuda")[:, None].expand_as(lanes)
    member, members, right = lanes.long(), torch.ones_like(sizes), True
    for _ in range(int(sizes.max())):
        here = member > 0
        token = (member - 1).clamp_min(0)
        right = right and bool((groups[row, token] == group)[here].all())
        members[:, kept - taking :] += here.sum(-1)
        member = torch.where(here, following[row, token].long(), 0)
    return "" if torch.equal(said, sizes) and torch.equal(members, sizes) and right else "BAD LINKS"


def check_mean(case: Case, got: Tensor, bias: Tensor) -> str:
    shape = (case.x.shape[0], case.kept, case.channels)
    index = case.groups[..., None].expand(-1, -1, case.channels)
    exact = torch.zeros(shape, dtype=torch.float64, device="cuda").scatter_add_(1, index, case.x.double())
    exact /= case.sizes.double()[..., None]
    plain = (group_sum(case.x, case.groups, case.kept) / case.sizes[..., None]).to(case.x.dtype)
    weighs = torch.allclose(bias, case.sizes.log(), rtol=1e-5, atol=1e-6)
    here, there = ((made.double() - exact).abs().max() for made in (got, plain))
    return ("" if here <= 1.01 * there and weighs else "WORSE THAN TORCH ") + f"{here:.1e} (torch {there:.1e})"
