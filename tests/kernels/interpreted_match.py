"""Drawing, splitting, matching and averaging in Triton's interpreter. Started by test_interpreted_match.py."""

from __future__ import annotations

import os

import pytest
import torch

from shared_tome import kernels
from shared_tome.core import matching
from shared_tome.core.curve import curve_order
from shared_tome.core.groups import group_counts, group_sum, take
from shared_tome.core.noise import key
from shared_tome.core.partition import partition
from shared_tome.core.sampling import draw, kept_count

assert os.environ.get("TRITON_INTERPRET") == "1" and kernels.ready()
from shared_tome.kernels.impl.match import launch_match
from shared_tome.kernels.impl.mean import chains_like
from shared_tome.kernels.impl.nearest import Config, launch_nearest

from .interpreted import CONFIG, DTYPES, assert_sizes, members, seeds, select, tokens


@pytest.fixture(autouse=True)
def nothing_fell_back():
    yield
    assert not kernels.switch.load()._broken


def in_torch(similarity, target, src, dst, goes):
    """As `select`, by the specification."""
    return matching.grouped(similarity, target, src, dst, goes, True)


# The interpreter takes seconds for a few programs, so not every case meets every other: each two of its parts do once.
STEPS = (torch.tensor(2**33 + 1), 5, torch.tensor(-3))


@pytest.mark.parametrize(
    ("grid", "ratio", "rows"),
    [
        ((7, 9), 0.75, 3),
        ((16, 16), 0.75, 0),
        ((7, 9), 0.4, 0),
        ((1, 64), 0.99, 0),
        ((16, 16), 0.93, 0),
        ((7, 9), 0.1, 0),
    ],
)
def test_draw_is_equal_bit_for_bit(grid, ratio, rows):
    count = grid[0] * grid[1]
    kept = kept_count(count, int(count * ratio))
    order, seed = curve_order(grid, torch.device("cpu")), seeds(rows)
    for step in STEPS if grid == (7, 9) else STEPS[:1]:
        expected = draw(order, kept, seed, step, 2, 3)
        assert torch.equal(kernels.draw(order, kept, seed, step, 2, 3), expected)


@pytest.mark.parametrize("name", ["random_2d", "fixed_2d"])
@pytest.mark.parametrize(
    ("grid", "stride", "rows"),
    [((7, 9), (2, 2), 3), ((16, 16), (2, 2), 0), ((7, 9), (3, 2), 0), ((1, 64), (2, 2), 0), ((2, 5, 6), (8, 2), 2)],
)
def test_split_is_equal_bit_for_bit(grid, stride, name, rows):
    config = CONFIG.replace(stride=stride, partition=name)
    steps = STEPS[:2] if grid == (7, 9) else STEPS[:1] if name == "random_2d" else STEPS[1:2]
    for step in steps:
        got = kernels.split(grid, config, seeds(rows), step, 2, 1)[0]
        expected = partition(grid, config, key(seeds(rows), step, 2, 1))
        assert all(torch.equal(a, b.expand_as(a)) for a, b in zip(got, expected, strict=True))
        for place, ahead in enumerate(kernels.split(grid, config, seeds(rows), step, 1, 2)):
            expected = partition(grid, config, key(seeds(rows), step, 1 + place, 1))
            assert all(torch.equal(a, b.expand_as(a)) for a, b in zip(ahead, expected, strict=True))


# Tiles that do not divide the counts, one program for the dst or several.
WAYS = [None, Config(16, 16, 16, 4, 2), Config(16, 16, 32, 4, 2, 1), Config(32, 16, 16, 4, 2, 4)]


