"""What only a GPU shows: the same choices as on the CPU, the same sums on repeat, no synchronisation, CUDA graphs."""

from __future__ import annotations

import pytest
import torch

from shared_tome import METHODS, ModelCall, ToMeConfig, match_tokens

from .helpers import captured

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA GPU on this machine"),
]
GRIDS = [(64, 64), (33, 41)]


def tokens(grid, dtype=torch.float16, batch=2, channels=320):
    x = torch.randn(batch, grid[0] * grid[1], channels, generator=torch.Generator().manual_seed(0))
    return x.to("cuda", dtype)


@pytest.mark.parametrize("grid", GRIDS)
def test_sample_draws_the_same_tokens_as_on_the_cpu(grid):
    config = ToMeConfig(ratio=0.7)
    x = tokens(grid)
    for layer in range(3):
        here = match_tokens(x, grid, config, seed=5, step=2, layer=layer)
        there = match_tokens(x.cpu(), grid, config, seed=5, step=2, layer=layer)
        assert torch.equal(here.index.cpu(), there.index) and torch.equal(here.groups.cpu(), there.groups)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("grid", GRIDS)
def test_repeat_is_bit_equal(method, grid):
    x = tokens(grid)
    made = []
    for _ in range(4):
        plan = match_tokens(x, grid, ToMeConfig(ratio=0.5, method=method), seed=1)
        made.append(plan.unmerge(plan.merge(x)))
    assert all(torch.equal(made[0], other) for other in made[1:])


@pytest.mark.parametrize("method", METHODS)
def test_merge_equals_the_cpu_in_float32(method):
    """On the plan's own groups: which tokens match may differ where similarities tie in half precision."""
    x = tokens((64, 64), torch.float32)
    plan = match_tokens(x, (64, 64), ToMeConfig(ratio=0.5, method=method), seed=1)
    there = match_tokens(x.cpu(), (64, 64), ToMeConfig(ratio=0.5, method=method), seed=1)
    # Merged tokens by the token that stands for each: kernels leave those that stay in another order than torch does.
    owners = [other.index.gather(1, other.groups).cpu() for other in (plan, there)]
    if torch.equal(*owners):
        here, merged = (
            other.merge(y).cpu().gather(1, other.index.cpu().argsort(1)[..., None].expand(-1, -1, x.shape[2]))
            for other, y in ((plan, x), (there, x.cpu()))
        )
        torch.testing.assert_close(here, merged, rtol=1e-5, atol=1e-5)
    else:
        assert (owners[0] == owners[1]).float().mean() > 0.99


@pytest.mark.parametrize("method", METHODS)
def test_no_synchronisation_and_a_cuda_graph(method):
    """A captured graph follows the step: its replay with another step equals running it."""
    x, grid = tokens((64, 64)), (64, 64)
    config = ToMeConfig(ratio=0.5, method=method, min_tokens=0)
    step = torch.zeros((), dtype=torch.int64, device="cuda")

    def run():
        call = ModelCall(config, grid, x.device, step=step)
        merged = call.attention(x, x, x, grid)
        return merged.unmerge(merged.q), merged.k

    run()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        run()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    graph, replayed = captured(run)
    step.fill_(3)
    graph.replay()
    assert all(torch.equal(a, b) for a, b in zip(replayed, run(), strict=True))
