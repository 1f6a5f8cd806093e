"""apply_patch and remove_patch on diffusers: configs, weights of keys, steps, and that nothing stays behind."""

from __future__ import annotations

import contextlib
import copy
import gc
import math
import threading
import time
import weakref
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import shared_tome
from shared_tome import METHODS, ModelCall, ToMeConfig
from shared_tome.scripts.block import ScriptBlock
from shared_tome.scripts.hooks import served_blocks
from shared_tome.scripts.steps import Steps

from . import models

KEPT = {"sample": (320, 80), "merge": (80, 80), "merge_queries": (80, 320), "merge_keys": (320, 80)}
KEPT["multires"] = (320, 320)  # its keys are drawn where they meet the queries


def config(**options):
    return ToMeConfig(**{"ratio": 0.75, "min_tokens": 0, "own_token": False, **options})


@pytest.mark.parametrize("method", METHODS)
def test_a_config_reaches_every_method(method):
    unet = models.sd15()
    before, hooks = models.run(unet), models.count_hooks(unet)
    assert shared_tome.apply_patch(unet, ratio=0.1, config=config(method=method)) is unet
    seen = {"to_q": set(), "to_k": set()}
    block = next(served_blocks(unet))
    for name, counts in seen.items():
        project = getattr(block.attn1, name)
        project.register_forward_hook(lambda m, args, out, counts=counts: counts.add(args[0].shape[1]))
    merged = models.run(unet)
    assert merged.shape == before.shape and merged.isfinite().all() and not torch.equal(merged, before)
    wanted = KEPT.get(method, (320, 80) if method == "downsample" else (80, 80))
    assert (seen["to_q"], seen["to_k"]) == ({wanted[0]}, {wanted[1]})
    shared_tome.remove_patch(unet)
    assert torch.equal(models.run(unet), before)
    assert models.count_hooks(unet) == hooks + 2  # those of this test


def test_defaults_are_tomesds():
    unet = models.sd15()
    shared_tome.apply_patch(unet)
    ours = unet._shared_tome.config
    assert (ours.method, ours.ratio, ours.stride, ours.levels) == ("merge", 0.5, (2, 2), "0")
    assert (ours.partition, ours.proportional, ours.reduce, ours.min_tokens) == ("random_2d", False, "mean", 0)
    assert not ours.cross_attention and not ours.mlp
    shared_tome.apply_patch(unet, 0.25, 4, 3, 2, False, True, True, True)  # in tomesd's order
    ours = unet._shared_tome.config
    assert (ours.ratio, ours.stride, ours.levels, ours.partition) == (0.25, (3, 2), "0,1,2", "fixed_2d")
    assert ours.cross_attention and ours.mlp
    shared_tome.apply_patch(unet, 0.25, seed=5, proportional=True)
    assert unet._shared_tome.config.seed == 5 and unet._shared_tome.config.proportional
    shared_tome.apply_patch(unet, 0.25, merge_attn=False, config=config(), seed=6)
    assert unet._shared_tome.config == config(seed=6) and unet._shared_tome.merge_attn


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"max_downsample": 3}, "1, 2, 4, 8, got 3"),
        ({"max_downsample": [1]}, r"1, 2, 4, 8, got \[1\]"),
        ({"config": {"ratio": 0.5}}, "config must be a ToMeConfig, got {'ratio': 0.5}"),
        ({"ratio": 1.5}, "ratio must be .* got 1.5"),
        ({"sx": 0}, "stride must be"),
        ({"config": ToMeConfig(), "mlp": True}, "mlp needs a method"),
    ],
)
def test_arguments_out_of_range_change_nothing(arguments, words):
    unet = models.sd15()
    shared_tome.apply_patch(unet, 0.3)
    kept, merged = unet._shared_tome, models.run(unet)
    with pytest.raises(ValueError, match=words):
        shared_tome.apply_patch(unet, **arguments)
    assert unet._shared_tome is kept and torch.equal(models.run(unet), merged)


