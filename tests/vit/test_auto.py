"""apply_patch(auto=True): on a GPU a model is timed at its first picture, and left alone where merging does not pay."""

from __future__ import annotations

import logging
import threading

import pytest
import torch
from support.made_up_gpu import MadeUpGPU

import shared_tome.vit as vit
from shared_tome.autotune import store, timing
from shared_tome.vit import autotune as vit_auto

from . import test_timm, test_transformers

HOOKS = 2  # around the model


@pytest.fixture
def decided(monkeypatch, tmp_path):
    """A GPU, on which merging saves so many of 100 us; what was timed, and under which names."""
    known = MadeUpGPU(monkeypatch, tmp_path, store)
    found = {"saves": 1.0, "shapes": [], "keys": known.keys, "known": known}

    def compared(full, merged, device, repeats):
        outs = [full(), merged()]
        outs = [out if isinstance(out, torch.Tensor) else out.last_hidden_state for out in outs]
        found["shapes"].append([tuple(out.shape) for out in outs])
        found["differ"] = float((outs[0] - outs[1]).norm() / outs[0].norm())
        return vit_auto.Decision(100.0, 100.0 - found["saves"], 0.0)

    monkeypatch.setattr(vit_auto, "may_measure", lambda device: True)
    monkeypatch.setattr(timing, "compared", compared)
    return found


def models():
    timm, clip = test_timm.make(), test_transformers.make("clip")
    return {
        "timm": (timm, lambda: timm(test_timm.images(timm))),
        "transformers": (clip, lambda: clip(pixel_values=test_transformers.pixels()).last_hidden_state),
    }


def count_hooks(model):
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


@pytest.mark.parametrize("name", ["timm", "transformers"])
@pytest.mark.parametrize("saves", [1.0, 50.0])
@torch.no_grad()
def test_measured_once_on_one_picture(decided, caplog, name, saves):
    decided["saves"] = saves
    model, run = models()[name]
    plain = run()
    merged = (vit.apply_patch(model, r=3), run())[1]
    hooks = count_hooks(model)
    vit.apply_patch(model, r=3, auto=True)
    assert count_hooks(model) == hooks + HOOKS and not torch.equal(plain, merged)
    with caplog.at_level(logging.INFO, "ToMe"):
        for _ in range(2):
            assert torch.equal(run(), merged if saves > 3 else plain)
    assert len(decided["shapes"]) == 1 and decided["differ"] > 0
    (full, less), (key, again) = decided["shapes"][0], decided["keys"]
    assert full == less and full[0] == 1 and key == again and "r 3, constant, proportional True" in key
    assert (sum("merging does not pay here" in line.getMessage() for line in caplog.records) == 1) == (saves < 3)
    vit.remove_patch(model)
    assert count_hooks(model) == 0 and torch.equal(run(), plain)


def test_not_in_training_and_not_where_gradients_flow(decided):
    model, run = models()["timm"]
    vit.apply_patch(model, r=3)
    merged = run()
    vit.apply_patch(model, r=3, auto=True)
    assert torch.equal(run(), merged) and not decided["keys"]
    with torch.no_grad():
        model.train()
        run()
    assert not decided["keys"]


@torch.no_grad()
def test_a_trace_is_of_the_owners_calls(decided):
    """None of the timing, and none of a call that was left alone."""
    model, run = models()["timm"]
    vit.apply_patch(model, r=3, auto=True, trace=True)
    run()
    with pytest.raises(ValueError, match="nothing was traced"):
        vit.trace(model)
    decided["known"].clear()
    decided["saves"] = 50.0
    run()
    assert vit.trace(model).sources.shape[0] == 2


@pytest.mark.parametrize("name", ["timm", "transformers"])
@torch.no_grad()
def test_nobody_else_sees_the_timing(decided, name):
    """Hooks of others run in the owner's call alone, once each."""
    model, run = models()[name]
    vit.apply_patch(model, r=3, auto=True)
    ran, weights = [], [weight.clone() for weight in model.parameters()]
    inner = [module for module in model.modules() if isinstance(module, torch.nn.Linear)][-1]
    for module in (model, inner):
        module.register_forward_hook(lambda *_: ran.append("after"))
        module.register_forward_pre_hook(lambda *_: ran.append("before"))
    random, hooks = torch.get_rng_state(), count_hooks(model)
    run()
    assert len(decided["shapes"]) == 1 and sorted(ran) == ["after"] * 2 + ["before"] * 2
    assert torch.equal(random, torch.get_rng_state()) and count_hooks(model) == hooks
    assert all(map(torch.equal, model.parameters(), weights))


@torch.no_grad()
def test_a_model_that_another_package_works_on_is_not_run(decided, caplog):
    """It may count or keep what it sees. Merged, as where nothing is measured, and said."""
    model, run = models()["timm"]
    vit.apply_patch(model, r=3)
    merged = run()
    vit.apply_patch(model, r=3, auto=True)
    kept = model.blocks[1].mlp.forward
    model.blocks[1].mlp.forward = lambda x: kept(x)
    assert torch.equal(run(), merged) and not decided["shapes"]
    assert "another package replaces a module's forward), so merged; it is tried again" in caplog.text


@torch.no_grad()
def test_what_tells_models_apart(decided):
    for stored in (torch.float32, torch.bfloat16):
        for restore in ("last", "all"):
            timm = test_timm.make().to(stored)
            vit.apply_patch(timm, r=3, auto=True, restore=restore)
            timm(test_timm.images(timm).to(stored))
    assert len(decided["known"].kept) == 4
    assert [" weights bfloat16" in key for key in decided["keys"]] == [False, False, True, True]


@torch.no_grad()
def test_an_exception_leaves_no_pause_behind(decided):
    model, run = models()["timm"]
    plain = run()
    vit.apply_patch(model, r=3, auto=True)

    def fail(*_):
        raise RuntimeError("stop")

    assert torch.equal(run(), plain)
    handle = model.blocks[2].register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="stop"):
        run()
    handle.remove()
    assert not model._shared_tome_vit._paused
    decided["known"].clear()
    decided["saves"] = 50.0
    assert not torch.equal(run(), plain)


@torch.no_grad()
def test_other_threads_go_on_merging(decided):
    """A pause is of the thread whose call it is."""
    model, run = models()["timm"]
    vit.apply_patch(model, r=3)
    merged, made = run(), []
    vit.apply_patch(model, r=3, auto=True)
    model._shared_tome_vit.pause(True)
    decided["saves"] = 50.0

    def other():
        with torch.no_grad():
            made.append(run())

    thread = threading.Thread(target=other)
    thread.start()
    thread.join(60)
    assert torch.equal(made[0], merged)
