"""`sample`: a random token of each run, another one in every layer and step."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from shared_tome import ModelCall, kernels, match_tokens
from shared_tome.core.curve import curve_order, hilbert_order
from shared_tome.core.sampling import kept_count, run_lengths

from .helpers import config, tokens

CPU = torch.device("cpu")
sides = st.integers(1, 24)
grids = st.tuples(sides, sides).filter(lambda grid: grid[0] * grid[1] > 1)


def sampled(grid, ratio=0.75, batch=1, **where):
    return match_tokens(tokens(batch, grid, 1), grid, config(method="sample", ratio=ratio), **where)


@given(st.integers(1, 5000), st.floats(0.0, 1.0))
def test_run_lengths(count, ratio):
    kept = kept_count(count, int(count * ratio))
    assert kept == max(count - int(count * ratio), -(-count // 64))
    start, length = run_lengths(count, kept, CPU)
    assert int(length.max()) - int(length.min()) <= 1 and int(length.min()) >= 1 and int(length.max()) <= 64
    assert start[0] == 0 and torch.equal(start[1:], length.cumsum(0)[:-1]) and int(length.sum()) == count


@given(grids, st.floats(0.05, 1.0), st.integers(0, 2**64 - 1), st.integers(0, 99), st.integers(0, 99))
def test_each_run_gives_one_of_its_own_tokens(grid, ratio, seed, step, layer):
    plan = sampled(grid, ratio, seed=seed, step=step, layer=layer)
    if plan.is_identity:
        assert int(grid[0] * grid[1] * ratio) == 0
        return
    start, length = run_lengths(plan.tokens, plan.kept, CPU)
    place = torch.empty(plan.tokens, dtype=torch.int64).scatter(0, hilbert_order(grid, CPU), torch.arange(plan.tokens))
    chosen = place[plan.index[0]]  # (M,) where along the curve
    assert (chosen >= start).all() and (chosen < start + length).all()


@pytest.mark.parametrize("along", ["step", "layer"])
@pytest.mark.parametrize("case", [((8, 8), 0.75), ((7, 9), 0.7), ((1, 40), 0.9), ((16, 16), 1.0), ((5, 5), 0.3)])
def test_the_walk_visits_every_token_of_each_run_once(case, along):
    fixed = {"seed": 11, "step": 6, "layer": 4}
    plans = [sampled(*case, **{**fixed, along: fixed[along] + turn}) for turn in range(64)]
    sizes = plans[0].sizes[0].long().tolist()
    chosen = torch.stack([plan.index[0] for plan in plans], dim=1)  # (M, turns)
    for run, size in enumerate(sizes):
        members = (plans[0].groups[0] == run).nonzero().flatten().tolist()
        for first in range(0, 64 - size + 1, size):
            assert sorted(chosen[run, first : first + size].tolist()) == members
        if size > 1:
            assert (chosen[run, 1:] != chosen[run, :-1]).all()


@given(grids)
def test_the_curve_is_a_permutation(grid):
    assert hilbert_order(grid, CPU).sort().values.tolist() == list(range(grid[0] * grid[1]))


@pytest.mark.parametrize("side", [2, 4, 8, 16, 32])
def test_the_curve_steps_to_neighbours(side):
    order = hilbert_order((side, side), CPU)
    y, x = order // side, order % side
    assert ((y.diff().abs() + x.diff().abs()) == 1).all()


def test_the_curve_of_a_line_is_the_line():
    for grid in ((1, 37), (37, 1)):
        assert hilbert_order(grid, CPU).tolist() == list(range(37))


def test_the_curve_is_remembered():
    assert curve_order((6, 7), CPU) is curve_order((6, 7), CPU)
    assert torch.equal(curve_order((6, 7), CPU), hilbert_order((6, 7), CPU))
    with torch.inference_mode():
        remembered = curve_order((6, 9), CPU)
    assert not remembered.is_inference()


@pytest.mark.parametrize("grid", [(2, 2), (8, 8), (6, 10), (34, 20), (12, 64)])
def test_runs_of_four_are_cells(grid):
    plan = sampled(grid, 0.75)
    token = torch.arange(plan.tokens)
    cell = token // grid[1] // 2 * (grid[1] // 2) + token % grid[1] // 2
    for run in range(plan.kept):
        assert cell[plan.groups[0] == run].unique().numel() == 1
    assert (plan.sizes == 4).all() and plan.key_bias() is None


def test_runs_in_video():
    """A run of four is a cell of one frame, a run of eight the same cell of two frames."""
    grid = (4, 6, 10)
    token = torch.arange(240)
    cell = token % 60 // 10 // 2 * 5 + token % 10 // 2
    for ratio, frames in ((0.75, 1), (0.875, 2)):
        plan = sampled(grid, ratio)
        for run in range(plan.kept):
            members = plan.groups[0] == run
            assert int(members.sum()) == 4 * frames
            assert cell[members].unique().numel() == 1 and (token[members] // 60 // frames).unique().numel() == 1


def test_unequal_runs_have_a_bias():
    plan = sampled((7, 9), 0.7)
    assert torch.equal(plan.key_bias()[0], plan.sizes[0].log()) and set(plan.sizes[0].tolist()) == {3.0, 4.0}


@pytest.mark.parametrize("seed", [7, 2**40 + 3, torch.tensor(7), torch.tensor([7, 8]), torch.tensor([2**40 + 3, 8])])
@pytest.mark.parametrize("step", [0, 21, torch.tensor(21)])
def test_a_model_call_draws_the_same(seed, step):
    """Drawn for many layers at once there, one by one here."""
    ours = config(method="sample", ratio=0.7)
    call = ModelCall(ours, (10, 14), CPU, seed=seed, step=step)
    for layer in range(37):
        for grid in ((10, 14), (5, 7)):
            x = tokens(2, grid, 3)
            plan, other = call.plan(x, grid), match_tokens(x, grid, ours, seed=seed, step=step, layer=layer)
            assert torch.equal(plan.index, other.index) and torch.equal(plan.groups, other.groups)
            assert torch.equal(plan.merge(x), other.merge(x))


@pytest.mark.parametrize("own", [False, True])
@pytest.mark.parametrize(("ratio", "draws"), [(0.75, [(0, 4)]), (0.7, [(0, 16), (16, 64), (80, 64)])])
def test_few_draws_serve_many_layers(monkeypatch, ratio, draws, own):
    """One, where all runs are of one length and so begin their walks anew together."""
    drawn, grid = [], (10, 14)
    ours = config(method="sample", ratio=ratio, own_token=own)
    real = kernels.draw
    monkeypatch.setattr(kernels, "draw", lambda *given: drawn.append(given[4:]) or real(*given))
    call, x = ModelCall(ours, grid, CPU, seed=5, step=3), tokens(2, grid, 3)
    plans = [call.plan(x, grid) for _ in range(90)]
    monkeypatch.undo()
    choices = [match_tokens(x, grid, ours, seed=5, step=3, layer=layer).choice for layer in range(94)]
    for layer, plan in enumerate(plans):
        assert torch.equal(plan.choice, choices[layer]) and len(plan.head_draws) == (4 if own else 1)
        assert all(map(torch.equal, plan.head_draws, choices[layer:]))
    more = 3 if own else 0  # heads take what comes behind the layer's own
    assert drawn == [(first, layers + more) for first, layers in draws]


@pytest.mark.parametrize("method", ["merge", "merge_queries", "merge_keys", "downsample", "prune"])
def test_a_model_call_matches_the_same(method):
    ours = config(method=method, ratio=0.5)
    call = ModelCall(ours.replace(seed=5), (10, 14), CPU, step=3)
    for layer in range(3):
        x = tokens(2, (10, 14), 3, seed=layer)
        plan, other = call.plan(x, (10, 14)), match_tokens(x, (10, 14), ours, seed=5, step=3, layer=layer)
        assert torch.equal(plan.index, other.index) and torch.equal(plan.groups, other.groups)


def test_a_model_call_leaves_layers_alone():
    call = ModelCall(config(method="sample", min_tokens=100), (16, 16), CPU)
    assert call.plan(tokens(1, (8, 8), 3), (8, 8)) is None and not call.serves((8, 8))
    assert call.plan(tokens(1, (16, 16), 3), (16, 16)).kept == 128
    x = tokens(1, (8, 8), 3)
    assert call.attention(x, x, x, (8, 8)) is None
    assert ModelCall(config(ratio=0.0), (16, 16), CPU).plan(tokens(1, (16, 16), 3), (16, 16)) is None


@pytest.mark.parametrize("method", ["sample", "merge", "merge_queries", "merge_keys", "downsample", "prune"])
def test_what_a_model_call_hands_to_attention(method):
    grid = (7, 9)
    q, k, v = (tokens(2, grid, 8, seed=i) for i in range(3))
    layer = ModelCall(config(method=method), grid, CPU).attention(q, k, v, grid)
    merges_queries = method in ("merge", "merge_queries", "prune")
    merges_keys = method != "merge_queries"
    merge = layer.plan.merge
    assert torch.equal(layer.q, merge(q)) if merges_queries else layer.q is q
    for ours, full in ((layer.k, k), (layer.v, v)):
        assert torch.equal(ours, merge(full)) if merges_keys else ours is full
    if method in ("merge_queries", "prune"):
        assert layer.bias is None
    else:
        assert torch.equal(layer.bias.expand(2, -1), layer.plan.sizes.log())
    out = tokens(2, (1, layer.q.shape[1]), 8, seed=4)
    assert torch.equal(layer.unmerge(out), layer.plan.unmerge(out)) if merges_queries else layer.unmerge(out) is out
    same = ModelCall(config(method=method), grid, CPU).attention(q, q, q, grid)
    assert same.k is same.v and (same.q is same.k) == (method in ("merge", "prune"))
    plain = ModelCall(config(method=method, proportional=False), grid, CPU).attention(q, k, v, grid)
    assert plain.bias is None


def chi_square(counts):
    expected = counts.sum() / counts.numel()
    return float(((counts - expected) ** 2 / expected).sum())


def test_every_token_of_a_run_is_as_likely_as_another():
    """Over 64 seeds, 256 runs of 4: chi square of the first choice's place, 3 degrees of freedom, p > 0.001."""
    counts = torch.zeros(4)
    pairs = torch.zeros(4, 4)
    order = torch.empty(1024, dtype=torch.int64).scatter(0, hilbert_order((32, 32), CPU), torch.arange(1024))
    for seed in range(64):
        place = order[sampled((32, 32), seed=seed).index[0]] % 4  # (256,)
        counts += place.bincount(minlength=4)
        pairs += (place[:-1] * 4 + place[1:]).bincount(minlength=16).reshape(4, 4)
    assert chi_square(counts) < 16.3
    assert chi_square(pairs) < 37.7  # neighbouring runs do not follow each other: 15 degrees of freedom


