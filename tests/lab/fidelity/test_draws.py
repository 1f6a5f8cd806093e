"""Draws that differ between heads or queries, and those that look at the tokens: against their definitions."""

from __future__ import annotations

import itertools

import pytest
import torch

from lab.fidelity.apart import QUERIES, Apart, ApartPlan, apart
from lab.fidelity.guided import GuidedCells, MergedOnTop
from lab.fidelity.methods import CATALOGUE
from shared_tome import ModelCall, ToMeConfig
from shared_tome.attention.sequence import JointCall
from shared_tome.core.curve import curve_order
from shared_tome.merging.match import match_tokens

GRID, TOKENS, HEADS, TEXT = (8, 8), 64, 2, 3
SEEDS = torch.tensor([3, 5, 7])  # of three pictures, each with two rows
CPU = torch.device("cpu")


def level0(**options) -> ToMeConfig:
    return ToMeConfig(**{"levels": "0", "min_tokens": 0, "ratio": 0.75, **options})


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def plan_of(queries: str, heads: bool, own: bool, step: int = 2, layer: int = 0) -> ApartPlan:
    call = Apart(level0(), GRID, CPU, SEEDS, step, queries, heads, own)
    return call._sample(2 * len(SEEDS), GRID, layer)


def weights(plan: ApartPlan, text: int) -> torch.Tensor:
    """[B, H, L, L]: how often each key counts for each query, written out from the plan's lists."""
    length = len(plan.keys)
    count = torch.zeros(plan.batch, HEADS, text + TOKENS, text + TOKENS)
    count[..., :text] = 1
    for row, head in itertools.product(range(plan.batch), range(HEADS)):
        seed = row % len(SEEDS)
        run_of = {int(token): run for run in range(plan.kept) for token in plan.keys[:, seed, run]}
        turn = head if plan.heads else 0
        count[row, head, :text, text + plan.keys[turn, seed]] = length
        groups = [torch.arange(TOKENS)] if plan.labels is None else plan.labels[:, seed]
        for number, group in enumerate(groups):
            drawn = plan.keys[(number + turn) % length, seed]
            for query in group.tolist():
                at = count[row, head, text + query, text:]
                at[drawn] = length
                if plan.own and drawn[run_of[query]] != query:
                    at[drawn[run_of[query]]] -= 1
                    at[query] = 1
    return count


@pytest.mark.parametrize("text", [0, TEXT])
@pytest.mark.parametrize(("queries", "heads", "own"), list(itertools.product(QUERIES, [False, True], [False, True])))
def test_apart_is_a_softmax_over_the_keys_of_each_query(queries, heads, own, text):
    plan = plan_of(queries, heads, own)
    q, k, v = (normal(6, HEADS, text + TOKENS, 8, seed=seed) for seed in range(3))
    exponentials = (q @ k.transpose(-1, -2) * 8**-0.5).exp() * weights(plan, text)
    expected = exponentials @ v / exponentials.sum(-1, keepdim=True)
    assert torch.allclose(plan.attend(q, k, v, text), expected, atol=1e-5)


def test_a_runs_queries_see_all_of_its_tokens():
    plan = plan_of("apart", True, False)
    assert torch.equal(plan.keys.sort(0).values, plan.labels.sort(0).values)  # the same runs
    seen = {tuple(plan.keys[(group + head) % 4, 0].tolist()) for group in range(4) for head in range(4)}
    assert len(seen) == 4 and sorted(itertools.chain.from_iterable(seen)) == list(range(TOKENS))
    own = plan_of("own", False, False)
    assert torch.equal(own.keys, own.labels)


def test_apart_starts_from_the_cores_draw():
    """The first head and the first queries have what all have without."""
    q, x = None, normal(6, TOKENS, 8)
    for step, layer in ((0, 0), (3, 2)):
        core = ModelCall(level0(), GRID, CPU, SEEDS, step)
        for _ in range(layer + 1):
            q = core.plan(x, GRID)
        assert torch.equal(plan_of("same", True, False, step, layer).choice, q.choice)


def test_apart_refuses_what_it_cannot_do():
    with pytest.raises(ValueError, match="'other'"):
        apart("other")
    with pytest.raises(ValueError, match="equal length"):
        Apart(level0(ratio=0.7), GRID, CPU, SEEDS, 0, "same", True, False)._sample(6, GRID, 0)


def test_restless_cells_keep_three_tokens_and_calm_ones_one():
    order = curve_order(GRID, CPU)
    x = torch.zeros(6, TOKENS, 4)
    restless = [0, 3, 5, 6]  # of eight pairs of runs
    for pair in restless:
        x[:, order[8 * pair : 8 * pair + 8]] = normal(6, 8, 4, seed=pair)
    plans = [GuidedCells(level0(), GRID, CPU, SEEDS, step).plan(x, GRID) for step in range(8)]
    seen = set()
    for plan in plans:
        assert plan.kept == TOKENS // 4 and torch.allclose(plan.sizes.sum(1), torch.full((6,), float(TOKENS)))
        assert torch.equal(plan.key_bias(), plan.sizes.log())
        place = torch.empty_like(order).scatter_(0, order, torch.arange(TOKENS))
        pairs = place[plan.index[0]] // 8
        for pair in range(8):
            own = plan.sizes[0][pairs == pair]
            assert own.tolist() == pytest.approx([8 / 3] * 3 if pair in restless else [8.0])
        seen |= set(plan.index[0].tolist())
    assert len(seen) == TOKENS  # over the steps every token has its turn


def test_queries_merged_on_top_of_sampled_keys():
    x = normal(6, TOKENS, 16)
    core = ModelCall(level0(), GRID, CPU, SEEDS, 1).attention(x, x, x, GRID)
    made = MergedOnTop(level0(), GRID, CPU, SEEDS, 1, 0.5).attention(x, x, x, GRID)
    config = ToMeConfig(method="merge_queries", ratio=0.5, min_tokens=0, levels="0")
    plan = match_tokens(x, GRID, config, seed=SEEDS, step=1, layer=0)
    assert torch.equal(made.k, core.k) and torch.equal(made.v, core.v) and core.bias is made.bias is None
    assert torch.equal(made.q, plan.merge(x)) and made.q.shape[1] == TOKENS // 2
    assert torch.equal(made.unmerge(made.q), plan.unmerge(made.q))


def test_the_catalogue_has_the_questions():
    assert len(CATALOGUE.sets["apart"]) == 2 + 2 * 9 and len(CATALOGUE.sets["guided"]) == 14


@pytest.mark.parametrize("text", [0, TEXT])
@pytest.mark.parametrize("ratio", [0.75, 0.9375])
def test_heads_apart_with_own_tokens_is_what_the_core_does(ratio, text):
    q, k, v = (normal(6, HEADS, text + TOKENS, 8, seed=seed) for seed in range(3))
    call = ModelCall(level0(ratio=ratio, own_token=True), GRID, CPU, SEEDS, 2)
    found = JointCall(True, ("flash",), print, own=True).attend(q, k, v, text, call.plan(k[:, 0, text:], GRID))
    lab = Apart(level0(ratio=ratio), GRID, CPU, SEEDS, 2, "same", True, True)._sample(6, GRID, 0)
    assert torch.allclose(found.transpose(1, 2), lab.attend(q, k, v, text), atol=1e-5)
