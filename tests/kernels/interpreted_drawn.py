"""Drawn keys and own tokens in one attention in Triton's interpreter, and the ways to it. Started by
test_interpreted_drawn.py."""

from __future__ import annotations

import math
import os

import pytest
import torch
from support.self_token_weights import attended as truth

from shared_tome import ToMeConfig, kernels, match_tokens
from shared_tome.attention import sequence as joint
from shared_tome.core import self_token
from shared_tome.core.self_token import attend_drawn, by_head

assert os.environ.get("TRITON_INTERPRET") == "1" and kernels.ready()
from shared_tome.kernels.impl.attend_drawn import launch_attend_drawn

from .interpreted import Launches
from .interpreted_self_token import HEADS, LAYOUTS, draw, drawn

HALF = [torch.float16, torch.bfloat16]
TILES = (16, 16, 4, 2)


@pytest.fixture(autouse=True)
def nothing_fell_back():
    yield
    assert not kernels.switch.load()._broken


def made(plan, d, dtype, around=(0, 0), layout="tokens first"):
    """q, k, v [B, H, L, d] of all tokens."""
    length = around[0] + plan.tokens + around[1]
    return [LAYOUTS[layout](draw(plan.batch, HEADS, length, d, seed=seed).to(dtype)) for seed in range(3)]


def given(q, k, v, plan, start=0, scale=None, listed=False):
    """The arguments of launch_attend_drawn."""
    drawn = kernels.take_by_head(*(x[:, :, start : start + plan.tokens] for x in (k, v)), plan.head_draws)
    weight, scale = math.log(plan.tokens / plan.kept), scale or q.shape[-1] ** -0.5
    return (q, k, v, *((None, None) if listed else drawn), plan.head_draws, plan.runs, start, scale, weight)


def near(got, expected, roundings=2):
    return (got.double() - expected).abs().max() < roundings * torch.finfo(got.dtype).eps * expected.abs().max()


# A launch takes the interpreter seconds, so not every case meets every other.
@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize(
    ("grid", "ratio", "rows", "d", "around", "tiles"),
    [
        ((6, 8), 0.75, 1, 64, (0, 0), TILES),
        ((6, 8), 0.75, 2, 64, (5, 3), TILES),
        ((4, 10), 0.75, 1, 128, (0, 7), (16, 32, 4, 2)),
        ((4, 10), 0.5, 4, 40, (21, 0), (32, 16, 4, 2)),
        ((10, 12), 0.75, 1, 64, (2, 0), None),
        ((8, 8), 0.9375, 2, 64, (0, 0), None),
    ],
)
def test_equal_up_to_rounding(grid, ratio, rows, d, around, tiles, dtype, monkeypatch):
    """The kernel and the specification, in tiles that fit and in some that do not; nothing given is written to."""
    monkeypatch.setattr(self_token, "_SCORES", 1000)  # the specification in many parts
    plan = drawn(grid, ratio, rows, batch=max(2, rows))
    q, k, v = made(plan, d, dtype, around)
    together, listed = (given(q, k, v, plan, around[0], listed=listed) for listed in (False, True))
    tensors = together[:7]
    before = [x.clone() for x in tensors]
    expected = truth(q, k, v, plan, around[0])
    tiles = [tiles] if tiles else []
    found = [attend_drawn(*listed[:3], *listed[5:])]
    found += [launch_attend_drawn(*of, *tiles) for of in (together, listed)]
    for got in found:
        assert got.shape == q.shape and got.dtype == dtype and near(got, expected)
    assert torch.equal(found[1], found[2])
    assert all(torch.equal(x, y) for x, y in zip(tensors, before, strict=True))
    assert len(plan.head_draws) > 1 and plan.even


@pytest.mark.parametrize("layout", LAYOUTS)
def test_memory_order_changes_nothing(layout):
    plan = drawn((6, 8), 0.75, 2, batch=2)
    q, k, v = made(plan, 64, torch.float16, (3, 4), layout)
    got = launch_attend_drawn(*given(q, k, v, plan, 3), TILES)
    assert got.transpose(1, 2).is_contiguous() and near(got, truth(q, k, v, plan, 3))
    assert torch.equal(got, launch_attend_drawn(*given(q, k, v, plan, 3, listed=True), TILES))
    assert torch.equal(got, launch_attend_drawn(*given(*(x.contiguous() for x in (q, k, v)), plan, 3), TILES))


@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("above", [200.0, -200.0])
def test_extreme_logits(above, dtype):
    """Its own logit far above all others: its own value; far below: as if the run's token counted once less."""
    plan = drawn((8, 8), 0.75, batch=2)
    q = torch.eye(64).expand(2, HEADS, -1, -1).to(dtype)
    k, v = (q * above).contiguous(), made(plan, 64, dtype)[2]
    got = launch_attend_drawn(*given(q, k, v, plan, scale=1.0), TILES)
    assert near(got, truth(q, k, v, plan, scale=1.0))
    if above > 0:
        assert near(got, v.double())


def test_who_stands_for_itself_gets_no_key_twice():
    """Such a query sees the drawn keys alone, bit for bit, whatever its own key and the values are."""
    plan = drawn((6, 8), 0.75)
    q, k, v = made(plan, 64, torch.float16)
    arguments = given(q, k, v, plan)
    nothing = launch_attend_drawn(q, k + torch.nan, v + torch.nan, *arguments[3:], TILES)  # but the drawn ones
    stands = by_head(plan.head_draws[..., plan.runs], 4, HEADS) == torch.arange(48)
    assert 0 < stands.float().mean() < 0.5
    assert torch.equal(nothing[stands], launch_attend_drawn(*arguments, TILES)[stands])
    assert nothing[~stands].isnan().all()  # the counterpart


