"""The kernels in Triton's interpreter on the CPU, on small and odd shapes. Started by test_interpreted.py in a process
of its own, because the interpreter must be asked for before triton is imported.

The interpreter cuts bfloat16 off where a GPU rounds, so what is off by one rounding there may be off by two here.
"""

from __future__ import annotations

import itertools
import logging
import os

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from shared_tome import ModelCall, ToMeConfig, kernels, match_tokens
from shared_tome.attention import bias as attention
from shared_tome.core import channels, matching
from shared_tome.core.curve import curve_order
from shared_tome.core.groups import group_counts, group_sum, take
from shared_tome.core.noise import key
from shared_tome.core.partition import partition
from shared_tome.core.sampling import kept_count, walk_rows, walk_table

assert os.environ.get("TRITON_INTERPRET") == "1" and kernels.ready()
from triton.runtime.interpreter import GridExecutor

from shared_tome.kernels.impl.match import launch_match
from shared_tome.kernels.impl.mean import LANES, heads_like
from shared_tome.kernels.impl.nearest import Config, launch_nearest

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
CONFIG = ToMeConfig(method="merge", ratio=0.5, min_tokens=0)


@pytest.fixture(autouse=True)
def nothing_fell_back(request):
    yield
    if "breaks" not in request.node.name:
        assert not kernels.switch.load()._broken


def select(similarity, target, src, dst, goes):
    """index [B, M] and groups [B, N] by the kernel `select`."""
    return kernels.switch.operator("select")(similarity, target, src, dst, goes)


def assert_sizes(index, groups, chain):
    kept = index.shape[1]
    assert torch.equal(kernels.group_sizes(groups, kept, chain), group_counts(groups, kept))


def in_torch(similarity, target, src, dst, goes):
    """The same by the specification."""
    return matching.grouped(similarity, target, src, dst, goes, True)


def tokens(batch, grid, channels, dtype=torch.float32):
    x = torch.randn(batch, grid[0] * grid[1], channels, generator=torch.Generator().manual_seed(0))
    x[:, 5:6] = 0.0  # similar to nothing
    return x.to(dtype)


def owners(plan):
    """[B, N]: the token that stands for each; whatever the order of merged tokens."""
    return plan.index.gather(1, plan.groups)


def sorted_rows(plan, merged):
    """Merged tokens [B, M, C] in the order of the tokens that stand for them."""
    order = plan.index.argsort(1)
    return merged.gather(1, order[..., None].expand_as(merged))


def members(chain, kept, row, place):
    """The tokens of a group but its own, by its chains, ascending."""
    return sorted(token for lane in lanes(chain, kept, row, place) for token in lane)


def lanes(chain, kept, row, place):
    """The tokens of each of a group's chains, in its order; none of groups that have none."""
    heads, following = chain
    found, alone = [], kept - (heads.shape[1] - kept) // LANES
    begin = kept + (place - alone) * LANES
    for at in heads[row, begin : begin + LANES].tolist() if place >= alone else ():
        found.append([])
        while at:
            found[-1].append(at - 1)
            at = int(following[row, at - 1])
    return found


def seeds(rows):
    return torch.tensor(7) if rows == 0 else torch.arange(2**40, 2**40 + rows)


@pytest.mark.parametrize(
    ("grid", "ratio", "rows"),
    [
        ((7, 9), 0.75, 3),
        ((16, 16), 0.75, 0),
        ((7, 9), 0.4, 0),
        ((1, 64), 0.99, 3),
        ((16, 16), 0.93, 0),
        ((7, 9), 0.1, 0),
    ],
)
def test_draw_is_equal_bit_for_bit(grid, ratio, rows):
    count = grid[0] * grid[1]
    kept = kept_count(count, int(count * ratio))
    order, seed = curve_order(grid, torch.device("cpu")), seeds(rows)
    for step in (torch.tensor(2**33 + 1), 5, torch.tensor(-3)):
        expected = walk_rows(walk_table(grid, kept, seed, order), count, step, 2, 3)
        assert torch.equal(kernels.draw(order, kept, seed, step, 2, 3), expected)


