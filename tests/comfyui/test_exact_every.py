"""exact_every in ComfyUI: each n-th merged step is exact, and the steps between add what their attentions lacked."""

from __future__ import annotations

import functools
import gc
import math
import weakref

import pytest
import torch

from . import host

sample = functools.partial(host.sample, height=128, width=128)
KEEPS = {"ratio": 0.75, "exact_every": 3}


def psnr(picture, exact):
    return 10 * math.log10(float((exact.max() - exact.min()) ** 2 / (picture - exact).square().mean()))


@pytest.fixture
def watched(monkeypatch):
    """(what every sampling kept for, what was said)."""
    module, found, said = host.pack_module("residuals"), [], []
    host.forget_log()

    class Watched(module.SamplingResiduals):
        def __init__(self, *given):
            super().__init__(*given)
            found.append(self)
            say = self._say
            self._say = lambda why: (said.append(why), say(why))

    monkeypatch.setattr(host.pack_module("outcome"), "SamplingResiduals", Watched)
    return found, said


@pytest.fixture
def steps_of(monkeypatch):
    """steps_of() -> [(exact, the draw)] of each call that kept or added."""
    module, found = host.pack_module("residuals"), []
    real = module.Residuals.call

    def spy(self, *given):
        made = real(self, *given)
        found.append(None if made is None else (made.exact, int(made.draw)))
        return made

    monkeypatch.setattr(module.Residuals, "call", spy)
    return found


@pytest.mark.parametrize(
    "options",
    [{}, {"own_token": False}, {"method": "downsample"}, {"ratio": 0.7, "own_token": False}, {"proportional": False}],
    ids=str,
)
def test_the_picture_is_much_nearer(sd15, tome, options):
    """And the sampling's first step alone is the unmerged one."""
    plain = sample(sd15, steps=7)
    without, kept = (sample(tome(sd15, **{**KEEPS, **options, "exact_every": n}), steps=7) for n in (0, 3))
    assert psnr(kept, plain) > psnr(without, plain) + 7
    assert torch.equal(sample(tome(sd15, **{**KEEPS, **options}), steps=1), sample(sd15, steps=1))


def test_each_nth_step_from_start_is_exact(sd15, tome, steps_of):
    sample(tome(sd15, **KEEPS), steps=7)
    assert steps_of == [(True, 0), (False, 0), (False, 0), (True, 3), (False, 3), (False, 3), (True, 999)]
    steps_of.clear()
    sample(tome(sd15, **KEEPS, start=0.25, end=0.8), steps=10)
    assert steps_of == [(True, 3), (False, 3), (False, 3), (True, 6), (False, 6)]


def test_steps_draw_what_the_exact_one_drew(sd15, tome, monkeypatch):
    module, drawn = host.pack_module("unet"), []
    real = module.ModelCall
    monkeypatch.setattr(
        module, "ModelCall", lambda *given, **more: drawn.append(int(more["step"])) or real(*given, **more)
    )
    sample(tome(sd15, **KEEPS), steps=7)
    assert drawn[:6] == [0, 0, 0, 3, 3, 3]


def test_samplers_that_ask_twice_a_step(short, tome, steps_of, watched):
    sample(tome(short, ratio=0.75, exact_every=2), steps=4, sampler="heun")
    # At each level but the first and the last: what closes a step, what begins the next one.
    assert [exact for exact, _ in steps_of] == [True, False, False, True, True, False, False]
    assert len({draw for exact, draw in steps_of[3:5]}) == 1 and watched[1] == []


@pytest.mark.parametrize("sampler", ["dpmpp_2m", "dpmpp_sde", "uni_pc", "dpm_fast", "lcm"])
def test_other_samplers_come_nearer_too(short, tome, sampler, watched):
    plain = sample(short, steps=6, sampler=sampler)
    without, kept = (sample(tome(short, ratio=0.75, exact_every=n), steps=6, sampler=sampler) for n in (0, 2))
    assert psnr(kept, plain) > psnr(without, plain) + 3 and watched[1] == []


def test_a_sampler_that_chooses_its_steps_goes_by_the_noise_levels(short, tome, steps_of, watched):
    """Its own levels lie between those of the list."""
    sample(tome(short, ratio=0.75, exact_every=2), steps=4, sampler="dpm_adaptive")
    exact = [exact for exact, _ in steps_of]
    assert exact[0] and 2 <= exact.count(True) < len(exact) and watched[1] == []


