"""Queries that keep their own token, on real shapes: the kernel three ways, a whole layer on each fast attention."""

from __future__ import annotations

import math

import pytest
import torch

from shared_tome import ModelCall, ToMeConfig, kernels
from shared_tome.attention.combine import KERNELS, attend_with_lse, choose_kernel
from shared_tome.attention.sequence import JointCall
from shared_tome.core.self_token import _take_by_head, add_self_token, by_head

from .helpers import captured, launches

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA GPU on this machine"),
    pytest.mark.skipif(torch.cuda.is_available() and not kernels.ready(), reason="no Triton on this machine"),
]
CUDA = torch.device("cuda")
HALF = [torch.float16, torch.bfloat16]
# (grid, heads, channels of a head): SD 1.5 at 512, an odd one, SDXL at 1024, a transformer.
SHAPES = [((64, 64), 8, 40), ((33, 41), 8, 80), ((64, 64), 10, 64), ((32, 32), 24, 128), ((16, 16), 8, 160)]
CONFIG = ToMeConfig(method="sample", ratio=0.75, min_tokens=0, own_token=True)


@pytest.fixture(autouse=True)
def nothing_fell_back():
    yield
    assert not kernels.switch.load()._broken


@pytest.fixture(params=KERNELS)
def kernel(request):
    return request.param


def drawn(grid, batch=2, ratio=0.75, seed=3, step=2, rows=1):
    seed = torch.arange(rows, device="cuda") + seed if rows > 1 else torch.tensor(seed, device="cuda")
    call = ModelCall(CONFIG.replace(ratio=ratio), grid, CUDA, seed, torch.tensor(step, device="cuda"))
    x = torch.empty(batch, grid[0] * grid[1], 1, device="cuda")
    return call.attention(x, x, x, grid, keeps_self=True).plan


def made(plan, heads, d, dtype, around=(0, 0)):
    """q, k, v [B, H, L, d] as a host has them: views of [B, L, H * d]."""
    generator = torch.Generator("cuda").manual_seed(0)
    shape = (plan.batch, around[0] + plan.tokens + around[1], heads, d)
    return [torch.randn(shape, generator=generator, device="cuda").to(dtype).transpose(1, 2) for _ in range(3)]


def truth(q, k, v, plan, start=0):
    """[B, L, H, d] in float64, a head at a time: each key as often as it counts for each query."""
    length, rows = q.shape[2], []
    image = torch.arange(plan.tokens, device="cuda") + start
    for row in range(q.shape[0]):
        weights = []  # (L, L), by turn
        for turn in plan.head_draws:
            owner = turn[row % len(turn)][plan.groups[row]] + start  # (N,)
            counts = torch.ones(length, dtype=torch.float64, device="cuda")
            counts[image] = 0.0
            counts.index_add_(0, owner, torch.ones_like(owner, dtype=torch.float64))
            weight = counts.repeat(length, 1)
            weight[image, image] += 1.0
            weight[image, owner] -= 1.0
            weights.append(weight.log())
        heads = []
        for head in range(q.shape[1]):
            logits = q[row, head].double() @ k[row, head].double().T * q.shape[-1] ** -0.5
            heads.append((logits + weights[head % len(weights)]).softmax(-1) @ v[row, head].double())
        rows.append(torch.stack(heads, 1))
    return torch.stack(rows)


def never(*said):
    raise AssertionError(said)


def error(out, expected):
    assert out.shape == expected.shape and out.isfinite().all()
    return float((out.double() - expected).abs().max() / expected.abs().max())


@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize(("grid", "heads", "d"), SHAPES)
@pytest.mark.parametrize("rows", [1, 2])
def test_three_ways(grid, heads, d, dtype, rows):
    """Kernel, the same dtype in plain torch, float64; all from the same attention to the drawn tokens."""
    plan = drawn(grid, batch=4, rows=rows)
    q, k, v = made(plan, heads, d, dtype)
    key, value = (_take_by_head(x, plan.head_draws) for x in (k, v))
    assert all(map(torch.equal, kernels.take_by_head(k, v, plan.head_draws), (key, value)))
    logits = q.double() @ key.double().transpose(-1, -2) * d**-0.5 + plan.sizes[:, None, None].double().log()
    exact, lse = logits.softmax(-1) @ value.double(), logits.logsumexp(-1)
    out = exact.to(dtype)
    del logits
    weight = math.log(plan.tokens / plan.kept) if plan.even else 0.0  # in two places
    given = (q, k, v, out, lse.float() - weight, plan.head_draws, plan.runs, d**-0.5, weight)
    kernel, plain = kernels.add_self_token(*given), add_self_token(*given)
    place = by_head(plan.head_draws.index_select(2, plan.runs), 4, heads)[..., None].expand(k.shape)
    own = ((q.double() * k.double()).sum(-1) * d**-0.5 - lse).exp()[..., None]
    other = ((q.double() * k.double().gather(2, place)).sum(-1) * d**-0.5 - lse).exp()[..., None]
    expected = (exact + own * v.double() - other * v.double().gather(2, place)) / (1 + own - other)
    assert error(kernel, expected) <= max(1.5 * error(plain, expected), torch.finfo(dtype).eps)
    stands = (place[..., 0] == torch.arange(plan.tokens, device="cuda")).expand(q.shape[:3])
    assert torch.equal(kernel[stands], out[stands]) and torch.equal(plain[stands], out[stands])
    assert kernel.transpose(1, 2).is_contiguous()