@pytest.mark.parametrize("name", ["random_2d", "fixed_2d"])
@pytest.mark.parametrize(
    ("grid", "stride", "rows"),
    [((7, 9), (2, 2), 3), ((16, 16), (2, 2), 0), ((7, 9), (3, 2), 0), ((1, 64), (2, 2), 0), ((3, 5, 6), (8, 2), 3)],
)
def test_split_is_equal_bit_for_bit(grid, stride, name, rows):
    config = CONFIG.replace(stride=stride, partition=name)
    for step in (torch.tensor(2**33 + 1), 5):
        got = kernels.split(grid, config, seeds(rows), step, 2, 1)[0]
        expected = partition(grid, config, key(seeds(rows), step, 2, 1))
        assert all(torch.equal(a, b.expand_as(a)) for a, b in zip(got, expected, strict=True))
        for place, ahead in enumerate(kernels.split(grid, config, seeds(rows), step, 1, 3)):
            expected = partition(grid, config, key(seeds(rows), step, 1 + place, 1))
            assert all(torch.equal(a, b.expand_as(a)) for a, b in zip(ahead, expected, strict=True))


# Tiles that do not divide the counts, one program for the dst or several.
WAYS = [None, Config(16, 16, 16, 4, 2), Config(16, 16, 32, 4, 2, 1), Config(32, 16, 16, 4, 2, 4)]


@pytest.mark.parametrize("way", range(len(WAYS)))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("grid", "batch", "channels"), [((7, 9), 3, 40), ((1, 64), 1, 16)])
def test_nearest_three_ways(grid, batch, channels, dtype, way):
    x = tokens(batch, grid, channels, dtype)
    src, dst = partition(grid, CONFIG, key(seeds(batch), 0, 0, 1))
    unit = x.double() / x.double().norm(dim=-1, keepdim=True).clamp_min(1e-30)
    scores = take(unit, src) @ take(unit, dst).transpose(1, 2)
    best = scores.amax(-1)

    def errors(made):
        similarity, target = made
        reached = scores.gather(2, target[..., None])[..., 0]
        return float((best - reached).max()), float((similarity.double() - best).abs().max())

    got = launch_nearest(x, src, dst, 0, WAYS[way])
    assert got[0].dtype == dtype and got[0].isfinite().all()
    missed, off = errors(got)
    _, off_in_torch = errors(matching.nearest(x, src, dst))
    cut = 2 if dtype == torch.bfloat16 else 1
    assert missed <= 2 * cut * off_in_torch + 1e-6 and off <= 2 * cut * off_in_torch + 1e-6
    spared = launch_nearest(x, src, dst, 1, WAYS[way])[1]
    assert spared.min() >= 1 and spared.max() < dst.shape[1]


def test_of_equal_similarities_the_first():
    x = torch.ones(2, 63, 16)
    src, dst = partition((7, 9), CONFIG, key(seeds(0), 0, 0, 1))
    assert not launch_nearest(x, src, dst)[1].any()
    for way in WAYS[1:]:
        assert not launch_nearest(x.half(), src, dst, 0, way)[1].any()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("grid", "batch"), [((7, 9), 3), ((16, 16), 1)])
