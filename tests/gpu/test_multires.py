"""Attention to keys at three resolutions on a GPU: the choice, the attention to it, graphs and launches."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from support.masks import KINDS, mask_of

from shared_tome import ModelCall, ToMeConfig, kernels
from shared_tome.attention.combine import TORCHS
from shared_tome.attention.multires import NO_KERNEL
from shared_tome.attention.sequence import JointCall
from shared_tome.core import multires
from shared_tome.core.multires import cut_tiles, draw_keys, shares, tile_counts

from .helpers import captured, launches

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA GPU on this machine"),
]
# grid, tokens before the image, behind it, tokens of a tile and of a query tile, channels.
CASES = {
    "128 channels": ((40, 56), 77, 0, 64, 128, 128),
    "64 channels, odd picture": ((37, 51), 0, 33, 64, 128, 64),
    "32 channels, video": ((5, 24, 18), 0, 0, 64, 64, 32),
    "96 channels": ((32, 32), 5, 0, 64, 128, 96),
    "256 channels": ((24, 32), 40, 0, 64, 128, 256),
    "40 channels, small tiles": ((17, 15), 9, 3, 16, 64, 40),
}


def made(name, dtype, rows=2, heads=3):
    grid, before, behind, size, queries, d = CASES[name]
    device = torch.device("cuda")
    tiles = cut_tiles(grid, device, before, before + math.prod(grid) + behind, size, queries)
    generator = torch.Generator(device).manual_seed(0)
    q, k, v = (
        torch.randn(rows, len(tiles.rows), heads, d, generator=generator, device=device).to(dtype).transpose(1, 2)
        for _ in range(3)
    )
    return tiles, 2 * q, k, v


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", list(CASES))
def test_three_ways(name, dtype):
    """The choice reaches what plain torch's does; the attention to it is as near to float32 as half precision is."""
    from shared_tome.kernels.impl.multires import launch_attend, launch_choose

    tiles, q, k, v = made(name, dtype)
    drawn = draw_keys(tiles, torch.tensor([3, 4], device="cuda"), torch.tensor(2, device="cuda"))
    scale = q.shape[-1] ** -0.5
    for ratio in (0.5, 0.77):
        counts = tile_counts(tiles, *shares(ratio), (0.3, 0.5))
        found = multires.scores(q, k, tiles, scale)
        lists = launch_choose(q, k, tiles, counts, scale)
        assert torch.equal(lists.sort(-1).values, torch.arange(tiles.count, device="cuda").short().expand_as(lists))
        for kept in {counts.whole, counts.whole + counts.half}:
            wanted = multires.choose(found, tiles, counts)
            reached = [
                found.float().clamp_max(99.0).gather(-1, x[:, :, : tiles.image_query_tiles, :kept].long()).mean()
                for x in (lists, wanted)
            ]
            torch.testing.assert_close(*reached, rtol=2e-3, atol=2e-3)
        got = launch_attend(q, k, v, tiles, drawn, lists, counts, 5, scale)
        exact = multires.attend(*(x.float() for x in (q, k, v)), tiles, drawn, lists, counts, 5, scale)
        assert got.shape == q.shape and got.transpose(1, 2).is_contiguous()
        assert (got - exact).abs().max() < 2 * torch.finfo(dtype).eps * exact.abs().max()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "name", ["128 channels", "64 channels, odd picture", "256 channels", "40 channels, small tiles"]
)
def test_a_mask(name, kind):
    from shared_tome.kernels.impl.multires import launch_attend, launch_choose

    tiles, q, k, v = made(name, torch.bfloat16)
    grid, before = CASES[name][:2]
    rows, heads, length, d = q.shape
    mask = mask_of(kind, rows, heads, length, before, before + math.prod(grid), torch.bfloat16).cuda()
    drawn, counts = draw_keys(tiles, torch.tensor(3, device="cuda"), 0), tile_counts(tiles, *shares(0.77))
    lists = launch_choose(q, k, tiles, counts, d**-0.5)
    got = launch_attend(q, k, v, tiles, drawn, lists, counts, 5, d**-0.5, mask=mask)
    exact = multires.attend(*(x.float() for x in (q, k, v)), tiles, drawn, lists, counts, 5, d**-0.5, mask)
    assert (got - exact).abs().max() < 2 * torch.finfo(torch.bfloat16).eps * exact.abs().max()
    spread = mask.expand(-1, -1, length, -1)
    assert torch.equal(got, launch_attend(q, k, v, tiles, drawn, lists, counts, 5, d**-0.5, mask=spread))


@pytest.mark.parametrize("name", ["128 channels", "40 channels, small tiles"])
def test_what_is_seen_of_the_choice_is_the_launches(name):
    """And it is timed: some share of the attention's time."""
    from shared_tome.inspect.record import ChoosingTimer
    from shared_tome.kernels.impl.multires import launch_choose

    tiles, q, k, v = made(name, torch.bfloat16)
    counts, scale = tile_counts(tiles, *shares(0.77)), q.shape[-1] ** -0.5
    assert torch.equal(kernels.choose_multires(q, k, tiles, counts, scale), launch_choose(q, k, tiles, counts, scale))
    timer = ChoosingTimer()
    drawn = draw_keys(tiles, torch.tensor(3, device="cuda"), 0)
    timer.see(q, k, v, tiles, drawn, counts, 0, scale, None)
    assert 0.0 < timer.share < 1.0


