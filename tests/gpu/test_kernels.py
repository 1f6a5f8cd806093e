"""The kernels on real shapes, three ways: kernel, the same dtype in plain torch, float64.

The similarity reached is compared, not the index: where similarities tie in half precision, several are right.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from shared_tome import ModelCall, ToMeConfig, kernels, match_tokens
from shared_tome.core import channels, matching, sampling
from shared_tome.core.curve import curve_order
from shared_tome.core.groups import group_counts, group_sum, take
from shared_tome.core.noise import key
from shared_tome.core.partition import partition

from .helpers import captured, launches

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA GPU on this machine"),
    pytest.mark.skipif(torch.cuda.is_available() and not kernels.ready(), reason="no Triton on this machine"),
]
DTYPES = [torch.float16, torch.bfloat16, torch.float32]
SHAPES = [((64, 64), 320), ((128, 128), 320), ((33, 41), 320), ((64, 64), 640), ((32, 32), 1280), ((40, 24), 72)]
CONFIG = ToMeConfig(method="merge", ratio=0.5, min_tokens=0)


@pytest.fixture(autouse=True)
def nothing_fell_back():
    yield
    assert not kernels.switch.load()._broken


@pytest.fixture
def plain():
    """A function that runs another without kernels."""

    def run(call):
        with kernels.use("reference"):
            return call()

    return run


def smooth(grid, channels, dtype, batch=2):
    """Tokens that resemble their neighbours, as a picture's do."""
    torch.manual_seed(0)
    coarse = torch.randn(batch, channels, 6, 6, device="cuda")
    x = F.interpolate(coarse, size=grid, mode="bilinear") + 0.3 * torch.randn(batch, channels, *grid, device="cuda")
    return x.flatten(2).transpose(1, 2).to(dtype)  # (B, N, C), channels not innermost in memory


def seeds(rows):
    return torch.tensor(7, device="cuda") if rows == 0 else torch.arange(2**40, 2**40 + rows, device="cuda")