def test_select_links_mean_gather(grid, batch, dtype):
    x = tokens(batch, grid, 40, dtype)
    src, dst = partition(grid, CONFIG, key(seeds(0), 0, 0, 1))
    similarity, target = matching.nearest(x.float(), src, dst)
    similarity = similarity.to(dtype)
    for goes in (1, 20, src.shape[1] - 1):
        index, groups = select(similarity, target, src, dst, goes)
        stay = src.shape[1] - goes
        place = torch.searchsorted(src[0], index[:, :stay].contiguous())
        assert (place.diff(dim=1) > 0).all() and torch.equal(index[:, stay:], dst.expand(batch, -1))
        kept_here = similarity.gather(1, place).sort(1).values
        assert torch.equal(kept_here, similarity.topk(stay, largest=False).values.sort(1).values)
        if dtype == torch.float32:  # no ties
            expected = matching.grouped(similarity, target, src, dst, goes, True)
            assert torch.equal(index, expected[0]) and torch.equal(groups, expected[1])
        kept = index.shape[1]
        chain, sizes = kernels.links(index, groups), group_counts(groups, kept)
        assert torch.equal(kernels.group_sizes(groups, index.shape[1], chain), sizes)
        got, bias = kernels.mean(x, index, groups, None, chain)
        torch.testing.assert_close(bias, sizes.log(), rtol=1e-6, atol=1e-7)
        spread = groups[..., None].expand(-1, -1, 40)
        exact = torch.zeros(batch, kept, 40, dtype=torch.float64).scatter_add_(1, spread, x.double())
        exact /= sizes[..., None].double()
        plain = (group_sum(x, groups, kept) / sizes[..., None]).to(dtype)
        cut = 4 if dtype == torch.bfloat16 else 1.01
        assert (got.double() - exact).abs().max() <= cut * (plain.double() - exact).abs().max() + 5e-7
        assert torch.equal(got[sizes == 1], take(x, index)[sizes == 1])
        assert torch.equal(kernels.take(got, groups), got.gather(1, groups[..., None].expand(-1, -1, 40)))


# One tile of src and dst, and several that do not divide the counts.
TILES = [(512, 512, 16384, 16), (16, 8, 32, 1)]


