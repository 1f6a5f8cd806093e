"""`multires` from a ModelCall's plan to the attention: what of the specification (test_multires.py) runs, and where
`sample` takes its place."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from support.masks import KINDS, mask_of

from shared_tome import ModelCall, kernels
from shared_tome.attention.multires import NOT_MULTIRES, NOT_UNDER_MASK
from shared_tome.attention.sequence import JointCall
from shared_tome.autotune.layer import ways
from shared_tome.core import multires
from shared_tome.inspect.report import Tally
from shared_tome.merging.plan import MultiresPlan

from .helpers import config

CPU = torch.device("cpu")
GRID, HEADS, D = (12, 16), 3, 16


def call_of(seed=5, step=2, grid=GRID, **options):
    return ModelCall(config(method="multires", **options), grid, CPU, seed=seed, step=step)


def heads(length, batch=2, seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(batch, HEADS, length, D, generator=generator).to(dtype) for _ in range(3)]


def said_by(own=True, kernels_of=("torch",), weighs=True):
    said = []
    return JointCall(weighs, kernels_of, lambda *words: said.append(words), own), said


def plan_of(call, batch=2, grid=GRID):
    return call.plan(torch.zeros(batch, grid[0] * grid[1], 1), grid)


@pytest.mark.parametrize(("before", "behind"), [(0, 0), (7, 0), (0, 9), (5, 4)])
@pytest.mark.parametrize("ratio", [0.3, 0.75, 0.9])
def test_the_attention_is_the_specifications(ratio, before, behind):
    """Layer by layer: each with its own draws, in one softmax with the tokens around the image."""
    call, (joint, said) = call_of(ratio=ratio), said_by()
    length = before + GRID[0] * GRID[1] + behind
    q, k, v = heads(length)
    tiles = multires.cut_tiles(GRID, CPU, before, length, 16, 16)
    drawn = multires.draw_keys(tiles, torch.tensor(5), 2)
    counts = multires.tile_counts(tiles, *multires.shares(ratio))
    made = []
    for layer in range(3):
        plan = plan_of(call)
        assert isinstance(plan, MultiresPlan) and plan.layer == layer
        got = joint.attend(q, k, v, before, plan)
        expected = multires.attend_multires(q, k, v, tiles, drawn, counts, layer)
        assert got.shape == (2, length, HEADS, D) and torch.equal(got.transpose(1, 2), expected)
        made.append(got)
    assert not torch.equal(made[0], made[1]) and not said


def test_a_ratio_of_nearly_nothing_is_nearly_the_whole_attention():
    q, k, v = heads(200)
    (joint, _), call = said_by(), call_of(ratio=0.01)
    got = joint.attend(q, k, v, 3, plan_of(call)).transpose(1, 2)
    full = F.scaled_dot_product_attention(q, k, v)
    assert (got - full).abs().max() < 0.1 < (full - full.mean(2, keepdim=True)).abs().max()
    tokens = GRID[0] * GRID[1]
    assert torch.allclose(got[:, :, :3], full[:, :, :3], atol=1e-5), "queries beside the image see all keys"
    assert torch.allclose(got[:, :, 3 + tokens :], full[:, :, 3 + tokens :], atol=1e-5)


def test_its_sample_is_drawn_only_where_it_is_needed(monkeypatch):
    """One launch a step and grid less. What is drawn late is what would have been drawn at once."""
    drawn, real = [], ModelCall._draw
    monkeypatch.setattr(ModelCall, "_draw", lambda *given: drawn.append(given[1:]) or real(*given))
    call, (joint, _) = call_of(ratio=0.75), said_by()
    plans = [plan_of(call) for _ in range(3)]
    for plan in plans:
        assert joint.attend(*heads(192), 0, plan) is not None
        assert (plan.tokens, plan.kept, plan.batch, plan.even, plan.ratio) == (192, 48, 2, True, 0.75)
    assert not drawn
    sampled = ModelCall(config(method="sample", ratio=0.75), GRID, CPU, seed=5, step=2)
    expected = [plan_of(sampled) for _ in range(3)]
    drawn.clear()
    for number in (2, 0, 1):
        assert torch.equal(plans[number].head_draws, expected[number].head_draws)
        assert torch.equal(plans[number].index, expected[number].index)
    assert [given[2] for given in drawn] == [2, 0, 1], "each once"


def test_another_seed_or_step_draws_others():
    q, k, v = heads(192)

    def run(**told):
        return said_by()[0].attend(q, k, v, 0, plan_of(call_of(**told)))

    assert torch.equal(run(), run())
    assert not torch.equal(run(), run(seed=6)) and not torch.equal(run(), run(step=3))
    alike = torch.tensor([5, 5]), torch.tensor([5, 6])
    rows = [run(seed=seed) for seed in alike]
    assert torch.equal(rows[0], run()) and torch.equal(rows[1][0], run()[0]) and not torch.equal(rows[1][1], run()[1])


def test_a_scale_of_the_hosts():
    q, k, v = heads(192)
    joint, _ = said_by()
    plan = plan_of(call_of())
    got = joint.attend(q * 3, k, v, 0, plan, scale=D**-0.5 / 3)
    torch.testing.assert_close(got, joint.attend(q, k, v, 0, plan), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dims", [2, 3, 4])
def test_a_mask_reaches_the_attention(kind, dims):
    """In as many dimensions as hosts write them in."""
    q, k, v = heads(200)
    mask = mask_of(kind, 2, HEADS, 200, 3, 195)[:1, :1]
    given = {2: mask[0, 0], 3: mask[0], 4: mask}[dims]
    call, (joint, said) = call_of(), said_by()
    got = joint.attend(q, k, v, 3, plan_of(call), mask=given)
    tiles = multires.cut_tiles(GRID, CPU, 3, 200, 16, 16)
    drawn = multires.draw_keys(tiles, torch.tensor(5), 2)
    expected = multires.attend_multires(
        q, k, v, tiles, drawn, multires.tile_counts(tiles, *multires.shares(call.config.ratio)), mask=mask
    )
    assert torch.equal(got.transpose(1, 2), expected) and not said


@pytest.mark.parametrize("dtype", [torch.bool, torch.float16, torch.float32])
def test_a_mask_within_the_image_is_for_sample(dtype):
    """One entry is enough; and each shape of a call's masks is read once."""
    q, k, v = heads(200)
    masks = [torch.zeros(1, 1, 200, 200, dtype=dtype) for _ in range(2)]
    if dtype == torch.bool:
        masks = [~mask for mask in masks]
    masks[0][..., 3, 194] = 0 if dtype == torch.bool else -1
    masks[1][..., 2, 194] = masks[1][..., 3, 195] = 0 if dtype == torch.bool else -1
    for mask, served in zip(masks, (False, True), strict=True):
        joint, said = said_by()
        got = joint.attend(q, k, v, 3, plan_of(call_of()), mask=mask)
        assert (got is not None) == served
        assert said == ([] if served else [(NOT_UNDER_MASK, "its numbers")])
        again = joint.attend(q, k, v, 3, plan_of(call_of()), mask=masks[0])
        assert (again is not None) == served, "the shape has been asked about"


