"""levels "auto" on a GPU: a transformer's whole step is run both ways at its first call, by the model's own call
without patches.

The CPU measures nothing; here times are given as a GPU's would be.
"""

from __future__ import annotations

import json
import logging
import sys

import pytest
import torch
from support.made_up_gpu import MadeUpTransformers

from . import dit_host
from .dit_host import SMALL
from .host import forget_log, pack_module, run_node

OPTIONS = {"method": "sample", "ratio": 0.5, "min_tokens": 0, "own_token": False}
LEFT, MERGED = "-8x12", "+8x12 +8x12/64/2/256"
CHANGE = ". To change that: make a larger picture; levels other than auto are always merged"


@pytest.fixture
def gpu(comfy_nodes, monkeypatch, tmp_path):
    forget_log()
    step = sys.modules[pack_module("whole_step").decision_of.__module__]
    store = sys.modules[sys.modules[step.known_or_measured.__module__].store_of.__module__]
    return MadeUpTransformers(monkeypatch, tmp_path, store, pack_module("dit_call"), pack_module("dit_auto"), step)


@pytest.fixture(scope="module")
def flux(comfy_nodes):
    return dit_host.small("flux")


def sample(model, steps=2):
    return dit_host.sample(model, "flux", steps=steps)


@pytest.mark.parametrize(
    ("times", "text", "ways"),
    [
        ((100, 95, 5, 8), LEFT, [0, *[2, 0, 0] * 4]),  # 100 ms, with both attentions 111 by the processor
        ((200, 80, 5, 8), MERGED, [0, *[2, 0, 0] * 4]),  # 200, 190: the processor's time does not show
        ((200, 80, 5, 1), MERGED, [0, *[2, 0] * 4]),  # each attention pays beside a processor that is waited for
        ((100, 99, 5, 1), LEFT, [0, *[2, 0] * 4]),  # 100, 101: and yet the step does not
        ((500, 80, 5, 8), MERGED, [0]),  # long enough without a look
    ],
)
def test_the_step_decides(flux, tome, gpu, caplog, times, text, ways):
    gpu.gpu_ms, gpu.cpu_ms, gpu.saves_ms, gpu.costs_ms = times
    plain, merged = sample(flux), sample(tome(flux, **OPTIONS, levels="0"))
    expected = merged if text == MERGED else plain
    assert not torch.equal(plain, merged)
    with caplog.at_level(logging.INFO, "ToMe"):
        assert torch.equal(sample(tome(flux, **OPTIONS)), expected)
    assert gpu.ways == ways and len(set(gpu.steps)) == 1
    unpaid = f"merging does not pay here: a step takes 100.0 ms without and {100 + (times[1] == 99)}.0 ms with it (Flux"
    both = [f"[ToMe] {unpaid})", f"[ToMe] nothing was merged in this sampling: {unpaid}){CHANGE}"]
    assert [line for line in caplog.messages if "not pay" in line and "whole" not in line] == (
        both if text == LEFT else []
    )
    gpu.forget()
    gpu.ways.clear()
    gpu.keys.clear()
    assert torch.equal(sample(tome(flux, **OPTIONS)), expected) and not gpu.ways
    gpu.keys.clear()
    gpu.clear()
    assert torch.equal(sample(tome(flux, **OPTIONS, decisions=text)), expected) and not gpu.keys


def test_a_step_that_is_left_alone_carries_no_patch(flux, tome, gpu, monkeypatch):
    """But in the first call of a sampling, which tells what becomes of the layers."""
    patch, made = pack_module("dit_patch"), []
    kept = patch.DiTCall

    def counted(*given):
        made.append(1)
        return kept(*given)

    monkeypatch.setattr(patch, "DiTCall", counted)
    assert torch.equal(sample(tome(flux, **OPTIONS), steps=3), sample(flux, steps=3)) and len(made) == 1


@pytest.mark.parametrize("name", SMALL)
def test_what_is_run_is_the_first_row_of_the_call(tome, gpu, name):
    """Of each model; what one keeps from call to call is not run beside them."""
    gpu.saves_ms, gpu.costs_ms, gpu.cpu_ms = 5, 1, 20
    model = dit_host.small(name)
    plain, expected = dit_host.call(model, name), dit_host.call(tome(model, **OPTIONS, levels="0"), name)
    assert torch.equal(dit_host.call(tome(model, **OPTIONS), name), expected)
    assert bool(gpu.outs) == (SMALL[name].elsewhere == 0) == bool(gpu.steps)
    if gpu.outs:
        whole, merged = gpu.outs[:2]
        assert len(whole) == 1 and whole.shape == merged.shape and not torch.equal(whole, merged)
        torch.testing.assert_close(whole, plain[:1], rtol=1e-4, atol=1e-5)


