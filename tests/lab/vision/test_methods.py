"""Every compared method takes away as many tokens, keeps the class token, and does what its name says."""

from __future__ import annotations

import pytest
import torch

import shared_tome.vit as vit
from lab.vit.methods import METHODS, UNWEIGHTED, Pruning, RandomPruning, apply, late
from lab.vit.run import Variant
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
def test_plans_hold_together(prefix):
    metric = torch.randn(2, 21, 8, generator=torch.Generator().manual_seed(0))
    plan = plans(RandomPruning, metric, prefix, 7)
    index, groups = plan.index, plan.groups
    assert plan.kept == 14 and index.shape == (2, 14) and groups.shape == (2, 21)
    assert torch.equal(groups.gather(1, index), torch.arange(14).expand(2, -1)), "each group has its own token"
    assert torch.equal(index[:, :prefix], torch.arange(prefix).expand(2, -1))
    assert (plan.sizes > 0).all() and (plan.sizes.sum(1) == 21).all()


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
