"""Sparse attention as others do it, and that the lab measures what a variant's name says."""

from __future__ import annotations

import math

import pytest
import torch

from lab.fidelity import tails
from lab.fidelity.hooks import MergedSelfAttention, Run
from lab.fidelity.methods import CATALOGUE, WORKS, Variant
from lab.models.unet import CrossAttention
from shared_tome import ToMeConfig
from shared_tome.merging.plan import MultiresPlan

GRID, TEXT, D = (8, 12), 5, 8


def heads():
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(2, 2, TEXT + 96, D, generator=generator, dtype=torch.float64) for _ in range(3)]


def slow(q, k, v, work, mode):
    """Query by query, from the words of tails.py."""
    tiles = tails.cut_tiles(GRID, q.device, TEXT, TEXT + 96, 16, 16)
    rows = tiles.rows[:96].long().view(6, 16)
    kept = max(1, round(tails.whole_share(work, mode) * 6))
    out = torch.nn.functional.scaled_dot_product_attention(q, k, v)
    for batch in range(2):
        for head in range(2):
            means = [x[batch, head][rows].float().mean(1).double() for x in (q, k, v)]
            for place in range(6):
                score = means[1] @ means[0][place]
                score[place] = torch.inf
                whole = score.topk(kept).indices.tolist()
                keys, values = [k[batch, head, :TEXT]], [v[batch, head, :TEXT]]
                weights = [torch.zeros(TEXT)]
                for tile in range(6):
                    if tile in whole:
                        keys.append(k[batch, head, rows[tile]])
                        values.append(v[batch, head, rows[tile]])
                        weights.append(torch.zeros(16))
                    elif mode == "mean":
                        keys.append(means[1][tile][None])
                        values.append(means[2][tile][None])
                        weights.append(torch.full((1,), math.log(16)))
                logits = q[batch, head, rows[place]] @ torch.cat(keys).T * D**-0.5 + torch.cat(weights)
                out[batch, head, rows[place]] = logits.softmax(-1) @ torch.cat(values)
    return out


@pytest.mark.parametrize("mode", tails.MODES)
@pytest.mark.parametrize("work", [0.2, 0.5, 1.0])
def test_against_its_words(mode, work):
    given = heads()
    got = tails.attend_tails(*given, TEXT, GRID, work, mode)
    torch.testing.assert_close(got, slow(*given, work, mode), rtol=1e-4, atol=1e-5)


def test_shares():
    assert tails.whole_share(0.25, "drop") == 0.25 and tails.whole_share(1.0, "mean") == 1.0
    assert tails.whole_share(0.25, "mean") * 16 + (1 - tails.whole_share(0.25, "mean")) == pytest.approx(0.25 * 16)
    with pytest.raises(ValueError, match="mode must be one of mean, drop, got 'x'"):
        tails.whole_share(0.5, "x")


def test_each_work_has_its_rivals():
    names = CATALOGUE.sets["multires"]
    for work in WORKS:
        ratio = f"{1 - work:g}"
        assert {f"multires {ratio}", f"mean tail {ratio}"} <= set(names)
        assert CATALOGUE.variants[f"multires {ratio}"].config.method == "multires"
        assert CATALOGUE.variants[f"mean tail {ratio}"].tail == "mean"


def test_a_step_of_multires_is_measured_by_the_core():
    run = Run(CATALOGUE.variants["multires 0.77"])
    run.begin(GRID, torch.device("cpu"), torch.tensor([1]), 0, 4)
    plan = run.call.plan(torch.zeros(1, 96, 1), GRID)
    assert isinstance(plan, MultiresPlan) and run.joint is not None


@pytest.mark.parametrize("strips", [False, True])
def test_tiles_attend_to_themselves_alone(strips):
    """HyperTile, tile by tile; keys in strips are those of as many tokens in the order of the rows."""
    attn = CrossAttention(16, None, 2, 8)
    x = torch.randn(2, 96, 16, generator=torch.Generator().manual_seed(0))
    run = Run(Variant("two tiles", "HyperTile", ToMeConfig(ratio=0.0), tiles=2, strips=strips))
    run.begin(GRID, x.device, torch.zeros(1, dtype=torch.int64), 0, 30)
    made = MergedSelfAttention(attn, run)(x).unflatten(1, GRID)
    for place in range(4):
        top, left = place // 2 * 4, place % 2 * 6
        tile = x.unflatten(1, GRID)[:, top : top + 4, left : left + 6].flatten(1, 2)
        expected = attn(tile, x[:, 24 * place : 24 * place + 24] if strips else tile).unflatten(1, (4, 6))
        torch.testing.assert_close(made[:, top : top + 4, left : left + 6], expected)
    assert run.cost_all == 0.25
    with pytest.raises(ValueError, match=r"\(8, 12\) tokens cannot be cut into 5 x 5 tiles"):
        MergedSelfAttention(attn, Run(Variant("five", "HyperTile", ToMeConfig(ratio=0.0), tiles=5)))._in_tiles(
            x, GRID, 5
        )