@pytest.mark.parametrize("tiles", TILES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("grid", "batch", "rows"), [((7, 9), 3, 0), ((8, 9), 2, 2), ((2, 2), 1, 0)])
def test_match_is_what_it_joins(grid, batch, rows, dtype, tiles):
    """nearest, select and links one after the other give the same, bit for bit; where similarities tie, too."""
    for x in (tokens(batch, grid, 24, dtype), torch.ones(batch, grid[0] * grid[1], 16, dtype=dtype)):
        src, dst = partition(grid, CONFIG, key(seeds(rows), 0, 0, 1))
        for way in WAYS[3:] if tiles == TILES[1] else WAYS[:1]:
            similarity, target = launch_nearest(x, src, dst, 0, way)
            count = src.shape[1]
            for goes in (1, count) if count < 8 else (count // 3, count):
                index, groups, *chain = launch_match(x, src, dst, goes, 0, 0, way, tiles)
                expected = (select if goes < count else in_torch)(similarity, target, src, dst, goes)
                assert torch.equal(index, expected[0]) and torch.equal(groups, expected[1])
                assert_sizes(index, groups, chain)
                for place in range(index.shape[1]):
                    others = (groups[-1] == place).nonzero()[:, 0].tolist()
                    others.remove(int(index[-1, place]))
                    assert members(chain, index.shape[1], -1, place) == others


@pytest.mark.parametrize("tiles", TILES, ids=str)
@pytest.mark.parametrize("distill", [0, 1])
def test_match_spares_protected_tokens(tiles, distill):
    x = tokens(2, (1, 51), 16, torch.float16)
    src, dst = partition((1, 51), CONFIG.replace(partition="alternate"), key(seeds(0), 0, 0, 1))
    similarity, target = launch_nearest(x, src, dst, distill)
    similarity[:, 0] = -torch.inf
    for goes in (1, 12, 25):
        index, groups, *chain = launch_match(x, src, dst, goes, 1, distill, None, tiles)
        expected = select(similarity, target, src, dst, goes)
        if distill:
            expected = matching.distill_second(*expected, src.shape[1] - goes)
            assert (index[:, 1] == 1).all() and (kernels.group_sizes(groups, index.shape[1], chain)[:, 1] == 1).all()
        assert torch.equal(index, expected[0]) and torch.equal(groups, expected[1])
        assert (index[:, 0] == 0).all() and (kernels.group_sizes(groups, index.shape[1], chain)[:, 0] == 1).all()
        assert_sizes(index, groups, chain)
        joined = [i for i in range(51) if int(index[1, groups[1, i]]) != i]
        assert all(i in members(chain, index.shape[1], 1, int(groups[1, i])) for i in joined)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_match_of_many_src_in_one_launch(dtype):
    """More than `select` holds; similarities that repeat often, so that many tie at the edge."""
    from shared_tome.kernels.impl.match import launch_grouped
    from shared_tome.kernels.impl.nearest import COARSE, TALLY

    torch.manual_seed(0)
    count, dst_count, rows = 9000, 3000, 2
    similarity = torch.randn(rows, count).to(dtype)
    similarity[:, ::7] = 0.5
    target = torch.randint(dst_count, (rows, count))
    src, dst = torch.randperm(count + dst_count)[None].split((count, dst_count), dim=1)
    code = similarity.view(torch.int16).long() & 0xFFFF
    code = torch.where(code >= 0x8000, 0xFFFF - code, code + 0x8000)
    for goes in (10, 3000, 8990):
        tally = torch.zeros(rows, TALLY, dtype=torch.int64)
        tally.scatter_add_(1, code >> 8, torch.ones_like(code)).scatter_add_(1, code + COARSE, torch.ones_like(code))
        heads = torch.zeros(heads_like(rows, count - goes + dst_count, dst_count), dtype=torch.int32)
        index, groups, _ = launch_grouped(similarity, target, src, dst, goes, tally.int(), heads)
        stays = torch.zeros(rows, count, dtype=torch.bool)
        order = code.argsort(dim=1, stable=True)[:, : count - goes]
        stays.scatter_(1, order, True)
        for row in range(rows):
            assert torch.equal(index[row], torch.cat((src[0, stays[row]], dst[0])))
            goal = groups[row, src[0, ~stays[row]]] - (count - goes)
            assert torch.equal(goal, target[row, ~stays[row]])
        assert_sizes(index, groups, (heads, None))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("d", [5, 40, 64])
def test_widen_is_equal_bit_for_bit(d, dtype):
    """Both orders of heads and tokens, strided inputs, one bias for all rows or one a row, other keys than queries."""
    q, k, v = (torch.randn(2, count, 3, 2 * d)[..., ::2].to(dtype) for count in (7, 5, 5))
    k, v = k.contiguous(), torch.cat((v, v), dim=-1)[..., ::2]
    bias = torch.tensor([[0.0, 0.7, 1.1, 3.3, 0.0], [1.6, 0.0, 0.7, 2.2, 5.0]])
    for rows in (1, 2):
        for heads_first in (False, True):
            parts, weight = (q, k, v), bias[:rows, :, None]
            if heads_first:
                parts, weight = [x.transpose(1, 2) for x in parts], bias[:rows, None]
            got = kernels.extend_heads(*parts, weight)
            alone = [kernels.extend_query(parts[0]), kernels.extend_key(parts[1], weight)]
            alone.append(kernels.extend_value(parts[2]))
            assert all(torch.equal(a, b) for a, b in zip(got, alone, strict=True))
            expected = [channels.extend_query(parts[0]), channels.extend_key(parts[1], weight)]
            expected.append(channels.extend_value(parts[2]))
            for here, there in zip(got, expected, strict=True):
                if dtype == torch.bfloat16:  # what the interpreter cuts off is in the second channel
                    assert torch.equal(here[..., :d], there[..., :d])
                    sums = (x[..., d:].float().sum(-1) for x in (here, there))
                    torch.testing.assert_close(*sums, rtol=2**-14, atol=1e-5)
                else:
                    assert torch.equal(here, there)


def watch_launches(monkeypatch, names):
    """Add the name of each kernel of ours that is launched."""
    launch = GridExecutor.__call__

    def counted(executor, *given, **named):
        names.append(executor.fn.__name__)
        with _disable_current_modes():
            return launch(executor, *given, **named)

    monkeypatch.setattr(GridExecutor, "__call__", counted)


class Launches(TorchDispatchMode):
    """Names of what a GPU would be asked to run: kernels of ours, and operations of torch that are no views."""

    FREE = ("empty", "new_empty", "view", "detach", "select", "slice", "expand", "unsqueeze", "unbind", "transpose")

    def __init__(self, monkeypatch):
        super().__init__()
        self.names = []
        watch_launches(monkeypatch, self.names)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        if not name.startswith(self.FREE):
            self.names.append(name)
        return func(*args, **(kwargs or {}))


def test_a_merged_layer_is_five_launches(monkeypatch):
    """And one more for all layers of a step; the heads' further channels one more where keys are weighed."""
    x, grid = tokens(2, (8, 8), 16, torch.float16), (8, 8)
    call = ModelCall(CONFIG, grid, x.device, seed=torch.tensor(3), step=torch.tensor(2))
    with Launches(monkeypatch) as launches:
        for _ in range(3):
            made = call.attention(x, x, x, grid)
            made.unmerge(made.q)
        assert made.bias is not None
    layer = ["_unit_kernel", "_nearest_kernel", "_match_kernel", "_mean_kernel", "_gather_kernel"]
    assert [name for name in launches.names if name != "_split_kernel"] == 3 * layer
    assert launches.names.count("_split_kernel") == 1
    with Launches(monkeypatch) as launches:
        q, k, v = (y.unflatten(-1, (2, 8)).transpose(1, 2) for y in (made.q, made.k, made.v))
        kernels.extend_heads(q, k, v, made.bias[:, None])
    assert launches.names == ["_widen_kernel"]


def test_equal_similarities_stay_by_their_order():
    src, dst = partition((7, 9), CONFIG, key(seeds(0), 0, 0, 1))
    index, groups = select(torch.zeros(1, 51), torch.zeros(1, 51, dtype=torch.int64), src, dst, 20)
    assert torch.equal(index[0, :31], src[0, :31]) and (groups.gather(1, src[:, 31:]) == 31).all()


def test_a_sum_depends_on_no_order():
    """The members dealt out to other chains, turned round, give the same bits, in every dtype."""
    for dtype in DTYPES:
        x = tokens(1, (7, 9), 16, dtype) * torch.logspace(-6, 4, 63)[:, None].to(dtype)
        index, groups = torch.tensor([[0]]), torch.zeros(1, 63, dtype=torch.int64)
        heads, following = kernels.links(index, groups)
        forward = kernels.mean(x, index, groups, None, (heads, following))[0]
        assert members((heads, following), 1, 0, 0) == list(range(1, 63))
        assert max(map(len, lanes((heads, following), 1, 0, 0))) <= -(-63 // LANES)
        dealt = [list(range(62, 40, -1)), [], list(range(1, 40)), [40]]
        for lane, members_of in enumerate(dealt):
            heads[0, 1 + lane] = (members_of or [-1])[0] + 1
            for here, after in itertools.pairwise([*members_of, -1]):
                following[0, here] = after + 1
        assert members((heads, following), 1, 0, 0) == list(range(1, 63))
        assert torch.equal(kernels.mean(x, index, groups, None, (heads, following))[0], forward)


@pytest.mark.parametrize("channels", [24, 96])
def test_a_mean_in_blocks_of_any_width(channels):
    """And where the last merged tokens alone may stand for others, as `match` has it, or all of them."""
    from shared_tome.kernels.impl.mean import launch_links, launch_mean

    groups = (torch.arange(63) % 20).clamp_min(9)[None].flip(1) - 9  # many of the first, three of the others
    order = torch.cat((torch.arange(7, 11), torch.arange(7)))  # those of many are the last
    groups, index = order.argsort()[groups], torch.stack([(groups[0] == g).nonzero()[0, 0] for g in order])[None]
    for dtype in DTYPES:
        x = tokens(2, (7, 9), channels, dtype)
        spread = groups.expand(2, -1)[..., None].expand(-1, -1, channels)
        exact = torch.zeros(2, 11, channels, dtype=torch.float64).scatter_add_(1, spread, x.double())
        exact = (exact / group_counts(groups, 11)[..., None]).to(dtype)
        for blocks in ((512, 256), (32,), (64,)):
            made = launch_mean(x, index, groups, *launch_links(index, groups, 11), blocks)
            torch.testing.assert_close(made[0], exact)
            torch.testing.assert_close(made[1], group_counts(groups, 11).log())
    # Groups of one token come first: the rest alone have chains.
    ones = torch.cat((torch.arange(5), 5 + torch.arange(58) % 4))[None]
    index = torch.cat((torch.arange(5), torch.arange(5, 9)))[None]
    found = [launch_mean(x, index, ones, *launch_links(index, ones, taking)) for taking in (4, 9)]
    assert all(map(torch.equal, *found)) and found[0][1][0, :5].eq(0).all() and found[0][1][0, 5:].gt(2).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("count", [2, 3, 5, 63])
def test_means_at_the_dtypes_end_stay_finite(dtype, count):
    x = torch.full((1, 63, 16), torch.finfo(dtype).max, dtype=dtype)
    x[..., 1::2] *= -1
    groups = (torch.arange(63) - count + 1).clamp_min(0)[None]
    index = torch.cat((torch.zeros(1, dtype=torch.int64), torch.arange(count, 63)))[None]
    merged, _ = kernels.mean(x, index, groups, None, kernels.links(index, groups))
    torch.testing.assert_close(merged, x[:, :1].expand_as(merged), rtol=2e-7, atol=0.0)


def test_what_is_not_finite_stays_so():
    for dtype in DTYPES:
        x = tokens(1, (7, 9), 16, dtype)
        x[0, 8, 3] = float("inf")
        x[0, 9, 4] = float("nan")
        index, groups = torch.tensor([[0]]), torch.zeros(1, 63, dtype=torch.int64)
        mean = kernels.mean(x, index, groups, None, kernels.links(index, groups))[0][0, 0]
        assert not mean[3].isfinite() and not mean[4].isfinite() and mean[5:].isfinite().all()


@pytest.mark.parametrize("method", ["merge", "merge_keys", "sample"])
def test_whole_plans(method):
    """Through match_tokens and ModelCall, with and without kernels: the same groups, in float32."""
    x, grid, config = tokens(2, (7, 9), 16), (7, 9), CONFIG.replace(method=method)

    def run():
        plan = match_tokens(x, grid, config, seed=4, step=torch.tensor(2), layer=1)
        call = ModelCall(config, grid, x.device, seed=torch.tensor([4, 5]), step=torch.tensor(2))
        merged = call.attention(x, x, x, grid)
        merged_sizes = sorted_rows(plan, plan.sizes[..., None])
        found = [sorted_rows(plan, plan.merge(x)), owners(plan), plan.index.sort(1).values, merged_sizes]
        if method != "sample":
            found.append(sorted_rows(plan, plan.key_bias()[..., None]))
        return *found, plan.unmerge(plan.merge(x)), merged.k.sum(1), merged.unmerge(merged.q)

    got = run()
    with kernels.use("reference"):
        expected = run()
    for here, there in zip(got, expected, strict=True):
        torch.testing.assert_close(here, there, rtol=1e-6, atol=1e-6)


def test_a_class_token_keeps_its_place():
    x, config = tokens(2, (1, 50), 16), CONFIG.replace(partition="alternate", ratio=0.3)

    def run():
        return match_tokens(x, (1, 50), config, class_token=True, distill_token=True)

    got = run()
    with kernels.use("reference"):
        expected = run()
    assert torch.equal(got.index, expected.index) and torch.equal(got.groups, expected.groups)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("method", ["merge", "sample"])
def test_one_compiled_graph(method, dtype):
    from torch._dynamo.testing import CompileCounterWithBackend

    counter = CompileCounterWithBackend("aot_eager")
    config, x = CONFIG.replace(method=method), tokens(2, (6, 8), 16, dtype)

    def layer(x, seed, step):
        plan = match_tokens(x, (6, 8), config, seed=seed, step=step)
        return plan.unmerge(plan.merge(x)), plan.sizes

    compiled = torch.compile(layer, fullgraph=True, backend=counter)
    with torch.no_grad():
        for number in range(3):
            given = (x, torch.tensor(2**33 * number), torch.tensor(number))
            assert all(torch.equal(a, b) for a, b in zip(compiled(*given), layer(*given), strict=True))
    assert counter.frame_count == 1


def test_gradients_go_through_plain_torch():
    x = tokens(2, (7, 9), 16)[:, :, :].requires_grad_()
    match_tokens(x, (7, 9), CONFIG, seed=1).merge(x).sum().backward()
    assert x.grad.isfinite().all() and x.grad.abs().sum() > 0


@pytest.mark.parametrize(
    "error", [torch.cuda.OutOfMemoryError("CUDA out of memory"), RuntimeError("CUDA error: out of memory")], ids=repr
)
def test_a_kernel_short_of_memory_is_not_off(monkeypatch, caplog, error):
    ops = kernels.switch.load()

    def fail(*given):
        raise error

    x, index = tokens(2, (7, 9), 16), torch.arange(4)[None]
    with monkeypatch.context() as patch:
        patch.setitem(ops.LAUNCH, "gather", fail)
        with pytest.raises(type(error)):
            kernels.take(x, index)
    assert torch.equal(kernels.take(x, index), x[:, :4]) and not caplog.text


def test_a_kernel_that_breaks_on_one_device_runs_on_others(monkeypatch, caplog):
    """A small GPU beside a large one."""
    ops, small, x = kernels.switch.load(), torch.device("cuda", 1), tokens(2, (7, 9), 16)
    monkeypatch.setattr(ops, "_broken", {(name, small) for name in ops.LAUNCH})
    launched, launch = [], ops.LAUNCH["gather"]
    monkeypatch.setitem(ops.LAUNCH, "gather", lambda *given: launched.append(1) or launch(*given))
    kernels.take(x, torch.arange(4)[None])
    assert launched and not ops.runs("attend_drawn", small) and ops.runs("attend_drawn", x.device)

    def fail(*given):
        raise RuntimeError("out of resource: shared memory")

    monkeypatch.setitem(ops.LAUNCH, "gather", fail)
    kernels.take(x, torch.arange(4)[None])
    assert "the gather kernel does not run on cpu, plain torch takes over there" in caplog.text
    assert not ops.runs("gather", x.device) and ops.runs("gather", torch.device("cuda", 0))


def test_a_kernel_that_breaks_is_said_once(monkeypatch, caplog):
    """Plain torch takes over for good; nothing is raised."""
    ops = kernels.switch.load()
    monkeypatch.setattr(ops, "_broken", set())
    x = tokens(2, (7, 9), 16)
    expected = match_tokens(x, (7, 9), CONFIG, seed=1)

    def fail(*given, **named):
        raise RuntimeError("no compiler\nand more")

    for name in ops.LAUNCH:
        monkeypatch.setitem(ops.LAUNCH, name, fail)
    with caplog.at_level(logging.WARNING, logger="ToMe"):
        for _ in range(2):
            plan = match_tokens(x, (7, 9), CONFIG, seed=1)
            torch.testing.assert_close(
                sorted_rows(plan, plan.merge(x)), sorted_rows(expected, expected.merge(x)), rtol=1e-6, atol=1e-6
            )
            torch.testing.assert_close(plan.unmerge(plan.merge(x)), expected.unmerge(expected.merge(x)))
            assert torch.equal(owners(plan), owners(expected))
            match_tokens(x.half(), (7, 9), CONFIG, seed=1)
            match_tokens(x, (7, 9), CONFIG.replace(method="sample"), seed=1)
            kernels.extend_heads(x[None], x[None], x[None], torch.ones(1, 1, 63))
            kernels.extend_value(x[None])
            attention.attend(*3 * [torch.zeros(1, 1, 3, 64, dtype=torch.float16)], torch.zeros(1, 3))
            head, zero = x[:, None], torch.zeros(1, 1, 63, dtype=torch.int64)
            kernels.take_turns(head, head, zero)
            kernels.keep_own(head, head, head, head, torch.zeros(2, 1, 63), zero, zero[0, 0], 0.25)
            heads = torch.zeros(1, 1, 63, 64, dtype=torch.float16)
            if kernels.attends_drawn(heads, heads, heads, 0.1):  # not asked for again
                drawn = kernels.attend_drawn(*3 * [heads], None, zero, zero[0, 0], 0, 0.1, 0.0)
                assert drawn.shape == heads.shape and drawn.transpose(1, 2).is_contiguous()
            match_tokens(x, (1, 63), CONFIG.replace(partition="alternate", ratio=0.3), class_token=True)
    said = [record.getMessage() for record in caplog.records]
    assert len(said) == len(set(said)) and all("no compiler)" in line for line in said)
    assert ops._broken == {(name, torch.device("cpu")) for name in ops.LAUNCH}
