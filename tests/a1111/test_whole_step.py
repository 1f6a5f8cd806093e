"""levels "auto" on a GPU: a whole step is run both ways before anything is merged, in A1111 by copies of the model."""

from __future__ import annotations

import sys
import types
from collections import Counter

import pytest
import torch
from support.holders import modules_holding
from support.made_up_gpu import MadeUpSteps
from torch import nn

from . import models
from .test_decisions import LABEL, lines, part, same  # noqa: F401
from .test_forge import _hooks
from .test_generation import _use_hypertile
from .test_nothing import any_host  # noqa: F401

ON = {"ratio": 0.5, "min_tokens": 0}
MORE, LESS = "from 8x8", "from 16x16"
CALLS = {"two ways": ["whole", *[LESS, "whole"] * 4], "three ways": ["whole", *[MORE, LESS, "whole"] * 4]}


@pytest.fixture
def steps(monkeypatch, tmp_path):
    """On this GPU steps wait for the processor, and the blocks of 8x8 tokens take it longer than the GPU."""
    names = ("store", "layer", "decisions", "step")
    steps = MadeUpSteps(monkeypatch, tmp_path, *map(part, names))
    steps.gpu_ms, steps.cpu_ms, steps.saves_ms, steps.waiting = 100.0, 99.5, 10.0, {(8, 8)}
    return steps


@pytest.fixture
def busy(steps):
    """A GPU that is busy all the time: what small layers take the processor does not show."""
    steps.gpu_ms, steps.cpu_ms = 200.0, 50.0
    return steps


def decided(host, step, large, small, size=16):
    """A text of the decisions of a step, its layers on the latent's grid and those on half of it."""
    large_is, small_is = ("32/4", "32/4") if host.forge else ("32/2", "64/2")
    full, half = f"{size}x{size}", f"{size // 2}x{size // 2}"
    return f"{step}{full} {large}{full}/{large_is} {small}{half}/{small_is}"


def unet_of(host):
    model = host.shared.sd_model
    return model.original.unet.model.diffusion_model if host.forge else model.model.diffusion_model


@pytest.mark.parametrize("map_", [False, True], ids=["", "map"])
def test_a_step_that_does_not_pay_is_left_alone_and_says_so_once(any_host, steps, lines, map_):  # noqa: F811
    plain, _ = any_host.generate()
    found, p = any_host.generate([{**ON, "map": map_}])
    assert same(found, plain) and not p.extra_generation_params
    assert steps.ways == CALLS["three ways"]
    said = "merging does not pay here: a step takes 100.0 ms without and 1"
    assert sum(said in line and "nothing is merged" in line for line in lines) == 1
    assert sum(said in line for line in lines) == 2, "and in the report"
    assert any(said in comment for comment in p.comments)
    report = next(line for line in lines if "left alone: " in line)
    assert f"left alone: {2 if any_host.forge else 7} layers at levels 0, 1 ({said}" in report
    steps.ways.clear(), lines.clear()
    again, _ = any_host.generate([ON], seeds=(1, 2), batch_size=1)
    assert not steps.ways and same(again[:1], plain)
    assert sum(said in line and "nothing is merged" in line for line in lines) == 1


@pytest.mark.parametrize("set_", [{}, {"decisions": "-16x16"}], ids=["measured", "set, beside HyperTile"])
def test_the_hooks_go_where_a_step_does_not_pay(host, steps, set_):
    unet, hooks = unet_of(host), []
    if set_:
        _use_hypertile(unet, True)
    unet.register_forward_hook(lambda module, *_: hooks.append(models.count_hooks(module)))
    host.generate([{**ON, **set_}])
    few = 1 + 2  # this one, and those that make the state of each call
    assert len(hooks) == 3 and hooks[0] > few and hooks[-1] == few, "the first call is reported"
    assert models.count_hooks(unet) == 1


def test_on_forge_the_patches_go_where_a_step_does_not_pay(any_host, steps):  # noqa: F811
    if not any_host.forge:
        pytest.skip("AUTOMATIC1111 has none")
    hooks = []
    unet_of(any_host).register_forward_hook(lambda module, *_: hooks.append(models.count_hooks(module)))
    any_host.generate([{**ON, "decisions": "-16x16"}])
    assert len(hooks) == 3 and hooks[0] > 1 and hooks[1:] == [1, 1], "the first call is reported"


