"""Attention to keys at three resolutions: what is promised, and the same keys and weights in float64."""

from __future__ import annotations

import math

import pytest
import torch
from support.masks import KINDS, mask_of

from shared_tome.core.curve import curve_order
from shared_tome.core.multires import (
    FRONTIER,
    HALF,
    QUARTER,
    Counts,
    attend,
    attend_multires,
    choose,
    cut_tiles,
    draw_keys,
    key_places,
    key_weights,
    scores,
    shares,
    tile_counts,
    work,
)
from shared_tome.core.sampling import draw

CPU = torch.device("cpu")
# grid, tokens before the image, tokens behind it, tokens of a tile, of a query tile.
CASES = {
    "picture": ((16, 16), 0, 0, 16, 16),
    "odd picture behind text": ((13, 11), 7, 0, 16, 32),
    "text behind and references beside": ((12, 20), 5, 40, 16, 64),
    "large tiles": ((17, 20), 3, 70, 64, 128),
    "video": ((5, 6, 9), 0, 0, 16, 16),
    "sound": ((1, 150), 0, 2, 16, 16),
    "less than a tile": ((3, 3), 4, 30, 16, 16),
    "one tile in a large query tile": ((4, 5), 0, 9, 16, 64),
}


@pytest.fixture(params=list(CASES))
def tiles(request):
    grid, before, behind, size, queries = CASES[request.param]
    return cut_tiles(grid, CPU, before, before + math.prod(grid) + behind, size, queries)