@pytest.mark.parametrize("way", range(len(WAYS)))
@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
def test_nearest_three_ways(dtype, way):
    turn = (DTYPES.index(dtype) + way) % 2
    grid, batch, channels = (((7, 9), 3, 40), ((1, 64), 1, 16))[turn]
    x = tokens(batch, grid, channels, dtype)
    src, dst = partition(grid, CONFIG, key(seeds(batch), 0, 0, 1))
    unit = x.double() / x.double().norm(dim=-1, keepdim=True).clamp_min(1e-30)
    scores = take(unit, src) @ take(unit, dst).transpose(1, 2)
    best = scores.amax(-1)

    def errors(made):
        similarity, target = made
        reached = scores.gather(2, target[..., None])[..., 0]
        return float((best - reached).max()), float((similarity.double() - best).abs().max())

    got = launch_nearest(x, src, dst, 0, WAYS[way])
    assert got[0].dtype == dtype and got[0].isfinite().all()
    missed, off = errors(got)
    _, off_in_torch = errors(matching.nearest(x, src, dst))
    cut = 2 if dtype == torch.bfloat16 else 1
    assert missed <= 2 * cut * off_in_torch + 1e-6 and off <= 2 * cut * off_in_torch + 1e-6
    spared = launch_nearest(x, src, dst, 1, WAYS[way])[1]
    assert spared.min() >= 1 and spared.max() < dst.shape[1]


def test_of_equal_similarities_the_first():
    x = torch.ones(2, 63, 16, dtype=torch.float16)
    src, dst = partition((7, 9), CONFIG, key(seeds(0), 0, 0, 1))
    for way in WAYS:
        assert not launch_nearest(x, src, dst, 0, way)[1].any()


@pytest.mark.parametrize(
    ("grid", "batch", "dtype"), [*(((7, 9), 2, dtype) for dtype in DTYPES), ((16, 16), 1, torch.float32)]
)
def test_select_links_mean_gather(grid, batch, dtype):
    x = tokens(batch, grid, 40, dtype)
    src, dst = partition(grid, CONFIG, key(seeds(0), 0, 0, 1))
    similarity, target = matching.nearest(x.float(), src, dst)
    similarity = similarity.to(dtype)
    for goes in (1, 20, src.shape[1] - 1)[len(src[0]) > 100 :]:
        index, groups = select(similarity, target, src, dst, goes)
        stay = src.shape[1] - goes
        place = torch.searchsorted(src[0], index[:, :stay].contiguous())
        assert (place.diff(dim=1) > 0).all() and torch.equal(index[:, stay:], dst.expand(batch, -1))
        kept_here = similarity.gather(1, place).sort(1).values
        assert torch.equal(kept_here, similarity.topk(stay, largest=False).values.sort(1).values)
        if dtype == torch.float32:  # no ties
            expected = matching.grouped(similarity, target, src, dst, goes, True)
            assert torch.equal(index, expected[0]) and torch.equal(groups, expected[1])
        kept = index.shape[1]
        chain, sizes = kernels.links(index, groups), group_counts(groups, kept)
        assert torch.equal(kernels.group_sizes(groups, index.shape[1], chain), sizes)
        got, bias = kernels.mean(x, index, groups, None, chain)
        torch.testing.assert_close(bias, sizes.log(), rtol=1e-6, atol=1e-7)
        spread = groups[..., None].expand(-1, -1, 40)
        exact = torch.zeros(batch, kept, 40, dtype=torch.float64).scatter_add_(1, spread, x.double())
        exact /= sizes[..., None].double()
        plain = (group_sum(x, groups, kept) / sizes[..., None]).to(dtype)
        cut = 4 if dtype == torch.bfloat16 else 1.01
        assert (got.double() - exact).abs().max() <= cut * (plain.double() - exact).abs().max() + 5e-7
        assert torch.equal(got[sizes == 1], take(x, index)[sizes == 1])
        assert torch.equal(kernels.take(got, groups), got.gather(1, groups[..., None].expand(-1, -1, 40)))


# One tile of src and dst, and several that do not divide the counts.
TILES = [(512, 512, 16384, 16), (16, 8, 32, 1)]