def test_a_mask_over_all_queries_alike_is_not_read(monkeypatch):
    monkeypatch.setattr(torch.Tensor, "aminmax", lambda *given: 1 / 0)
    monkeypatch.setattr(torch.Tensor, "all", lambda *given: 1 / 0)
    q, k, v = heads(200)
    for mask in (torch.zeros(1, 1, 200), torch.ones(2, 1, 1, 200).bool().expand(-1, -1, 200, -1)):
        joint, said = said_by()
        assert joint.attend(q, k, v, 3, plan_of(call_of()), mask=mask) is not None and not said


def test_what_is_no_mask_over_heads():
    q, k, v = heads(200)
    joint, said = said_by()
    assert joint.attend(q, k, v, 3, plan_of(call_of()), mask=torch.zeros(200)) is None
    assert joint.attend(q, k, v, 3, ModelCall(config(), GRID, CPU).plan(torch.zeros(2, 192, 1), GRID), mask=q) is None
    assert [message for message, _ in said] == [NOT_UNDER_MASK]


@pytest.mark.parametrize("options", [{"own_token": False}, {"proportional": False}])
def test_options_of_sample_change_nothing(options):
    q, k, v = heads(192)
    plain = said_by()[0].attend(q, k, v, 0, plan_of(call_of()))
    joint, _ = said_by(own=options.get("own_token", True), weighs=options.get("proportional", True))
    assert torch.equal(joint.attend(q, k, v, 0, plan_of(call_of(**options))), plain)