def test_a_busy_step_merges_all_layers_that_save_gpu_time(any_host, busy, lines):  # noqa: F811
    text = decided(any_host, "+", "+", "+")
    expected, _ = any_host.generate([{**ON, "decisions": text}])
    assert not busy.keys
    found, p = any_host.generate([ON])
    assert same(found, expected) and busy.ways == CALLS["three ways"]
    assert p.extra_generation_params[LABEL] == text and not p.troubles
    assert not any("does not pay" in line for line in lines), "what was tried alone is not told"
    busy.forget(), busy.ways.clear()
    again, _ = any_host.generate([ON])
    assert same(again, expected) and not busy.ways


def test_a_step_that_waits_spares_the_layers_that_take_the_processor(any_host, steps, lines):  # noqa: F811
    steps.cpu_ms, steps.costs_ms = (70.0, 12.0) if any_host.forge else (50.0, 6.0)
    text = decided(any_host, "+", "+", "-")
    expected, _ = any_host.generate([{**ON, "decisions": text}])
    found, p = any_host.generate([ON])
    assert same(found, expected) and p.extra_generation_params[LABEL] == text
    assert steps.ways == CALLS["three ways"]
    assert any("a block takes the processor" in line for line in lines)


def test_a_third_way_is_run_only_where_it_differs(any_host, steps):  # noqa: F811
    steps.cpu_ms, steps.waiting = 50.0, set()
    any_host.generate([ON])
    assert steps.ways == ["whole", *[MORE, "whole"] * 4]
    steps.another(x8x8=False)
    steps.ways.clear()
    any_host.generate([ON])
    assert steps.ways == CALLS["two ways"]


def test_each_size_and_ratio_is_asked_for_once(any_host, busy):  # noqa: F811
    busy.waiting.add((12, 12))
    any_host.generate([ON], seeds=(1, 2), batch_size=1, enable_hr=True)
    count = len(busy.ways)
    assert count == 2 * len(CALLS["three ways"])
    asked = sum(key.startswith("a step of") for key in busy.keys)
    assert asked == 4, "once in each pass"
    any_host.opts.data["batch_cond_uncond"] = False  # prompts and negatives in calls of their own
    any_host.generate([ON], seeds=(1, 2), batch_size=2, enable_hr=True)
    assert len(busy.ways) == count, "the rows of a call are no part of it"
    any_host.generate([{**ON, "ratio_end": 0.25}], steps=8)
    more = len(busy.ways) - count
    assert more >= 3 * len(CALLS["three ways"]) and more % len(CALLS["three ways"]) == 0
    any_host.generate([{**ON, "levels": "0"}])
    assert len(busy.ways) == count + more, "named levels are merged whatever they cost"


@pytest.mark.parametrize("step", "+-")
def test_set_decisions_of_steps_are_obeyed_and_nothing_is_measured(any_host, steps, step):  # noqa: F811
    text = decided(any_host, step, "+", "-")
    found, p = any_host.generate([{**ON, "decisions": text}])
    assert not steps.keys and not steps.ways
    plain, _ = any_host.generate()
    assert same(found, plain) == (step == "-")
    assert p.extra_generation_params.get(LABEL) == (text if step == "+" else None)
    assert any("the decisions that are set leave it alone" in comment for comment in p.comments)


def test_a_text_without_the_step_has_it_measured(any_host, busy, lines):  # noqa: F811
    """By the layers of this machine: what is kept holds for other texts too."""
    text = decided(any_host, "+", "-", "+").partition(" ")[2]
    found, p = any_host.generate([{**ON, "decisions": text}])
    assert busy.ways == CALLS["three ways"]
    assert any("decisions does not name 16x16, so this was decided here" in line for line in lines)
    assert p.extra_generation_params[LABEL] == f"+16x16 {text}"


def test_pictures_without_a_layer_that_is_served_are_not_timed(any_host, busy):  # noqa: F811
    any_host.generate([{**ON, "min_tokens": 300}])
    assert not busy.keys and not busy.ways
    _, p = any_host.generate([{**ON, "min_tokens": 100}])
    assert busy.ways and p.extra_generation_params[LABEL] == decided(any_host, "+", "+", "+").rpartition(" ")[0]


def test_nothing_is_measured_on_the_cpu(any_host, steps, monkeypatch):  # noqa: F811
    monkeypatch.setattr(part("step"), "may_measure", part("layer").may_measure)
    monkeypatch.setattr(part("decisions"), "measures", part("layer").measures)
    _, p = any_host.generate([ON])
    assert not steps.keys and p.extra_generation_params[LABEL] == decided(any_host, "+", "+", "+")


