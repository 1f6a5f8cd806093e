"""Video (frames x patches) and sound (frequency x time) as grids of match_tokens: near tokens merge, in any order."""

from __future__ import annotations

import math
import re
import runpy
from pathlib import Path

import pytest
import torch

from shared_tome import ToMeConfig, match_tokens

PAGE = Path(__file__).resolve().parents[2] / "docs" / "vit.md"
VIDEOS = [(3, 4, 6), (2, 5, 7), (8, 4, 4)]
SOUNDS = [(8, 12), (12, 31), (1, 40)]


def config(**options):
    return ToMeConfig(**{"method": "merge", "ratio": 0.5, "min_tokens": 0, **options})


def places(grid):
    """Each token's coordinates [N, axes], the last axis fastest."""
    return torch.stack(torch.meshgrid(*map(torch.arange, grid), indexing="ij"), dim=-1).reshape(-1, len(grid))


def features(grid):
    """Tokens [1, N, C] that are the more alike the nearer they are: each axis is an angle."""
    angle = places(grid).double() * math.pi / (2 * max(grid))
    return torch.cat((angle.cos(), angle.sin()), dim=1)[None]


@pytest.mark.parametrize("partition", ["random_2d", "fixed_2d", "random", "alternate"])
@pytest.mark.parametrize("grid", VIDEOS + SOUNDS, ids=str)
def test_every_merged_token_goes_to_its_nearest_destination(grid, partition):
    metric = features(grid)
    plan = match_tokens(metric, grid, config(partition=partition), seed=3)
    where, index, groups = places(grid), plan.index[0], plan.groups[0]
    dst = torch.tensor(sorted({int(i) for i in index.tolist() if (groups == groups[i]).sum() > 1}))
    assert len(dst) > 0 and plan.kept < math.prod(grid)
    alone = metric[0] @ metric[0].T
    for token in range(math.prod(grid)):
        own = int(index[groups[token]])
        if own == token:
            continue
        # No destination at all is nearer than the one it went to.
        others = [int(i) for i in dst if int(i) != token]
        assert alone[token, own] >= max(float(alone[token, i]) for i in others) - 1e-12
        assert (where[token] - where[own]).abs().max() <= max(2, 4 * (partition == "random"))


@pytest.mark.parametrize("partition", ["random_2d", "fixed_2d"])
def test_each_frame_has_a_destination_in_each_cell(partition):
    grid = (3, 4, 6)
    plan = match_tokens(features(grid), grid, config(partition=partition, ratio=0.75), seed=1)
    cells = {(int(t), int(y) // 2, int(x) // 2) for t, y, x in places(grid)[plan.index[0]]}
    assert plan.kept == 3 * 2 * 3 and len(cells) == plan.kept


def test_what_stands_still_merges_over_time_and_what_moves_does_not():
    """A bright patch wanders over four flat quarters: no quarter's token and no frame of it is mixed with another."""
    frames, height, width = 4, 6, 6
    grid = (frames, height, width)
    where = places(grid)
    quarter = (where[:, 1] >= 3).long() * 2 + (where[:, 2] >= 3).long()
    film = torch.nn.functional.one_hot(quarter, 6).double()
    film += 0.01 * torch.randn(film.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    bright = [t * 36 + (1 + t) * 6 + 1 + t for t in range(frames)]
    for t, token in enumerate(bright):
        film[token] = 0
        film[token, 4 + t % 2] = 1.0 if t < 2 else -1.0  # unlike any other, the other frames' ones included
    plan = match_tokens(film[None], grid, config(partition="fixed_2d", ratio=0.6))
    groups = plan.groups[0]
    over_time = 0
    for number in range(plan.kept):
        members = (groups == number).nonzero().flatten()
        assert quarter[members].unique().numel() == 1 or set(members.tolist()) & set(bright)
        over_time += where[members, 0].unique().numel() > 1
    assert over_time > 0, "the same quarter of other frames is as near as that of the own one"
    assert all((groups == groups[token]).sum() == 1 for token in bright)


@pytest.mark.parametrize("order", ["frequency first", "time first"])
def test_steady_tones_merge_over_time_and_never_over_frequency(order):
    frequencies, times = 6, 16
    tones = torch.eye(frequencies, dtype=torch.float64)  # each frequency has a timbre of its own
    if order == "frequency first":  # as AST's patches come: the row is a frequency
        grid, stride, metric = (frequencies, times), (4, 1), tones.repeat_interleave(times, dim=0)
    else:
        grid, stride, metric = (times, frequencies), (1, 4), tones.repeat(times, 1)
    plan = match_tokens(metric[None], grid, config(partition="fixed_2d", stride=stride, ratio=0.75))
    where = places(grid)[:, 0 if order == "frequency first" else 1]
    assert plan.kept == frequencies * times // 4
    for number in range(plan.kept):
        assert where[plan.groups[0] == number].unique().numel() == 1
    merged = plan.merge(metric[None])
    torch.testing.assert_close(plan.unmerge(merged), metric[None])


def test_the_example_of_the_page_runs(tmp_path):
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    example = next(block for block in blocks if "match_tokens" in block)
    file = tmp_path / "example.py"
    file.write_text(example, encoding="utf-8")
    names = runpy.run_path(str(file))
    assert names["clip"].kept == 4 * 7 * 7 and names["sound"].kept == 12 * 25