def test_prompts_for_areas(sd15, tome, steps_of, watched):
    """ComfyUI gives the negative prompt a copy of each, under one uuid."""
    areas = [(16, 8, 0, 0), (16, 8, 0, 8)]
    prompts = [host.conditioning(5 + i, area=area, strength=1.0)[0] for i, area in enumerate(areas)]
    given = {"positive": host.conditioning(1) + prompts, "steps": 6}
    plain = sample(sd15, **given)
    without, kept = (sample(tome(sd15, ratio=0.75, exact_every=n), **given) for n in (0, 2))
    assert watched[1] == [] and psnr(kept, plain) > psnr(without, plain) + 7
    # Each step takes two calls: of the whole picture, and of the areas.
    assert [exact for exact, _ in steps_of] == [True, True, False, False] * 3


def split_batches(monkeypatch, patcher, rule):
    """Memory for one row alone in the calls of the sampler for which rule(number) holds."""
    calls = [0]

    def required(shape, cond_shapes=None):
        calls[0] += 1
        return 0 if shape[0] == 1 or not rule(calls[0]) else 10**20

    monkeypatch.setattr(patcher.model, "memory_required", required)


@pytest.mark.parametrize("rule", [lambda n: True, lambda n: n % 3 == 0, lambda n: n > 4], ids=["always", "now", "then"])
def test_it_does_not_matter_how_memory_splits_the_batch(short, tome, monkeypatch, rule):
    together = sample(tome(short, **KEEPS), steps=6)
    with monkeypatch.context() as patched:
        split_batches(patched, short, rule)
        apart = sample(tome(short, **KEEPS), steps=6)
    assert psnr(apart, together) > 110


def test_a_batch_is_its_pictures(short, tome):
    latents = torch.randn(2, 4, 16, 16, generator=torch.Generator().manual_seed(3))
    model = tome(short, **KEEPS)
    together = sample(model, steps=5, latent=latents, denoise=0.9, sampler="ddim")
    noise = {"seed": 1}
    import comfy.sample

    drawn = comfy.sample.prepare_noise(latents, noise["seed"], None)
    alone = []
    for row in range(2):
        conds = host.conditioning(1), host.conditioning(2)
        alone.append(
            comfy.sample.sample(
                model,
                drawn[row : row + 1],
                5,
                5.0,
                "ddim",
                "normal",
                *conds,
                latents[row : row + 1],
                denoise=0.9,
                seed=1,
            )
        )
    assert psnr(torch.cat(alone), together) > 110


def tiled(model, times=2):
    """Another node's model_function_wrapper that calls the model for as many parts, all of one shape."""
    clone = model.clone()

    def wrapper(apply_model, given):
        parts = given["input"].chunk(times, dim=-1)
        return torch.cat([apply_model(part, given["timestep"], **given["c"]) for part in parts], dim=-1)

    clone.set_model_unet_function_wrapper(wrapper)
    return clone


def test_tiles_are_not_told_apart_so_nothing_is_kept(sd15, tome, watched):
    """Whatever the order of the tiles: the picture is the one without the option, which is said once."""
    from_start = sample(tome(tiled(sd15), ratio=0.75), steps=4)
    found = sample(tome(tiled(sd15), **KEEPS), steps=4)
    assert len(watched[1]) == 1 and "cannot tell apart" in watched[1][0] and not watched[0][0]._kept
    # The very first call was exact before the second one came.
    assert psnr(found, from_start) > 20 and not torch.equal(found, from_start)


def test_context_windows_are_not_told_apart(comfy_nodes, sd15, tome, watched):
    """Windows move from step to step."""
    node = next(node for name, node in comfy_nodes.items() if "ContextWindows" in name and "Manual" in name)
    model = host.run_node(
        node, model=sd15, context_length=2, context_overlap=1, context_schedule="standard_uniform", context_stride=1,
        closed_loop=False, fuse_method="pyramid", dim=0, freenoise=False,
    )  # fmt: skip
    sample(tome(model, **KEEPS), steps=3, batch=4)
    assert any("cannot tell apart" in why for why in watched[1]) and not watched[0][0]._kept


def test_perturbed_attention_calls_again(comfy_nodes, sd15, tome, watched):
    model = host.run_node(comfy_nodes["PerturbedAttentionGuidance"], model=sd15, scale=2.0)
    sample(tome(model, **KEEPS), steps=3)
    assert any("cannot tell apart" in why for why in watched[1])