def test_other_nodes_do_not_see_it(flux, tome, gpu):
    """Their patches and wrappers run in the picture's own steps alone, whatever is found."""
    seen, model = [], flux.clone()
    model.set_model_patch(lambda args: seen.append("patch") or args, "double_block")
    model.add_wrapper_with_key(
        "diffusion_model", "other", lambda executor, *a, **k: seen.append("w") or executor(*a, **k)
    )
    sample(model)
    before, seen[:] = list(seen), []
    for gpu.cpu_ms in (95.0, 20.0):
        gpu.clear()
        gpu.ways.clear()
        sample(tome(model, **OPTIONS))
        assert seen == before and gpu.ways
        seen.clear()


@pytest.mark.parametrize("what", ["override", "forward", "hook", "call", "levels", "large", "min_tokens"])
def test_not_timed(flux, tome, gpu, caplog, monkeypatch, what):
    """Beside another node's work, where nothing is to be decided, and where layers always pay."""
    gpu.saves_ms, gpu.costs_ms = 5, 1
    model, options, base = flux.clone(), dict(OPTIONS), flux.model
    part = base.diffusion_model.double_blocks[0]
    if what == "override":
        model.model_options["transformer_options"]["optimized_attention_override"] = lambda func, *a, **k: func(*a, **k)
    elif what == "levels":
        options["levels"] = "0"
    elif what == "min_tokens":
        options["min_tokens"] = 97
    elif what == "large":
        monkeypatch.setattr(pack_module("dit_patch"), "ALWAYS", 96)
    expected = sample(model, steps=1) if what == "min_tokens" else sample(tome(model, **{**options, "levels": "0"}), 1)
    handle = part.register_forward_hook(lambda *_: None) if what == "hook" else None
    if what == "forward":
        kept = part.forward
        part.forward = lambda *a, **k: kept(*a, **k)
    elif what == "call":
        base._apply_model = base._apply_model
    try:
        assert torch.equal(sample(tome(model, **options), steps=1), expected)
    finally:
        for owner, name in ((part, "forward"), (base, "_apply_model")):
            owner.__dict__.pop(name, None)
        if handle is not None:
            handle.remove()
    assert not gpu.ways
    assert ("not measured (NotNow: another node" in caplog.text) == (what in ("forward", "hook", "call"))


def test_the_report_says_it_of_each_layer(flux, tome, gpu, comfy_nodes):
    plain = sample(flux)
    model, kept = comfy_nodes["ToMeRecord"].execute(model=tome(flux, **OPTIONS)).result
    assert torch.equal(sample(model), plain)
    out = comfy_nodes["ToMeReport"].execute(record=kept, after=None, measure_time=False)
    text, data = out.result[0], json.loads(out.result[1])
    assert "a step takes 100.0 ms without and 100.0 ms with it" in text and data["layers"] and LEFT in text


def test_the_node_says_how_much_faster_a_step_was(flux, tome, gpu, monkeypatch):
    said = []
    monkeypatch.setattr(pack_module("outcome"), "show_on_node", lambda node, text: said.append(text))
    gpu.gpu_ms, gpu.cpu_ms = 200, 80
    sample(tome(flux, **OPTIONS))
    assert f"a step was measured {200 / 190:.2f}x as fast" in said[-1] and said[-1].endswith(f"Decisions: {MERGED}")


def test_methods_that_match_are_judged_by_the_step_alone(flux, tome, gpu):
    for gpu.gpu_ms, merged in ((100, False), (400, True)):
        gpu.clear()
        options = {**OPTIONS, "method": "merge"}
        expected = sample(tome(flux, **options, levels="0")) if merged else sample(flux)
        assert torch.equal(sample(tome(flux, **options)), expected)


def test_prompts_and_batches_are_decided_alike_and_references_by_themselves(flux, tome, gpu):
    model = tome(flux, **OPTIONS)
    for text in (7, 300):
        dit_host.call(model, "flux", c_crossattn=torch.randn(2, text, 48))
    dit_host.call(model, "flux", latent=(4, 16, 16, 24))
    assert len(set(gpu.steps)) == 1 and "8x12, float32" in gpu.steps[0] and "up to 1024 tokens beside" in gpu.steps[0]
    dit_host.call(model, "flux", ref_latents=[torch.randn(2, 16, 80, 80)])
    assert len(set(gpu.steps)) == 2


def test_a_compiled_model_follows_a_text_and_is_not_timed(flux, tome, gpu, comfy_nodes, caplog):
    for decisions, merged in (("", True), ("-8x12", False)):
        torch._dynamo.reset()
        model = tome(flux, **OPTIONS, decisions=decisions)
        compiled = run_node(comfy_nodes["TorchCompileModel"], model=model, backend="eager")
        with caplog.at_level(logging.INFO, "ToMe"):
            made = sample(compiled, steps=1)
        expected = sample(tome(flux, **OPTIONS, levels="0"), steps=1) if merged else sample(flux, steps=1)
        torch.testing.assert_close(made, expected, rtol=1e-3, atol=1e-4)
        assert not gpu.ways and ("the decisions that are set leave it alone" in caplog.text) != merged