def test_all_whole_is_attention():
    from shared_tome.kernels.impl.multires import launch_multires

    tiles, q, k, v = made("128 channels", torch.bfloat16)
    drawn = draw_keys(tiles, torch.tensor(3, device="cuda"), 0)
    got = launch_multires(q, k, v, tiles, drawn, tile_counts(tiles, 1.0, 0.0), 0, 128**-0.5)
    expected = F.scaled_dot_product_attention(*(x.double() for x in (q, k, v)))
    assert (got - expected).abs().max() < 2 * torch.finfo(torch.bfloat16).eps * expected.abs().max()


def test_three_launches_one_result_and_another_step_in_a_graph():
    from shared_tome.kernels.impl.multires import launch_multires

    tiles, q, k, v = made("128 channels", torch.bfloat16)
    counts = tile_counts(tiles, *shares(0.77))
    drawn = draw_keys(tiles, torch.tensor(3, device="cuda"), 0)

    def run():
        return launch_multires(q, k, v, tiles, drawn, counts, 1, 128**-0.5)

    assert launches(run) == 3
    first = run().clone()
    assert torch.equal(first, run())
    graph, out = captured(run)
    graph.replay()
    assert torch.equal(out, first)
    drawn.table.copy_(draw_keys(tiles, torch.tensor(3, device="cuda"), 1).table)
    graph.replay()
    assert torch.equal(out, run()) and not torch.equal(out, first)


def call_and_plan(grid, ratio=0.77, seed=3, step=2, batch=2):
    ours = ToMeConfig(method="multires", ratio=ratio, min_tokens=0)
    call = ModelCall(ours, grid, torch.device("cuda"), seed=seed, step=step)
    return call.plan(torch.zeros(batch, math.prod(grid), 1, device="cuda"), grid)


@pytest.mark.parametrize(("grid", "before"), [((64, 72), 77), ((24, 32), 5), ((5, 24, 40), 0)])
def test_a_models_attention_goes_by_the_kernel(grid, before):
    """The way of a host: plan, JointCall, front door. Within half precision of the specification; no word said."""
    said, plan = [], call_and_plan(grid)
    joint = JointCall(True, TORCHS, lambda *words: said.append(words), keeps_self=True)
    length = before + math.prod(grid)
    generator = torch.Generator("cuda").manual_seed(0)
    q, k, v = (
        torch.randn(2, length, 3, 64, generator=generator, device="cuda").half().transpose(1, 2) for _ in range(3)
    )
    got = joint.attend(q, k, v, before, plan)
    assert launches(lambda: joint.attend(q, k, v, before, plan)) == 3 and not said
    with kernels.use("reference"):
        assert joint.attend(q, k, v, before, plan) is not None and len(said) == 1  # sample in its place
    ((tiles, drawn, counts),) = joint.multires.tiles.values()
    scale = q.shape[-1] ** -0.5
    expected = multires.attend_multires(q, k, v, tiles, drawn, counts, plan.layer, scale)
    # A tile at the edge of the choice may fall the other way: few queries see it.
    off = (got.transpose(1, 2).float() - expected.float()).abs().amax(-1)
    assert (off < 4e-3).float().mean() > 0.9 and off.median() < 1e-3


def test_one_compiled_graph_for_all_seeds_and_steps():
    from torch._dynamo.testing import CompileCounterWithBackend

    counter, grid = CompileCounterWithBackend("inductor"), (24, 32)
    ours = ToMeConfig(method="multires", ratio=0.77, min_tokens=0)

    def layer(q, k, v, seed, step):
        call = ModelCall(ours, grid, q.device, seed=seed, step=step)
        plan = call.plan(q[:, 0, 5:], grid)
        return JointCall(True, TORCHS, print, True).attend(q, k, v, 5, plan)

    compiled = torch.compile(layer, fullgraph=True, backend=counter)
    q, k, v = (torch.randn(1, 3, 773, 64, device="cuda", dtype=torch.float16) for _ in range(3))
    for seed, step in ((1, 2), (5, 2), (5, 3)):
        given = (q, k, v, torch.tensor(seed, device="cuda"), torch.tensor(step, device="cuda"))
        torch.testing.assert_close(compiled(*given), layer(*given), rtol=1e-3, atol=1e-3)
    assert counter.frame_count == 1
    torch._dynamo.reset()


@pytest.mark.parametrize(("dtype", "d"), [(torch.float32, 64), (torch.float16, 320)])
def test_what_no_kernel_takes_is_sampled_and_said(dtype, d):
    said, plan = [], call_and_plan((24, 32))
    joint = JointCall(True, TORCHS, lambda *words: said.append(words), keeps_self=True)
    q = torch.randn(2, 3, 768, d, device="cuda", dtype=dtype)
    joint.attend(q, q, q, 0, plan)
    assert said and said[0][0] == NO_KERNEL and f"{d} channels" in said[0][1]