def test_self_attention_guidance_asks_for_one_side_again(comfy_nodes, sd15, tome, steps_of, watched):
    """Of a blurred picture, in each step: which is a part of its own."""
    model = host.run_node(comfy_nodes["SelfAttentionGuidance"], model=sd15, scale=0.5, blur_sigma=2.0)
    plain = sample(model, steps=6)
    without, kept = (sample(tome(model, ratio=0.75, exact_every=n), steps=6) for n in (0, 3))
    assert psnr(kept, plain) > psnr(without, plain) + 7 and watched[1] == []
    assert [exact for exact, _ in steps_of] == [True, True, False, False, False, False] * 2


def parts_by_sampler(model, sigmas, inner_times):
    """Another node's sampler, which asks the model for each half of the picture at every level."""
    import comfy.samplers

    def function(model, x, sigmas, extra_args=None, callback=None, disable=None, **options):
        for now, then in zip(sigmas[:-1], sigmas[1:], strict=True):
            ones = x.new_ones(x.shape[0])
            halves = [model(half, now * ones, **(extra_args or {})) for half in x.chunk(inner_times, dim=-1)]
            denoised = torch.cat(halves, dim=-1)
            x = x + (x - denoised) / now * (then - now)
        return x

    return comfy.samplers.KSAMPLER(function)


@pytest.mark.parametrize("times, said", [(1, []), (2, ["cannot tell apart"])])
def test_another_nodes_guider_may_ask_for_parts(sd15, tome, watched, times, said):
    import comfy.samplers

    class Guider(comfy.samplers.CFGGuider):
        def __call__(self, x, *args, **kwargs):
            return torch.cat([super(Guider, self).__call__(part, *args, **kwargs) for part in x.chunk(times, -1)], -1)

    model = tome(sd15, **KEEPS)
    sigmas = comfy.samplers.calculate_sigmas(model.get_model_object("model_sampling"), "normal", 4)
    guider = Guider(model)
    guider.set_conds(host.conditioning(1), host.conditioning(2))
    guider.set_cfg(4.0)
    noise = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(1))
    guider.sample(noise, torch.zeros_like(noise), comfy.samplers.sampler_object("euler"), sigmas, disable_pbar=True)
    assert len(watched[1]) == len(said) and all(word in why for word, why in zip(said, watched[1], strict=True))


@pytest.mark.parametrize("times, said", [(1, []), (2, ["cannot tell apart"])])
def test_another_nodes_sampler_may_ask_for_parts(sd15, tome, watched, times, said):
    import comfy.samplers

    model = tome(sd15, **KEEPS)
    sigmas = comfy.samplers.calculate_sigmas(model.get_model_object("model_sampling"), "normal", 4)
    guider = comfy.samplers.CFGGuider(model)
    guider.set_conds(host.conditioning(1), host.conditioning(2))
    guider.set_cfg(4.0)
    noise = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(1))
    guider.sample(noise, torch.zeros_like(noise), parts_by_sampler(model, sigmas, times), sigmas, disable_pbar=True)
    assert len(watched[1]) == len(said) and all(word in why for word, why in zip(said, watched[1], strict=True))


def test_what_is_kept_goes_with_the_sampling(sd15, tome, watched):
    tensors = []
    real = watched[0]

    def look(step, denoised, x, total):
        tensors.extend(weakref.ref(part) for part in real[-1]._kept.values())
        if step == 3:
            raise InterruptedError

    import comfy.sample

    noise = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(1))
    for steps in (3, 8):
        conds = host.conditioning(1), host.conditioning(2)
        try:
            comfy.sample.sample(
                tome(sd15, **KEEPS),
                noise,
                steps,
                5.0,
                "euler",
                "normal",
                *conds,
                torch.zeros_like(noise),
                callback=look,
            )
        except InterruptedError:
            assert steps == 8
        assert tensors and not real[-1]._kept and not real[-1].is_on
        gc.collect()
        assert all(ref() is None for ref in tensors)


def test_a_call_outside_a_sampler_keeps_nothing(sd15, tome, watched):
    given = torch.randn(2, 4, 16, 16), torch.full((2,), 1.0), None, torch.randn(2, 7, 64), None
    made = []
    for options in (KEEPS, {"ratio": 0.75}):
        model = tome(sd15, **options)
        with torch.no_grad():
            made.append(model.model.apply_model(*given, {"wrappers": model.wrappers}))
    said = host.pack_module("log")._said
    assert torch.equal(*made) and any("nothing tells here" in why for why in said) and watched[0] == []
    assert not torch.equal(made[0], sd15.model.apply_model(*given, {}))


def test_off_is_as_before(sd15, tome):
    model = tome(sd15, ratio=0.75)
    assert not model.get_wrappers("predict_noise", "ToMe")
    assert tome(sd15, **KEEPS).get_wrappers("predict_noise", "ToMe")
    assert not tome(sd15, method="merge", exact_every=3).get_wrappers("predict_noise", "ToMe")


