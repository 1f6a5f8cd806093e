"""ToMe Report beside nodes that answer in the model's place, and what a record keeps in memory."""

from __future__ import annotations

import functools
import gc
import json
import sys
import weakref

import pytest
import torch

from . import host
from .host import cached, pack_module, small_unet

sample = functools.partial(host.sample, height=128, width=128)

CACHED = "the time was not measured: another node answers from its cache"


def report(comfy_nodes, record, **values):
    text, data = comfy_nodes["ToMeReport"].execute(record=record, after=None, **values).result
    return text, json.loads(data)


@pytest.mark.parametrize("recorded_first", [True, False])
def test_a_call_that_easycache_answers_is_not_counted(sd15, tome, caches, recorded_first):
    model, record = tome(sd15, ratio=0.5, min_tokens=0), None
    if recorded_first:
        model, record = caches["ToMeRecord"].execute(model=model).result
    model = cached(caches, "EasyCache", model)
    if not recorded_first:
        model, record = caches["ToMeRecord"].execute(model=model).result
    runs = []
    handle = sd15.model.diffusion_model.out.register_forward_hook(lambda *_: runs.append(1))
    sample(model, steps=6)
    handle.remove()
    assert 0 < len(runs) < 6  # so that there is something to tell
    text, data = report(caches, record)
    assert CACHED in text and data["time"] is None
    assert (data["calls"], data["steps"], data["merged_steps"], data["of_steps"]) == (len(runs),) * 3 + (6,)
    assert f"another node answered {6 - len(runs)} of 6 calls without the model" in text
    assert sum(len(m._forward_hooks) for m in sd15.model.diffusion_model.modules()) == 0


def test_lazycache_stands_before_the_model_and_is_no_part_of_the_time(sd15, tome, caches):
    model, record = caches["ToMeRecord"].execute(model=tome(sd15, ratio=0.5, min_tokens=0)).result
    sample(cached(caches, "LazyCache", model), steps=6)
    text, data = report(caches, record)
    assert 0 < data["calls"] < 6 and data["time"]["with_ms"] > 0 and CACHED not in text


def test_a_cache_inside_the_model(sd15, tome, caches, monkeypatch):
    """As first-block caches: a part of the model runs each time, the rest only the first."""
    model, record = caches["ToMeRecord"].execute(model=tome(sd15, ratio=0.5, min_tokens=0)).result
    sample(model, steps=2)
    unet = sd15.model.diffusion_model
    forward, known = unet.forward, []

    def first_block(x, timesteps, **kwargs):
        if not known:
            known.append(forward(x, timesteps, **kwargs))
        return known[0] + 0 * unet.input_blocks[0][0](x).mean()

    monkeypatch.setattr(unet, "forward", first_block)
    assert CACHED in report(caches, record)[0]
    # Already full when it is measured: hardly anything runs.
    model, record = caches["ToMeRecord"].execute(model=tome(sd15, ratio=0.5, min_tokens=0)).result
    known.clear()
    sample(model, steps=2)
    assert CACHED in report(caches, record)[0]


def test_without_a_cache_all_calls_are_counted_and_measured(sd15, tome, caches):
    model, record = caches["ToMeRecord"].execute(model=tome(sd15, ratio=0.5, min_tokens=0, start=0.5)).result
    sample(model, steps=4)
    text, data = report(caches, record)
    assert (data["calls"], data["merged_steps"]) == (4, 2) and data["time"]["with_ms"] > 0
    assert "without the model" not in text


def test_another_nodes_wrapper_that_runs_the_model_changes_nothing(sd15, tome, caches):
    model = tome(sd15, ratio=0.5, min_tokens=0)
    model.add_wrapper_with_key("diffusion_model", "other", lambda executor, *args, **kwargs: executor(*args, **kwargs))
    model, record = caches["ToMeRecord"].execute(model=model).result
    sample(model, steps=3)
    text, data = report(caches, record)
    assert data["calls"] == 3 and data["time"]["with_ms"] > 0 and "without the model" not in text


def test_a_model_that_does_not_tell_that_it_runs_counts_as_run(caches):
    run = pack_module("record_nodes").Run
    tally = run(pack_module("unet").ToMeConfig()).tally
    tally.ask(0, 0.5), tally.ask(1, 0.5)
    sys.modules[run.__module__].CallTally(tally, (8, 8)).left_alone("fewer than min tokens 9", "input block 1")
    tally.settle()
    assert tally.calls == 2 and not tally.report().notes


@pytest.mark.parametrize("measured", [None, False])
def test_a_record_keeps_no_model(tome, caches, measured):
    patcher = small_unet("SD15")
    model, record = caches["ToMeRecord"].execute(model=tome(patcher, ratio=0.5, min_tokens=0)).result
    sample(model, steps=1)
    if measured is not None:
        report(caches, record, measure_time=measured)
    given = weakref.ref(record.run().last.args[0])
    gone = weakref.ref(patcher.model), weakref.ref(model)
    import comfy.model_management as management

    management.unload_all_models()
    management.current_loaded_models.clear()
    del patcher, model
    gc.collect()
    assert [ref() for ref in gone] == [None, None] and given() is None and record.run().last is None
    assert "the model is gone" in report(caches, record)[0]


def test_the_models_state_is_as_before(sd15, tome, caches):
    before = sample(tome(sd15, ratio=0.5, min_tokens=0), steps=3)
    model, record = caches["ToMeRecord"].execute(model=tome(sd15, ratio=0.5, min_tokens=0)).result
    assert torch.equal(sample(cached(caches, "EasyCache", model), steps=1), sample(model, steps=1))
    report(caches, record)
    assert torch.equal(sample(model, steps=3), before)
