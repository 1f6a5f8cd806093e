"""levels "auto" on a GPU: whole steps are run both ways at the first call, by the model's own call without patches.

The CPU measures nothing; here verdicts are given as a GPU's would be. How they are timed: tests/scripts.
"""

from __future__ import annotations

import functools
import json
import logging
import sys

import pytest
import torch
from support.made_up_gpu import MadeUpGPU, MadeUpSteps

from . import host
from .host import forget_log, pack_module, small_unet

sample = functools.partial(host.sample, height=128, width=128)

CHANGE = ". To change that: make a larger picture; levels other than auto are always merged"
OPTIONS = {"min_tokens": 50, "ratio": 0.5, "method": "merge"}


@pytest.fixture
def decided(comfy_nodes, monkeypatch, tmp_path):
    """A GPU, on which a step takes 100 ms, and one that is merged that of `merged`; what was run, and its names."""
    forget_log()
    whole_step = pack_module("whole_step")
    step_auto = sys.modules[whole_step.decision_of.__module__]
    store = sys.modules[sys.modules[step_auto.known_or_measured.__module__].store_of.__module__]
    known = MadeUpGPU(monkeypatch, tmp_path, store)
    found = {"merged": 99.0, "outs": [], "keys": known.keys, "known": known}

    def compared(whole, merged, device):
        found["outs"].append((whole(), merged(step_auto.Judge())()))
        return step_auto.Decision(1e5, 1e3 * found["merged"], 0.0)

    monkeypatch.setattr(whole_step, "is_timed", lambda config, device: config.levels == "auto")
    monkeypatch.setattr(step_auto, "_compared", compared)
    return found


@pytest.mark.parametrize("options", [{}, {"mlp": True, "cross_attention": True}, {"method": "sample", "ratio": 0.75}])
@pytest.mark.parametrize("merged", [99.0, 60.0])
def test_the_first_call_is_run_both_ways(sd15, tome, decided, caplog, options, merged):
    decided["merged"], options = merged, {**OPTIONS, **options}
    plain, expected = sample(sd15, steps=2), sample(tome(sd15, **options, levels="0,1"), steps=2)
    with caplog.at_level(logging.INFO, "ToMe"):
        assert torch.equal(sample(tome(sd15, **options), steps=2), expected if merged < 97 else plain)
    ((whole, less),) = decided["outs"]
    assert whole.shape == less.shape and len(whole) == 2 and torch.equal(whole[0], whole[1])
    assert not torch.equal(whole, less) and whole.isfinite().all()
    assert (
        len(decided["keys"]) == 2
        and "a step of UNetModel of " in decided["keys"][0]
        and "not measured" not in caplog.text
    )
    said = [line for line in caplog.messages if "a step takes" in line]
    unpaid = "merging does not pay here: a step takes 100.0 ms without and 99.0 ms with it (16x16"
    both = [f"[ToMe] {unpaid}, nothing is merged)", f"[ToMe] nothing was merged in this sampling: {unpaid}){CHANGE}"]
    assert said == ([] if merged < 97 else both)
    assert not [module for module in sd15.model.diffusion_model.modules() if module._forward_pre_hooks]


def test_named_levels_are_not_judged(sd15, tome, decided):
    assert not torch.equal(sample(tome(sd15, **OPTIONS, levels="0"), steps=1), sample(sd15, steps=1))
    assert not decided["keys"]


def test_the_report_says_it_of_each_layer(sd15, tome, decided, comfy_nodes):
    plain = sample(sd15, steps=2)
    model, kept = comfy_nodes["ToMeRecord"].execute(model=tome(sd15, **OPTIONS)).result
    assert torch.equal(sample(model, steps=2), plain)
    out = comfy_nodes["ToMeReport"].execute(record=kept, after=None, measure_time=False)
    text, data = out.result[0], json.loads(out.result[1])
    assert "a step takes 100.0 ms without and 99.0 ms with it" in text and data["layers"]


def test_other_nodes_do_not_see_it(sd15, tome, decided):
    """Their patches and wrappers run in the picture's own steps alone, whatever is found."""
    seen = []
    model = sd15.clone()
    model.set_model_attn1_patch(lambda q, k, v, extra_options: seen.append("patch") or (q, k, v))
    model.add_wrapper_with_key(
        "diffusion_model", "other", lambda executor, *a, **k: seen.append("w") or executor(*a, **k)
    )
    sample(model, steps=2)
    before, seen[:] = list(seen), []
    for decided["merged"] in (99.0, 60.0):
        decided["known"].clear()
        sample(tome(model, **OPTIONS), steps=2)
        assert seen == before
        seen.clear()
    assert len(decided["outs"]) == 2


def test_not_judged_under_another_nodes_attention(sd15, tome, decided):
    model = sd15.clone()
    model.model_options["transformer_options"]["optimized_attention_override"] = lambda func, *a, **k: func(*a, **k)
    expected = sample(tome(model, **OPTIONS, levels="0,1"), steps=1)
    assert torch.equal(sample(tome(model, **OPTIONS), steps=1), expected) and not decided["keys"]


