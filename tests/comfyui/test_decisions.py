"""What autotune decided is told in a text on the node and in ToMe Report; set in the option `decisions`, the same steps
and layers are merged on another GPU. The CPU measures nothing: here times are given as a GPU's would be.
"""

from __future__ import annotations

import json
import logging
import sys
from types import SimpleNamespace

import pytest
import torch
from support.made_up_gpu import MadeUpTimes

from . import dit_host, host
from .host import pack_module, sample, short_unet

OPTIONS = {"min_tokens": 100, "ratio": 0.5}
LAYERS = "-32x32/32/1 +16x16/64/2"


@pytest.fixture
def gpu(comfy_nodes, monkeypatch, tmp_path):
    """On it level 0 (32x32) of the U-Net does not pay; `step`: what a merged step takes, of 100 ms."""
    host.forget_log()
    decisions, whole_step = sys.modules[pack_module("unet").Decisions.__module__], pack_module("whole_step")
    layer = sys.modules[decisions.measures.__module__]
    store, step_auto = (sys.modules[one.__module__] for one in (layer.store_of, whole_step.decision_of))
    gpu = MadeUpTimes(monkeypatch, tmp_path, store, layer, decisions)
    gpu.step = 60.0
    monkeypatch.setattr(whole_step, "is_timed", lambda config, device: config.levels == "auto")
    monkeypatch.setattr(step_auto, "_compared", lambda *_: layer.Decision(1e5, 1e3 * gpu.step, 0.0))
    # Transformers: each attention takes as long as it is said to.
    gpu.attention = True
    monkeypatch.setattr(pack_module("dit_auto"), "measures", lambda config, grid, device: config.levels == "auto")
    monkeypatch.setattr(
        pack_module("dit_call"), "compared", lambda *_: layer.Decision(80.0, 40.0 if gpu.attention else 79.0, 0.0)
    )
    gpu.another(x32x32=False)
    return gpu


@pytest.fixture
def line(comfy_nodes, monkeypatch):
    """line() -> what the node with the id 12 shows now."""
    found = []
    server = SimpleNamespace(client_id="me", send_progress_text=lambda text, node, page=None: found.append(text))
    monkeypatch.setitem(sys.modules, "server", SimpleNamespace(PromptServer=SimpleNamespace(instance=server)))
    return lambda: found[-1]


@pytest.fixture
def on_node(comfy_nodes):
    """on_node(model, **options) -> the merged clone of the node that the prompt calls 12."""

    def apply(model, **options):
        node = type("ToMe", (comfy_nodes["ToMe"],), {"hidden": SimpleNamespace(unique_id="12")})
        values = {"version": pack_module("nodes").version(), "stride_x": 2, "stride_y": 2, "seed": 0}
        return node.execute(model, **{**values, "method": "sample", **OPTIONS, **options}).result[0]

    return apply


def text_of(line):
    return line.partition("Decisions: ")[2]


def test_the_text_on_the_node_makes_the_same_picture_on_another_gpu(sd15, on_node, gpu, line):
    made = sample(on_node(sd15))
    text = text_of(line())
    assert text == f"+32x32 {LAYERS}" and gpu.keys
    gpu.another(x16x16=False)
    gpu.step = 99.0
    assert not torch.equal(sample(on_node(sd15)), made)
    gpu.keys.clear()
    again = sample(on_node(sd15, decisions=text))
    assert torch.equal(again, made) and not gpu.keys
    assert line().endswith(f"Decisions (as set): {text}") and "the decisions that are set leave it alone" in line()


def test_a_step_that_was_left_alone_stays_so(sd15, on_node, gpu, line):
    gpu.step = 99.0
    plain = sample(sd15)
    assert torch.equal(sample(on_node(sd15)), plain)
    text = text_of(line())
    assert text.startswith("-32x32")
    gpu.another()
    gpu.step = 60.0
    assert not torch.equal(sample(on_node(sd15)), plain)
    gpu.keys.clear()
    assert torch.equal(sample(on_node(sd15, decisions=text)), plain) and not gpu.keys
    assert line().startswith("nothing was merged in this sampling: the decisions that are set leave it alone (32x32")
    assert "empty decisions" in line()


