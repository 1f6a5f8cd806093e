"""Attention to keys at three resolutions in Triton's interpreter. Started by test_interpreted_multires.py."""

from __future__ import annotations

import math
import os

import pytest
import torch

from shared_tome import kernels
from shared_tome.core import multires
from shared_tome.core.multires import Counts, cut_tiles, draw_keys, tile_counts

assert os.environ.get("TRITON_INTERPRET") == "1" and kernels.ready()
from support.masks import mask_of

from shared_tome.kernels.impl.multires import Config, launch_attend, launch_choose, launch_multires

CPU = torch.device("cpu")
# For the interpreter, whose time is that of its programs; blocks that fit and that do not.
SMALL = Config(rows=16, keys=16, asking=4, asked=16, held=16, pool=16)
LAYOUTS = {
    "tokens first": lambda x: x,
    "heads first": lambda x: x.contiguous(),
    "channels apart": lambda x: x.mT.contiguous().mT,
}


def made(grid, before, behind, queries, rows, heads, d, dtype):
    tiles = cut_tiles(grid, CPU, before, before + math.prod(grid) + behind, 16, queries)
    generator = torch.Generator().manual_seed(0)
    given = [torch.randn(rows, len(tiles.rows), heads, d, generator=generator) * 2 for _ in range(3)]
    return tiles, *(x.to(dtype).transpose(1, 2) for x in given)


# Odd grids, tokens on both sides, the last query tile shorter, two draws for the batch, channels that fill no block.
@pytest.mark.parametrize(
    ("grid", "before", "behind", "queries", "rows", "heads", "d", "dtype", "counts", "layout"),
    [
        ((7, 10), 3, 23, 32, 1, 1, 24, torch.float16, Counts(4, 1, 2, 2), "heads first"),
        ((2, 4, 6), 0, 0, 16, 2, 1, 16, torch.bfloat16, Counts(1, 1, 1, 1), "tokens first"),
        ((3, 11), 0, 1, 16, 1, 2, 16, torch.float16, Counts(1, 0, 2, 0), "channels apart"),
        ((3, 4), 5, 2, 16, 1, 1, 16, torch.float16, Counts(1, 0, 1, 0), "tokens first"),  # no tile of the image
    ],
)
def test_three_ways(grid, before, behind, queries, rows, heads, d, dtype, counts, layout):
    """The choice as in plain torch; the attention to it as in plain torch, and in float32 from the same numbers."""
    tiles, q, k, v = made(grid, before, behind, queries, rows, heads, d, dtype)
    q, k, v = (LAYOUTS[layout](x) for x in (q, k, v))
    drawn, scale = draw_keys(tiles, torch.arange(rows) + 5, 1), 0.3
    found = multires.scores(q, k, tiles, scale)
    lists = multires.choose(found, tiles, counts)
    if layout == "channels apart":
        got = launch_multires(q, k, v, tiles, drawn, counts, 3, scale, None, SMALL)
    else:
        chosen = launch_choose(q, k, tiles, counts, scale, SMALL)
        # The interpreter cuts bfloat16 off where a GPU rounds, so there the scores reached are compared.
        if dtype == torch.float16:
            assert torch.equal(chosen, lists)
        reached = [
            found.float().clamp_max(99.0).gather(-1, x[..., : counts.whole].long()).sum() for x in (chosen, lists)
        ]
        assert torch.equal(chosen.sort(-1).values, lists.sort(-1).values)
        torch.testing.assert_close(*reached, rtol=0.02, atol=0)
        lists = chosen
        got = launch_attend(q, k, v, tiles, drawn, lists, counts, 3, scale, None, SMALL)
    same = multires.attend(q, k, v, tiles, drawn, lists, counts, 3, scale)
    exact = multires.attend(*(x.float() for x in (q, k, v)), tiles, drawn, lists, counts, 3, scale)
    assert got.shape == q.shape and got.dtype == dtype and got.transpose(1, 2).is_contiguous()
    room = 2 * torch.finfo(dtype).eps * exact.abs().max()
    assert (got.float() - exact).abs().max() < room and (got.float() - same.float()).abs().max() < room


