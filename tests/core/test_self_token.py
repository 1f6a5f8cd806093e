"""Queries that keep their own token beside the drawn ones, against float64 from the formula of weights."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.attention import attention
from support.self_token_weights import counts

from shared_tome import ModelCall, ToMeConfig, kernels, match_tokens
from shared_tome.attention.combine import attend_in_parts
from shared_tome.attention.sequence import JointCall
from shared_tome.core.groups import take
from shared_tome.core.self_token import by_head
from shared_tome.merging.plan import SamplePlan

from .helpers import config, tokens

HEADS, D = 3, 16
ROUNDINGS = {torch.float32: 2e-6, torch.bfloat16: 1e-2}
# Runs of one length, runs of two lengths of which few or many are odd, the longest runs, one row, a video. A case
# weighs every key for every query in float64, so its time goes by the square of its tokens.
CASES = {
    "even": ((8, 8), 0.75),
    "uneven": ((8, 8), 0.6),
    "odd": ((5, 7), 0.7),
    "runs of one and two": ((5, 7), 0.3),
    "many odd runs": ((20, 20), 0.7),
    "longest runs": ((16, 16), 0.984375),
    "one row": ((1, 40), 0.75),
    "video": ((3, 4, 6), 0.75),
    "uneven video": ((3, 5, 5), 0.75),
}


def drawn_for_each_head(grid, ratio, batch=2, seed=3, step=4) -> SamplePlan:
    """As hosts draw: other tokens for other heads."""
    call = ModelCall(config(method="sample", ratio=ratio, own_token=True), grid, torch.device("cpu"), seed, step)
    plan = call.plan(tokens(batch, grid, 1), grid)
    assert isinstance(plan, SamplePlan) and len(plan.head_draws) == min(16, -(-plan.tokens // plan.kept)) > 1
    return plan


def drawn(grid, ratio, batch=2, seed=3, step=4) -> SamplePlan:
    """One draw for all heads."""
    plan = match_tokens(tokens(batch, grid, 1), grid, config(method="sample", ratio=ratio), seed=seed, step=step)
    assert isinstance(plan, SamplePlan)
    return plan


def made(plan, around=(0, 0), dtype=torch.float32, spread=2.0):
    """q, k, v [B, H, L, d] as a host has them: views of [B, L, H * d]."""
    length = around[0] + plan.tokens + around[1]
    generator = torch.Generator().manual_seed(plan.tokens)
    shape = (plan.batch, length, HEADS * D)
    q, k, v = (torch.randn(shape, generator=generator, dtype=torch.float32).to(dtype) for _ in range(3))
    return [x.unflatten(-1, (HEADS, D)).transpose(1, 2) for x in (q * spread, k, v)]


def truth(q, k, v, weight, scale=None):
    """[B, L, H, d] in float64."""
    return attention(q, k, v, weight.log(), scale).transpose(1, 2)


def never(*said):
    raise AssertionError(said)


def joint(own=True):
    return JointCall(True, ("flash",), never, keeps_self=own)


def error(out, expected):
    assert out.shape == expected.shape and out.is_contiguous() and out.isfinite().all()
    return float((out.double() - expected).abs().max() / expected.abs().max())


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("around", [(0, 0), (7, 0), (0, 5), (3, 6)], ids=["alone", "text before", "behind", "both"])
@pytest.mark.parametrize(("draws", "scale"), [(drawn, None), (drawn_for_each_head, None), (drawn_for_each_head, 0.4)])
def test_against_float64(case, around, draws, scale):
    plan = draws(*CASES[case])
    q, k, v = made(plan, around)
    out = joint().attend(q, k, v, around[0], plan, scale)
    weight = counts(plan, HEADS, around[0], q.shape[2])
    assert (weight.sum(-1) == q.shape[2]).all()  # each token of the row counts once, by itself or by another
    assert error(out, truth(q, k, v, weight, scale)) < ROUNDINGS[torch.float32]
    # The counterpart: without its own token a query sees something else; text is not the image's and sees the same.
    other = truth(q, k, v, counts(plan, HEADS, around[0], q.shape[2], own=False), scale)
    assert error(out, other) > 0.01
    text = torch.cat((out[:, : around[0]], out[:, around[0] + plan.tokens :]), 1).double()
    assert torch.allclose(text, torch.cat((other[:, : around[0]], other[:, around[0] + plan.tokens :]), 1), atol=1e-5)


@pytest.mark.parametrize("around", [(0, 0), (4, 3)])
@pytest.mark.parametrize("ratio", [0.75, 0.6])
def test_half_precision(ratio, around):
    plan = drawn((8, 8), ratio)
    q, k, v = made(plan, around, torch.bfloat16)
    out = joint().attend(q, k, v, around[0], plan)
    assert out.dtype == torch.bfloat16
    assert error(out, truth(q, k, v, counts(plan, HEADS, around[0], q.shape[2]))) < ROUNDINGS[torch.bfloat16]


@pytest.mark.parametrize("draws", [drawn, drawn_for_each_head])
@pytest.mark.parametrize("around", [(0, 0), (4, 3)])
@pytest.mark.parametrize("ratio", [0.75, 0.6])
def test_several_choices_in_a_batch(ratio, around, draws):
    """Two pictures, prompted and unprompted: row i has the choice i % 2."""
    plan = draws((8, 8), ratio, batch=4, seed=torch.tensor([3, 8]))
    assert plan.choice.shape[0] == plan.head_draws.shape[1] == 2 and not torch.equal(*plan.choice)
    q, k, v = made(plan, around)
    out = joint().attend(q, k, v, around[0], plan)
    assert error(out, truth(q, k, v, counts(plan, HEADS, around[0], q.shape[2]))) < ROUNDINGS[torch.float32]
    for row, seed in enumerate((3, 8, 3, 8)):  # each as it is alone
        one = draws((8, 8), ratio, batch=1, seed=seed)
        alone = joint().attend(*(x[row : row + 1] for x in (q, k, v)), around[0], one)
        assert (out[row] - alone[0]).abs().max() < 1e-5


@pytest.mark.parametrize("layout", ["heads first", "tokens first", "of one projection"])
@pytest.mark.parametrize("around", [(0, 0), (4, 3)])
@pytest.mark.parametrize("seed", [3, torch.tensor([3, 8])], ids=["one choice", "a choice a row"])
def test_memory_order_changes_nothing(layout, around, seed):
    plan = drawn((8, 8), 0.6, seed=seed)
    given = made(plan, around)
    q, k, v = given
    if layout == "heads first":
        q, k, v = (x.contiguous() for x in given)
    elif layout == "of one projection":
        q, k, v = torch.cat([x.transpose(1, 2) for x in given], -1).transpose(1, 2).split(D, -1)
    before = [x.clone() for x in (q, k, v)]
    out = joint().attend(q, k, v, around[0], plan)
    assert error(out, truth(*given, counts(plan, HEADS, around[0], q.shape[2]))) < ROUNDINGS[torch.float32]
    assert all(torch.equal(x, y) for x, y in zip((q, k, v), before, strict=True))


@pytest.mark.parametrize("dtype", ROUNDINGS, ids=str)
@pytest.mark.parametrize("above", [200.0, -200.0])
@pytest.mark.parametrize("ratio", [0.75, 0.6])
@pytest.mark.parametrize("around", [(0, 0), (2, 2)])
def test_extreme_logits(dtype, above, ratio, around):
    """Its own logit far above all others, or below: finite and right."""
    plan, length = drawn((4, 4), ratio), around[0] + 16 + around[1]
    q = torch.eye(length).expand(2, HEADS, -1, -1).to(dtype)
    k, v = (torch.eye(length) * above).expand(2, HEADS, -1, -1).to(dtype), made(plan, around, dtype)[2]
    v = torch.cat((v, v), -1)[..., :length]
    out = joint().attend(q, k, v, around[0], plan, 1.0)
    expected = truth(q, k, v, counts(plan, HEADS, around[0], length), 1.0)
    assert error(out, expected) < ROUNDINGS[dtype]
    if above > 0:
        image = slice(around[0], around[0] + 16)
        assert error(out[:, image].contiguous(), v.transpose(1, 2)[:, image].double()) < ROUNDINGS[dtype]


@pytest.mark.parametrize("dtype", ROUNDINGS, ids=str)
@pytest.mark.parametrize("seed", [3, torch.tensor([3, 8])], ids=["one choice", "a choice a row"])
def test_drawn_tokens_keep_their_output_bit_for_bit(dtype, seed):
    plan = drawn((8, 8), 0.75, seed=seed)
    q, k, v = made(plan, dtype=dtype)
    assert joint(own=False).attend(q, k, v, 0, plan) is None  # alone and all alike: there is nothing to join
    with_own = joint().attend(q, k, v, 0, plan)
    rows = (take(x.transpose(1, 2).flatten(2), plan.choice) for x in (k, v))
    plain = attend_in_parts(q, [(*(x.unflatten(-1, (HEADS, D)).transpose(1, 2) for x in rows), math.log(4))], "cpu")
    stands = torch.zeros(2, 64, dtype=torch.bool).scatter(1, plan.index, True)
    assert torch.equal(with_own[stands], plain[stands])
    assert (with_own[~stands] != plain[~stands]).flatten(1).any(1).all()


def test_gradients_take_the_way_that_has_them():
    plan = drawn((8, 8), 0.75)
    q, k, v = made(plan)
    call = joint()
    for asked in range(3):
        given = [x.detach().requires_grad_(at == asked) for at, x in enumerate((q, k, v))]
        assert call.attend(*given, 0, plan) is None
        with torch.no_grad():
            assert call.attend(*given, 0, plan) is not None


def test_nothing_to_weigh_against():
    """Where keys do not weigh, a query keeps nothing; nor where no kernel tells its log-sum-exp."""
    plan = drawn((8, 8), 0.75)
    given = (*made(plan), 0, plan)
    assert not JointCall(False, ("flash",), never, keeps_self=True).keeps_self
    assert JointCall(False, ("flash",), never, keeps_self=True).attend(*given) is None
    assert JointCall(True, (), never, keeps_self=True).attend(*given) is None


def test_other_plans_are_joined_without(monkeypatch):
    """downsample has no runs: beside text its keys weigh, and no query keeps its own."""
    plan = match_tokens(tokens(2, (8, 8), 1), (8, 8), config(method="downsample", ratio=0.75))
    given = (*made(plan, (3, 0)), 3, plan)
    monkeypatch.setattr("shared_tome.kernels.add_self_token", never)
    assert torch.equal(joint(own=True).attend(*given), joint(own=False).attend(*given))


def test_a_kernel_that_refuses_ends_it_for_the_call(monkeypatch):
    plan, said = drawn((8, 8), 0.75), []
    call = JointCall(True, ("flash",), lambda *words: said.append(words), keeps_self=True)

    def refuse(*given):
        raise RuntimeError("no such kernel\nand more")

    monkeypatch.setattr("shared_tome.kernels.add_self_token", refuse)
    for _ in range(2):
        assert call.attend(*made(plan), 0, plan) is None
    assert len(said) == 1 and said[0][1] == "no such kernel" and not call.keeps_self and not call.kernels


@pytest.mark.parametrize("around", [(0, 0), (3, 4)])
@pytest.mark.parametrize("ratio", [0.75, 0.6])
def test_one_compiled_graph(ratio, around):
    from torch._dynamo.testing import CompileCounterWithBackend

    counter = CompileCounterWithBackend("aot_eager")
    options = config(method="sample", ratio=ratio, own_token=True)
    q, k, v = made(drawn((8, 8), ratio), around)

    def layer(q, k, v, seed, step):
        call = ModelCall(options, (8, 8), q.device, seed, step)
        image = k[:, :, around[0] : around[0] + 64].transpose(1, 2).flatten(2)
        plan = call.attention(image, image, image, (8, 8), keeps_self=True).plan
        return joint().attend(q, k, v, around[0], plan)

    torch._dynamo.reset()
    compiled = torch.compile(layer, fullgraph=True, backend=counter)
    with torch.no_grad():
        for number in range(3):
            given = (q, k, v, torch.tensor(2**33 * number), torch.tensor(number))
            made_there, eager = compiled(*given), layer(*given)
            assert (made_there - eager).abs().max() < 1e-5
    torch._dynamo.reset()
    assert counter.frame_count == 1


def test_heads_of_several_sizes_are_compiled_by_one_function():
    """A host's function is traced for layers of 40 channels, and then of any number: what is asked while it is traced
    needs the number itself."""
    options = config(method="sample", ratio=0.75, own_token=True)

    def layer(q, k, v):
        plan = ModelCall(options, (8, 8), q.device).plan(v[:, 0], (8, 8))
        return joint().attend(q, k, v, 0, plan)

    torch._dynamo.reset()
    compiled = torch.compile(layer, fullgraph=True, backend="eager", dynamic=True)
    with torch.no_grad():
        for d in (8, 16):
            given = [torch.randn(2, 2, 64, d) for _ in range(3)]
            torch.testing.assert_close(compiled(*given), layer(*given))
    torch._dynamo.reset()


def test_a_call_leaves_keys_whole_for_own_tokens():
    x = tokens(2, (8, 8), 16)
    for ratio, has_bias in ((0.75, False), (0.6, True)):
        call = ModelCall(config(method="sample", ratio=ratio, own_token=True), (8, 8), x.device)
        layer = call.attention(x, x, x, (8, 8), keeps_self=True)
        assert layer.q is x and layer.k is x and layer.v is x and layer.unmerge(x) is x
        assert (layer.bias is not None) == has_bias and layer.plan.kept == 64 - int(64 * ratio)


@pytest.mark.parametrize("changes", [{}, {"proportional": False}, {"method": "downsample"}, {"method": "merge"}])
def test_which_configs_keep_own(changes):
    assert ToMeConfig(own_token=True, **changes).keeps_self == (not changes)
    assert not ToMeConfig(own_token=False, **changes).keeps_self


def test_heads_take_what_later_layers_would():
    """Head h of a layer has the draw of the layer h further on; where runs are short it begins anew."""
    call = ModelCall(config(method="sample", ratio=0.75, own_token=True), (8, 8), torch.device("cpu"), 3, 5)
    plain = ModelCall(config(method="sample", ratio=0.75, own_token=False), (8, 8), torch.device("cpu"), 3, 5)
    x = tokens(2, (8, 8), 1)
    ours, theirs = ([one.plan(x, (8, 8)) for _ in range(22)] for one in (call, plain))  # more than one draw has
    for layer, plan in enumerate(ours):
        assert torch.equal(plan.choice, theirs[layer].choice) and len(theirs[layer].head_draws) == 1
        for head in range(min(4, 22 - layer)):
            assert torch.equal(plan.head_draws[head], theirs[layer + head].choice)
        assert torch.equal(
            plan.head_draws.sort(0).values, ours[0].head_draws.sort(0).values
        )  # all four tokens of each cell
    long = ModelCall(config(method="sample", ratio=63 / 64, own_token=True), (16, 16), torch.device("cpu"))
    assert len(long.plan(tokens(1, (16, 16), 1), (16, 16)).head_draws) == 16  # of 64


def test_lists_by_head():
    index = torch.arange(12).reshape(2, 3, 2)  # two turns, three pictures, two tokens
    found = by_head(index, 6, 5)
    assert found.shape == (6, 5, 2)
    for row, head in itertools.product(range(6), range(5)):
        assert torch.equal(found[row, head], index[head % 2, row % 3])
    x = torch.randn(6, 5, 12, 4)
    expected = x.gather(2, found[..., None].expand(-1, -1, -1, 4))
    assert all(map(torch.equal, kernels.take_by_head(x, -x, index), (expected, -expected)))
    with pytest.raises(ValueError, match="3 rows does not fit a batch of 4"):
        kernels.take_by_head(x[:4], x[:4], index)


sides = st.one_of(st.just(1), st.integers(1, 24))
grids = st.one_of(st.tuples(sides, sides), st.tuples(st.integers(1, 5), st.integers(1, 8), st.integers(1, 8)))


@given(grids, st.one_of(st.sampled_from([0.25, 0.5, 0.75, 1.0]), st.floats(0.0, 1.0)), st.sampled_from([1, 2, 4]))
def test_the_owner_is_the_token_that_stands_for_each(grid, ratio, rows):
    seed = torch.arange(rows) if rows > 1 else torch.tensor(5)
    x = tokens(4, grid, 1)
    plan = match_tokens(x, grid, config(method="sample", ratio=ratio), seed=seed)
    if plan.is_identity:
        return
    (owner,) = plan.head_draws.index_select(2, plan.runs)
    assert owner.shape == (rows, math.prod(grid)) and owner.dtype == torch.int64
    assert torch.equal(owner.repeat(4 // rows, 1), plan.index.gather(1, plan.groups))
    assert torch.equal(owner.gather(1, plan.choice), plan.choice)  # who stands for others stands for itself


def test_a_plan_for_other_rows_is_refused():
    q, k, v = made(drawn((4, 4), 0.75, batch=4))
    with pytest.raises(ValueError, match="3 rows does not fit a batch of 4"):
        kernels.add_self_token(q, k, v, q, q[..., 0], torch.zeros(1, 3, 4).long(), torch.zeros(16).long(), 1.0)
