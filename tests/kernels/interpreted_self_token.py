"""The kernels of own tokens in Triton's interpreter, against plain torch. Started by test_interpreted_self_token.py."""

from __future__ import annotations

import math
import os

import pytest
import torch

from shared_tome import ModelCall, ToMeConfig, kernels
from shared_tome.attention.sequence import JointCall
from shared_tome.core.self_token import _take_by_head, add_self_token, by_head

assert os.environ.get("TRITON_INTERPRET") == "1" and kernels.ready()
from shared_tome.kernels.impl.self_token import launch_self_token, launch_take_by_head

from .interpreted import Launches

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
# Roundings of the largest value. The interpreter cuts bfloat16 off where a GPU rounds.
ROUNDINGS = {torch.float32: 8, torch.float16: 1, torch.bfloat16: 2}
HEADS = 2


@pytest.fixture(autouse=True)
def nothing_fell_back():
    yield
    assert not kernels.switch.load()._broken


def draw(*shape, seed):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# How q, k, v [B, H, N, d] lie in memory.
LAYOUTS = {
    "heads first": lambda x: x.contiguous(),
    "tokens first": lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),
    "of one projection": lambda x: torch.cat((x, -x, x), 1).transpose(1, 2).contiguous().transpose(1, 2)[:, :HEADS],
    "behind text": lambda x: (
        torch.cat((-x[:, :, :5], x, -x), 2).transpose(1, 2).contiguous().transpose(1, 2)[:, :, 5 : 5 + x.shape[2]]
    ),
    "behind text, heads first": lambda x: torch.cat((-x[:, :, :5], x), 2).contiguous()[:, :, 5:],
    "channels apart": lambda x: x.transpose(2, 3).contiguous().transpose(2, 3),
}


def drawn(grid, ratio, rows=1, batch=4):
    """A plan whose each head draws for itself."""
    seeds = torch.arange(rows) if rows > 1 else torch.tensor(7)
    call = ModelCall(ToMeConfig(ratio=ratio, min_tokens=0, own_token=True), grid, torch.device("cpu"), seeds)
    with kernels.use("reference"):  # interpreted_match.py tests the drawing, which takes the interpreter seconds
        return call.plan(draw(batch, grid[0] * grid[1], 1, seed=9), grid)


def made(grid, ratio, rows, d, dtype, layout="tokens first", batch=4):
    """q, k, v, out, lse, turns, runs as attend_combined has them: lse in float32, of the drawn keys' weights."""
    plan = drawn(grid, ratio, rows, batch)
    q, k, v = (LAYOUTS[layout](draw(batch, HEADS, plan.tokens, d, seed=seed).to(dtype)) for seed in range(3))
    place = by_head(plan.head_draws, batch, HEADS)[..., None].expand(-1, -1, -1, d)
    keys, values = (x.float().gather(2, place) for x in (k, v))
    logits = q.float() @ keys.transpose(-1, -2) * d**-0.5 + plan.sizes[:, None, None].log()
    out, lse = (logits.softmax(-1) @ values).to(dtype), logits.logsumexp(-1)
    return q, k, v, out, lse, plan.head_draws, plan.runs


def close(made, expected):
    assert made.shape == expected.shape and made.dtype == expected.dtype and made.isfinite().all()
    room = ROUNDINGS[made.dtype] * torch.finfo(made.dtype).eps * expected.abs().max()
    assert (made.float() - expected.float()).abs().max() <= room


# A launch takes the interpreter seconds, so not every case meets every other.
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("grid", "ratio", "rows", "d"),
    [*(((5, 7), 0.75, 1, d) for d in (8, 40, 64, 80, 128, 160)), ((8, 8), 0.75, 2, 40), ((1, 67), 0.6, 4, 40)],
)
def test_equal_up_to_rounding(grid, ratio, rows, d, dtype):
    given = made(grid, ratio, rows, d, dtype)
    *_, head_draws, runs = given
    assert len(head_draws) > 1 and head_draws.shape[1] == rows and runs.shape == (grid[0] * grid[1],)
    before = [x.clone() for x in given]
    got, expected = launch_self_token(*given, d**-0.5), add_self_token(*given, d**-0.5)
    if (grid, d, dtype) == ((5, 7), 40, torch.float16):  # once: what the logarithm lacks comes apart
        lighter = (*given[:4], given[4] - 0.75, *given[5:], d**-0.5, 0.75)
        for of in (launch_self_token, add_self_token):
            close(of(*lighter), expected)
    close(got, expected)
    assert got.transpose(1, 2).is_contiguous()
    assert all(torch.equal(x, y) for x, y in zip(given, before, strict=True))  # nothing is written to
    assert (expected.float() - given[3].float()).abs().max() > 0.1  # the counterpart


@pytest.mark.parametrize(
    ("grid", "ratio", "rows", "layout", "dtype", "d"),
    [
        *(((5, 7), 0.75, 1, layout, torch.float16, 40) for layout in LAYOUTS),
        *(((8, 8), 0.9, 2, "tokens first", dtype, 80) for dtype in DTYPES),
    ],
)
def test_tokens_by_head_are_those_of_plain_torch(grid, ratio, rows, layout, dtype, d):
    head_draws = drawn(grid, ratio, rows).head_draws
    x = LAYOUTS[layout](draw(4, HEADS, grid[0] * grid[1], d, seed=1).to(dtype))
    expected = _take_by_head(x, head_draws)
    one = _take_by_head(x, head_draws[:1])  # both heads by the only list
    assert len(head_draws) > 1 and torch.equal(expected[:, 0], one[:, 0]) and not torch.equal(expected, one)
    for made in (launch_take_by_head(x, -x, head_draws), kernels.take_by_head(x, -x, head_draws)):
        assert torch.equal(made[0], expected) and torch.equal(made[1], -expected)
    assert torch.equal(kernels.take_by_head(x, x[..., :d], head_draws[:1])[1], one)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rows", [1, 2])