def test_the_step_that_is_run_is_the_pictures_own(any_host, busy, monkeypatch):  # noqa: F811
    """Its first row as a picture with guidance; whole it is unmerged, and the tried ones are merged."""
    step, outs = part("step"), []
    compared = step._compared

    def looked(whole, merged, device):
        outs.append((whole(), merged(step.Judge())(), merged(step.Judge(waits=False))()))
        return compared(whole, merged, device)

    monkeypatch.setattr(step, "_compared", looked)
    any_host.generate([ON], prompts=["a", "b"], seeds=(1, 2), batch_size=2)
    ((whole, less, more),) = outs
    assert whole.shape == (2, 4, 16, 16) and all(torch.equal(one[0], one[1]) for one in (whole, less, more))
    assert not torch.equal(whole, less) and not torch.equal(less, more)


# --- Other extensions -------------------------------------------------------------------------------------------------


def replaced_forward(unet):
    """As ControlNet stands in the place of the U-Net's forward."""
    own, seen = unet.forward, []

    def forward(self, *args, **kwargs):
        seen.append(args[0].shape if args else None)
        return own(*args, **kwargs)

    unet.forward = types.MethodType(forward, unet)
    return seen


def replaced_class(monkeypatch, unet):
    """An extension's cache of whole calls, for all models of a class."""
    own, seen = type(unet).forward, []

    def forward(self, *args, **kwargs):
        seen.append(1)
        return own(self, *args, **kwargs)

    forward.__module__ = "cache_of_steps"
    monkeypatch.setattr(type(unet), "forward", forward)
    return seen


def added_part(unet):
    """As an adapter brings parts of its own into the model."""

    class Part(nn.Identity):
        __module__ = "adapter"

        def forward(self, x):
            seen.append(1)
            return x

    unet.seen, seen = Part(), []
    next(m for m in unet.modules() if hasattr(m, "attn1")).norm1.register_forward_hook(lambda m, a, out: unet.seen(out))
    return seen


def replaced_call(host):
    """As an extension stands in the place of Forge's apply_model."""
    base = host.shared.sd_model.original.unet.model
    own, seen = base.apply_model, []
    base.apply_model = lambda *args, **c: seen.append(1) or own(*args, **c)
    return seen


@pytest.mark.parametrize("what", ["forward", "class", "part", "call"])
def test_where_another_extension_is_in_the_way_nothing_is_run(any_host, busy, monkeypatch, caplog, what):  # noqa: F811
    """The layers alone decide, as where steps wait."""
    unet = unet_of(any_host)
    if what == "call" and not any_host.forge:
        pytest.skip("AUTOMATIC1111 has no such call")
    if what == "call":
        seen = replaced_call(any_host)
    elif what == "class":
        seen = replaced_class(monkeypatch, unet)
    else:
        seen = replaced_forward(unet) if what == "forward" else added_part(unet)
    expected, _ = any_host.generate([{**ON, "decisions": decided(any_host, "+", "+", "-")}])
    before, seen[:] = len(seen), []
    found, p = any_host.generate([ON])
    assert same(found, expected) and not busy.ways and len(seen) == before
    assert caplog.text.count("not measured (NotNow: another extension") == 1
    assert p.extra_generation_params[LABEL] == decided(any_host, "+", "+", "-")


def test_hypertile_is_in_the_way_while_it_is_on(host, busy):
    unet = unet_of(host)
    _use_hypertile(unet, True)
    _, p = host.generate([ON])
    assert not busy.ways and not p.extra_generation_params
    _use_hypertile(unet, False)
    found, p = host.generate([ON])
    assert busy.ways and p.extra_generation_params[LABEL] == decided(host, "+", "+", "+")
    kept = set(busy.keys)
    for module in unet.modules():  # the model is loaded anew
        vars(module).pop("__webui_hypertile_params", None) and vars(module).pop("forward")
    again, _ = host.generate([ON])
    assert same(again, found) and set(busy.keys) == kept, "measured under one name"


def test_a_hook_of_another_extension_sees_no_call_more(host, busy):
    seen = []
    unet = unet_of(host)
    unet.register_forward_pre_hook(lambda *_: seen.append("model"))
    next(m for m in unet.modules() if hasattr(m, "attn1")).ff.register_forward_hook(lambda *_: seen.append("ff"))
    host.generate([ON])
    assert busy.ways and seen == ["model", "ff"] * 3


