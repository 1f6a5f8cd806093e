"""With the same destinations, merging equals PyPI's tomesd 0.1.3 (the paper's authors' own code)."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from shared_tome import match_tokens
from shared_tome.core.noise import key
from shared_tome.core.partition import partition

from .helpers import config, tokens

tomesd = pytest.importorskip("tomesd", reason="needs tomesd 0.1.3, see requirements")

RATIOS = [0.1, 0.15, 0.2, 0.25, 0.3, 0.35, 0.4, 0.45, 0.5, 0.55, 0.6, 0.65, 0.7, 0.75]
# (grid, stride): tomesd cannot clamp a cell to a grid thinner than it, so it is told the clamped stride.
GRIDS = [((64, 64), (2, 2)), ((17, 23), (2, 2)), ((1, 64), (2, 2)), ((32, 8), (2, 2)), ((18, 12), (3, 2))]
SEED, STEP, LAYER = 1234, 5, 3


class TorchWithOurDraw:
    """torch, but randint gives the offsets that we drew."""

    def __init__(self, offsets):
        self.offsets = offsets

    def __getattr__(self, name):
        return getattr(torch, name)

    def randint(self, high, size, **kwargs):
        assert tuple(size) == tuple(self.offsets.shape) and int(self.offsets.max()) < high
        return self.offsets


def tomesd_match(monkeypatch, metric, grid, ours):
    """tomesd's (merge, unmerge) with our destinations."""
    # It tells src from dst by sorting a list of 0 and -1; ties in their own order are what its paper means.
    argsort = torch.Tensor.argsort
    monkeypatch.setattr(torch.Tensor, "argsort", lambda x, dim, **kwargs: argsort(x, stable=True, dim=dim, **kwargs))
    height, width = grid
    sx, sy = min(ours.stride[0], width), min(ours.stride[1], height)
    count = int(height * width * ours.ratio)
    fixed = ours.partition == "fixed_2d"
    if not fixed:
        _, dst = partition(grid, ours, key(torch.tensor(SEED), STEP, LAYER, 1))
        offsets = torch.full((height // sy, width // sx, 1), -1)
        for token in dst[0].tolist():
            y, x = divmod(token, width)
            offsets[y // sy, x // sx, 0] = (y % sy) * sx + x % sx
        monkeypatch.setattr(tomesd.merge, "torch", TorchWithOurDraw(offsets))
    generator = SimpleNamespace(device=torch.device("cpu"))
    return tomesd.merge.bipartite_soft_matching_random2d(
        metric, width, height, sx, sy, count, no_rand=fixed, generator=generator
    )


@pytest.mark.parametrize("ratio", RATIOS)
@pytest.mark.parametrize("partition", ["fixed_2d", "random_2d"])
def test_merge_and_unmerge(partition, ratio):
    for number, (grid, stride) in enumerate(GRIDS):
        for batch in (1, 2, 3) if grid[0] < 64 else (1 + RATIOS.index(ratio) % 3,):
            ours = config(ratio=ratio, partition=partition, stride=stride)
            metric, x = tokens(batch, grid, 16, seed=number), tokens(batch, grid, 5, seed=100 + number)
            if metric.shape[1] > 256:
                metric = metric.double()  # of thousands of scores some are alike in float32, and either may win
            plan = match_tokens(metric, grid, ours, seed=SEED, step=STEP, layer=LAYER)
            with pytest.MonkeyPatch.context() as monkeypatch:
                merge, unmerge = tomesd_match(monkeypatch, metric, grid, ours)
            merged = merge(x)
            assert plan.merge(x).shape == merged.shape, (grid, batch)
            assert not torch.equal(unmerge(merged), x)
            torch.testing.assert_close(plan.merge(x), merged, rtol=1e-6, atol=1e-6)
            torch.testing.assert_close(plan.unmerge(plan.merge(x)), unmerge(merged), rtol=1e-6, atol=1e-6)


def test_the_ratio_above_the_cap_is_tomesds_cap(monkeypatch):
    grid, metric = (10, 14), tokens(2, (10, 14), 8)
    ours = config(ratio=0.95, partition="fixed_2d")
    plan = match_tokens(metric, grid, ours)
    merge, unmerge = tomesd_match(monkeypatch, metric, grid, ours)
    torch.testing.assert_close(plan.merge(metric), merge(metric), rtol=1e-6, atol=1e-6)
    assert plan.ratio == 0.75