def test_run_where_comfyui_has_put_a_classs_own_forward_back(sd15, tome, decided):
    """It does when it takes an object patch off."""
    block = next(m for m in sd15.model.diffusion_model.modules() if hasattr(m, "attn1"))
    block.ff.forward = block.ff.forward
    try:
        sample(tome(sd15, **OPTIONS), steps=1)
    finally:
        del block.ff.forward
    assert decided["outs"]


@pytest.mark.parametrize("what", ["forward", "hook", "call"])
def test_not_run_where_another_node_works_on_the_model_itself(sd15, tome, decided, caplog, what):
    base = sd15.model
    block = next(m for m in base.diffusion_model.modules() if hasattr(m, "attn1"))
    expected = sample(tome(sd15, **OPTIONS, levels="0,1"), steps=1)
    handle = block.ff.register_forward_hook(lambda *_: None) if what == "hook" else None
    if what == "forward":
        kept = block.ff.forward
        block.ff.forward = lambda x: kept(x)
    elif what == "call":
        base._apply_model = base._apply_model
    try:
        assert torch.equal(sample(tome(sd15, **OPTIONS), steps=1), expected)  # merged, as where nothing is measured
    finally:
        for owner, name in ((block.ff, "forward"), (base, "_apply_model")):
            owner.__dict__.pop(name, None)
        if handle is not None:
            handle.remove()
    assert not decided["outs"] and "not measured (NotNow: another node" in caplog.text


@pytest.fixture
def gpu(comfy_nodes, monkeypatch, tmp_path):
    """A made-up GPU whose steps are really timed and whose verdicts are really kept; layers are not measured."""
    forget_log()
    whole_step = pack_module("whole_step")
    step_auto = sys.modules[whole_step.decision_of.__module__]
    store = sys.modules[sys.modules[step_auto.known_or_measured.__module__].store_of.__module__]
    monkeypatch.setattr(step_auto, "may_measure", lambda device: True)
    monkeypatch.setattr(step_auto, "LONG", 0.0)  # one step is enough, and it pays
    return MadeUpGPU(monkeypatch, tmp_path, store)


# (weights, computed in) by what ComfyUI does with a checkpoint of that name.
STORED = {
    "fp32": (torch.float32, None),
    "fp16": (torch.float16, None),
    "bf16": (torch.bfloat16, None),
    "fp16 on a GPU without it": (torch.float16, torch.float32),
    "fp8": (torch.float8_e4m3fn, torch.bfloat16),
    "fp8 by fp16": (torch.float8_e4m3fn, torch.float16),
    "fp8 of the other kind": (torch.float8_e5m2, torch.float16),
}


def test_a_step_is_known_by_the_dtype_that_its_model_computes_in(tome, gpu):
    """ComfyUI samples in float32 whatever the model is in."""
    for stored, cast in STORED.values():
        model = tome(small_unet("SD15", manual_cast=cast, dtype=stored), **OPTIONS)
        sample(model, steps=1)
    keys = list(gpu.kept)
    assert len(keys) == len(STORED) == len(set(gpu.keys))
    for key, (stored, cast) in zip(keys, STORED.values(), strict=True):
        computed, weights = (str(dtype).removeprefix("torch.") for dtype in (cast or stored, stored))
        step, _, _ = key.partition(" | ")
        assert f", 16x16, {computed}, comfy.ldm.modules.attention.attention_pytorch" in step
        assert f", weights {weights} comfy.ops." in step


def test_where_the_weights_lie_is_part_of_a_steps_name(tome, gpu):
    model = small_unet("SD15")
    base, merged = model.model, tome(model, **OPTIONS)
    for attribute, value in (("model_lowvram", True), ("lowvram_patch_counter", 3), ("dynamic_vbars", {"gpu": 1})):
        sample(merged, steps=1)
        was = getattr(base, attribute, None)
        setattr(base, attribute, value)
        try:
            about = pack_module("whole_step").about_model(base)
        finally:
            setattr(base, attribute, was)
        assert about.startswith(pack_module("whole_step").about_model(base) + ", ")
    assert len(gpu.kept) == 1


@pytest.mark.parametrize(
    "options", [{"min_tokens": 80}, {"ratio": 0.25}, {"method": "sample"}, {"mlp": True}, {"cross_attention": True}]
)
def test_options_that_change_a_steps_work_are_part_of_its_name(sd15, tome, gpu, options):
    sample(tome(sd15, **OPTIONS), steps=1)
    sample(tome(sd15, **{**OPTIONS, **options}), steps=1)
    sample(tome(sd15, **{**OPTIONS, "seed": 5, "start": 0.0, "end": 0.9}), steps=1)
    assert len(gpu.kept) == 2


def test_a_later_process_measures_nothing(sd15, tome, gpu):
    first = sample(tome(sd15, **OPTIONS), steps=1)
    before = gpu.kept
    gpu.forget()
    assert torch.equal(sample(tome(sd15, **OPTIONS), steps=1), first) and gpu.kept == before