def test_on_forge_a_hook_of_another_extension_is_in_the_way(any_host, busy):  # noqa: F811
    if not any_host.forge:
        pytest.skip("there copies without hooks are run")
    seen = []
    handle = unet_of(any_host).blocks[0].ff.register_forward_hook(lambda *_: seen.append(1))
    _, p = any_host.generate([ON])
    assert not busy.ways and len(seen) == 3 and LABEL in p.extra_generation_params
    handle.remove()
    assert _hooks(any_host) == 0


def test_on_forge_patches_and_wrappers_of_others_see_no_call_more(any_host, busy):  # noqa: F811
    if not any_host.forge:
        pytest.skip("AUTOMATIC1111 has none")
    unet, seen = any_host.shared.sd_model.original.unet, []
    options = unet.model_options["transformer_options"]
    options["patches"] = {"attn1_patch": [lambda q, k, v, extra: seen.append("patch") or (q, k, v)]}
    any_host.generate([ON])
    assert busy.ways and seen == ["patch"] * 2 * 3
    busy.clear(), busy.ways.clear(), seen.clear()

    def wrapper(apply_model, args):  # it may call the model for tiles
        seen.append("wrapper")
        return apply_model(args["input"], args["timestep"], **args["c"])

    unet.model_options["model_function_wrapper"] = wrapper
    any_host.generate([ON])
    assert not busy.ways and seen.count("wrapper") == 3


def test_control_networks_are_not_run(any_host, busy, monkeypatch):  # noqa: F811
    if not any_host.forge:
        pytest.skip("AUTOMATIC1111's control networks stand in the place of the model's forward")
    model, seen = any_host.shared.sd_model, []
    real = type(model.original.unet.model).apply_model

    def apply_model(self, x, t, control=None, control_model=None, **c):
        seen.append((control, control_model))
        return real(self, x, t, **c)

    monkeypatch.setattr(type(model.original.unet.model), "apply_model", apply_model)
    run = type(model)._run

    def controlled(self, x, sigma, context=None):
        wrapper = self.forge_objects.unet.model_options["model_function_wrapper"]
        options = self.forge_objects.unet.model_options["transformer_options"].copy()
        c = {"c_crossattn": context, "transformer_options": options, "control": "control", "control_model": "network"}
        apply = self.forge_objects.unet.model.apply_model
        return wrapper(apply, {"input": x, "timestep": sigma, "c": c, "cond_or_uncond": [0, 1]})

    monkeypatch.setattr(type(model), "_run", controlled)
    model.model.diffusion_model = model._run
    any_host.generate([ON])
    assert run is not controlled and busy.ways
    assert seen.count(("control", "network")) == 3 and set(seen) == {("control", "network"), (None, None)}


class Lora:
    """As AUTOMATIC1111's own writes networks into the weights, when a layer first runs, and keeps on the layer what it
    wrote and what was there."""

    def __init__(self, monkeypatch, unet):
        self.wanted, self.writes, own = (), [], nn.Linear.forward

        def forward(layer, x):
            name = getattr(layer, "network_layer_name", None)
            if name is not None and getattr(layer, "network_current_names", ()) != self.wanted:
                if getattr(layer, "network_weights_backup", None) is None:
                    layer.network_weights_backup = layer.weight.detach().clone()
                layer.weight.data.copy_(layer.network_weights_backup * (1.5 if self.wanted else 1.0))
                layer.network_current_names = self.wanted
                self.writes.append(name)
            return own(layer, x)

        forward.__module__ = "networks"
        monkeypatch.setattr(nn.Linear, "forward", forward)
        for name, module in unet.named_modules():
            if name.endswith("attn1.to_v"):
                module.network_layer_name = name


def test_loras_are_written_by_the_model_itself(host, busy, monkeypatch):
    lora = Lora(monkeypatch, unet_of(host))
    without, _ = host.generate([{**ON, "decisions": decided(host, "+", "+", "+")}])
    lora.wanted = ("a",)
    expected, _ = host.generate([{**ON, "decisions": decided(host, "+", "+", "+")}])
    assert not same(expected, without) and not busy.ways
    lora.wanted = ()
    assert same(host.generate([ON])[0], without) and busy.ways  # measured before the networks are taken out
    busy.clear(), busy.ways.clear(), lora.writes.clear()
    lora.wanted = ("a",)
    assert same(host.generate([ON])[0], expected) and busy.ways  # and before they are put in
    assert sorted(lora.writes) == sorted(set(lora.writes)), "each layer once"


