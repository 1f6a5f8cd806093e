"""Video and sound in the core: runs of four are cells of a frame, runs of eight the same cell of two frames."""

from __future__ import annotations

import pytest
import torch

from shared_tome import ModelCall, ToMeConfig, match_tokens
from shared_tome.core.curve import curve_order
from shared_tome.core.grid import grid_at, level_of

CPU = torch.device("cpu")
VIDEOS = [(1, 8, 12), (2, 6, 10), (3, 4, 6), (5, 7, 9), (4, 1, 13), (21, 2, 3)]


def tokens(grid, channels=4, batch=1):
    count = torch.Size(grid).numel()
    return torch.randn(batch, count, channels, generator=torch.Generator().manual_seed(0))


def config(**options):
    return ToMeConfig(**{"method": "sample", "min_tokens": 0, **options})


@pytest.mark.parametrize("grid", VIDEOS)
def test_the_order_is_a_permutation(grid):
    assert curve_order(grid, CPU).sort().values.tolist() == list(range(torch.Size(grid).numel()))


def test_one_frame_is_a_picture():
    assert torch.equal(curve_order((1, 8, 12), CPU), curve_order((8, 12), CPU))


@pytest.mark.parametrize("grid", [(2, 6, 10), (4, 8, 8), (6, 4, 6)])
@pytest.mark.parametrize(("ratio", "frames"), [(0.75, 1), (0.875, 2)])
def test_runs_are_cells(grid, ratio, frames):
    plan = match_tokens(tokens(grid), grid, config(ratio=ratio))
    token = torch.arange(plan.tokens)
    frame, y, x = token // (grid[1] * grid[2]), token // grid[2] % grid[1], token % grid[2]
    cell = (frame // frames * grid[1] + y // 2) * grid[2] + x // 2
    for run in range(plan.kept):
        assert cell[plan.groups[0] == run].unique().numel() == 1
    assert (plan.sizes == 4 * frames).all()


def test_a_last_frame_without_a_partner():
    """Three frames: the runs of four of the last one are its cells."""
    grid = (3, 4, 6)
    plan = match_tokens(tokens(grid), grid, config(ratio=0.75))
    last = plan.groups[0, 48:]
    assert last.unique().numel() == 6 and set(last.tolist()).isdisjoint(plan.groups[0, :48].tolist())


def test_sound_is_cut_into_runs():
    plan = match_tokens(tokens((1, 40)), (1, 40), config(ratio=0.75))
    assert plan.groups[0].tolist() == [token // 4 for token in range(40)]


@pytest.mark.parametrize("grid", VIDEOS)
def test_a_model_call_draws_the_same(grid):
    ours = config(ratio=0.7, seed=3)
    call = ModelCall(ours, grid, CPU, step=5)
    for layer in range(20):
        plan, other = call.plan(tokens(grid), grid), match_tokens(tokens(grid), grid, ours, step=5, layer=layer)
        assert torch.equal(plan.index, other.index) and torch.equal(plan.groups, other.groups)


@pytest.mark.parametrize("method", ["merge", "merge_queries", "merge_keys", "prune"])
@pytest.mark.parametrize("partition", ["random_2d", "fixed_2d"])
@pytest.mark.parametrize("grid", VIDEOS)
def test_destinations_lie_in_cells_of_a_frame(grid, method, partition):
    """One of each whole cell of each frame, and no two of one cell."""
    plan = match_tokens(tokens(grid), grid, config(method=method, partition=partition, ratio=1.0))
    height, width = min(2, grid[1]), min(2, grid[2])
    cells = grid[0] * (grid[1] // height) * (grid[2] // width)
    assert plan.kept == cells
    index = plan.index[0]
    frame, y, x = index // (grid[1] * grid[2]), index // grid[2] % grid[1], index % grid[2]
    assert len({*zip(frame.tolist(), (y // height).tolist(), (x // width).tolist(), strict=True)}) == cells


@pytest.mark.parametrize("grid", VIDEOS)
def test_downsample_goes_to_the_cell_of_its_own_frame(grid):
    plan = match_tokens(tokens(grid), grid, config(method="downsample", ratio=1.0))
    token = torch.arange(plan.tokens)
    target = plan.index[0][plan.groups[0]]
    frame = token // (grid[1] * grid[2])
    assert torch.equal(target // (grid[1] * grid[2]), frame)
    y, own_y = token // grid[2] % grid[1], target // grid[2] % grid[1]
    x, own_x = token % grid[2], target % grid[2]
    assert ((y - own_y) >= 0).all() and ((x - own_x) >= 0).all()
    assert ((y - own_y) <= 2).all() and ((x - own_x) <= 2).all()


def test_levels_of_a_video():
    assert grid_at((5, 9, 7), 1) == (5, 5, 4)
    assert level_of((5, 5, 4), (5, 9, 7)) == 1 and level_of((5, 9, 7), (5, 9, 7)) == 0


def test_a_grid_of_the_wrong_size():
    with pytest.raises(ValueError, match="a grid of 2x3x4 has 24 tokens, the metric has 72"):
        match_tokens(tokens((3, 4, 6)), (2, 3, 4), config())
