"""levels "auto" on a GPU: a script's whole step is run both ways at its first call, by a copy of the model."""

from __future__ import annotations

import copy
import logging

import pytest
import torch
from support.holders import modules_holding
from support.made_up_gpu import MadeUpGPU, MadeUpSteps
from torch import nn

import shared_tome
from shared_tome import ToMeConfig, decisions_of
from shared_tome.autotune import decisions, layer, store, timing
from shared_tome.autotune import step as step_auto
from shared_tome.autotune.detached import about_model, detached_model
from shared_tome.autotune.paying import Decision, Judge
from shared_tome.scripts import hooks as script_hooks

from . import models
from .test_idle import MODEL_HOOKS

OPTIONS = {"min_tokens": 0, "ratio": 0.5, "method": "merge"}


@pytest.fixture
def decided(monkeypatch, tmp_path):
    """A GPU, on which a step takes 100 ms, and one that is merged that of `merged`; what was run, and its names."""
    known = MadeUpGPU(monkeypatch, tmp_path, store)
    found = {"merged": 99.0, "outs": [], "keys": known.keys}

    def compared(whole, merged, device):
        found["outs"].append((whole().sample, merged(Judge())().sample))
        return Decision(1e5, 1e3 * found["merged"], 0.0)

    monkeypatch.setattr(step_auto, "may_measure", lambda device: True)
    monkeypatch.setattr(step_auto, "_compared", compared)
    return found


def patched(unet, **options):
    shared_tome.apply_patch(unet, config=ToMeConfig(**{**OPTIONS, **options}))
    return unet


@pytest.mark.parametrize("name", models.UNETS)
@pytest.mark.parametrize("merged", [99.0, 60.0])
def test_the_first_call_is_run_both_ways(decided, caplog, name, merged):
    unet, decided["merged"] = models.UNETS[name](), merged
    plain, hooks = models.run(unet), models.count_hooks(unet)
    expected = models.run(patched(models.UNETS[name](), levels="0,1,2"))
    patched(unet)
    on = models.count_hooks(unet)
    with caplog.at_level(logging.INFO, "ToMe"):
        for _ in range(2):
            assert torch.equal(models.run(unet), expected if merged < 97 else plain)
    (whole, less), (key,) = decided["outs"][0], decided["keys"]
    # The first row as a picture with guidance; that the rows are alike shows in the outcome.
    alone = models.run(models.UNETS[name](), batch=2)[:1]
    assert whole.shape == plain.shape and torch.equal(whole[0], whole[1]) and whole.shape == less.shape
    torch.testing.assert_close(whole[:1], alone)
    assert not torch.equal(whole, less) and key.startswith("a step of UNet2DConditionModel of ") and "16x20" in key
    said = "a step takes 100.0 ms without and 99.0 ms with it"
    assert (said in caplog.text) == (merged > 97)
    left = models.count_hooks(unet)
    assert left >= on if merged < 97 else left == MODEL_HOOKS
    shared_tome.remove_patch(unet)
    assert models.count_hooks(unet) == hooks


def test_what_is_known_of_one_batch_holds_for_another(decided):
    unet = patched(models.sd15())
    for batch in (1, 2, 4):
        models.run(unet, batch=batch)
    shared_tome.remove_patch(unet)
    models.run(patched(unet), batch=4)
    assert len(decided["keys"]) == 2 and len(set(decided["keys"])) == 1 and len(decided["outs"]) == 1


def test_each_size_and_way_is_judged_by_itself(decided):
    unet = models.sd15()
    for options in ({}, {"mlp": True}, {"ratio": 0.25}, {"method": "sample"}, {"method": "sample", "own_token": False}):
        models.run(patched(unet, **options))
        models.run(unet, 8, 8)
    assert len(set(decided["keys"])) == len(decided["keys"]) == 10


