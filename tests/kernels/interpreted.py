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
from shared_tome.core import channels
from shared_tome.core.groups import group_counts
from shared_tome.core.multires import Counts, cut_tiles, draw_keys
from shared_tome.core.noise import key
from shared_tome.core.partition import partition

assert os.environ.get("TRITON_INTERPRET") == "1" and kernels.ready()
from triton.runtime.interpreter import GridExecutor

from shared_tome.kernels.impl.mean import LANES
from shared_tome.merging import call as model_call

# A call splits for this many layers at once. For 16 it takes the interpreter longer than for all else of a test.
model_call._SPLIT_AT_ONCE = 3

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
            biases = None, weight, None
            alone = [kernels.extend_one(x, kind, b) for kind, (x, b) in enumerate(zip(parts, biases, strict=True))]
            assert all(torch.equal(a, b) for a, b in zip(got, alone, strict=True))
            expected = channels.extend_heads(*parts, weight)
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
    whole, narrow, middle = (512, 256), (32,), (64,)
    for dtype, widths in zip(DTYPES, ((whole, narrow), (whole, middle), (narrow, middle)), strict=True):
        x = tokens(2, (7, 9), channels, dtype)
        spread = groups.expand(2, -1)[..., None].expand(-1, -1, channels)
        exact = torch.zeros(2, 11, channels, dtype=torch.float64).scatter_add_(1, spread, x.double())
        exact = (exact / group_counts(groups, 11)[..., None]).to(dtype)
        for blocks in widths:
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
    x, grid, config = tokens(2, (5, 7), 16), (5, 7), CONFIG.replace(method=method)

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
    grid, config = (4, 6), CONFIG.replace(method=method)
    x = tokens(2, grid, 16, dtype)

    def layer(x, seed, step):
        plan = match_tokens(x, grid, config, seed=seed, step=step)
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
    tiles, tiled = cut_tiles((4, 8), x.device, 0, 32, 16, 16), torch.zeros(1, 1, 32, 16, dtype=torch.float16)

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
            kernels.extend_one(x[None], channels.VALUE)
            attention.attend(*3 * [torch.zeros(1, 1, 3, 64, dtype=torch.float16)], torch.zeros(1, 3))
            head, zero = x[:, None], torch.zeros(1, 1, 63, dtype=torch.int64)
            kernels.take_by_head(head, head, zero)
            kernels.add_self_token(head, head, head, head, torch.zeros(2, 1, 63), zero, zero[0, 0], 0.25)
            heads = torch.zeros(1, 1, 63, 64, dtype=torch.float16)
            if kernels.attends_drawn(heads, heads, heads, 0.1):  # not asked for again
                drawn = kernels.attend_drawn(*3 * [heads], zero, zero[0, 0], 0, 0.1, 0.0)
                assert drawn.shape == heads.shape and drawn.transpose(1, 2).is_contiguous()
            match_tokens(x, (1, 63), CONFIG.replace(partition="alternate", ratio=0.3), class_token=True)
            keys, counts = draw_keys(tiles, torch.tensor(5), 1), Counts(1, 0, 1, 0)
            kernels.choose_multires(tiled, tiled, tiles, counts, 0.3)
            kernels.attend_multires(*3 * [tiled], tiles, keys, counts, 0, 0.3)
    said = [record.getMessage() for record in caplog.records]
    assert len(said) == len(set(said)) and all("no compiler)" in line for line in said)
    assert ops._broken == {(name, torch.device("cpu")) for name in ops.LAUNCH}