def test_layers_that_all_do_not_pay_are_told_too(sd15, on_node, gpu, line):
    gpu.another(x32x32=False, x16x16=False)
    plain = sample(sd15)
    for _ in range(2):  # the second one does not patch the model, by what is known
        assert torch.equal(sample(on_node(sd15)), plain)
        assert {"-32x32/32/1", "-16x16/64/2"} <= set(text_of(line()).split())
    text = text_of(line())
    gpu.another()
    assert torch.equal(sample(on_node(sd15, decisions=text)), plain) and not gpu.keys


def test_two_sizes_of_one_workflow_stand_in_one_text(sd15, on_node, gpu, line):
    """A hires pass is a sampling of its own, of another size."""
    model = on_node(sd15)
    made = [sample(model, height=size, width=size) for size in (256, 384)]
    text = text_of(line())
    assert text == "+48x48 +48x48/32/1 +32x32 -32x32/32/1 +24x24/64/2 +16x16/64/2 +12x12/64/2"
    gpu.another(x16x16=False, x48x48=False)
    model = on_node(sd15, decisions=text)
    again = [sample(model, height=size, width=size) for size in (256, 384)]
    assert all(map(torch.equal, made, again)) and not gpu.keys
    assert "does not" not in line(), "the other pass's names are no misfit"


def test_a_moving_ratio_has_decisions_of_its_own(sd15, on_node, gpu, line):
    made = sample(on_node(sd15, ratio_end=0.2), steps=3)
    text = text_of(line())
    assert "-32x32/32/1@0.5" in text.split() and text.count("+32x32@") == 3
    gpu.another(x16x16=False)
    assert torch.equal(sample(on_node(sd15, ratio_end=0.2, decisions=text), steps=3), made) and not gpu.keys


def test_a_compiled_model_follows_them(comfy_nodes, on_node, gpu, line):
    def compiled(**options):
        torch._dynamo.reset()
        return host.run_node(comfy_nodes["TorchCompileModel"], model=on_node(short_unet(), **options), backend="eager")

    made = sample(compiled(), steps=1)
    text = text_of(line())
    assert text == f"+32x32 {LAYERS}"
    gpu.another(x16x16=False)
    again = sample(compiled(decisions=text), steps=1)
    assert (again - made).norm() / made.norm() < 1e-4 and not gpu.keys
    other = sample(compiled(decisions=text.replace("+16", "-16")), steps=1)
    plain = sample(short_unet(), steps=1)
    assert (other - plain).norm() / plain.norm() < 1e-4 < (again - plain).norm() / plain.norm()
    torch._dynamo.reset()


def test_a_node_that_calls_the_unet_itself_follows_them(sd15, on_node, gpu):
    """Past apply_model."""

    def past(model):
        options = dit_host.options_of(model, 1.0)
        wrapper = options["wrappers"]["diffusion_model"]["ToMe"][0]
        x, unet = torch.randn(1, 4, 32, 32, generator=torch.manual_seed(1)), sd15.model.diffusion_model

        def run(x, t, *args, **kwargs):
            return unet._forward(x, t, *args, **kwargs)

        executor = type("Executor", (), {"__call__": staticmethod(run), "class_obj": unet})()
        with torch.no_grad():
            return wrapper(executor, x, torch.ones(1), torch.zeros(1, 7, 64), transformer_options=options)

    made = past(on_node(sd15, decisions=LAYERS))
    assert torch.equal(made, past(on_node(sd15, levels="1"))) and not gpu.keys
    assert torch.equal(past(on_node(sd15, decisions="-32x32")), past(on_node(sd15, decisions="-all")))
    assert not torch.equal(past(on_node(sd15, decisions="-32x32")), made)


def test_the_report_has_them(sd15, on_node, gpu, comfy_nodes):
    model, kept = comfy_nodes["ToMeRecord"].execute(model=on_node(sd15, decisions=f"+32x32 {LAYERS}")).result
    sample(model)
    out = comfy_nodes["ToMeReport"].execute(record=kept, after=None, measure_time=False)
    text, data = out.result[0], json.loads(out.result[1])
    assert f"\nDecisions (as set): +32x32 {LAYERS}" in text
    assert (data["decisions"], data["decisions_as_set"]) == (f"+32x32 {LAYERS}", True)
    assert "3 layers: the decisions that are set leave it alone" in text