def test_a_schedule_is_judged_by_the_ratios_that_it_has(decided):
    unet = patched(models.sd15(), start=0.5, ratio=0.25, ratio_end=0.5)
    for timestep in (900, 499, 300, 100, 1, 900, 499):
        models.run(unet, timestep=timestep)
    ratios = [part for key in decided["keys"] for part in key.split(", ") if part.startswith("0.")]
    assert ratios[0] == "0.2500" and ratios[-1] == "0.5000"
    assert 2 < len(set(ratios)) == len(ratios) == len(decided["keys"])
    assert all(not torch.equal(*outs) for outs in decided["outs"])


@pytest.mark.parametrize("what", ["levels", "training", "another's forward", "another's attention", "tomesd's call"])
def test_not_judged(decided, what):
    unet = models.sd15()
    block = next(script_hooks.served_blocks(unet))
    options = {"levels": "0"} if what == "levels" else {}
    if what == "training":
        unet.train()
    elif what == "another's forward":
        models.put_forward(block.ff)
    elif what == "another's attention":
        models.put_processor(block.attn1)
    if what == "tomesd's call":
        shared_tome.apply_patch(unet, ratio=0.5)
    else:
        patched(unet, **options)
    plain = models.run(models.sd15())
    assert not torch.equal(models.run(unet), plain) and not decided["keys"]


def test_attention_codes_and_weights_are_part_of_a_steps_name(decided):
    from diffusers.models.attention_processor import AttnProcessor

    unet = models.sd15()
    models.run(patched(unet))
    unet.set_attn_processor(AttnProcessor())
    models.run(patched(unet))
    first, second = decided["keys"]
    assert "attention_processor.AttnProcessor2_0, weights float32" in first
    assert "attention_processor.AttnProcessor, weights float32" in second


def test_what_a_models_times_depend_on():
    unet, cpu = models.sd15(), torch.device("cpu")
    plain = about_model(unet, cpu)
    assert about_model(unet, torch.device("meta")) == plain + ", partly elsewhere"
    block = next(script_hooks.served_blocks(unet))
    kept = block.ff.forward
    block.ff.forward = lambda *args, **kwargs: kept(*args, **kwargs)  # as offloading puts one there
    assert about_model(unet, cpu) == plain.replace("float32", "float32 replaced forwards")
    del block.ff.forward
    block.attn1.to_q.half()
    assert about_model(unet, cpu) == plain.replace("float32", "float16 float32")


def test_a_step_short_of_memory_is_asked_about_again(decided, monkeypatch, caplog):
    compared, now = step_auto._compared, [100.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])

    def full(*_):
        raise torch.cuda.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(step_auto, "_compared", full)
    unet, plain = patched(models.sd15()), models.run(models.sd15())
    merged = models.run(unet)
    assert torch.equal(models.run(unet), merged) and not torch.equal(merged, plain)
    assert "it is tried again later" in caplog.text and len(decided["keys"]) == 1
    monkeypatch.setattr(step_auto, "_compared", compared)
    now[0] += store.RETRY
    assert torch.equal(models.run(unet), plain) and len(decided["outs"]) == 1
    assert torch.equal(models.run(unet), plain) and len(decided["keys"]) == 2


def test_nobody_else_sees_it(decided):
    """Hooks of others run as often as without; the weights are the same ones, and no copy of the model is kept."""
    unet, ran = models.sd15(), []
    for module in (unet, unet.conv_in, next(script_hooks.served_blocks(unet)).ff):
        module.register_forward_hook(lambda *_: ran.append(1))
    weights = [weight.clone() for weight in unet.parameters()]
    random = torch.get_rng_state()
    models.run(patched(unet))
    assert len(ran) == 3 and decided["outs"] and torch.equal(torch.get_rng_state(), random)
    assert all(map(torch.equal, unet.parameters(), weights))
    twin = copy.deepcopy(unet)
    assert torch.equal(models.run(twin), models.run(unet)) and len(decided["outs"]) == 1


