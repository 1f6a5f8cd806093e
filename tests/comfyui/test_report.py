"""ToMe Report: its numbers are those of the run, and it leaves nothing behind."""

from __future__ import annotations

import gc
import json
import logging
import weakref

import pytest
import torch

from . import dit_host
from .host import conditioning, forget_log, least_unet, pack_module, run_node, sample, small_unet, tokens, watch


@pytest.fixture
def record(comfy_nodes):
    """record(model) -> (the clone that is recorded, its record), through the node itself."""
    return lambda model: comfy_nodes["ToMeRecord"].execute(model=model).result


@pytest.fixture
def report(comfy_nodes):
    """report(record) -> (text, what the JSON holds), through the node itself."""

    def make(record, measure_time=False, **values):
        out = comfy_nodes["ToMeReport"].execute(record=record, after=None, measure_time=measure_time, **values)
        text, data = out.result
        assert out.ui.as_dict()["text"] == (text,)
        return text, json.loads(data)

    return make


METHODS = ("sample", "merge", "merge_queries", "merge_keys", "downsample", "prune")


@pytest.mark.parametrize("method", METHODS)
def test_tokens_are_those_that_reach_the_projections(sd15, tome, record, report, method):
    # With own tokens keys are drawn behind the projections.
    model, kept = record(tome(sd15, method=method, ratio=0.6, min_tokens=100, own_token=False))
    with watch(sd15) as seen:
        sample(model, steps=3)
    part = tokens(seen, "attn1.to_q" if method == "merge_queries" else "attn1.to_k")
    _, data = report(kept)
    assert (data["steps"], data["of_steps"], data["merged_steps"], data["calls"]) == (3, 3, 3, 3)
    merged = [layer for layer in data["layers"] if not layer["reason"]]
    assert len(merged) == 6 and {layer["level"] for layer in merged} == {0, 1}
    for layer in merged:
        kind, _, number = layer["where"].split()
        (count,) = part[f"{kind}_blocks.{number}.1"]
        assert layer["after"] == [count, count] and layer["calls"] == 3
        assert layer["before"] == layer["grid"][0] * layer["grid"][1]
    left = [layer for layer in data["layers"] if layer["reason"]]
    assert len(left) == 4 and all(layer["before"] == 64 and layer["after"] is None for layer in left)
    assert {layer["reason"] for layer in left} == {"fewer than min tokens 100"}


def test_text_reads_well(sd15, tome, record, report):
    model, kept = record(tome(sd15, min_tokens=100))
    sample(model, steps=2)
    assert report(kept)[0] == (
        "ToMe: method sample, ratio 0.5, seed 0\n"
        "2 steps, merged in 2; 2 calls of the model\n"
        "\n"
        "Merged:\n"
        "- level 0 (32x32): 1024 to 512 tokens (-50%), 3 layers: input block 1, output block 4, 5\n"
        "- level 1 (16x16): 256 to 128 tokens (-50%), 3 layers: input block 3, output block 2, 3\n"
        "\n"
        "Left alone:\n"
        "- level 2 (8x8), 64 tokens, 4 layers: fewer than min tokens 100 (input block 5, middle block 0, output block "
        "0, 1)\n"
        "\n"
        "Decisions: +32x32 +32x32/32/1 +16x16/64/2"
    )


def test_a_schedule_and_the_cap(sd15, tome, record, report):
    model, kept = record(tome(sd15, method="merge", ratio=0.9, start=0.5))
    sample(model, steps=4)
    text, data = report(kept)
    assert (data["steps"], data["merged_steps"]) == (4, 2)
    assert data["capped"] is True and data["ratio_cap"] == 0.75
    assert "ratio 0.9 is more than method merge can take at stride 2x2: 0.75 is what it does" in text
    assert "4 steps, merged in 2, from start 0.5 to end 1" in text


def test_a_level_that_was_not_asked_for(sd15, tome, record, report):
    model, kept = record(tome(sd15, levels="1"))
    sample(model, steps=1)
    text, _ = report(kept)
    assert "- level 0 (32x32), 1024 tokens, 3 layers: its level is not one of levels 1 (input block 1" in text