def test_another_nodes_attention_is_asked_for_both(sd15, tome):
    asked = []

    def override(func, *args, **kwargs):
        asked.append((args[0].shape[1], args[1].shape[1]))
        return func(*args, **kwargs)

    other = sd15.clone()
    other.model_options["transformer_options"]["optimized_attention_override"] = override
    sample(tome(other, **KEEPS, levels="0"), steps=2)
    self_attention = [pair for pair in asked if pair[0] == 256 and pair[1] != 7]
    layers = len(self_attention) // 3
    assert self_attention.count((256, 256)) == layers and self_attention.count((256, 64)) == 2 * layers


def test_an_attention_that_asks_no_override_is_said(comfy_nodes, sd15, tome, watched, monkeypatch):
    """As of a node that puts another function in the layers' place. The first step, which was to be exact, is not."""
    from comfy.ldm.modules import attention

    real = attention.optimized_attention.__wrapped__
    monkeypatch.setattr(attention, "optimized_attention", lambda *args, **kwargs: real(*args, **kwargs))
    recorder = host.run_node(comfy_nodes["ToMeRecord"], model=sd15)
    sample(tome(recorder, **KEEPS), steps=2)
    assert any("cannot see an attention" in why for why in watched[1])
    assert recorder.model_options["transformer_options"]["ToMe record"].run().tally.report().merged_steps == 2


@pytest.fixture
def told(monkeypatch):
    """What the node says of each sampling."""
    module, found = host.pack_module("outcome"), []
    real = module.Outcome.as_text
    monkeypatch.setattr(module.Outcome, "as_text", lambda self, *given: found.append(real(self, *given)) or found[-1])
    return found


def test_the_line_tells_why_nothing_was_kept(comfy_nodes, sd15, tome, told):
    """Each time, though the log says it once; and it calls no layer exact."""
    for steps in (4, 4):
        sample(tome(tiled(sd15), **KEEPS), steps=steps)
    model = host.run_node(comfy_nodes["PerturbedAttentionGuidance"], model=sd15, scale=2.0)
    sample(tome(model, **KEEPS), steps=4)
    for line in told:
        assert "sizes merged" in line and "in every" not in line
        assert line.count("exact every has no effect in this sampling: in a step the model is called") == 1
    assert len(told) == 3


def test_the_report_tells_why_nothing_was_kept(comfy_nodes, sd15, tome):
    """And lists no layer as exact that is merged from then on."""
    recorder = host.run_node(comfy_nodes["ToMeRecord"], model=tiled(sd15))
    sample(tome(recorder, **KEEPS), steps=4)
    report = recorder.model_options["transformer_options"]["ToMe record"].run().tally.report()
    assert report.merged and not report.left_alone and report.merged_steps == 4
    assert sum("cannot tell apart" in note for note in report.notes) == 1


def test_a_moving_ratio_is_named_where_each_step_was_exact(sd15, tome, told, watched):
    sample(tome(sd15, **KEEPS, ratio_end=0.3), steps=4)
    assert "each stage of a moving ratio begins exact" in told[0] and len(watched[1]) == 1


def test_the_line_and_the_report_tell_it(comfy_nodes, sd15, tome):
    patcher = host.run_node(comfy_nodes["ToMeRecord"], model=sd15)
    recorder = patcher if hasattr(patcher, "model_options") else patcher[0]
    model = tome(recorder, **KEEPS, levels="0")
    outcomes, module = [], host.pack_module("outcome")
    real = module.Outcome.as_text
    module.Outcome.as_text = lambda self, *given: outcomes.append(real(self, *given)) or outcomes[-1]
    try:
        sample(model, steps=5)
        sample(tome(sd15, **KEEPS), steps=1)
    finally:
        module.Outcome.as_text = real
    assert "merged (16x16 tokens), exact in every 3rd step" in outcomes[0]
    assert "nothing was merged in this sampling: each merged step was exact" in outcomes[1]
    run = model.model_options["transformer_options"]["ToMe record"].run()
    report = run.tally.report()
    assert (report.steps, report.merged_steps) == (5, 3)
    assert {layer.reason for layer in report.left_alone if layer.level == 0} == {"exact in every 3rd step"}
    assert {layer.calls for layer in report.merged} == {3}
    assert {number: facts.draw for number, facts in run.facts.items()} == {0: 0, 1: 0, 2: 0, 3: 3, 4: 3}
    assert [facts.config.ratio for _, facts in sorted(run.facts.items())] == [0.0, 0.75, 0.75, 0.0, 0.75]