def test_a_copy_of_a_model_shares_its_weights_alone():
    unet = patched(models.sd15())
    made = detached_model(unet)
    assert models.count_hooks(made) == 0 < models.count_hooks(unet)
    assert [id(x) for x in made.parameters()] == [id(x) for x in unet.parameters()]
    assert not {id(module) for module in made.modules()} & {id(module) for module in unet.modules()}
    assert torch.equal(models.run(made), models.run(models.sd15()))
    made.conv_in.weight = nn.Parameter(torch.zeros_like(unet.conv_in.weight))
    assert unet.conv_in.weight.any()


def compared(calls, matters=False):
    """The decision of made-up steps. calls: gets a letter for each one that is run: whole, merged, or merged with all
    layers that save the GPU time. matters: whether there are more of these."""

    def merged(judge):
        judge.matters = matters
        return lambda: calls.append("m" if judge.waits else "g")

    return step_auto._compared(lambda: calls.append("w"), merged, torch.device("cpu"))


def test_both_take_turns_and_the_least_counts_of_the_whole_one(monkeypatch):
    calls, clock = [], iter([30.0, 20.0, 10.0, 25.0, 20.0, 19.0, 18.0, 17.0, 16.0])
    monkeypatch.setattr(timing, "seconds", lambda call, device: call() or next(clock) * 1e-3)
    decision = step_auto._compared(
        lambda: calls.append("w"), lambda judge: lambda: calls.append("m"), torch.device("cpu")
    )
    assert "".join(calls) == "wwmm" + "mw" * 4
    assert (decision.full_us, decision.merged_us) == (10e3, 19.5e3) and not decision.pays()


def test_the_third_way_takes_its_turn(monkeypatch):
    """Where it saves 3% of the whole step more than the second one; of both the median counts."""
    for least, busy in ((16.0, True), (18.6, False), (25.0, False)):
        calls, clock = [], iter([30.0, *[least, 19.0, 20.0] * 3, 99.0, 99.0, 20.0])
        monkeypatch.setattr(timing, "seconds", lambda call, device, c=clock: call() or next(c) * 1e-3)
        decision = compared(calls, matters=True)
        assert "".join(calls) == "wwmmg" + "gmw" * 4
        assert decision == Decision(20e3, pytest.approx(1e3 * (least if busy else 19.0)), 0.0, busy=busy)


def test_a_long_step_pays_and_is_not_run_merged(monkeypatch):
    calls, clock = [], iter([0.5])
    monkeypatch.setattr(timing, "seconds", lambda call, device: call() or next(clock))
    decision = step_auto._compared(
        lambda: calls.append("w"), lambda judge: lambda: calls.append("m"), torch.device("cpu")
    )
    assert "".join(calls) == "ww" and decision.pays() and decision.full_us == 5e5 and decision.busy


@pytest.mark.parametrize(("alone", "run"), [([20.0, 20.0], "ww"), ([2.0, 0.1], "www" + "mm" + "mw" * 4)])
def test_a_long_step_is_run_twice(monkeypatch, alone, run):
    """The first one may have been long because kernels were loaded."""
    calls, clock = [], iter(alone)
    monkeypatch.setattr(timing, "seconds_of_one", lambda call, device: call() or next(clock))
    monkeypatch.setattr(timing, "seconds", lambda call, device: call() or 0.1)
    decision = step_auto._compared(
        lambda: calls.append("w"), lambda judge: lambda: calls.append("m"), torch.device("cpu")
    )
    assert "".join(calls) == run and decision.busy == (run == "ww") and decision.full_us == 1e6 * alone[1]


def test_a_call_is_timed_among_others():
    calls = []
    taken = timing.seconds(lambda: calls.append(1), torch.device("cpu"))
    assert len(calls) == 2 and 0 < taken < 1
    assert 0 < timing.seconds_of_one(lambda: calls.append(1), torch.device("cpu")) < 1 and len(calls) == 3