def hypertile(nodes, model):
    return run_node(
        nodes["HyperTile"], model=model, tile_size=128, swap_size=1, max_depth=0, scale_depth=False
    )  # fmt: skip


def perturbed(nodes, model):
    return run_node(nodes["PerturbedAttentionGuidance"], model=model, scale=3.0)


@pytest.mark.parametrize(
    ("other", "part"),
    [
        (hypertile, "another node has tiled or merged them"),
        (perturbed, "that another node or extension replaces"),
    ],
)
def test_the_log_and_the_report_give_the_same_reason(comfy_nodes, sd15, tome, record, report, caplog, other, part):
    model, kept = record(other(comfy_nodes, tome(sd15)))
    forget_log()
    with caplog.at_level(logging.INFO, logger="ToMe"):
        sample(model, steps=1)
    (logged,) = [line.removeprefix("[ToMe] ") for line in caplog.messages if part in line]
    _, data = report(kept)
    reasons = {layer["reason"] for layer in data["layers"] if part in layer["reason"]}
    assert len(reasons) == 1
    assert logged.startswith(f"{reasons.pop()} (")


def test_an_attention_that_is_not_to_itself(sd15, tome, record, report):
    model = sd15.clone()
    model.set_model_attn1_patch(lambda q, k, v, options: (q, torch.cat((k, k), 1), torch.cat((v, v), 1)))
    model, kept = record(tome(model))
    sample(model, steps=1)
    text, data = report(kept)
    assert "Nothing was merged." in text and len(data["layers"]) == 10
    assert {layer["reason"] for layer in data["layers"]} == {
        "ToMe skips a layer that does not attend to its own tokens"
    }


def test_transformers(comfy_nodes, tome, record, report):
    model, kept = record(tome(dit_host.small("flux"), ratio=0.5))
    dit_host.call(model, "flux")
    _, data = report(kept)
    assert [layer["where"] for layer in data["layers"]] == ["double block 0", "single block 0"]
    assert all(layer["before"] == 96 and layer["after"] == [48, 48] for layer in data["layers"])
    model, kept = record(tome(dit_host.small("flux"), min_tokens=2048))
    dit_host.call(model, "flux")
    text, _ = report(kept)
    assert "- level 0 (8x12), 96 tokens, 1 layer: fewer than min tokens 2048 (Flux)" in text


def test_a_mask_that_is_not_over_the_keys(comfy_nodes, tome, record, report):
    """The reason goes from the attention itself to the report."""
    made = pack_module("record")
    run = made.Run(pack_module("unet").ToMeConfig(), None)
    call = made.CallRecord(run, 0, None, (4, 6))
    dit, table = pack_module("dit"), pack_module("dit_models")
    config = pack_module("dit_patch").ToMeConfig(min_tokens=0)
    patch = dit.DiTCall(
        dit.ModelCall(config, (4, 6), torch.device("cpu")), table.DIT_MODELS[0], dit.Layout((4, 6), 0, 0), {}, call
    )
    q = torch.randn(1, 24, 64)
    told = {**patch.options, "block_index": 0}
    from comfy.ldm.modules.attention import optimized_attention

    optimized_attention(q, q, q, 2, mask=torch.zeros(24, 1), transformer_options=told)
    (layer,) = run.tally.layers()
    assert layer.reason == "ToMe skips an attention whose mask is not one over its keys" and layer.before == 24


def test_nothing_recorded_is_said(sd15, tome, record, report):
    model, kept = record(sd15)  # no ToMe node at all
    sample(model, steps=1)
    text, data = report(kept)
    assert "Nothing was recorded" in text and "change the sampler's seed" in text
    assert data["recorded"] is False and data["why"] == text