@pytest.mark.parametrize("rows", [0, 3])
@pytest.mark.parametrize("ratio", [0.3, 0.75, 0.9375, 0.98])
@pytest.mark.parametrize("grid", [(64, 64), (256, 256), (33, 41), (1, 500)])
def test_draw_is_equal_bit_for_bit(grid, ratio, rows):
    tokens = grid[0] * grid[1]
    kept = max(-(-tokens // 64), tokens - int(tokens * ratio))
    order, seed, step = curve_order(grid, torch.device("cuda")), seeds(rows), torch.tensor(9, device="cuda")
    expected = sampling.draw(order, kept, seed, step, 3, 16)
    assert torch.equal(kernels.draw(order, kept, seed, step, 3, 16), expected)
    assert torch.equal(kernels.draw(order, kept, seed, 9, 3, 16), expected)


@pytest.mark.parametrize("rows", [0, 3])
@pytest.mark.parametrize("name", ["random_2d", "fixed_2d"])
@pytest.mark.parametrize("stride", [(2, 2), (3, 2), (8, 8)])
@pytest.mark.parametrize("grid", [(64, 64), (33, 41), (1, 500), (3, 17, 20)])
def test_split_is_equal_bit_for_bit(grid, stride, name, rows, plain):
    config = CONFIG.replace(stride=stride, partition=name)
    seed, step = seeds(rows), torch.tensor(9, device="cuda")
    got = kernels.split(grid, config, seed, step, 2, 1)[0]
    expected = partition(grid, config, key(seed, step, 2, 1))
    assert all(torch.equal(a, b.expand_as(a)) for a, b in zip(got, expected, strict=True))
    for layer, ahead in enumerate(kernels.split(grid, config, seed, step, 3, 16), start=3):
        expected = partition(grid, config, key(seed, step, layer, 1))
        assert all(torch.equal(a, b.expand_as(a)) for a, b in zip(ahead, expected, strict=True))


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
@pytest.mark.parametrize(("grid", "channels"), SHAPES)
def test_nearest_three_ways(grid, channels, dtype):
    from shared_tome.kernels.impl.nearest import launch_nearest

    x = smooth(grid, channels, dtype)
    src, dst = partition(grid, CONFIG, key(seeds(0), 0, 0, 1))
    unit = x.double() / x.double().norm(dim=-1, keepdim=True)
    scores = take(unit, src) @ take(unit, dst).transpose(1, 2)
    best = scores.amax(-1)

    def errors(made):
        similarity, target = made
        reached = scores.gather(2, target[..., None])[..., 0]
        return float((best - reached).max()), float((similarity.double() - best).abs().max())

    missed, off = errors(launch_nearest(x, src, dst))
    _, off_in_torch = errors(matching.nearest(x, src, dst))
    assert missed <= 2 * off_in_torch and off <= 2 * off_in_torch + 1e-6
    again = [launch_nearest(x, src, dst) for _ in range(2)]
    assert all(torch.equal(a, b) for a, b in zip(*again, strict=True))
    assert launch_nearest(x, src, dst, 1)[1].min() >= 1


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("grid", "channels"), SHAPES)
def test_select_mean_and_gather(grid, channels, dtype):
    x = smooth(grid, channels, dtype)
    src, dst = partition(grid, CONFIG, key(seeds(0), 0, 0, 1))
    similarity, target = matching.nearest(x, src, dst)
    goes = int(grid[0] * grid[1] * 0.4)
    index, groups = kernels.tokens._grouped(similarity, target, src, dst, goes, True)
    stay = src.shape[1] - goes
    place = torch.searchsorted(src[0], index[:, :stay].contiguous())
    expected = similarity.topk(stay, largest=False).values
    assert torch.equal(similarity.gather(1, place).sort(1).values, expected.sort(1).values)
    assert (place.diff(dim=1) > 0).all() and torch.equal(index[:, stay:], dst.expand(2, -1))
    assert torch.equal(groups.gather(1, index), torch.arange(index.shape[1], device="cuda").expand(2, -1))

    kept = index.shape[1]
    chain = kernels.links(index, groups)
    sizes = group_counts(groups, kept)
    assert (
        torch.equal(kernels.group_sizes(groups, index.shape[1], chain), sizes) and sizes.sum() == 2 * grid[0] * grid[1]
    )
    got, bias = kernels.mean(x, index, groups, None, chain)
    torch.testing.assert_close(bias, sizes.log(), rtol=1e-6, atol=1e-7)
    spread = groups[..., None].expand(-1, -1, channels)
    exact = torch.zeros(2, kept, channels, dtype=torch.float64, device="cuda").scatter_add_(1, spread, x.double())
    exact /= sizes[..., None].double()
    in_torch = (group_sum(x, groups, kept) / sizes[..., None]).to(dtype)
    bound = 1.01 * (in_torch.double() - exact).abs().max() + 2e-7 * exact.abs().max()
    assert (got.double() - exact).abs().max() <= bound
    alone = sizes == 1
    assert torch.equal(got[alone], take(x, index)[alone])  # exact where nothing was merged
    for _ in range(5):  # chains in another order, the same sums
        assert torch.equal(kernels.mean(x, index, groups, None, kernels.links(index, groups))[0], got)
    assert torch.equal(kernels.take(got, groups), take(got.cpu(), groups.cpu()).cuda())


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
@pytest.mark.parametrize("share", [0.1, 0.5, 0.75])
@pytest.mark.parametrize(("grid", "channels"), [*SHAPES, ((256, 256), 64)])
def test_match_is_what_it_joins(grid, channels, share, dtype):
    """nearest, then the src that stay by a stable sort, then links: the same, bit for bit; and the same on repeat."""
    from shared_tome.kernels.impl.nearest import launch_nearest

    x = smooth(grid, channels, dtype)
    src, dst = partition(grid, CONFIG, key(seeds(0), 0, 0, 1))
    goes = min(src.shape[1], int(grid[0] * grid[1] * share))
    similarity, target = launch_nearest(x, src, dst)
    stay = src.shape[1] - goes
    stays = torch.zeros(similarity.shape, dtype=torch.bool, device="cuda")
    stays.scatter_(1, similarity.float().argsort(dim=1, stable=True)[:, :stay], True)
    for _ in range(3):
        index, groups, chain = kernels.match(x, src, dst, goes)
        for row in range(2):
            assert torch.equal(index[row], torch.cat((src[0, stays[row]], dst[0])))
            assert torch.equal(groups[row, src[0, ~stays[row]]], target[row, ~stays[row]] + stay)
        assert torch.equal(groups.gather(1, index), torch.arange(index.shape[1], device="cuda").expand(2, -1))
        sizes = group_counts(groups, index.shape[1])
        assert torch.equal(kernels.group_sizes(groups, index.shape[1], chain), sizes)
        # Another way to the same chains gives the same means.
        other = kernels.links(index, groups)
        assert torch.equal(
            kernels.mean(x, index, groups, None, chain)[0], kernels.mean(x, index, groups, None, other)[0]
        )


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
@pytest.mark.parametrize(("grid", "channels"), SHAPES)
def test_match_three_ways(grid, channels, dtype, plain):
    """The similarity that all merged pairs reach together, in float64."""
    x = smooth(grid, channels, dtype)
    src, dst = partition(grid, CONFIG, key(seeds(0), 0, 0, 1))
    goes = int(grid[0] * grid[1] * 0.5)
    unit = x.double() / x.double().norm(dim=-1, keepdim=True)
    best = (take(unit, src) @ take(unit, dst).transpose(1, 2)).amax(-1).topk(goes).values.sum(1)

    def missed(index, groups):
        """How much less than the best, for each merged pair."""
        reached = (unit * take(unit, index.gather(1, groups))).sum(-1)  # (B, N), 1 where a token stands for itself
        alone = x.shape[1] - goes
        return float(((best - (reached.sum(1) - alone)) / goes).abs().max())

    here = missed(*kernels.match(x, src, dst, goes)[:2])
    there = missed(*plain(lambda: matching.match(x, src, dst, goes)))
    assert here <= 2 * there + 1e-9


@pytest.mark.parametrize("distill", [False, True])
def test_match_spares_protected_tokens(distill, plain):
    x = smooth((24, 24), 64, torch.float16)
    config = CONFIG.replace(partition="alternate", ratio=0.3)

    def run():
        return match_tokens(x, (24, 24), config, class_token=True, distill_token=distill)

    got, expected = run(), plain(run)
    for plan in (got, expected):
        assert all((plan.index[:, i] == i).all() and (plan.sizes[:, i] == 1).all() for i in range(1 + distill))
        assert (plan.groups[:, 0] == 0).all() and plan.sizes.sum() == 2 * 576
        after = plan.index[:, 1 + distill : 288 - int(0.3 * 576)]
        assert (after.diff(dim=1) > 0).all()  # the src that stay keep their order
    owners = [plan.index.gather(1, plan.groups) for plan in (got, expected)]
    assert (owners[0] == owners[1]).float().mean() > 0.95


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("d", [40, 64, 72, 160])
@pytest.mark.parametrize("rows", [1, 2])
def test_widen_is_equal_bit_for_bit(d, rows, dtype):
    q, k, v = (torch.randn(2, count, 5, d, device="cuda").to(dtype) for count in (700, 333, 333))
    v = torch.cat((v, v), dim=-1)[..., ::2]
    bias = torch.randint(1, 40, (rows, 333), device="cuda").float().log()
    for parts, weight in (((q, k, v), bias[:, :, None]), ([x.transpose(1, 2) for x in (q, k, v)], bias[:, None])):
        expected = channels.extend_heads(*parts, weight)
        got = kernels.extend_heads(*parts, weight)
        biases = None, weight, None
        alone = [kernels.extend_one(x, kind, b) for kind, (x, b) in enumerate(zip(parts, biases, strict=True))]
        for made in (got, alone):
            assert all(torch.equal(a, b) for a, b in zip(made, expected, strict=True))


@pytest.mark.parametrize("batch", [2, 4])
@pytest.mark.parametrize("size", [32, 64, 128])
def test_a_merged_layer_is_five_launches(size, batch):
    """And one more in a step for all of its layers; one more still where heads are widened to weigh keys."""
    grid = (size, size)
    x = smooth(grid, 320, torch.float16, batch).contiguous()
    seed, step = torch.tensor(3, device="cuda"), torch.tensor(2, device="cuda")

    def layers(widens):
        call = ModelCall(CONFIG, grid, x.device, seed=seed, step=step)
        for _ in range(4):
            made = call.attention(x, x, x, grid)
            if widens:
                q, k, v = (y.unflatten(-1, (8, 40)) for y in (made.q, made.k, made.v))
                kernels.extend_heads(q, k, v, made.bias[:, :, None])
            made.unmerge(made.q)

    assert launches(lambda: layers(False)) <= 4 * 5 + 1
    assert launches(lambda: layers(True)) <= 4 * 6 + 1


def test_a_single_group_and_what_is_not_finite():
    """A flat picture puts thousands into one group; infinity is not made a number."""
    for dtype in DTYPES:
        x = torch.ones(1, 4096, 64, device="cuda", dtype=dtype)
        plan = match_tokens(x, (64, 64), CONFIG.replace(ratio=0.75))
        assert plan.sizes.max() > 3000 and torch.equal(plan.merge(x), torch.ones_like(plan.merge(x)))
        x[0, :, 5] = float("inf")
        plan = match_tokens(torch.ones_like(x), (64, 64), CONFIG.replace(ratio=0.75))
        assert not plan.merge(x)[..., 5].isfinite().any() and plan.merge(x)[..., 4].isfinite().all()


@pytest.mark.parametrize("method", ["merge", "merge_queries", "prune"])
def test_a_plan_is_as_good_as_in_plain_torch(method, plain):
    x = smooth((64, 64), 320, torch.float16)
    config = CONFIG.replace(method=method)

    def error():
        plan = match_tokens(x, (64, 64), config, seed=3)
        return float((plan.unmerge(plan.merge(x)).float() - x.float()).square().mean())

    here, there = error(), plain(error)
    assert here == pytest.approx(there, rel=0.01)


def test_a_captured_graph_follows_step_and_seed():
    x, grid = smooth((64, 64), 320, torch.float16), (64, 64)
    step, seed = torch.zeros((), dtype=torch.int64, device="cuda"), torch.tensor([3, 4], device="cuda")

    def run():
        made = []
        for method in ("merge", "sample"):
            call = ModelCall(CONFIG.replace(method=method), grid, x.device, seed=seed, step=step)
            merged = call.attention(x, x, x, grid)
            made += [merged.unmerge(merged.q), merged.k]
        return made

    graph, replayed = captured(run)
    for _ in range(2):
        step.add_(3)
        seed.add_(2**33 + 1)
        graph.replay()
        assert all(torch.equal(a, b) for a, b in zip(replayed, run(), strict=True))


@pytest.mark.slow
def test_one_compiled_graph():
    from torch._dynamo.testing import CompileCounterWithBackend

    x = smooth((32, 32), 64, torch.float16)

    def layer(x, config, seed, step):
        plan = match_tokens(x, (32, 32), config, seed=seed, step=step)
        return plan.unmerge(plan.merge(x)), plan.sizes

    with torch.no_grad():
        for method in ("merge", "sample"):
            counter = CompileCounterWithBackend("inductor")
            compiled = torch.compile(layer, fullgraph=True, backend=counter)
            for number in range(3):
                given = (x, CONFIG.replace(method=method), seeds(0) + number, torch.tensor(number, device="cuda"))
                got, expected = compiled(*given), layer(*given)
                assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))
            assert counter.frame_count == 1
