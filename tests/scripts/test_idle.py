"""Where a GPU was found to gain nothing by merging, the hooks on the blocks go: they would take the processor time."""

from __future__ import annotations

import copy
import threading

import pytest
import torch

import shared_tome
from shared_tome import ToMeConfig
from shared_tome.autotune import decisions

from . import models

MODEL_HOOKS = 2


@pytest.fixture
def decided(monkeypatch):
    """Layers with as many tokens or more pay."""
    least = [10**9]

    def decision_on(grid, *_):
        return decisions.Decision(100.0, 40.0 if grid[0] * grid[1] >= least[0] else 99.0, 5.0)

    monkeypatch.setattr(decisions, "measures", lambda *_: True)
    monkeypatch.setattr(decisions, "decision_on", decision_on)
    return least


def config(**options):
    return ToMeConfig(**{"min_tokens": 0, "ratio": 0.5, **options})


@pytest.mark.parametrize("name", models.UNETS)
@pytest.mark.parametrize("options", [{}, {"own_token": True}, {"method": "merge", "mlp": True}])
def test_hooks_go_after_the_first_call_and_come_back(decided, name, options):
    unet = models.UNETS[name]()
    plain, large = models.run(unet), models.run(unet, 32, 32)
    shared_tome.apply_patch(unet, config=config(**options))
    on = models.count_hooks(unet)
    assert torch.equal(models.run(unet), plain) and models.count_hooks(unet) == on
    for _ in range(2):
        assert torch.equal(models.run(unet), plain) and models.count_hooks(unet) == MODEL_HOOKS
    decided[0] = 32 * 32 if name == "sd15" else 16 * 16
    merged = models.run(unet, 32, 32)  # another size, which pays
    assert not torch.equal(merged, large) and models.count_hooks(unet) >= on
    assert torch.equal(models.run(unet), plain) and torch.equal(models.run(unet, 32, 32), merged)
    shared_tome.remove_patch(unet)
    assert models.count_hooks(unet) == 0 and torch.equal(models.run(unet, 32, 32), large)


@pytest.mark.parametrize("options", [{}, {"ratio": 0.4}, {"method": "merge", "cross_attention": True}])
def test_blocks_of_levels_that_do_not_pay_lose_theirs(decided, options):
    """And have them again in calls of a size of which more levels pay."""
    unet, fresh = models.sd15(), models.sd15()
    decided[0] = 256
    for one in (unet, fresh):
        shared_tome.apply_patch(one, config=config(**options))
    on = models.count_hooks(unet)
    made = models.run(unet)
    assert models.count_hooks(unet) >= on  # and those on the projections of merged layers
    assert torch.equal(models.run(unet), made) and MODEL_HOOKS < models.count_hooks(unet) < on
    large = models.run(fresh, 32, 32)
    assert torch.equal(models.run(unet, 32, 32), large) and models.count_hooks(unet) >= on
    assert torch.equal(models.run(unet), made) and models.count_hooks(unet) < on
    assert torch.equal(models.run(unet, 32, 32), large)
    shared_tome.remove_patch(unet)
    assert models.count_hooks(unet) == 0


def test_a_block_that_was_not_reached_keeps_its_hooks(decided):
    """Others leave blocks out in some steps: nothing is known of those."""
    unet, fresh = models.sd15(), models.sd15()
    decided[0] = 256
    for one in (unet, fresh):
        shared_tome.apply_patch(one, config=config())
    block = next(m for m in unet.modules() if hasattr(m, "attn1"))
    forward, block.forward = block.forward, lambda x, *_, **__: x
    calls, attention = [], block.attn1.forward
    models.run(unet)
    models.run(unet)
    block.forward = forward
    block.attn1.forward = lambda x, *args, **kwargs: calls.append(x.shape) or attention(x, *args, **kwargs)
    assert torch.equal(models.run(unet), models.run(fresh)) and calls


def test_a_schedule_is_judged_by_its_ratios(decided):
    """A ratio of 0 in the first steps is no judgement."""
    unet = models.sd15()
    shared_tome.apply_patch(unet, config=config(start=0.5))
    on = models.count_hooks(unet)
    models.run(unet, timestep=900)
    models.run(unet, timestep=900)
    assert models.count_hooks(unet) == on
    models.run(unet, timestep=100)
    models.run(unet, timestep=100)
    assert models.count_hooks(unet) == MODEL_HOOKS


@pytest.mark.parametrize("least", [32 * 32, 16 * 16])
def test_another_thread_at_work_keeps_its_hooks(decided, least):
    """One thread finds that nothing pays at its size, or less, while another is in the midst of a call that does."""
    unet = models.sd15()
    decided[0] = least
    shared_tome.apply_patch(unet, config=config())
    expected = models.run(unet, 32, 32)
    models.run(unet)  # the small size is known now
    inside, go = threading.Event(), threading.Event()

    def wait(*_):
        if threading.current_thread() is not threading.main_thread():
            inside.set()
            go.wait(60)

    handle = unet.conv_in.register_forward_pre_hook(wait)
    made = []
    other = threading.Thread(target=lambda: made.append(models.run(unet, 32, 32)))
    other.start()
    assert inside.wait(60)
    models.run(unet)
    go.set()
    other.join(60)
    handle.remove()
    assert torch.equal(made[0], expected)


def test_a_copy_of_the_model_has_hooks_of_its_own(decided):
    unet = models.sd15()
    plain = models.run(unet)
    shared_tome.apply_patch(unet, config=config())
    for _ in range(2):
        models.run(unet)
    twin = copy.deepcopy(unet)
    decided[0] = 0
    for _ in range(2):
        assert torch.equal(models.run(twin), plain)  # judged already, as the original
    assert not torch.equal(models.run(twin, 32, 32), models.run(models.sd15(), 32, 32))
    assert models.count_hooks(unet) == MODEL_HOOKS < models.count_hooks(twin)
