"""share_match: one match for all layers on a grid, and for both halves of a batch where they are the same images."""

from __future__ import annotations

import pytest
import torch

from shared_tome import ModelCall
from shared_tome.attention import attend

from .helpers import config, tokens

CPU = torch.device("cpu")
GRIDS = (12, 10), (6, 5)


def plans(layers=3, **options):
    """(the plan of each layer on two grids by turns, the call)."""
    alike = options.pop("alike", True)
    call = ModelCall(config(method="merge", **options), GRIDS[0], CPU, seed=5, step=2, alike=alike)
    found = []
    for layer in range(layers):
        for seed, grid in enumerate(GRIDS):
            found.append(call.plan(tokens(4, grid, 8, seed=10 * layer + seed), grid))
    return found, call


@pytest.mark.parametrize("alike", [True, False])
def test_one_match_a_grid(alike):
    found, _ = plans(share_match=True, alike=alike)
    assert found[0] is found[2] is found[4] and found[1] is found[3] is found[5]
    assert found[0].choice.shape[0] == (2 if alike else 4)
    own, _ = plans()
    assert len({id(plan) for plan in own}) == 6
    assert not torch.equal(own[0].groups, own[2].groups)
    if not alike:  # the first layer's own
        assert torch.equal(found[0].groups, own[0].groups) and torch.equal(found[1].groups, own[1].groups)


def test_the_next_call_matches_anew():
    first, call = plans(share_match=True)
    again, _ = plans(share_match=True)
    assert torch.equal(first[0].groups, again[0].groups) and first[0] is not again[0]
    other = ModelCall(call.config, GRIDS[0], CPU, seed=5, step=3).plan(tokens(4, GRIDS[0], 8, seed=0), GRIDS[0])
    assert not torch.equal(first[0].groups, other.groups)


def test_rows_that_change_on_the_way_are_matched_anew():
    """A host that runs a layer on some rows alone."""
    _, call = plans(share_match=True)
    x = tokens(2, GRIDS[0], 8)
    plan = call.plan(x, GRIDS[0])
    assert plan.batch == 2 and plan.merge(x).shape[0] == 2


def test_sampling_draws_for_each_layer_all_the_same():
    call = ModelCall(config(method="sample", share_match=True), GRIDS[0], CPU, seed=5)
    one, two = (call.plan(tokens(2, GRIDS[0], 8), GRIDS[0]) for _ in range(2))
    assert not torch.equal(one.index, two.index)


def test_a_layers_attention_is_whole():
    """Merged by another layer's match, weighed by its sizes, and all tokens back."""
    call = ModelCall(config(method="merge", share_match=True), GRIDS[0], CPU, seed=5)
    for seed in range(2):
        x = tokens(2, GRIDS[0], 8, seed=seed)
        layer = call.attention(x, x, x, GRIDS[0])
        heads = [y.unflatten(-1, (2, 4)).transpose(1, 2) for y in (layer.q, layer.k, layer.v)]
        out = layer.unmerge(attend(*heads, layer.bias).transpose(1, 2).flatten(2))
        assert out.shape == x.shape and out.isfinite().all()
        assert torch.equal(layer.q, layer.plan.merge(x)) and float(layer.bias.exp().sum()) == pytest.approx(120)