def test_what_a_call_is_given_is_brought_to_two_rows():
    """Its first row; what has no row, or is another's kind of list, is passed on as it is."""
    x, other = torch.arange(12.0).view(3, 4), torch.zeros(7)
    size, step = torch.Size((3, 5)), torch.tensor(5)
    given = (x, step, {"a": [x[:, 1], other], "b": None}, size, "text", (x, (x,)))
    made = step_auto.rows_of(given, 3)
    assert torch.equal(made[0], x[:1].repeat(2, 1)) and made[0].is_contiguous() and made[1] is step
    assert torch.equal(made[2]["a"][0], torch.ones(2)) and made[2]["a"][1] is other and made[2]["b"] is None
    assert made[3] is size and made[4] == "text" and torch.equal(made[5][1][0], made[0])
    assert type(made[5]) is tuple and type(made[2]["a"]) is list


def test_a_list_of_a_tensor_a_row_is_brought_to_its_first():
    """But not one of whole tensors, of sizes, nor a tuple."""
    x, rows, sizes = torch.zeros(3, 4), [torch.zeros(2, 5), torch.ones(2, 6), torch.ones(2)], [(3, 4), (3, 5), (3, 6)]
    made = step_auto.rows_of({"rows": rows, "whole": [x, x, x], "sizes": sizes, "tuple": tuple(rows)}, 3, 1)
    assert made["rows"] == rows[:1] and made["sizes"] == sizes and len(made["tuple"]) == 3
    assert [part.shape for part in made["whole"]] == [(1, 4)] * 3


SMALL, LARGE = "+16x20 +16x20/16/2 +8x10/32/2", "+16x20 +16x20/16/2 -8x10/32/2"


@pytest.fixture
def steps(monkeypatch, tmp_path):
    """A slow processor: the blocks of 8x10 tokens take it longer than the GPU."""
    steps = MadeUpSteps(monkeypatch, tmp_path, store, layer, decisions, step_auto)
    steps.waiting = {(8, 10)}
    return steps


@pytest.mark.parametrize(
    ("gpu_ms", "cpu_ms", "text", "ways"),
    [
        (200, 80, SMALL, ["from 8x10", "from 16x20", "whole"]),  # 200 ms, 185 with the large layers, 165 with all
        (100, 81, LARGE, ["from 8x10", "from 16x20", "whole"]),  # 100, 85, 88 by the processor
        (500, 80, SMALL, []),
    ],
)
def test_small_layers_are_merged_where_the_gpu_is_busy(steps, caplog, gpu_ms, cpu_ms, text, ways):
    unet, steps.gpu_ms, steps.cpu_ms = models.sd15(), gpu_ms, cpu_ms
    expected = models.run(patched(models.sd15(), method="sample", decisions=text))
    assert not steps.keys
    patched(unet, method="sample")
    assert all(torch.equal(models.run(unet), expected) for _ in range(3))
    assert steps.ways == ["whole", *ways * 4] and decisions_of(unet) == text
    waits = "a block takes the processor 50000 us and the GPU 40000, so its steps wait for the processor"
    assert (waits in caplog.text) == (text == LARGE), "what was tried alone is not told"


def test_blocks_that_were_left_alone_are_merged_once_a_step_is_known_to_be_busy(steps, monkeypatch):
    """Its first measurement failed, so the small layers' blocks have lost their hooks."""
    compared, now = step_auto._compared, [100.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])

    def full(*_):
        raise torch.cuda.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(step_auto, "_compared", full)
    unet = patched(models.sd15(), method="sample")
    large, small = (models.run(patched(models.sd15(), method="sample", decisions=text)) for text in (LARGE, SMALL))
    assert all(torch.equal(models.run(unet), large) for _ in range(2))
    monkeypatch.setattr(step_auto, "_compared", compared)
    now[0] += store.RETRY
    assert all(torch.equal(models.run(unet), small) for _ in range(2)) and not torch.equal(large, small)


def test_nothing_of_a_tried_step_stays(steps):
    """Copies share the model's weights, which may be as much as the GPU has."""
    unet = patched(models.sd15(), method="sample")
    assert modules_holding(unet.conv_out.weight, lambda: models.run(unet)) == 1 and steps.ways, "the model's own"