def heads(tiles, rows=2, count=5, d=8, seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    return [(1.5 * torch.randn(rows, count, len(tiles.rows), d, generator=generator)).to(dtype) for _ in range(3)]


def some_counts(tiles):
    return tile_counts(tiles, 0.2, 0.4, (0.5, 0.25))


def in_float64(q, k, v, tiles, drawn, lists, counts, layer, scale, mask=None):
    """One query after the other over all L keys, where a key that is not there has no weight."""
    batch, count, length, _ = q.shape
    added = torch.zeros(1, dtype=torch.float64) if mask is None else mask
    if added.dtype == torch.bool:
        added = torch.zeros(added.shape).masked_fill(~added, -torch.inf)
    added = added.double().expand(batch, count, length, length)
    out = torch.empty(q.shape, dtype=torch.float64)
    order = tiles.rows.tolist()
    for row in range(batch):
        for head in range(count):
            for ask in range(tiles.query_tiles):
                weight = torch.zeros(length, dtype=torch.float64)
                weight[order[tiles.count * tiles.size :]] = 1.0
                whole, half = counts[:2] if (ask + 1) * tiles.queries <= tiles.image * tiles.size else counts[2:]
                for at, tile in enumerate(lists[row, head, ask].tolist()):
                    if at < whole:
                        weight[order[tile * tiles.size : (tile + 1) * tiles.size]] = 1.0
                        continue
                    run, table = (HALF, drawn.half) if at < whole + half else (QUARTER, drawn.quarter)
                    keys = tiles.size // run
                    mine = table[(head + layer) % run, row % table.shape[1]]
                    weight[mine[tile * keys : (tile + 1) * keys].long()] = run
                assert weight.sum() == length  # every token is stood for, once
                asking = order[ask * tiles.queries : (ask + 1) * tiles.queries]
                logits = q[row, head, asking].double() @ k[row, head].double().T * scale + weight.log()
                logits = logits + added[row, head, asking]
                unseen = logits.amax(-1, keepdim=True) < -1e30  # a query that sees nothing sees all that is there
                logits = torch.where(unseen, torch.where(weight > 0, 0.0, -torch.inf), logits)
                out[row, head, asking] = logits.softmax(-1) @ v[row, head].double()
    return out


def test_attends_to_the_keys_and_weights_that_it_says(tiles):
    q, k, v = heads(tiles)
    counts, seeds = some_counts(tiles), torch.tensor([3, 4])
    drawn, scale = draw_keys(tiles, seeds, 2), 0.4
    lists = choose(scores(q, k, tiles, scale), tiles, counts)
    expected = in_float64(q, k, v, tiles, drawn, lists, counts, 3, scale)
    got = attend(q, k, v, tiles, drawn, lists, counts, 3, scale)
    assert (got - expected).abs().max() < 16 * torch.finfo(torch.float32).eps * expected.abs().max()
    assert torch.equal(got, attend_multires(q, k, v, tiles, drawn, counts, 3, scale))
    half = attend_multires(*(x.half() for x in (q, k, v)), tiles, drawn, counts, 3, scale)
    assert half.dtype == torch.float16 and half.shape == q.shape


@pytest.mark.parametrize("kind", KINDS)
def test_a_mask_is_added_to_the_logits_of_the_keys_that_are_there(tiles, kind):
    q, k, v = heads(tiles, count=3)
    counts, image = some_counts(tiles), tiles.rows[: tiles.image * tiles.size]
    start = int(image.min()) if tiles.image else 0
    mask = mask_of(kind, 2, 3, len(tiles.rows), start, start + len(image))
    drawn, scale = draw_keys(tiles, torch.tensor([3, 4]), 2), 0.4
    lists = choose(scores(q, k, tiles, scale), tiles, counts)
    expected = in_float64(q, k, v, tiles, drawn, lists, counts, 3, scale, mask)
    got = attend(q, k, v, tiles, drawn, lists, counts, 3, scale, mask)
    assert got.isfinite().all()
    assert (got - expected).abs().max() < 16 * torch.finfo(torch.float32).eps * expected.abs().max()
    assert torch.equal(got, attend_multires(q, k, v, tiles, drawn, counts, 3, scale, mask))
    spread = mask.expand(-1, -1, len(tiles.rows), -1)
    assert torch.equal(got, attend(q, k, v, tiles, drawn, lists, counts, 3, scale, spread.contiguous()))


def test_weights_add_up_to_the_tokens_and_keys_are_tokens_once(tiles):
    counts = some_counts(tiles)
    drawn = draw_keys(tiles, torch.tensor(3), 0)
    q, k, _ = heads(tiles, 1, 2)
    lists = choose(scores(q, k, tiles, 0.4), tiles, counts)
    for whole, half in (counts[:2], counts[2:]):
        weights = key_weights(tiles, whole, half, CPU)
        assert weights.sum() == len(tiles.rows) and set(weights.tolist()) <= {1.0, 4.0, 16.0}
        places = key_places(tiles, drawn, lists[:, :, 0], whole, half, 1)
        assert places.shape == (1, 2, len(weights))
        assert all(len(set(row.tolist())) == len(row) for row in places[0])


def test_all_whole_is_attention(tiles):
    q, k, v = heads(tiles)
    drawn = draw_keys(tiles, torch.tensor(3), 0)
    everything = tile_counts(tiles, *shares(0.0))
    got = attend_multires(q, k, v, tiles, drawn, everything)
    torch.testing.assert_close(got, torch.nn.functional.scaled_dot_product_attention(q, k, v))


def test_what_is_always_whole(tiles):
    """A query tile's own tiles, and all that is no tile of the image; as many tiles as were asked for beside."""
    q, k, _ = heads(tiles)
    counts = tile_counts(tiles, 0.0, 0.3, (0.0, 0.0))
    own = min(tiles.image, tiles.queries // tiles.size)
    assert counts.whole == counts.beside_whole == tiles.count - tiles.image + own and counts.beside_half == 0
    lists = choose(scores(q, k, tiles, 0.4), tiles, counts)
    assert lists.shape == (2, 5, tiles.query_tiles, tiles.count) and lists.dtype == torch.int16
    for ask in range(tiles.query_tiles):
        mine = {x for x in range(tiles.image) if x * tiles.size // tiles.queries == ask}
        for row in lists[:, :, ask].reshape(-1, tiles.count).tolist():
            assert mine | set(range(tiles.image, tiles.count)) <= set(row[: counts.whole])
            assert sorted(row) == list(range(tiles.count))


def test_tiles_are_squares_of_the_picture_and_of_two_frames():
    for grid, size, extent in (((32, 32), 64, (1, 8, 8)), ((16, 8), 16, (1, 4, 4)), ((4, 16, 16), 64, (2, 8, 4))):
        tiles = cut_tiles(grid, CPU, 0, None, size, size)
        frames, height, width = (1, *grid)[-3:]
        at = tiles.rows.view(-1, size)
        sides = [x.amax(1) - x.amin(1) + 1 for x in (at // (height * width), at // width % height, at % width)]
        assert torch.stack(sides, 1).prod(1).eq(size).all()
        assert sorted(sides[1:], key=lambda x: -x[0])[0].max() <= max(extent)


def test_the_greatest_scores_are_whole():
    tiles = cut_tiles((16, 16), CPU, 0, None, 16, 16)
    found = torch.zeros(1, 1, 16, 16)
    found[..., 5], found[..., 9], found[..., 2] = 3.0, 2.0, 1.0
    found[torch.arange(1), :, torch.arange(16), torch.arange(16)] = torch.inf
    lists = choose(found, tiles, Counts(2, 2, 2, 2))
    assert lists[0, 0, 0].tolist() == [0, 5, 2, 9, *(x for x in range(16) if x not in (0, 5, 2, 9))]
    assert lists[0, 0, 5, :2].tolist() == [5, 9]
    # Of equal ones the first; a difference of less than a step is none, and beyond the last step there is none either.
    found[..., :6], found[..., 0], found[..., 8], found[..., 9] = -100.0, -200.0, 3.0, 3.0 + 2**-8
    assert choose(found, tiles, Counts(2, 0, 2, 0))[0, 0, 7, :2].tolist() == [7, 8]
    assert 0 in choose(found, tiles, Counts(11, 0, 11, 0))[0, 0, 7, :11].tolist()


def test_a_tile_that_a_query_looks_at_is_chosen():
    """One key like the queries of one tile, far away from it, in one head alone."""
    tiles = cut_tiles((16, 16), CPU, 0, None, 16, 16)
    q, k, _ = (x[:1, :2] for x in heads(tiles))
    q, k = q * 0.1, k * 0.1
    asking, asked = (tiles.rows[at * 16 : at * 16 + 16].long() for at in (3, 12))
    q[0, 1, asking], k[0, 1, asked[:4]] = 4.0, 4.0
    lists = choose(scores(q, k, tiles, 0.35), tiles, Counts(2, 0, 2, 0))
    assert lists[0, 1, 3, :2].tolist() == [3, 12]


def test_draws_are_those_of_sample(tiles):
    seeds = torch.tensor([3, 2**40 + 1])
    drawn = draw_keys(tiles, seeds, torch.tensor(5))
    order = tiles.rows[: tiles.image * tiles.size].long()
    if not len(order):
        assert drawn.half.shape == (4, 2, 0) and drawn.quarter.shape == (16, 2, 0)
        return
    for run, table in ((HALF, drawn.half), (QUARTER, drawn.quarter)):
        kept = len(order) // run
        expected = draw(order, kept, seeds, 5, 0, run)
        assert torch.equal(table.long(), expected)
        # All tokens of a cell, one after the other.
        assert torch.equal(table.sort(0).values[:, 0].T.flatten().sort().values, order.sort().values.int())
    assert torch.equal(drawn.table[: len(tiles.rows)], tiles.rows)


def test_seed_step_layer_and_head_draw_other_tokens():
    tiles = cut_tiles((16, 16), CPU, 0, None, 16, 16)
    q, k, v = heads(tiles, rows=1)
    q, k, v = (x[:, :1].expand(-1, 5, -1, -1) for x in (q, k, v))  # heads alike but for their draws
    counts = tile_counts(tiles, 0.1, 0.3)

    def run(seed=1, step=0, layer=0):
        return attend_multires(q, k, v, tiles, draw_keys(tiles, torch.tensor(seed), step), counts, layer)

    first = run()
    assert torch.equal(first, run())
    for other in (run(seed=2), run(step=1), run(layer=1)):
        assert not torch.allclose(first, other, atol=1e-3)
    assert not torch.allclose(first[:, 0], first[:, 1], atol=1e-3)
    # The walk: the next layer now is this layer in the next step, and head 1 here.
    torch.testing.assert_close(run(layer=1), run(step=1))
    torch.testing.assert_close(run(layer=1)[:, 0], first[:, 1])


@pytest.mark.parametrize("ratio", [0.0, 0.3, 0.5, 0.66, 0.77, 0.84, 0.9, 0.9375])
def test_shares_leave_the_work_that_was_asked_for(ratio):
    whole, half = shares(ratio)
    assert work(whole, half) == pytest.approx(1 - ratio) and whole + half <= 1 + 1e-9
    assert min(whole, half) >= 0


def test_shares_are_the_measured_ones():
    for row in FRONTIER:
        assert shares(1 - work(*row)) == pytest.approx(row)
    assert shares(1.0) == shares(0.95) == (0.0, 0.0)
    assert [work(*row) for row in FRONTIER] == sorted(work(*row) for row in FRONTIER)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: shares(1.2), "ratio must be from 0 to 1, got 1.2"),
        (lambda: cut_tiles((4, 4), CPU, size=32), "a tile has 16 or 64 tokens, got 32"),
        (lambda: cut_tiles((4, 4), CPU, queries=96), "a query tile must have a multiple of 64 tokens, got 96"),
        (lambda: cut_tiles((4, 4), CPU, 3, 18), "an image of 16 tokens from 3 on does not fit into a row of 18"),
        (
            lambda: tile_counts(cut_tiles((8, 8), CPU), 0.7, 0.4),
            "whole and half must be shares that add up to 1 at most, got 0.7 and 0.4",
        ),
    ],
)
def test_errors_name_the_value(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_rows_hold_the_image_first():
    tiles = cut_tiles((6, 7), CPU, 5, 50, 16, 32)
    assert tiles.image == 2 and tiles.count == 3 and tiles.query_tiles == 2 and tiles.image_query_tiles == 1
    assert torch.equal(tiles.rows[:42], curve_order((6, 7), CPU).int() + 5)
    assert tiles.rows[42:].tolist() == [0, 1, 2, 3, 4, 47, 48, 49]


def test_the_global_generator_is_untouched():
    tiles = cut_tiles((16, 16), CPU, 0, None, 16, 16)
    before = torch.get_rng_state()
    q, k, v = heads(tiles)
    attend_multires(q, k, v, tiles, draw_keys(tiles, torch.tensor(1), 0), some_counts(tiles))
    assert torch.equal(before, torch.get_rng_state())