# Odd tails, both kinds of blocks, text on both sides; and the mask that is as every query's, which no launch may read.
@pytest.mark.parametrize(
    ("kind", "grid", "before", "behind", "queries", "rows", "heads", "dtype", "mask_dtype"),
    [
        ("keys, numbers", (7, 10), 3, 23, 32, 2, 1, torch.float16, torch.float16),
        ("keys, seen or not", (4, 12), 21, 0, 16, 1, 2, torch.bfloat16, None),
        ("each query, numbers", (5, 9), 17, 2, 16, 1, 1, torch.float16, torch.bfloat16),
        ("each query, seen or not", (3, 11), 0, 19, 32, 2, 1, torch.float16, None),
        ("one a head, nothing", (4, 9), 5, 1, 16, 2, 2, torch.float16, torch.float32),
    ],
)
def test_a_mask(kind, grid, before, behind, queries, rows, heads, dtype, mask_dtype):
    tiles, q, k, v = made(grid, before, behind, queries, rows, heads, 16, dtype)
    counts, length = tile_counts(tiles, 0.3, 0.4), len(tiles.rows)
    mask = mask_of(kind, rows, heads, length, before, before + math.prod(grid), mask_dtype or torch.float32)
    drawn, scale = draw_keys(tiles, torch.arange(rows) + 5, 1), 0.3
    lists = multires.choose(multires.scores(q, k, tiles, scale), tiles, counts)
    got = launch_attend(q, k, v, tiles, drawn, lists, counts, 3, scale, mask, SMALL)
    exact = multires.attend(*(x.float() for x in (q, k, v)), tiles, drawn, lists, counts, 3, scale, mask)
    assert got.isfinite().all()
    assert (got.float() - exact).abs().max() < 2 * torch.finfo(dtype).eps * exact.abs().max()
    none = launch_attend(q, k, v, tiles, drawn, lists, counts, 3, scale, None, SMALL)
    assert (none.float() - exact).abs().max() > 0.1, "the mask counts"
    if mask.shape[2] == 1:  # alike for all queries in memory, as models expand it
        spread = mask.expand(-1, -1, length, -1)
        for same in (spread, spread.contiguous()):
            assert torch.equal(got, launch_attend(q, k, v, tiles, drawn, lists, counts, 3, scale, same, SMALL))


def test_a_mask_of_zeros_is_none():
    tiles, q, k, v = made((7, 10), 3, 23, 32, 1, 1, 16, torch.float16)
    drawn, counts = draw_keys(tiles, torch.tensor(5), 1), Counts(4, 1, 2, 2)
    apart = torch.zeros(1, 1, 96, 96).mT[:, :, :1]  # its keys do not lie together
    for mask in (torch.zeros(1, 1, 1, 96), apart, torch.ones(1, 1, 1, 96).bool()):
        got = launch_multires(q, k, v, tiles, drawn, counts, 3, 0.3, mask, SMALL)
        expected = launch_multires(q, k, v, tiles, drawn, counts, 3, 0.3, None, SMALL)
        torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-3)


def test_logits_of_any_size():
    """Far below and above what exp takes; the running maximum moves from block to block."""
    tiles, q, k, v = made((4, 12), 0, 0, 16, 1, 1, 16, torch.float16)
    q, k = q * 20, k * 20
    drawn, counts = draw_keys(tiles, torch.tensor(5), 1), Counts(2, 1, 2, 1)
    lists = multires.choose(multires.scores(q, k, tiles, 1.0), tiles, counts)
    got = launch_attend(q, k, v, tiles, drawn, lists, counts, 0, 1.0, None, SMALL)
    exact = multires.attend(*(x.float() for x in (q, k, v)), tiles, drawn, lists, counts, 0, 1.0)
    assert (got.float() - exact).abs().max() < 4e-3 * exact.abs().max()