def test_a_step_short_of_memory_is_no_decision(sd15, tome, gpu, monkeypatch, caplog):
    """Merged for now, as where nothing is known; the next time that it is asked for it is measured."""
    step_auto = sys.modules[pack_module("whole_step").decision_of.__module__]
    real = step_auto._compared

    def full(*_):
        raise torch.cuda.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(step_auto, "_compared", full)
    expected = sample(tome(sd15, **OPTIONS, levels="0,1"), steps=1)
    assert torch.equal(sample(tome(sd15, **OPTIONS), steps=1), expected)
    assert "CUDA out of memory), so merged; it is tried again later" in caplog.text
    monkeypatch.setattr(step_auto, "_compared", real)
    monkeypatch.setattr(sys.modules[step_auto.known_or_measured.__module__].store_of(sd15.load_device), "_again", {})
    sample(tome(sd15, **OPTIONS), steps=1)
    assert len(gpu.kept) == 1


LEVELS = {"min_tokens": 100, "ratio": 0.5, "method": "sample"}  # of 256x256 pixels: 32x32 and 16x16, three layers each
SMALL, LARGE = "+32x32 +32x32/32/1 +16x16/64/2", "+32x32 +32x32/32/1 -16x16/64/2"
MORE, LESS = "from 16x16", "from 32x32"


@pytest.fixture
def steps(comfy_nodes, monkeypatch, tmp_path):
    """A slow processor: the blocks of 16x16 tokens take it longer than the GPU."""
    forget_log()
    decisions, whole_step = sys.modules[pack_module("unet").Decisions.__module__], pack_module("whole_step")
    layer = sys.modules[decisions.measures.__module__]
    store, step_auto = (sys.modules[one.__module__] for one in (layer.store_of, whole_step.decision_of))
    steps = MadeUpSteps(monkeypatch, tmp_path, store, layer, decisions, step_auto)
    steps.waiting = {(16, 16)}
    return steps


@pytest.mark.parametrize(
    ("gpu_ms", "cpu_ms", "text", "ways"),
    [
        (200, 100, SMALL, [MORE, LESS, "whole"]),  # 200 ms, 185 with the large layers, 170 with all
        (100, 81, LARGE, [MORE, LESS, "whole"]),  # 100, 85, 87 by the processor: it waits for the small ones
        (100, 77, LARGE, [MORE, LESS, "whole"]),  # 100, 85, 83: too little for what they cost in likeness
        (100, 95, SMALL.replace("+", "-"), [MORE, LESS, "whole"]),  # 100, 98, 101: nothing is gained
        (500, 100, SMALL, []),  # long enough without a look
        (500, 450, SMALL, []),
    ],
)
def test_small_layers_are_merged_where_the_gpu_is_busy(sd15, tome, steps, caplog, gpu_ms, cpu_ms, text, ways):
    steps.gpu_ms, steps.cpu_ms = gpu_ms, cpu_ms
    expected = host.sample(tome(sd15, **LEVELS, decisions=text), steps=2)
    assert not steps.keys
    with caplog.at_level(logging.INFO, "ToMe"):
        assert torch.equal(host.sample(tome(sd15, **LEVELS), steps=2), expected)
    assert steps.ways == ["whole", *ways * 4]
    waits = "a block takes the processor 50000 us and the GPU 40000, so its steps wait for the processor"
    assert (waits in caplog.text) == (text == LARGE), "what was tried alone is not told"
    steps.forget()
    steps.ways.clear()
    assert torch.equal(host.sample(tome(sd15, **LEVELS), steps=2), expected) and not steps.ways


def test_a_third_way_is_run_only_where_it_differs(sd15, tome, steps):
    """No layer's block waits for the processor, or those that do save the GPU nothing."""
    for steps.waiting, small in ((set(), True), ({(16, 16)}, False)):
        steps.another(x16x16=small)
        steps.ways.clear()
        host.sample(tome(sd15, **LEVELS), steps=1)
        assert steps.ways == ["whole", *[MORE if small else LESS, "whole"] * 4]


def test_layers_of_a_step_that_is_not_timed_are_judged_as_waiting(sd15, tome, steps):
    model = sd15.clone()
    model.model_options["transformer_options"]["optimized_attention_override"] = lambda func, *a, **k: func(*a, **k)
    expected = host.sample(tome(model, **LEVELS, decisions=LARGE), steps=1)
    assert torch.equal(host.sample(tome(model, **LEVELS), steps=1), expected) and steps.keys and not steps.ways


def test_known_layers_do_not_hide_that_a_step_is_busy(sd15, tome, steps):
    """None of them pays beside a processor that is waited for, so that the model would not be patched at all."""
    steps.waiting = {(32, 32), (16, 16)}
    merged, expected = tome(sd15, **LEVELS), host.sample(tome(sd15, **LEVELS, decisions=SMALL), steps=1)
    assert all(torch.equal(host.sample(merged, steps=1), expected) for _ in range(2))
    assert steps.ways == ["whole", *[MORE, "whole", "whole"] * 4]