def test_where_heads_are_not_alike_sample_takes_its_place(monkeypatch):
    """Fewer heads of keys, or fewer queries: what is left is a sample of as many keys."""
    q, k, v = heads(192)
    monkeypatch.setattr(kernels, "attend_multires", lambda *given: 1 / 0)
    joint, said = said_by()
    plan = plan_of(call_of(ratio=0.75))
    assert plan.kept == 48 and len(plan.choice[0].unique()) == 48
    assert joint.attend(q, k[:, :1], v[:, :1], 0, plan) is None
    assert joint.attend(q[:, :, :100], k, v, 0, plan) is None
    assert said == [(NOT_MULTIRES, "3x192 queries, 1x192 keys"), (NOT_MULTIRES, "3x100 queries, 3x192 keys")]
    assert said_by(kernels_of=())[0].attend(q, k, v, 0, plan) is None, "another attention than torch's"


def test_an_attention_that_is_not_for_it_is_said():
    joint, said = said_by()
    joint.tell_sampled(plan_of(call_of()), "sage")
    joint.tell_sampled(ModelCall(config(), GRID, CPU).plan(torch.zeros(2, 192, 1), GRID), "sage")
    assert said == [(NOT_MULTIRES, "sage")]


def test_a_gpu_without_a_kernel_says_so(monkeypatch):
    """Plain torch would be slower than the whole attention."""

    class Elsewhere:
        type = "mps"

    joint, said = said_by()
    q, k, v = heads(192)
    plan = plan_of(call_of())
    monkeypatch.setattr("shared_tome.attention.multires.cut_tiles", lambda *given: 1 / 0)  # nothing is cut for it
    moved = q.as_subclass(type("Moved", (torch.Tensor,), {"device": Elsewhere()}))
    assert joint.multires.attend(moved, k, v, 0, plan, None) is None
    assert len(said) == 1 and said[0][0].startswith("multires has no kernel here") and "16 channels" in said[0][1]


@pytest.mark.parametrize("grid", [(1, 5), (3, 5), (5, 7, 3), (64, 64), (63, 66)])
def test_any_grid(grid):
    """Below one tile, of odd sides, of frames, and large enough for the tiles of 64."""
    tokens = grid[0] * grid[1] * (grid[2] if len(grid) == 3 else 1)
    call, (joint, _) = call_of(grid=grid), said_by()
    q, k, v = heads(tokens + 2, batch=1)
    plan = call.plan(torch.zeros(1, tokens, 1), grid)
    got = joint.attend(q, k, v, 2, plan)
    assert got.shape == (1, tokens + 2, HEADS, D) and got.isfinite().all()
    (held,) = joint.multires.tiles.values()
    assert held[0].size == (64 if tokens >= 4096 else 16)
    if tokens < 16:
        full = F.scaled_dot_product_attention(q, k, v)
        torch.testing.assert_close(got.transpose(1, 2), full, rtol=1e-4, atol=1e-5)


def test_a_report_says_the_shares():
    text = Tally(config(method="multires", ratio=0.75)).report().text()
    assert "Of the keys' tiles 10% stay whole, 48% keep a quarter of their tokens, 41% a 16th" in text
    assert "tiles" not in Tally(config(method="sample", ratio=0.75)).report().text()