class Calls:
    """How often the model ran, and with ToMe or without."""

    def __init__(self, model, monkeypatch):
        self.merged, self.plain = 0, 0
        forward = model.model.diffusion_model.forward

        def counted(*args, **kwargs):
            patches = kwargs["transformer_options"].get("patches", {})
            if any("UNetCall" in repr(patch) for patch in patches.get("attn1_patch", ())):
                self.merged += 1
            else:
                self.plain += 1
            return forward(*args, **kwargs)

        monkeypatch.setattr(model.model.diffusion_model, "forward", counted)


def test_times_are_those_of_calls_without_and_with(short, tome, record, report, monkeypatch):
    model, kept = record(tome(short))
    calls = Calls(short, monkeypatch)
    sample(model, steps=3)
    assert (calls.merged, calls.plain) == (3, 0)
    text, data = report(kept, measure_time=True)
    time = data["time"]
    assert time["without_ms"] > 0 and time["with_ms"] > 0
    assert time["speedup"] == pytest.approx(time["without_ms"] / time["with_ms"])
    assert (time["rounds"], time["calls"], time["step"], time["ratio"], time["device"]) == (5, 1, 2, 0.5, "cpu")
    assert calls.merged == 3 + 1 + 5 and calls.plain == 2 + 5  # warm-up, then by turns
    assert " with ToMe: " in text and data["calls"] == 3, "measuring is not counted as sampling"


def test_the_clock_is_read_around_each_call(short, tome, record, report, monkeypatch):
    """With a clock that goes on 10 ms in a plain call and 4 ms in a merged one, these are the figures."""
    measure = pack_module("measure")
    now = [0.0]
    monkeypatch.setattr(measure.time, "perf_counter", lambda: now[0])
    model, kept = record(tome(short))
    sample(model, steps=2)
    forward = short.model.diffusion_model.forward

    def slow(*args, **kwargs):
        now[0] += 0.004 if "ToMe" in kwargs["transformer_options"]["wrappers"]["apply_model"] else 0.010
        return forward(*args, **kwargs)

    monkeypatch.setattr(short.model.diffusion_model, "forward", slow)
    time = report(kept, measure_time=True)[1]["time"]
    assert (round(time["without_ms"], 6), round(time["with_ms"], 6)) == (10.0, 4.0)


def test_a_step_of_several_calls(short, tome, record, report):
    """Prompts of other lengths cannot share a batch, so a step is two calls."""
    model, kept = record(tome(short))
    sample(model, steps=2, positive=conditioning(1, tokens=7), negative=conditioning(2, tokens=11, strength=0.5))
    _, data = report(kept, measure_time=True)
    if data["calls"] == 4:
        assert data["time"]["calls"] == 2
    else:
        assert data["calls"] == 2 and data["time"]["calls"] == 1


def test_a_slow_model_is_not_measured_for_long(sd15, tome, record, report, monkeypatch):
    monkeypatch.setattr(pack_module("measure"), "_BUDGET", 0.0)
    model, kept = record(tome(sd15))
    sample(model, steps=1)
    assert report(kept, measure_time=True)[1]["time"]["rounds"] == 1


def test_the_last_merged_step_is_measured(short, tome, record, report):
    model, kept = record(tome(short, end=0.5))
    sample(model, steps=4)
    assert report(kept, measure_time=True)[1]["time"]["step"] == 1


def test_times_are_measured_once_and_what_they_need_is_let_go(short, tome, record, report, monkeypatch):
    model, kept = record(tome(short))
    sample(model, steps=1)
    assert report(kept)[1]["time"] is None, "off"
    last = weakref.ref(kept.run().last.args[0])
    assert last() is not None, "kept as long as it may be asked for"
    first = report(kept, measure_time=True)[1]["time"]
    gc.collect()
    assert kept.run().last is None and last() is None
    calls = Calls(short, monkeypatch)
    assert report(kept, measure_time=True)[1]["time"] == first
    assert calls.merged == calls.plain == 0


def hooks(model):
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.model.diffusion_model.modules())