def test_weights_that_come_in_parts_are_in_the_way(host, busy, caplog):
    """As with --lowvram."""
    unet = unet_of(host)
    unused = nn.Module()
    unused.weight = nn.Parameter(torch.empty(1, device="meta"))
    unet.unused = unused
    _, p = host.generate([ON])
    assert not busy.ways and "the model's weights are moved to the GPU in parts" in caplog.text
    assert p.extra_generation_params[LABEL] == decided(host, "+", "+", "-")


def test_a_step_short_of_memory_is_no_decision(any_host, busy, monkeypatch, caplog):  # noqa: F811
    """The layers decide, as where nothing is known; a minute later it is tried again, and hooks and modes are gone."""
    step, store, seconds = part("step"), part("store"), part("timing").seconds
    calls = []

    def full(call, device):
        calls.append(1)
        if len(calls) == 2:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory")
        return seconds(call, device)

    expected, _ = any_host.generate([{**ON, "decisions": decided(any_host, "+", "+", "-")}])
    monkeypatch.setattr(step.timing, "seconds", full)
    found, _ = any_host.generate([ON])
    assert same(found, expected) and "CUDA out of memory), so merged; it is tried again later" in caplog.text
    assert len(calls) == 2
    hooks = _hooks(any_host) if any_host.forge else models.count_hooks(unet_of(any_host))
    assert hooks == 0
    monkeypatch.setattr(store.store_of(torch.device("cpu")), "_again", {})
    _, p = any_host.generate([ON])
    assert p.extra_generation_params[LABEL] == decided(any_host, "+", "+", "+")


def test_a_step_that_turns_out_busy_later_has_all_its_hooks(any_host, tome, busy, monkeypatch):  # noqa: F811
    """Its first measurement failed, so the small layers' blocks did without."""
    store, step, seconds, calls = part("store"), part("step"), part("timing").seconds, []

    def full_at_first(call, device):
        calls.append(1)
        if len(calls) == 1:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory")
        return seconds(call, device)

    monkeypatch.setattr(step.timing, "seconds", full_at_first)
    for module in (store, part("verdicts")):
        monkeypatch.setattr(module, "RETRY", 0.0)
    any_host.generate([ON])
    large, small = (1, 1) if any_host.forge else (3, 4)
    assert Counter(busy.merged) == {(16, 16): 2 * large, (8, 8): 2 * small}, "in the second call and the third"


def test_nothing_of_a_tried_step_stays(host, tome, busy):
    """Copies share the model's weights, which another checkpoint is to replace."""
    weight = unet_of(host).out[-1].weight

    def generate():
        host.generate([ON])
        assert busy.ways and not tome.hooks._attached

    assert modules_holding(weight, generate) == 1, "the model's own"


def test_a_refiner_is_asked_for_itself(host, busy):
    refiner = models.small_model(7, mult=(1, 1, 2))
    host.generate([ON], steps=4, refiner=refiner)
    asked = {key.partition(" parameters")[0] for key in busy.keys if key.startswith("a step of")}
    assert len(asked) == 2 and len(busy.ways) == 2 * len(CALLS["three ways"])


def test_a_steps_name_tells_what_its_times_depend_on(any_host, busy, monkeypatch):  # noqa: F811
    """The dtype that the model computes in, whatever it is given, the attention and whether it is upcast."""
    any_host.generate([ON])
    opts = any_host.opts.data
    opts["upcast_attn"] = True
    any_host.generate([ON])
    opts["upcast_attn"] = False
    (key, upcast) = dict.fromkeys(key for key in busy.keys if key.startswith("a step of"))
    assert ", 16x16, float32, " in key and upcast == key.replace(", sample", ", attention in float32, sample", 1)
    if not any_host.forge:
        assert "ldm.modules.attention.CrossAttention.forward" in key
        return
    base = any_host.shared.sd_model.original.unet.model
    monkeypatch.setattr(sys.modules[type(base).__module__], "attention_function", models.small_model, raising=False)
    setattr(base, "manual_cast_dtype" if hasattr(base, "model_sampling") else "computation_dtype", torch.float16)
    any_host.generate([ON])
    other = [key for key in busy.keys if key.startswith("a step of")][-1]
    assert ", 16x16, float16, " in other and ", a1111.models.small_model, sample" in other