def test_a_second_call_replaces_the_first():
    unet = models.sd15()
    before = models.run(unet)
    shared_tome.apply_patch(unet, 0.5)
    once, hooks = models.run(unet), models.count_hooks(unet)
    shared_tome.apply_patch(unet, 0.2)
    assert not torch.equal(models.run(unet), once)
    shared_tome.apply_patch(unet, 0.5)
    assert torch.equal(models.run(unet), once) and models.count_hooks(unet) == hooks
    shared_tome.remove_patch(shared_tome.remove_patch(unet))
    assert torch.equal(models.run(unet), before) and models.count_hooks(unet) == 0
    assert not any("tome" in name for name in vars(unet))


@pytest.mark.parametrize("method", ["sample", "merge"])
def test_after_an_exception_all_is_well(method):
    unet = models.sd15()
    before = models.run(unet)
    shared_tome.apply_patch(unet, config=config(method=method, ratio=0.6))
    merged = models.run(unet)
    block = list(served_blocks(unet))[1]
    for part in (block.attn1, block.attn1.to_k, block.attn1.to_out[0], block.ff):
        handle = part.register_forward_pre_hook(lambda module, args: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            models.run(unet)
        handle.remove()
        assert torch.equal(models.run(unet), merged)
    block.ff.register_forward_pre_hook(lambda module, args: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        models.run(unet)
    block.ff._forward_pre_hooks.clear()
    shared_tome.remove_patch(unet)
    assert torch.equal(models.run(unet), before) and models.count_hooks(unet) == 0


@pytest.mark.parametrize("method", ["sample", "merge"])
def test_an_exception_keeps_no_tensor(method):
    unet, seen = models.sd15(), []
    shared_tome.apply_patch(unet, config=config(method=method, ratio=0.6))
    block = list(served_blocks(unet))[1]
    handles = [
        block.register_forward_pre_hook(lambda module, args: seen.append(weakref.ref(args[0]))),
        block.ff.register_forward_pre_hook(lambda module, args: 1 / 0),
    ]
    with contextlib.suppress(ZeroDivisionError):
        models.run(unet)
    gc.collect()
    assert len(seen) == 1 and seen[0]() is None
    for handle in handles:
        handle.remove()
    merged = models.run(unet)
    shared_tome.apply_patch(unet, config=config(method=method, ratio=0.6))
    assert torch.equal(models.run(unet), merged)


def test_an_exception_in_a_merged_step_does_not_reach_an_unmerged_one():
    unet = models.sd15()
    early = models.run(unet, timestep=900)
    shared_tome.apply_patch(unet, config=config(start=0.5))
    handle = list(served_blocks(unet))[1].ff.register_forward_pre_hook(lambda module, args: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        models.run(unet, timestep=100)
    handle.remove()
    assert torch.equal(models.run(unet, timestep=900), early)


def test_layers_that_do_not_pay_are_left_alone(monkeypatch, caplog):
    """A GPU measures each shape once; here all are said not to pay."""
    from shared_tome.autotune import decisions

    unet = models.sd15()
    before = models.run(unet)
    monkeypatch.setattr(decisions, "measures", lambda config, grid, device: config.levels == "auto")
    monkeypatch.setattr(decisions, "decision_on", lambda *_: decisions.Decision(100.0, 99.0, 5.0))
    shared_tome.apply_patch(unet, config=config())
    assert torch.equal(models.run(unet), before)
    assert "does not pay here: it saves 1 of 100 us" in caplog.text
    shared_tome.apply_patch(unet, config=config(levels="0"))
    assert not torch.equal(models.run(unet), before)


def test_the_models_own_block_is_timed_by_itself(monkeypatch):
    """How long it takes the processor decides where steps wait for it; ToMe's hooks and others' do not run in it."""
    from shared_tome.autotune import decisions

    unet = models.sd15()
    before, ran, found = models.run(unet), [], []

    def decision_on(grid, channels, heads, dtype, device, ours, attention, kernels, block, about):
        x = torch.randn(2, grid[0] * grid[1], channels)
        count = len(ran)
        run = block(x)
        assert run().shape == run().shape == x.shape and len(ran) == count
        found.append(channels)
        return decisions.Decision(100.0, 50.0, 10.0, 900.0, 895.0)  # the processor is what a merged block waits for

    monkeypatch.setattr(decisions, "measures", lambda config, grid, device: True)
    monkeypatch.setattr(decisions, "decision_on", decision_on)
    for block in served_blocks(unet):
        block.ff.register_forward_pre_hook(lambda *_: ran.append(1))
    shared_tome.apply_patch(unet, config=config())
    assert torch.equal(models.run(unet), before)
    assert len(found) == len(set(found)) > 1 and ran


def reference(attn1, x, metric, grid, config):
    """Weighted, merged attention in float64, from the core's parts alone."""
    call = ModelCall(config, grid, x.device)
    layer = call.attention(x, x, x, grid, metric=metric)
    q, k, v = (
        (t.double() @ w.weight.double().T).unflatten(-1, (attn1.heads, -1)).transpose(1, 2)
        for t, w in ((layer.q, attn1.to_q), (layer.k, attn1.to_k), (layer.v, attn1.to_v))
    )
    logits = q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5
    if layer.bias is not None:
        logits = logits + layer.bias.double()[:, None, None]
    out = (logits.softmax(-1) @ v).transpose(1, 2).flatten(2)
    out = out @ attn1.to_out[0].weight.double().T + attn1.to_out[0].bias.double()
    return layer.unmerge(out), layer.bias


@pytest.mark.parametrize("processor", ["AttnProcessor2_0", "AttnProcessor", "SlicedAttnProcessor"])
@pytest.mark.parametrize("method", ["merge", "merge_keys", "sample"])
def test_weighted_attention_against_float64(method, processor):
    """15x17 makes the runs of `sample` unequal, so that its keys have weights too."""
    from diffusers.models import attention_processor

    unet, ours = models.sd15(), config(method=method, ratio=0.6)
    make = getattr(attention_processor, processor)
    unet.set_attn_processor(make(2) if processor == "SlicedAttnProcessor" else make())
    block, seen = next(served_blocks(unet)), {}
    block.register_forward_pre_hook(lambda m, args: seen.setdefault("metric", args[0].clone()))
    block.norm1.register_forward_hook(lambda m, args, out: seen.setdefault("x", out.clone()))
    shared_tome.apply_patch(unet, config=ours)
    block.attn1.register_forward_hook(lambda m, args, out: seen.setdefault("out", out.clone()))
    models.run(unet, 15, 17)
    expected, bias = reference(block.attn1, seen["x"], seen["metric"], (15, 17), ours)
    plain, _ = reference(block.attn1, seen["x"], seen["metric"], (15, 17), ours.replace(proportional=False))
    assert bias is not None and float(bias.max()) > 0
    assert (expected - plain).abs().max() > 1e-3, "the weights must matter"
    assert (seen["out"].double() - expected).abs().max() < 2e-6


def test_a_processor_that_takes_no_weights_runs_without(caplog):
    class FixedSize:
        """One that widened heads cannot go through."""

        def __call__(self, attn, hidden_states, encoder_hidden_states=None, **kwargs):
            context = hidden_states if encoder_hidden_states is None else encoder_hidden_states
            size = round(attn.scale**-2)
            q, k, v = (
                project(t).reshape(t.shape[0], -1, attn.heads, size).transpose(1, 2)
                for project, t in ((attn.to_q, hidden_states), (attn.to_k, context), (attn.to_v, context))
            )
            out = nn.functional.scaled_dot_product_attention(q, k, v)
            return attn.to_out[0](out.transpose(1, 2).flatten(2))

    unet = models.sd15()
    unet.set_attn_processor(FixedSize())
    shared_tome.apply_patch(unet, config=config(method="merge"))
    weighted = models.run(unet)
    assert "proportional attention is off" in caplog.text
    shared_tome.apply_patch(unet, config=config(method="merge", proportional=False))
    assert torch.equal(weighted, models.run(unet))


def test_projections_that_a_lora_replaces_later_are_followed():
    unet = models.sd15()
    shared_tome.apply_patch(unet, config=config(method="merge"))
    merged = models.run(unet)
    for block in served_blocks(unet):
        block.attn1.to_k = nn.Sequential(block.attn1.to_k)  # the old one inside another, as PEFT does
    assert torch.equal(models.run(unet), merged)
    shared_tome.remove_patch(unet)
    assert models.count_hooks(unet) == 0


@pytest.mark.parametrize("method", ["merge", "sample"])
def test_fused_projections(method, caplog):
    unet = models.sd15()
    before = models.run(unet)
    shared_tome.apply_patch(unet, config=config(method=method, proportional=False))
    apart = models.run(unet)
    unet.fuse_qkv_projections()
    torch.testing.assert_close(models.run(unet), apart if method == "merge" else before, rtol=1e-4, atol=1e-5)
    assert ("unfuse_qkv_projections" in caplog.text) == (method == "sample")
    unet.unfuse_qkv_projections()
    torch.testing.assert_close(models.run(unet), apart, rtol=0, atol=0)


def test_the_choice_comes_from_the_seed_and_the_step_alone():
    unet = models.sd15()
    torch.manual_seed(0)
    state = torch.get_rng_state()
    shared_tome.apply_patch(unet, seed=1)
    first, second = models.run(unet, timestep=900), models.run(unet, timestep=800)
    assert torch.equal(torch.get_rng_state(), state), "the global generator was used"
    assert torch.equal(models.run(unet, timestep=900), first) and torch.equal(models.run(unet, timestep=800), second)
    shared_tome.apply_patch(unet, seed=2)
    assert not torch.equal(models.run(unet, timestep=900), first)
    # One choice for all rows: a row does not depend on those beside it.
    alone = models.run(unet, timestep=900, batch=1)
    torch.testing.assert_close(models.run(unet, timestep=900, batch=3)[:1], alone, rtol=1e-4, atol=1e-5)


def test_steps_are_counted():
    steps, cpu = Steps(), torch.device("cpu")
    given = (981, 961, 961, 941.0, torch.tensor(921), torch.tensor([901, 901]), 981, 741, None)
    assert [int(steps.step(t, cpu)) for t in given] == [0, 1, 1, 2, 3, 4, 0, 1, 0]
    assert steps.progress(999) == 0.0 and steps.progress(torch.tensor(499.5)) == 0.5 and steps.progress(0) == 1.0
    scheduler = SimpleNamespace(timesteps=torch.tensor([999.0, 750.3, 500.1, 250.0]), num_inference_steps=4)
    pipe = SimpleNamespace(scheduler=scheduler)
    steps = Steps(pipe)
    for number in (2, 0, 3, 1):  # img2img begins in the middle
        assert int(steps.step(scheduler.timesteps[number], cpu)) == number
        assert steps.progress(scheduler.timesteps[number]) == number / 4
    steps = Steps(pipe, 1000.0)
    given = scheduler.timesteps.to(torch.bfloat16) / 1000  # as Flux's pipeline does
    assert [int(steps.step(t, cpu)) for t in given] == [0, 1, 2, 3]


def test_a_step_of_two_calls_is_one_step():
    """Schedulers such as Heun's have each timestep but the first twice."""
    scheduler = SimpleNamespace(timesteps=torch.tensor([999.0, 750, 750, 500, 500, 250, 250]), num_inference_steps=4)
    steps = Steps(SimpleNamespace(scheduler=scheduler))
    assert [int(steps.step(t, torch.device("cpu"))) for t in scheduler.timesteps] == [0, 1, 1, 2, 2, 3, 3]


def test_a_schedule_goes_by_noise_whatever_part_of_a_run_a_pipeline_has():
    """As a base model and a refiner that share a run, each with a number of steps of its own."""
    for timesteps in (torch.arange(999, 0, -100), torch.arange(999, 0, -37), torch.tensor([499, 249])):
        scheduler = SimpleNamespace(timesteps=timesteps, num_inference_steps=len(timesteps), alphas_cumprod=None)
        steps = Steps(SimpleNamespace(scheduler=scheduler))
        assert [steps.progress(t) for t in timesteps] == [round(1 - int(t) / 999, 4) for t in timesteps]


@pytest.mark.parametrize("options", [{}, {"method": "merge"}, {"start": 0.4}, {"end": 0.6}, {"ratio_end": 0.0}])
def test_two_pipelines_that_share_a_run_make_the_picture_of_one(options):
    pipe = models.pipeline()

    def run(first, last, latents):
        pipe.scheduler.set_timesteps(6)
        for t in pipe.scheduler.timesteps[first:last]:
            noise = pipe.unet(latents, t, models.noise(1, 7, 16, seed=2)).sample
            latents = pipe.scheduler.step(noise, t, latents).prev_sample
        return latents

    with torch.no_grad():
        plain = run(0, 6, models.noise(1, 4, 16, 16))
        shared_tome.apply_patch(pipe, config=config(**options))
        merged = run(0, 6, models.noise(1, 4, 16, 16))
        half = run(0, 2, models.noise(1, 4, 16, 16))
        shared_tome.remove_patch(pipe)
        shared_tome.apply_patch(pipe, config=config(**options))  # the other pipeline, which has called nothing yet
        assert torch.equal(run(2, 6, half), merged) and not torch.equal(merged, plain)


def host_percent(level, shift):
    """The percent whose percent_to_sigma is a flow's noise level in ComfyUI, found by halving."""
    low, high = 0.0, 1.0
    for _ in range(40):
        middle = (low + high) / 2
        time = 1.0 - middle
        low, high = (middle, high) if shift * time / (1 + (shift - 1) * time) > level else (low, middle)
    return low


FLOWS = {
    "euler": ("FlowMatchEulerDiscreteScheduler", {"shift": 3.0}),
    "euler without a shift": ("FlowMatchEulerDiscreteScheduler", {}),
    "euler, uneven": ("FlowMatchEulerDiscreteScheduler", {"shift": 3.0, "use_exponential_sigmas": True}),
    "heun": ("FlowMatchHeunDiscreteScheduler", {"shift": 3.0}),
    "lcm": ("FlowMatchLCMScheduler", {"shift": 3.0}),
    "dpm": (
        "DPMSolverMultistepScheduler",
        {"use_flow_sigmas": True, "flow_shift": 3.0, "prediction_type": "flow_prediction"},
    ),
}


@pytest.mark.parametrize("name", FLOWS)
def test_a_flow_goes_by_noise_as_in_comfyui(name):
    kind, options = FLOWS[name]
    scheduler = getattr(models.diffusers, kind)(**options)
    scheduler.set_timesteps(7)
    steps = Steps(SimpleNamespace(scheduler=scheduler), 1000.0)
    for number, t in enumerate(scheduler.timesteps):
        expected = host_percent(float(t) / 1000, options.get("shift", options.get("flow_shift", 1.0)))
        assert abs(steps.progress(t / 1000) - expected) < 1e-4
        # As Flux's pipeline hands it to the model.
        assert steps.progress(t.to(torch.bfloat16) / 1000) == steps.progress(t / 1000), number


def test_a_shift_that_is_set_later_counts():
    scheduler = models.diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    scheduler.set_shift(5.0)
    scheduler.set_timesteps(4)
    steps = Steps(SimpleNamespace(scheduler=scheduler))
    for t in scheduler.timesteps:
        assert abs(steps.progress(t) - host_percent(float(t) / 1000, 5.0)) < 1e-4


def test_a_shift_by_the_pictures_size_goes_by_place():
    """Flux's default. The scheduler keeps no shift; for evenly spread steps the place is the percent."""
    scheduler = models.diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    scheduler.set_timesteps(sigmas=[1.0, 0.75, 0.5, 0.25], mu=1.15)
    steps = Steps(SimpleNamespace(scheduler=scheduler))
    for number, t in enumerate(scheduler.timesteps):
        assert steps.progress(t) == number / 4
        assert abs(steps.progress(t) - host_percent(float(t) / 1000, math.exp(1.15))) < 1e-4


@torch.no_grad()
@pytest.mark.parametrize("options", [{"start": 0.4}, {"end": 0.6}, {"ratio": 0.75, "ratio_end": 0.0}], ids=str)
def test_two_parts_of_a_flow_make_the_picture_of_one(options):
    """Each part's scheduler knows the part's noise levels alone. downsample draws nothing."""
    model, sigmas = models.sd3(), [1.0, 0.9, 0.7, 0.5, 0.3, 0.1]
    scheduler = models.diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    pipe, merges = SimpleNamespace(scheduler=scheduler, transformer=model), []

    def run(sigmas, count, latents):
        scheduler.set_timesteps(sigmas=sigmas)
        for t in scheduler.timesteps[:count]:
            out = model(
                hidden_states=latents, encoder_hidden_states=models.noise(1, 5, 16, seed=2), timestep=t[None],
                pooled_projections=models.noise(1, 8, seed=3),
            ).sample  # fmt: skip
            merges.append(model._shared_tome.config_now(t).ratio if hasattr(model, "_shared_tome") else 0.0)
            latents = scheduler.step(out, t, latents).prev_sample
        return latents

    start = models.noise(1, 4, 12, 20)
    plain = run(sigmas, 6, start)
    shared_tome.apply_patch(pipe, config=config(method="downsample", **options))
    whole, expected = run(sigmas, 6, start), merges[6:]
    del merges[:]
    assert torch.equal(run(sigmas[3:], 3, run(sigmas[:4], 3, start)), whole) and merges == expected
    assert len(set(expected)) > 1 and not torch.equal(whole, plain)


def test_pipeline_with_a_schedule():
    pipe = models.pipeline()
    unmerged = models.generate(pipe, steps=4)
    kept = []
    next(served_blocks(pipe.unet)).attn1.to_k.register_forward_hook(lambda m, args, out: kept.append(out.shape[1]))
    shared_tome.apply_patch(pipe, config=config(start=0.5))
    merged = models.generate(pipe, steps=4)
    assert kept == [256, 256, 64, 64] and not torch.equal(merged, unmerged)
    assert torch.equal(models.generate(pipe, steps=4), merged)
    shared_tome.remove_patch(pipe)
    assert torch.equal(models.generate(pipe, steps=4), unmerged)


def test_a_copy_is_a_model_of_its_own():
    unet = models.sd15()
    before = models.run(unet)
    shared_tome.apply_patch(unet, config=config(method="merge", mlp=True))
    merged, twin = models.run(unet), copy.deepcopy(unet)
    shared_tome.remove_patch(unet)
    assert torch.equal(models.run(twin), merged) and torch.equal(models.run(unet), before)
    shared_tome.remove_patch(twin)
    assert torch.equal(models.run(twin), before) and models.count_hooks(twin) == 0


def test_threads_do_not_mix():
    """Two calls that are in the same blocks at the same time, each with its own grid."""
    unet = models.sd15()
    shared_tome.apply_patch(unet, config=config(method="merge"))
    models.check_threads(unet, lambda block: (block.attn1.to_q, block.attn2))


def test_threads_that_meet_in_the_first_call_do_not_mix(monkeypatch):
    """The first of them puts the hooks on the projections, which takes its time."""
    put = ScriptBlock.hook_projections
    monkeypatch.setattr(ScriptBlock, "hook_projections", lambda *given: time.sleep(0.1) or put(*given))
    unet, twin = models.sd15(), models.sd15()
    for model in (unet, twin):
        shared_tome.apply_patch(model, config=config(method="merge"))
    barrier, wanted, found = threading.Barrier(2, timeout=20), models.run(twin), []

    def meet(*_):
        barrier.wait()

    next(served_blocks(unet)).attn1.register_forward_pre_hook(meet, prepend=True)
    threads = [threading.Thread(target=lambda: found.append(models.run(unet))) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 2 and all(torch.equal(out, wanted) for out in found)
    assert models.count_hooks(unet) == models.count_hooks(twin) + 1  # the barrier's


def test_a_self_attention_with_a_mask_is_left_alone(caplog):
    unet = models.sd15()
    x, context, mask = models.noise(2, 4, 8, 8), models.noise(2, 7, 16), torch.ones(2, 64)
    mask[:, 32:] = 0

    def run():
        with torch.no_grad():
            return unet(x, 5, encoder_hidden_states=context, attention_mask=mask).sample

    unet = models.seeded(
        lambda: models.diffusers.UNet2DConditionModel(
            sample_size=8, in_channels=4, out_channels=4, block_out_channels=(16,), layers_per_block=1,
            down_block_types=("CrossAttnDownBlock2D",), up_block_types=("CrossAttnUpBlock2D",),
            cross_attention_dim=16, attention_head_dim=2, norm_num_groups=8,
        )
    )  # fmt: skip
    before = run()
    shared_tome.apply_patch(unet, config=config(method="merge"))
    assert torch.equal(run(), before) and "ToMe skips a self-attention with a mask" in caplog.text