def test_who_stands_for_itself_keeps_its_output_bit_for_bit(dtype, rows):
    q, k, v, out, lse, head_draws, runs = made((5, 7), 0.75, rows, 40, dtype)
    stands = by_head(head_draws.index_select(2, runs), 4, HEADS) == torch.arange(35)
    assert 0 < stands.float().mean() < 0.5
    for run in (launch_self_token, add_self_token):
        got = run(q, k, v, out, lse, head_draws, runs, 40**-0.5)
        assert torch.equal(got[stands], out[stands])
        assert (got[~stands] != out[~stands]).any(-1).all()


@pytest.mark.parametrize("heads_first", [True, False], ids=["out heads first", "out tokens first"])
@pytest.mark.parametrize(
    ("layout", "lse_layout"),
    [
        *((layout, "whole") for layout in LAYOUTS),
        *(("tokens first", lse_layout) for lse_layout in ("padded", "tokens first", "of longer rows")),
    ],
)
def test_memory_order_changes_nothing(layout, heads_first, lse_layout):
    q, k, v, out, lse, *drawn = made((5, 7), 0.6, 2, 24, torch.float32, layout)
    expected = add_self_token(*(x.contiguous() for x in (q, k, v, out, lse)), *drawn, 24**-0.5)
    if not heads_first:
        out = out.transpose(1, 2).contiguous().transpose(1, 2)
    lse = {
        "whole": lambda x: x,
        "padded": lambda x: torch.nn.functional.pad(x, (0, 29), value=torch.nan)[..., :35],
        "tokens first": lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),
        "of longer rows": lambda x: torch.nn.functional.pad(x, (6, 3), value=torch.nan)[..., 6:41],
    }[lse_layout](lse)
    close(launch_self_token(q, k, v, out, lse, *drawn, 24**-0.5), expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("above", [200.0, -200.0])
def test_extreme_logits(above, dtype):
    """Its own logit far above all others: its own value; far below: as if the run's token counted once less."""
    q, k, v, out, lse, *lists = made((4, 4), 0.75, 1, 64, dtype)
    alone = q.clone()  # each token's key resembles its own query alone
    basis = torch.eye(64)[:16].expand(4, HEADS, -1, -1)
    alone, k = basis.to(dtype), (basis * above).to(dtype)
    keys, values = (_take_by_head(x, lists[0]).float() for x in (k, v))
    logits = alone.float() @ keys.transpose(-1, -2) + math.log(4.0)
    out, lse = (logits.softmax(-1) @ values).to(dtype), logits.logsumexp(-1)
    got, expected = (run(alone, k, v, out, lse, *lists, 1.0) for run in (launch_self_token, add_self_token))
    close(got, expected)
    if above > 0:
        close(got, v)


def test_a_plan_for_other_rows_is_refused():
    q, k, v, out, lse, _, runs = made((5, 7), 0.75, 1, 8, torch.float32)
    with pytest.raises(ValueError, match="3 rows does not fit a batch of 4"):
        launch_self_token(q, k, v, out, lse, torch.zeros(1, 3, 9, dtype=torch.int64), runs, 1.0)
    with pytest.raises(ValueError, match="3 rows does not fit a batch of 4"):
        launch_take_by_head(k, v, torch.zeros(2, 3, 5, dtype=torch.int64))


def test_what_serves(monkeypatch):
    """The kernel where it can be, plain torch for gradients, float64 and queries of another dtype."""
    ops = kernels.switch.load()
    given, launched = made((5, 7), 0.75, 1, 8, torch.float32), []
    monkeypatch.setitem(ops.LAUNCH, "self_token", lambda *x: launched.append(1) or launch_self_token(*x))
    close(kernels.add_self_token(*given, 8**-0.5), add_self_token(*given, 8**-0.5))
    assert launched == [1]
    double = [x.double() for x in given[:5]]
    for q, k, v, out, lse in (double, (given[0].half(), *given[1:5]), (given[0].clone().requires_grad_(), *given[1:5])):
        kernels.add_self_token(q, k, v, out, lse, *given[5:], 8**-0.5)
    assert launched == [1]


@pytest.mark.parametrize("config", [(64, 1), (512, 2), (8192, 8)])
def test_tiles_change_nothing(config):
    given = made((5, 7), 0.75, 1, 40, torch.float32)
    head_draws = drawn((5, 7), 0.75).head_draws
    for x, taken in zip(given[1:3], launch_take_by_head(*given[1:3], head_draws, config), strict=True):
        assert torch.equal(taken, _take_by_head(x, head_draws))
    close(launch_self_token(*given, 40**-0.5, config=config), add_self_token(*given, 40**-0.5))


def test_a_layer_adds_two_launches(monkeypatch):
    """Keys and values, and the kernel."""
    q, k, v, *_ = made((8, 8), 0.75, 1, 40, torch.float16)
    plan = drawn((8, 8), 0.75)
    joint = JointCall(True, ("flash",), lambda *_: None, keeps_self=True)
    joint.attend(q, k, v, 0, plan)  # what all layers share
    with Launches(monkeypatch) as launches:
        joint.attend(q, k, v, 0, plan)
    views = {"alias"}
    attention = [name for name in launches.names if "attention" in name]
    ours = sorted(name for name in launches.names if "attention" not in name and name not in views)
    assert len(attention) == 1 and ours == ["_self_token_kernel", "_take_by_head_kernel"]