@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize(("grid", "heads", "d"), SHAPES[:4])
@pytest.mark.parametrize("around", [(0, 0), (77, 0), (0, 13)], ids=["alone", "text before", "behind"])
@pytest.mark.parametrize("ratio", [0.75, 0.6])
def test_a_whole_layer_against_float64(kernel, grid, heads, d, dtype, around, ratio):
    if choose_kernel((kernel,), CUDA, dtype, d) is None:
        pytest.skip(f"this GPU or torch has no {kernel} kernel for heads of {d}")
    plan = drawn(grid, ratio=ratio, rows=2)
    q, k, v = made(plan, heads, d, dtype, around)
    with torch.inference_mode():
        out = JointCall(True, (kernel,), never, keeps_self=True).attend(q, k, v, around[0], plan)
    assert out.dtype == dtype and out.is_contiguous()
    # As test_joined for each part, and one more for what is added behind them.
    assert error(out, truth(q, k, v, plan, around[0])) < 5 * torch.finfo(dtype).eps
    joint = JointCall(True, (kernel,), never, keeps_self=True)
    assert torch.equal(out, joint.attend(q, k, v, around[0], plan))


@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("above", [200.0, -200.0])
def test_extreme_logits(kernel, dtype, above):
    """Its own logit far above all others, or far below."""
    if choose_kernel((kernel,), CUDA, dtype, 64) is None:
        pytest.skip(f"this GPU or torch has no {kernel} kernel")
    plan = drawn((8, 8))
    q = torch.eye(64, device="cuda", dtype=dtype).expand(2, 3, -1, -1).contiguous()
    k, v = (q * above).contiguous(), made(plan, 3, 64, dtype)[2]
    out = JointCall(True, (kernel,), never, keeps_self=True).attend(q, k, v, 0, plan, 1.0)
    assert error(out, truth(q * 8.0, k, v, plan)) < 3 * torch.finfo(dtype).eps
    if above > 0:
        assert error(out, v.transpose(1, 2).double()) < 2 * torch.finfo(dtype).eps


@torch.inference_mode()
@pytest.mark.parametrize(("grid", "heads", "d"), [((64, 64), 8, 40), ((64, 64), 10, 64), ((32, 32), 20, 64)])
def test_a_layer_adds_two_launches(kernel, grid, heads, d):
    """Keys and values, and the kernel; at heads of 64 the kernel is the attention itself."""
    if choose_kernel((kernel,), CUDA, torch.float16, d) is None:
        pytest.skip(f"this GPU or torch has no {kernel} kernel for heads of {d}")
    plan = drawn(grid)
    q, k, v = made(plan, heads, d, torch.float16)
    key, value = (_take_by_head(x, plan.head_draws) for x in (k, v))
    assert all(map(torch.equal, kernels.take_by_head(k, v, plan.head_draws), (key, value)))
    joint = JointCall(True, (kernel,), never, keeps_self=True)
    attention = launches(lambda: attend_with_lse(q, key, value, kernel))
    found = launches(lambda: joint.attend(q, k, v, 0, plan))
    assert attention > 0 and (
        found == (1 if plan.kept <= kernels.heads._LISTED else 2) if d == 64 else attention < found <= attention + 2
    )


@torch.inference_mode()
def test_a_graph_follows_the_step_and_the_seed():
    grid = (64, 64)
    q, k, v = made(drawn(grid), 8, 40, torch.float16)
    seed, step = torch.tensor(3, device="cuda"), torch.tensor(2, device="cuda")
    order = tuple(name for name in KERNELS if choose_kernel((name,), CUDA, torch.float16, 40))
    x = torch.empty(2, 4096, 1, device="cuda")

    def run():
        call = ModelCall(CONFIG, grid, CUDA, seed, step)
        joint = JointCall(True, order, never, keeps_self=True)
        return [joint.attend(q, k, v, 0, call.attention(x, x, x, grid, keeps_self=True).plan) for _ in range(3)]

    graph, replayed = captured(run)
    before = None
    for _ in range(2):
        step.add_(3)
        seed.add_(2**33 + 1)
        graph.replay()
        assert all(torch.equal(a, b) for a, b in zip(replayed, run(), strict=True))
        assert before is None or not torch.equal(before, replayed[0])
        before = replayed[0].clone()


@pytest.mark.slow
@pytest.mark.parametrize("around", [(0, 0), (77, 0)])
def test_one_compiled_graph(around):
    from torch._dynamo.testing import CompileCounterWithBackend

    grid, counter = (32, 32), CompileCounterWithBackend("inductor")
    q, k, v = made(drawn(grid), 10, 64, torch.float16, around)

    def layer(q, k, v, seed, step):
        call = ModelCall(CONFIG, grid, q.device, seed, step)
        image = k[:, :, around[0] :].transpose(1, 2).flatten(2)
        plan = call.attention(image, image, image, grid, keeps_self=True).plan
        return JointCall(True, KERNELS, never, keeps_self=True).attend(q, k, v, around[0], plan)

    torch._dynamo.reset()
    compiled = torch.compile(layer, fullgraph=True, backend=counter)
    with torch.inference_mode():
        for number in range(3):
            given = (q, k, v, torch.tensor(2**33 * number, device="cuda"), torch.tensor(number, device="cuda"))
            assert error(compiled(*given), layer(*given).double()) < 4 * torch.finfo(torch.float16).eps
    torch._dynamo.reset()
    assert counter.frame_count == 1