@pytest.mark.parametrize(
    ("grid", "batch", "rows", "dtype", "tiles"),
    [
        ((7, 9), 2, 0, torch.float16, TILES[0]),
        ((7, 9), 2, 0, torch.bfloat16, TILES[1]),
        ((8, 9), 2, 2, torch.bfloat16, TILES[0]),
        ((8, 9), 2, 2, torch.float16, TILES[1]),
        ((2, 2), 1, 0, torch.float16, TILES[0]),
        ((2, 2), 1, 0, torch.bfloat16, TILES[1]),
    ],
)
def test_match_is_what_it_joins(grid, batch, rows, dtype, tiles):
    """nearest, select and links one after the other give the same, bit for bit; where similarities tie, too."""
    for x in (tokens(batch, grid, 24, dtype), torch.ones(batch, grid[0] * grid[1], 16, dtype=dtype)):
        src, dst = partition(grid, CONFIG, key(seeds(rows), 0, 0, 1))
        for way in WAYS[3:] if tiles == TILES[1] else WAYS[:1]:
            similarity, target = launch_nearest(x, src, dst, 0, way)
            count = src.shape[1]
            for goes in (1, count) if count < 8 else (count // 3, count):
                index, groups, *chain = launch_match(x, src, dst, goes, 0, 0, way, tiles)
                expected = (select if goes < count else in_torch)(similarity, target, src, dst, goes)
                assert torch.equal(index, expected[0]) and torch.equal(groups, expected[1])
                assert_sizes(index, groups, chain)
                for place in range(index.shape[1]):
                    others = (groups[-1] == place).nonzero()[:, 0].tolist()
                    others.remove(int(index[-1, place]))
                    assert members(chain, index.shape[1], -1, place) == others


@pytest.mark.parametrize("tiles", TILES, ids=str)
@pytest.mark.parametrize("distill", [0, 1])
def test_match_spares_protected_tokens(tiles, distill):
    x = tokens(2, (1, 51), 16, torch.float16)
    src, dst = partition((1, 51), CONFIG.replace(partition="alternate"), key(seeds(0), 0, 0, 1))
    similarity, target = launch_nearest(x, src, dst, distill)
    similarity[:, 0] = -torch.inf
    for goes in (1, 12, 25):
        index, groups, *chain = launch_match(x, src, dst, goes, 1, distill, None, tiles)
        expected = select(similarity, target, src, dst, goes)
        if distill:
            expected = matching.distill_second(*expected, src.shape[1] - goes)
            assert (index[:, 1] == 1).all() and (kernels.group_sizes(groups, index.shape[1], chain)[:, 1] == 1).all()
        assert torch.equal(index, expected[0]) and torch.equal(groups, expected[1])
        assert (index[:, 0] == 0).all() and (kernels.group_sizes(groups, index.shape[1], chain)[:, 0] == 1).all()
        assert_sizes(index, groups, chain)
        joined = [i for i in range(51) if int(index[1, groups[1, i]]) != i]
        assert all(i in members(chain, index.shape[1], 1, int(groups[1, i])) for i in joined)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_match_of_many_src_in_one_launch(dtype):
    """More than `select` holds; similarities that repeat often, so that many tie at the edge."""
    from shared_tome.kernels.impl.match import launch_grouped
    from shared_tome.kernels.impl.nearest import COARSE, TALLY

    torch.manual_seed(0)
    count, dst_count, rows = 9000, 3000, 2
    similarity = torch.randn(rows, count).to(dtype)
    similarity[:, ::7] = 0.5
    target = torch.randint(dst_count, (rows, count))
    src, dst = torch.randperm(count + dst_count)[None].split((count, dst_count), dim=1)
    code = similarity.view(torch.int16).long() & 0xFFFF
    code = torch.where(code >= 0x8000, 0xFFFF - code, code + 0x8000)
    for goes in (10, 3000, 8990) if dtype == torch.float16 else (3000,):
        tally = torch.zeros(rows, TALLY, dtype=torch.int64)
        tally.scatter_add_(1, code >> 8, torch.ones_like(code)).scatter_add_(1, code + COARSE, torch.ones_like(code))
        heads = torch.zeros(chains_like(rows, count - goes + dst_count, dst_count), dtype=torch.int32)
        index, groups, _ = launch_grouped(similarity, target, src, dst, goes, tally.int(), heads)
        stays = torch.zeros(rows, count, dtype=torch.bool)
        order = code.argsort(dim=1, stable=True)[:, : count - goes]
        stays.scatter_(1, order, True)
        for row in range(rows):
            assert torch.equal(index[row], torch.cat((src[0, stays[row]], dst[0])))
            goal = groups[row, src[0, ~stays[row]]] - (count - goes)
            assert torch.equal(goal, target[row, ~stays[row]])
        assert_sizes(index, groups, (heads, None))