@pytest.mark.parametrize("options", [{}, {"method": "merge", "mlp": True, "cross_attention": True}])
def test_a_measured_model_is_what_it_was(short, tome, record, report, options):
    before, merged = sample(short), sample(tome(short, **options))
    model, kept = record(tome(short, **options))
    state = repr(model.model_options)
    sample(model)
    report(kept, measure_time=True)
    assert hooks(short) == 0 and repr(model.model_options) == state
    assert short.model.current_patcher is None
    assert torch.equal(sample(short), before) and torch.equal(sample(model), merged)


def test_random_numbers_are_not_touched(short, tome, record, report):
    model, kept = record(tome(short))
    sample(model)
    state = torch.random.get_rng_state()
    report(kept, measure_time=True)
    assert torch.equal(torch.random.get_rng_state(), state)


def test_a_failed_measurement_is_said_and_cleaned_up(sd15, tome, record, report, monkeypatch):
    model, kept = record(tome(sd15))
    sample(model, steps=1)

    def broken(*args, **kwargs):
        raise RuntimeError("out of memory, say")

    with monkeypatch.context() as patch:
        patch.setattr(sd15.model.diffusion_model, "forward", broken)
        text, data = report(kept, measure_time=True)
    assert data["time"] is None and "the time was not measured: RuntimeError: out of memory, say" in text
    assert kept.run().last is None and sd15.model.current_patcher is None and hooks(sd15) == 0


def test_an_interrupt_while_measuring_goes_through(sd15, tome, record, report):
    import comfy.model_management as management

    model, kept = record(tome(sd15))
    sample(model, steps=1)
    management.interrupt_current_processing(True)
    with pytest.raises(management.InterruptProcessingException):
        report(kept, measure_time=True)
    assert sd15.model.current_patcher is None


def test_a_control_network_is_left_out_of_the_measurement_alone(short, tome, record, report):
    """The model empties the lists of a control network: run again they would be wrong, so they are not kept."""
    import comfy.controlnet

    class Control(comfy.controlnet.ControlBase):
        def get_control(self, x, t, cond, batched, options):
            return {"input": [], "middle": [torch.zeros(x.shape[0], 64, 8, 8)], "output": []}

    control = Control()
    model, kept = record(tome(short))
    sample(
        model, steps=1,
        positive=conditioning(1, control=control, control_apply_to_uncond=True),
        negative=conditioning(2, control=control, control_apply_to_uncond=True),
    )  # fmt: skip
    assert kept.run().last.args[4] is None
    assert report(kept, measure_time=True)[1]["time"]["with_ms"] > 0


def test_a_record_is_freed_with_its_nodes_outcome(sd15, tome, record):
    model, kept = record(tome(sd15, method="merge"))
    sample(model, steps=1)
    gone = weakref.ref(kept), weakref.ref(kept.run())
    del model, kept
    gc.collect()
    assert [ref() for ref in gone] == [None, None]


def test_two_samplers_at_once_do_not_mix(sd15, tome, record, report):
    """Each record counts its own model's calls."""
    from concurrent.futures import ThreadPoolExecutor

    pairs = [record(tome(small_unet("SD15"), ratio=ratio)) for ratio in (0.25, 0.75)]
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(lambda pair: sample(pair[0], steps=3), pairs))
    for (_, kept), after in zip(pairs, (768, 256), strict=True):
        _, data = report(kept)
        assert data["calls"] == 3 and data["layers"][0]["after"] == [after, after]


def test_under_torch_compile(comfy_nodes, tome, record, report, caplog):
    torch._dynamo.reset()
    forget_log()
    model, kept = record(run_node(comfy_nodes["TorchCompileModel"], model=tome(least_unet()), backend="eager"))
    with caplog.at_level(logging.INFO, logger="ToMe"):
        sample(model, steps=2)
    text, data = report(kept, measure_time=True)
    torch._dynamo.reset()
    assert sum("under torch.compile ToMe Record sees no single layers" in line for line in caplog.messages) == 1
    assert "under torch.compile ToMe Record sees no single layers" in text
    assert (data["steps"], data["calls"], data["layers"]) == (2, 2, [])
    assert data["time"]["with_ms"] > 0