@pytest.mark.parametrize("partition", ["random_2d", "random"])
def test_destinations_are_uniform(partition):
    """Over steps and layers every token of the image is a destination as often as another."""
    grid, ours = (8, 8), config(partition=partition, ratio=1.0)
    counts = torch.zeros(64)
    x = tokens(1, grid, 2)
    for step in range(20):
        for layer in range(20):
            counts += match_tokens(x, grid, ours, seed=3, step=step, layer=layer).index[0].bincount(minlength=64)
    assert int(counts.sum()) == 400 * 16
    assert chi_square(counts) < 103.4  # 63 degrees of freedom, p > 0.001


def test_half_precision_tokens_and_other_defaults_draw_the_same():
    expected = sampled((12, 12), seed=3, step=4).index
    ours = config(method="sample", ratio=0.75)
    for dtype in (torch.float16, torch.bfloat16, torch.float64):
        x = tokens(1, (12, 12), 1).to(dtype)
        assert torch.equal(match_tokens(x, (12, 12), ours, seed=3, step=4).index, expected)
    torch.set_default_dtype(torch.float64)
    try:
        assert torch.equal(sampled((12, 12), seed=3, step=4).index, expected)
    finally:
        torch.set_default_dtype(torch.float32)
    with torch.inference_mode():
        assert torch.equal(sampled((12, 12), seed=3, step=4).index, expected)