def test_a_plan_for_other_rows_is_refused():
    plan = drawn((6, 8), 0.75)
    arguments = list(given(*made(plan, 64, torch.float16), plan))
    arguments[5] = torch.zeros(1, 3, 12, dtype=torch.int64)
    with pytest.raises(ValueError, match="3 rows does not fit a batch of 4"):
        launch_attend_drawn(*arguments)


def test_the_fake_has_the_kernels_shape_and_strides():
    plan = drawn((6, 8), 0.75)
    arguments = given(*made(plan, 64, torch.float16), plan)
    fake, real = kernels.switch.load()._fake_attend(*arguments), launch_attend_drawn(*arguments, TILES)
    assert (fake.shape, fake.stride(), fake.dtype) == (real.shape, real.stride(), real.dtype)


def test_what_is_taken():
    q = draw(2, HEADS, 9, 64, seed=0).half()
    takes = kernels.attends_drawn
    assert takes(q, q, q, 0.1) and takes(*3 * [q.bfloat16()], 0.1)
    assert not takes(q, q, q, 0.0) and not takes(q, q, q, -0.1)
    assert not takes(*3 * [q.float()], 0.1) and not takes(q, q, q.bfloat16(), 0.1)
    assert not takes(*3 * [q[..., :40]], 0.1) and not takes(q, q[:, :1], q[:, :1], 0.1)
    assert not takes(q.clone().requires_grad_(), q, q, 0.1)
    assert not takes(*3 * [q[:0]], 0.1)
    assert not takes(*3 * [q[:1, :1].expand(300, 300, 9, 64)], 0.1)  # more than a GPU's grid has room for


# By the host's kernel and the heads: one kernel of ours where it is the faster.
@pytest.mark.parametrize(
    ("kernel", "d", "ratio", "at_once"),
    [
        ("cudnn", 64, 0.75, True),
        ("flash", 64, 0.75, True),
        ("efficient", 128, 0.75, True),
        ("cudnn", 128, 0.75, False),
        ("flash", 40, 0.75, False),
        ("flash", 64, 0.6, False),  # drawn keys do not all count alike
    ],
)
@pytest.mark.parametrize(("around", "listed"), [((0, 0), 11), ((3, 2), 12)])
def test_when_it_is_taken(monkeypatch, kernel, d, ratio, at_once, around, listed):
    """And both ways give the same up to rounding, in one launch or two."""
    monkeypatch.setattr(kernels.heads, "_LISTED", listed)  # of twelve keys
    monkeypatch.setattr(joint, "choose_kernel", lambda *_: kernel)
    real = joint.attend_combined
    monkeypatch.setattr(joint, "attend_combined", lambda *given: real(*given[:6], "cpu", *given[7:]))
    plan = drawn((6, 8), ratio, batch=2)
    q, k, v = made(plan, d, torch.float16, around)
    shared = joint.JointCall(True, (kernel,), never, keeps_self=True)
    expected = shared.attend(q.float(), k.float(), v.float(), around[0], plan)  # which no kernel of ours takes
    with Launches(monkeypatch) as launches:
        got = shared.attend(q, k, v, around[0], plan)
    ours = [name for name in launches.names if name.endswith("_kernel")]
    assert ("_attend_drawn_kernel" in ours) == at_once and got.is_contiguous() and got.shape == expected.shape
    if at_once:
        assert ours == [*(["_take_by_head_kernel"] if listed == 11 else []), "_attend_drawn_kernel"]
        assert [name for name in launches.names if name not in (*ours, "alias")] == []
    assert near(got, expected.double(), 4)


def never(*said):
    raise AssertionError(said)


def test_not_for_other_plans(monkeypatch):
    """downsample has no runs."""
    monkeypatch.setattr(joint, "choose_kernel", lambda *_: "flash")
    monkeypatch.setattr(joint, "attend_combined", lambda *given: "joined")
    plan = match_tokens(draw(2, 64, 1, seed=0), (8, 8), ToMeConfig(method="downsample", ratio=0.75, min_tokens=0))
    q = draw(2, HEADS, 70, 64, seed=0).half()
    assert joint.JointCall(True, ("flash",), never, keeps_self=True).attend(q, q, q, 6, plan) == "joined"


def test_where_it_fails_the_other_way_is_taken(monkeypatch, caplog):
    ops, launched = kernels.switch.load(), []

    def fail(*given):
        launched.append(1)
        raise RuntimeError("too little shared memory")

    joined, real = [], joint.attend_combined
    monkeypatch.setattr(joint, "attend_combined", lambda *given: joined.append(len(launched)) or real(*given))
    monkeypatch.setattr(ops, "_broken", set())
    monkeypatch.setitem(ops.LAUNCH, "attend_drawn", fail)
    plan = drawn((6, 8), 0.75, batch=2)
    q, k, v = made(plan, 64, torch.float16)
    shared = joint.JointCall(True, ("flash",), never, keeps_self=True)
    first, second = (shared.attend(q, k, v, 0, plan) for _ in range(2))
    assert launched == joined == [1] and caplog.text.count("the attend_drawn kernel does not run on cpu") == 1
    expected = truth(q, k, v, plan).transpose(1, 2)
    assert near(first, expected) and near(second, expected)