@pytest.mark.parametrize(
    ("by_hand", "expected"),
    [
        ({"whole": 0.3, "half": 0.2}, (0.3, 0.2)),
        ({"whole": 0.9}, (0.9, 0.1)),  # the ratio would have more at half than is left
        ({"half": 0.95}, (0.05, 0.95)),
        ({"half": 0.0}, (multires.shares(0.75)[0], 0.0)),
        ({"whole": 1.0, "half": 0.0}, (1.0, 0.0)),
        ({}, multires.shares(0.75)),
    ],
)
def test_shares_by_hand(by_hand, expected):
    ours = config(method="multires", ratio=0.75, **by_hand)
    assert multires.shares_of(ours) == pytest.approx(expected)
    call, (joint, _) = ModelCall(ours, GRID, CPU, seed=5, step=2), said_by()
    q, k, v = heads(192)
    plan = plan_of(call)
    if by_hand.get("whole") == 1.0:
        assert plan is None, "nothing goes"
        return
    assert plan.kept == pytest.approx(192 * multires.work(*expected), abs=1), "sample in its place does as much"
    got = joint.attend(q, k, v, 0, plan).transpose(1, 2)
    ((tiles, drawn, counts),) = joint.multires.tiles.values()
    assert counts == multires.tile_counts(tiles, *expected)
    assert torch.equal(got, multires.attend_multires(q, k, v, tiles, drawn, counts))
    text = Tally(ours).report().text()
    assert f"{expected[0]:.0%} stay whole" in text and ("(by hand)" in text) == bool(by_hand)


def test_measured_times_depend_on_shares_by_hand():
    named = {" ".join(ways(config(method="multires", whole=whole), True)) for whole in (-1.0, 0.1, 0.2)}
    assert len(named) == 3
    assert ways(config(method="sample", whole=0.1), True) == ways(config(method="sample"), True)


@pytest.mark.parametrize("multires", [False, True])
def test_auto_is_resolved_by_the_model(multires):
    ours = config(method="auto", ratio=0.6)
    assert ours.samples and ours.keeps_self and ours.kind is config(method="sample").kind
    assert ours.resolved(multires) == ours.replace(method="multires" if multires else "sample")
    named = config(method="merge")
    assert named.resolved(multires) is named


@pytest.mark.parametrize(("ratio", "ratio_end"), [(0.9375, -1.0), (0.5, 0.9), (0.84, 0.84), (0.9375, 0.5)])
def test_auto_takes_no_more_of_a_transformer_than_its_picture_bears(ratio, ratio_end):
    ours = config(method="auto", ratio=ratio, ratio_end=ratio_end)
    found = ours.resolved(multires=True)
    assert (found.ratio, found.ratio_end) == (min(ratio, 0.84), min(ratio_end, 0.84))
    less = ours.why_less(found)
    assert (less is None) == (found.ratio == ratio and found.ratio_end == ratio_end)
    assert less is None or f"at most ratio 0.84, in place of {max(ratio, ratio_end):g}" in less
    assert ours.resolved(multires=False).ratio == ratio
    named = ours.replace(method="multires")
    assert named.resolved(multires=True) is named and named.why_less(named) is None


def test_in_the_core_auto_is_sample():
    x = torch.zeros(2, 192, 1)
    one, other = (ModelCall(config(method=name), GRID, CPU, seed=5).plan(x, GRID) for name in ("auto", "sample"))
    assert torch.equal(one.choice, other.choice) and not isinstance(one, MultiresPlan)


def test_one_graph_for_all_seeds_and_steps():
    """Under torch.compile: no break, and nothing compiled anew for another seed or step."""
    from torch._dynamo.testing import CompileCounter

    counter, ours = CompileCounter(), config(method="multires", ratio=0.6)

    def layer(q, k, v, seed, step):
        call = ModelCall(ours, (4, 8), CPU, seed=seed, step=step)
        plan = call.plan(q[:, 0, 3:], (4, 8))
        return JointCall(True, ("torch",), print, True).attend(q, k, v, 3, plan)

    compiled, (q, k, v) = torch.compile(layer, fullgraph=True, backend=counter), heads(35)
    for seed, step in ((1, 2), (5, 2), (5, 3)):
        given = (q, k, v, torch.tensor(seed), torch.tensor(step))
        torch.testing.assert_close(compiled(*given), layer(*given), rtol=1e-5, atol=1e-6)
    assert counter.frame_count == 1
    torch._dynamo.reset()