def test_what_does_not_fit_is_said_once(sd15, on_node, gpu, line, caplog):
    with caplog.at_level(logging.INFO, "ToMe"):
        for _ in range(2):
            sample(on_node(sd15, decisions="+32x32 +16x16/64/2 -16x16/640/8 +99x99/8/8"))
    notes = (
        "decisions does not name 32x32/32/1, so this was decided here",
        "decisions names 16x16/640/8, which this model does not have at this size",
    )
    for note in notes:
        assert caplog.messages.count(f"[ToMe] {note}") == 1 and f". {note}. " in line()
    assert line().endswith(f"Decisions (as set): +32x32 {LAYERS}")


def test_a_bad_text_is_an_error_of_the_node(sd15, on_node):
    with pytest.raises(ValueError, match="decisions must be words such as .*; got 'x'"):
        on_node(sd15, decisions="+32x32 x")
    with pytest.raises(ValueError, match="decisions needs levels auto, got levels '0'"):
        on_node(sd15, decisions="+32x32", levels="0")


# --- transformers -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["flux", "wan", "zimage"])
def test_transformers_have_them_too(on_node, gpu, line, name):
    model, given = dit_host.small(name), {"method": "auto", "min_tokens": 0}
    merged, plain = dit_host.sample(on_node(model, **given), name), dit_host.sample(model, name)
    texts = [text_of(line())]
    for gpu.attention, gpu.step in ((False, 60.0), (True, 99.0)):
        gpu.another()
        assert torch.equal(dit_host.sample(on_node(model, **given), name), plain)
        texts.append(text_of(line()))
    step, layer = texts[0].removeprefix("sample +").split(" +")
    assert texts[1:] == [f"sample +{step} -{layer}", f"sample -{step}"] and layer.startswith(f"{step}/")
    for text, expected in zip(texts, (merged, plain, plain), strict=True):
        gpu.keys.clear()
        assert torch.equal(dit_host.sample(on_node(model, decisions=text, **given), name), expected)
        assert not gpu.keys


def test_what_auto_stood_for_is_kept(on_node, line):
    """multires on another machine; the CPU has no kernel of it, so auto alone is sample here."""
    model = dit_host.small("zimage")
    given = {"ratio": 0.9, "min_tokens": 0}
    here = dit_host.sample(on_node(model, method="auto", **given), "zimage")
    assert text_of(line()).startswith("sample +")
    as_there = dit_host.sample(on_node(model, method="auto", decisions="multires +all", **given), "zimage")
    assert line().endswith("multires +" + text_of(line().replace(" (as set)", "")).partition("+")[2])
    named = dit_host.sample(on_node(model, method="multires", min_tokens=0, ratio=0.84), "zimage")
    assert torch.equal(as_there, named) and not torch.equal(as_there, here)


def test_a_compiled_transformer_tells_that_all_is_merged(comfy_nodes, on_node, gpu, line):
    def compiled(**options):
        torch._dynamo.reset()
        model = on_node(dit_host.small("flux"), min_tokens=0, **options)
        return host.run_node(comfy_nodes["TorchCompileModel"], model=model, backend="eager")

    made = dit_host.sample(compiled(), "flux", steps=1)
    assert text_of(line()) == "+all" and not gpu.keys
    gpu.another()
    gpu.attention = False
    uncompiled = dit_host.sample(on_node(dit_host.small("flux"), min_tokens=0, decisions="+all"), "flux", steps=1)
    assert (uncompiled - made).norm() / made.norm() < 1e-4 and not gpu.keys
    plain = dit_host.sample(dit_host.small("flux"), "flux", steps=1)
    alone = dit_host.sample(compiled(decisions="-all"), "flux", steps=1)
    assert (alone - plain).norm() / plain.norm() < 1e-4 < (made - plain).norm() / plain.norm()
    torch._dynamo.reset()


# --- versions ---------------------------------------------------------------------------------------------------------


def test_a_workflow_of_an_older_version_says_what_has_changed(sd15, on_node, line, caplog):
    host.forget_log()
    with caplog.at_level(logging.INFO, "ToMe"):
        for _ in range(2):
            sample(on_node(sd15, version="0.1.0", start=0.1), steps=1)
    said = [text for text in caplog.messages if "saved with ToMe 0.1.0" in text]
    assert len(said) == 1 and said[0].removeprefix("[ToMe] ") in line()
    for change in ("go by noise levels instead of step numbers", "start, end and ratio at the end count noise"):
        assert change in said[0]
    assert "share match" not in said[0]
    sample(on_node(sd15), steps=1)
    assert "saved with" not in line()
