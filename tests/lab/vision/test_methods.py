"""Every compared method takes away as many tokens, keeps the class token, and does what its name says."""

from __future__ import annotations

import pytest
import torch

import shared_tome.vit as vit
from lab.vit.measure import Variant
from lab.vit.methods import METHODS, UNWEIGHTED, KMeans, KMeansLonger, Pruning, Random, RandomPruning, apply, late
from shared_tome.vit.hooks import NAME

from .conftest import SMALL

MERGING = [name for name in METHODS if name != "limit"]


def counts(model, pictures):
    seen = []
    handles = [
        block.mlp.register_forward_hook(lambda module, args, out: seen.append(out.shape[1])) for block in model.blocks
    ]
    out = model(pictures)
    for handle in handles:
        handle.remove()
    return seen, out


@pytest.mark.parametrize("schedule", ["constant", "falling", "late"])
@pytest.mark.parametrize("method", METHODS)
def test_tokens_left_are_those_that_are_told(method, schedule, model, pictures):
    for r in (1, 6, 14):
        kind = Variant(method, schedule, r)
        kind.put_on(model)
        seen, out = counts(model, pictures)
        assert seen == kind.spread(SMALL.depth, SMALL.tokens) and seen[-1] < 65
        assert out.isfinite().all()


@pytest.mark.parametrize("method", METHODS)
def test_exact_on_repeat_and_nothing_stays_behind(method, model, pictures):
    before, state = model(pictures), torch.random.get_rng_state()
    apply(model, method, 9)
    one, again = model(pictures), model(pictures)
    assert torch.equal(one, again) and not torch.equal(one, before)
    assert torch.equal(torch.random.get_rng_state(), state)
    vit.remove_patch(model)
    assert torch.equal(model(pictures), before) and not hasattr(model, NAME)


def plans(kind, metric, prefix, goes):
    tower_free = kind.__new__(kind)  # match asks for nothing of a model
    tower_free.generator = torch.Generator().manual_seed(1)
    return tower_free.match(metric, prefix, goes)


@pytest.mark.parametrize("prefix", [0, 1, 2])
@pytest.mark.parametrize("kind", [KMeans, Random, RandomPruning])
def test_plans_hold_together(kind, prefix):
    metric = torch.randn(2, 21, 8, generator=torch.Generator().manual_seed(0))
    plan = plans(kind, metric, prefix, 7)
    index, groups = plan.index, plan.groups
    assert plan.kept == 14 and index.shape == (2, 14) and groups.shape == (2, 21)
    assert torch.equal(groups.gather(1, index), torch.arange(14).expand(2, -1)), "each group has its own token"
    assert torch.equal(index[:, :prefix], torch.arange(prefix).expand(2, -1))
    assert (plan.sizes > 0).all() and (plan.sizes.sum(1) == 21).all()
    if kind is not RandomPruning:
        for place in range(prefix):
            assert (groups == place).sum(1).tolist() == [1, 1], "prefix tokens are alone"


def slow_k_means(unit, clusters, iterations):
    """Lloyd's algorithm by cosine on rows [N, d], from evenly spread rows, which end in their own cluster."""
    first = [i * len(unit) // clusters for i in range(clusters)]
    centres = [unit[i] for i in first]
    for turn in range(iterations):
        near = [max(range(clusters), key=lambda j: (float(row @ centres[j]), -j)) for row in unit]
        for j, i in enumerate(first):
            near[i] = j
        if turn < iterations - 1:
            sums = [sum(row for row, own in zip(unit, near, strict=True) if own == j) for j in range(clusters)]
            centres = [row / row.norm() for row in sums]
    return near


@pytest.mark.parametrize("kind", [KMeans, KMeansLonger])
def test_k_means_equals_slow_loops(kind):
    metric = torch.randn(2, 121, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    plan = plans(kind, metric, 1, 110)
    found, shorter = [], []
    for row in range(2):
        unit = metric[row, 1:] / metric[row, 1:].norm(dim=1, keepdim=True)
        found.append(slow_k_means(unit, 10, kind.iterations))
        shorter.append(slow_k_means(unit, 10, kind.iterations - 1))
        assert plan.groups[row, 1:].tolist() == [1 + number for number in found[-1]]
    assert found != shorter, "each iteration must matter"


def test_k_means_leaves_no_cluster_empty():
    plan = plans(KMeans, torch.ones(1, 21, 4), 1, 7)
    assert plan.kept == 14 and (plan.sizes >= 1).all()


def test_k_means_finds_clusters_that_are_there():
    generator = torch.Generator().manual_seed(0)
    centres = torch.eye(4)[torch.arange(20) % 4]
    metric = torch.cat((torch.randn(1, 4, generator=generator), centres + 0.01 * torch.rand(20, 4)))[None]
    plan = plans(KMeans, metric, 1, 16)
    kinds = torch.arange(20) % 4
    for number in range(1, plan.kept):
        assert kinds[(plan.groups[0, 1:] == number)].unique().numel() == 1


def test_pruning_drops_what_the_class_token_attends_to_least():
    generator = torch.Generator().manual_seed(0)
    q, k = (torch.randn(2, 3, 11, 8, generator=generator) for _ in range(2))
    pruning = Pruning.__new__(Pruning)
    weight = ((q[:, :, 0, None] * k).sum(-1) / 8**0.5).softmax(-1).mean(1)  # (B, 11)
    plan = pruning.match(pruning.metric(q, k), 1, 4)
    x = torch.randn(2, 11, 5, generator=generator)
    for row in range(2):
        stays = sorted((weight[row, 1:].topk(6).indices + 1).tolist())
        assert plan.index[row].tolist() == [0, *stays]
        assert torch.equal(plan.merge(x)[row], x[row, [0, *stays]]), "what stays keeps its own value"


def test_weights_count_in_all_but_the_unweighted(model, pictures):
    for method in METHODS:
        apply(model, method, 9)
        assert getattr(model, NAME).options.proportional is (method not in UNWEIGHTED)
    outputs = []
    for method in ("bipartite", "bipartite, unweighted"):
        apply(model, method, 9)
        outputs.append(model(pictures))
    assert not torch.equal(*outputs)


def test_pruned_values_are_never_mixed_in_later_blocks(model, pictures):
    """Every token that a pruned model still has is one of those that it began with, each by itself."""
    apply(model, "random pruning", 9)
    attachment = getattr(model, NAME)
    seen = []
    match = attachment.match
    attachment.match = lambda *args: seen.append(match(*args)) or seen[-1]
    model(pictures)
    assert len(seen) == 4 and not any(plan.mean for plan in seen)


def test_late_lists_keep_the_sum():
    for depth in (3, 4, 12, 24):
        for r in (1, 2, 11, 16):
            found = late(r, depth)
            assert len(found) == depth and sum(found) == r * depth and not any(found[: depth // 3])
            assert max(found[depth // 3 :]) - min(found[depth // 3 :]) <= 1