def test_equal_scores_and_a_batch_that_does_not_fit():
    """Tokens all alike: the first tiles are whole."""
    tiles, q, k, v = made((4, 16), 0, 0, 32, 1, 1, 16, torch.float16)
    chosen = launch_choose(torch.ones_like(q), torch.ones_like(k), tiles, Counts(2, 1, 2, 1), 0.25, SMALL)
    assert chosen[0, 0].tolist() == [[0, 1, 2, 3], [2, 3, 0, 1]]
    drawn = draw_keys(tiles, torch.arange(2), 0)
    with pytest.raises(ValueError, match="a plan for 2 rows does not fit a batch of 1"):
        launch_attend(q, k, v, tiles, drawn, chosen, Counts(2, 1, 2, 1), 0, 0.25, None, SMALL)


def test_what_the_launches_take(monkeypatch):
    takes = kernels.attends_multires
    tiles, q, k, v = made((4, 8), 0, 3, 16, 1, 1, 16, torch.float16)
    assert takes(q, k, v, tiles)
    assert not takes(*(x.float() for x in (q, k, v)), tiles)
    assert not takes(q, k[:, :, 1:], v[:, :, 1:], tiles) and not takes(q, k, v.bfloat16(), tiles)
    assert not takes(*(x.repeat(1, 1, 1, 17) for x in (q, k, v)), tiles)  # 272 channels
    assert not takes(*made((3, 4), 5, 2, 16, 1, 1, 16, torch.float16)[1:], tiles)  # of another length
    none = cut_tiles((3, 4), CPU, 0, 35, 16, 16)
    assert not takes(q, k, v, none)  # no tile of the image
    for name, most in (("_MOST_TILES", 1), ("_FARTHEST", 35 * q.stride(2))):
        with monkeypatch.context() as patch:
            patch.setattr(kernels.heads, name, most)
            assert not takes(q, k, v, tiles)


def test_where_it_fails_sample_is_taken(monkeypatch):
    """By a card with too little shared memory, for one: plain torch would be slower than the whole attention."""
    ops = kernels.switch.load()
    monkeypatch.setattr(ops, "_broken", {("multires", CPU)})
    tiles, q, k, v = made((7, 10), 3, 23, 32, 1, 1, 24, torch.float16)
    assert not kernels.attends_multires(q, k, v, tiles)
    monkeypatch.setattr(ops, "_broken", set())
    assert kernels.attends_multires(q, k, v, tiles)


@pytest.mark.parametrize("rows", [1, 2])
def test_the_front_door_is_the_launches(rows, monkeypatch):
    """And so is the operator that traced code meets; the fake for tracing has their shape and strides."""
    tiles, q, k, v = made((7, 10), 3, 23, 32, rows, 2, 24, torch.float16)
    drawn, counts = draw_keys(tiles, torch.arange(rows) + 5, 1), Counts(4, 1, 2, 2)
    got = kernels.attend_multires(q, k, v, tiles, drawn, counts, 3, 0.3)
    assert torch.equal(got, launch_multires(q, k, v, tiles, drawn, counts, 3, 0.3))
    fake = kernels.switch.load()._fake_attend(q)
    assert (fake.shape, fake.stride(), fake.dtype) == (got.shape, got.stride(), got.dtype)
    mask = torch.linspace(-1.0, 1.0, q.shape[2]).expand(1, 1, 1, -1)
    masked = kernels.attend_multires(q, k, v, tiles, drawn, counts, 3, 0.3, mask)
    with monkeypatch.context() as patch:
        for module in (kernels.heads, kernels.switch):
            patch.setattr(module, "is_compiling", lambda: True)
        assert torch.equal(got, kernels.attend_multires(q, k, v, tiles, drawn, counts, 3, 0.3))
        assert torch.equal(masked, kernels.attend_multires(q, k, v, tiles, drawn, counts, 3, 0.3, mask))
    assert not torch.equal(got, masked)
    with kernels.use("reference"):
        plain = kernels.attend_multires(q, k, v, tiles, drawn, counts, 3, 0.3)
    torch.testing.assert_close(got, plain, rtol=0, atol=4e-3)
