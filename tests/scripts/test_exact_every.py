"""exact_every through diffusers: each n-th merged step of a pipeline's run is exact, the others add what it lacked."""

from __future__ import annotations

import copy
import gc
import math
import weakref
from itertools import pairwise

import pytest
import torch
from torch import nn

import shared_tome
from shared_tome import ToMeConfig
from shared_tome.merging import residual
from shared_tome.merging.residual import Residuals

from . import models

KEEPS = {"ratio": 0.75, "min_tokens": 0, "exact_every": 3}


@pytest.fixture
def kept(monkeypatch):
    """[(exact, draw) or None of each call], all tensors that were kept, all Residuals."""
    calls, tensors, made = [], [], []
    call, keep, init = Residuals.call, Residuals.keep, Residuals.__init__

    def spy(self, *given):
        found = call(self, *given)
        calls.append(None if found is None else (found.exact, int(found.draw)))
        return found

    def keeping(self, found):
        tensors.extend(weakref.ref(part) for part in found.values())
        keep(self, found)

    def begin(self, *given):
        init(self, *given)
        made.append(self)

    monkeypatch.setattr(Residuals, "call", spy)
    monkeypatch.setattr(Residuals, "keep", keeping)
    monkeypatch.setattr(Residuals, "__init__", begin)
    return calls, tensors, made


@pytest.fixture
def said(monkeypatch):
    found = []
    monkeypatch.setattr(shared_tome.scripts.base.BaseAttachment, "_log", lambda self, message: found.append(message))
    return found


def pipeline(scheduler=None):
    pipe = models.pipeline()
    if scheduler is not None:
        more = {"skip_prk_steps": True} if scheduler == "PNDMScheduler" else {}
        pipe.scheduler = getattr(models.diffusers, scheduler).from_config(pipe.scheduler.config, **more)
    return pipe


def psnr(picture, exact):
    return 10 * math.log10(float((exact.max() - exact.min()) ** 2 / (picture - exact).square().mean()))


def patched(pipe, **options):
    return shared_tome.apply_patch(pipe, config=ToMeConfig(**{**KEEPS, **options}))


OPTIONS = [{}, {"own_token": False}, {"method": "downsample", "proportional": False}, {"ratio": 0.6}]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_what_is_added_is_what_was_lacking(said, options, monkeypatch):
    """Steps with the input of the exact one give its output, whatever they draw."""
    pipe = pipeline()
    pipe.scheduler.set_timesteps(7)
    unet, (first, second, *_) = pipe.unet, pipe.scheduler.timesteps
    monkeypatch.setattr(unet.time_proj, "forward", lambda t, real=unet.time_proj.forward: real(torch.full_like(t, 500)))

    @torch.no_grad()
    def run(timestep, seed=1):
        return unet(models.noise(2, 4, 16, 20, seed=seed), timestep, models.noise(2, 7, 16, seed=2)).sample

    plain, other = run(first), run(first, seed=5)
    patched(pipe, **options)
    assert torch.equal(run(first), plain)
    torch.testing.assert_close(run(second), plain, rtol=1e-4, atol=1e-5)
    patched(pipe, **options)
    run(first)
    assert not torch.allclose(run(second, seed=5), other, rtol=1e-2, atol=1e-3)
    patched(pipe, **{**options, "exact_every": 0})
    assert not torch.allclose(run(first), plain, rtol=1e-2, atol=1e-3)
    assert said == []


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_the_picture_is_nearer(kept, said, options):
    pipe = pipeline()
    plain = models.generate(pipe, 7)
    without, found = (models.generate(patched(pipe, **{**options, "exact_every": every}), 7) for every in (0, 3))
    assert psnr(found, plain) > psnr(without, plain) + 3 and said == []
    assert torch.equal(models.generate(pipe, 7), found)


PATTERNS = {
    "PNDMScheduler": [True, False, False, True, False, True],  # the second of five timesteps comes twice
    "HeunDiscreteScheduler": [True, False, False, True, True, False, False, True, True],
    "EulerDiscreteScheduler": [True, False, True, False, True],
    "DPMSolverMultistepScheduler": [True, False, True, False, True],
}


@pytest.mark.parametrize("scheduler", PATTERNS)
def test_schedulers(kept, said, scheduler):
    """Also those that ask twice at a timestep. And nothing is left behind."""
    pipe = patched(pipeline(scheduler), exact_every=2)
    found = models.generate(pipe, 5)
    calls, tensors, made = kept
    assert [exact for exact, _ in calls] == PATTERNS[scheduler] and said == []
    assert len(made) == 1 and not made[0].is_on
    gc.collect()
    assert tensors and all(ref() is None for ref in tensors)
    assert torch.equal(models.generate(pipe, 5), found)


@pytest.mark.parametrize(
    ("scheduler", "more"),
    [
        # Its second timestep of a pair is rounded, and so at times above the first.
        ("KDPM2AncestralDiscreteScheduler", {"use_karras_sigmas": True, "beta_schedule": "scaled_linear"}),
        ("DDIMInverseScheduler", {}),  # rises
    ],
)
def test_steps_are_counted_in_the_order_of_the_run(kept, said, scheduler, more):
    pipe = pipeline()
    pipe.scheduler = getattr(models.diffusers, scheduler).from_config(pipe.scheduler.config, **more)
    models.generate(patched(pipe), 10)
    times, numbers = pipe.scheduler.timesteps.tolist(), [0]
    for before, time in pairwise(times):
        numbers.append(numbers[-1] + (time != before))
    assert times != sorted(times, reverse=True)
    assert [exact for exact, _ in kept[0]] == [number % 3 == 0 for number in numbers] and said == []


def test_each_nth_step_from_start_is_exact(kept):
    models.generate(patched(pipeline()), 7)
    assert kept[0] == [(True, 0), (False, 0), (False, 0), (True, 3), (False, 3), (False, 3), (True, 6)]
    kept[0].clear()
    models.generate(patched(pipeline(), start=0.3, end=0.85), 10)
    assert kept[0] == [(True, 3), (False, 3), (False, 3), (True, 6), (False, 6)]


def test_a_pipeline_that_calls_the_model_for_parts_keeps_nothing(kept, said):
    """As one for panoramas, or one with cond and uncond in calls of their own."""

    class Parts(nn.Module):
        def __init__(self, unet):
            super().__init__()
            self.unet, self.config, self.dtype, self.device = unet, unet.config, unet.dtype, unet.device

        def forward(self, x, timestep, encoder_hidden_states, **more):
            rows = zip(x.chunk(2), encoder_hidden_states.chunk(2), strict=True)
            return (torch.cat([self.unet(one, timestep, prompt, return_dict=False)[0] for one, prompt in rows]),)

    found = []
    for every in (0, 3):
        pipe = pipeline()
        patched(pipe, exact_every=every)
        pipe.unet, unet = Parts(pipe.unet), pipe.unet
        found.append(models.generate(pipe, 5))
        pipe.unet = unet
    assert len(said) == 1 and "which step it is" in said[0]
    assert not any(one._kept for one in kept[2]) and psnr(found[1], found[0]) > 15


def test_a_unet_alone_keeps_nothing(said):
    unet = models.sd15()
    shared_tome.apply_patch(unet, config=ToMeConfig(**{**KEEPS, "exact_every": 0}))
    expected = models.run(unet)
    shared_tome.apply_patch(unet, config=ToMeConfig(**KEEPS))
    assert torch.equal(models.run(unet), expected)
    assert len(said) == 1 and "nothing tells here which step it is" in said[0]


def test_part_of_a_run_begins_exact(kept, said):
    """img2img: the scheduler knows the whole run, of which the first steps are not run."""
    parts = models.pipeline().components
    pipe = patched(models.diffusers.StableDiffusionImg2ImgPipeline(**parts, requires_safety_checker=False))
    pipe.set_progress_bar_config(disable=True)
    pipe(
        image=models.noise(1, 4, 16, 16), prompt_embeds=models.noise(1, 7, 16, seed=2), num_inference_steps=8,
        negative_prompt_embeds=models.noise(1, 7, 16, seed=3), strength=0.5, output_type="latent",
        generator=torch.Generator().manual_seed(7),
    )  # fmt: skip
    assert kept[0] == [(True, 4), (False, 4), (False, 4), (True, 7)] and said == []


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_memory_is_given_back_after_an_error(kept, error):
    """Between two calls of the model: what is kept goes with the prompt that the pipeline held."""
    pipe = patched(pipeline())

    def stop(pipe, step, timestep, given):
        assert any(ref() is not None for ref in kept[1])
        if step == 3:
            raise error
        return given

    with pytest.raises(error):
        pipe(
            prompt_embeds=models.noise(1, 7, 16), negative_prompt_embeds=models.noise(1, 7, 16, seed=3),
            latents=models.noise(1, 4, 16, 16), num_inference_steps=8, output_type="latent", callback_on_step_end=stop,
        )  # fmt: skip
    gc.collect()
    assert all(ref() is None for ref in kept[1])
    shared_tome.remove_patch(pipe)


@torch.no_grad()
def loop(pipe, stop=6, prompts=(2,) * 6):
    """A script's own loop over the timesteps that its scheduler was given once."""
    x, last = models.noise(2, 4, 16, 16), None
    for timestep, seed in zip(pipe.scheduler.timesteps[:stop], prompts, strict=False):
        if seed != last:
            last, prompt = seed, models.noise(2, 7, 16, seed=seed)
        x = x - 0.1 * pipe.unet(x, timestep, prompt).sample
    return x


EACH_THIRD = [(True, 0), (False, 0), (False, 0), (True, 3), (False, 3), (False, 3)]


@pytest.mark.parametrize("count, stop", [(6, 6), (6, 3), (1, 1)])
def test_a_scheduler_may_serve_many_runs(kept, said, count, stop):
    """Also behind one that was stopped."""
    pipe = patched(pipeline())
    pipe.scheduler.set_timesteps(count)
    first = loop(pipe, stop)
    kept[0].clear()
    second = loop(pipe)
    assert kept[0] == EACH_THIRD[:count] and (torch.equal(first, second) or stop < count)
    assert said == [residual.ALONE] * (count == 1)


def test_a_run_may_go_on_with_another_prompt(kept, said):
    """What was kept goes with the first, and the next step is exact."""
    pipe = patched(pipeline())
    pipe.scheduler.set_timesteps(6)
    loop(pipe, prompts=(2, 2, 3, 3, 3, 3))
    assert kept[0] == [(True, 0), (False, 0), (True, 2), (True, 3), (False, 3), (False, 3)] and said == []


def test_a_latent_on_its_side_gets_nothing_of_the_other(kept, said):
    """As many tokens, in other places."""
    pipe = patched(pipeline())
    pipe.scheduler.set_timesteps(4)
    timesteps, prompt = pipe.scheduler.timesteps, models.noise(2, 7, 16, seed=2)
    sizes, found = [(16, 24), (24, 16), (24, 16)], {}
    for exact in (False, True):
        if exact:
            shared_tome.remove_patch(pipe)
        with torch.no_grad():
            found[exact] = [
                pipe.unet(models.noise(2, 4, *size), timestep, prompt).sample
                for size, timestep in zip(sizes, timesteps, strict=False)
            ]
    equal = [torch.equal(one, other) for one, other in zip(found[False], found[True], strict=True)]
    assert equal == [True, True, False] and said == []


@pytest.fixture
def held():
    """held(pipe): the prompts of all its calls stay, so that nothing of a run goes with them."""
    found = []
    return lambda pipe: pipe.unet.register_forward_pre_hook(
        lambda module, args, kwargs: found.append(kwargs["encoder_hidden_states"]), with_kwargs=True
    )


def test_memory_is_given_back_with_the_last_call(kept, held):
    pipe = patched(pipeline())
    held(pipe)
    models.generate(pipe, 5)
    assert kept[1] and not kept[2][0]._kept and not kept[2][0].is_on


def test_memory_is_given_back_after_an_error_in_the_model(kept, held):
    pipe = patched(pipeline())
    held(pipe)
    calls = []

    def fail(*_):
        calls.append(1)
        if len(calls) == 3:
            raise RuntimeError

    handle = pipe.unet.conv_out.register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError):
        models.generate(pipe, 6)
    assert not kept[2][0]._kept
    handle.remove()


def test_a_copy_of_a_patched_model_has_a_run_of_its_own(kept):
    pipe = patched(pipeline())
    expected = models.generate(pipe, 4)
    twin = copy.deepcopy(pipe.unet)
    pipe.unet = twin
    shared_tome.apply_patch(pipe, config=ToMeConfig(**KEEPS))
    assert torch.equal(models.generate(pipe, 4), expected)


def test_what_cannot_be_is_said(said):
    for options, word in (({"method": "merge"}, "it is for sample and downsample"), ({}, "on transformers")):
        model = models.sd15() if options else models.flux()
        shared_tome.apply_patch(model, config=ToMeConfig(**{**KEEPS, **options}))
        assert [word in line for line in said] == [True]
        said.clear()


def test_another_processor_is_said(said, kept):
    """One that does not call torch's attention."""
    pipe = pipeline()
    pipe.unet.set_attn_processor(models.diffusers.models.attention_processor.AttnProcessor())
    found = [models.generate(patched(pipe, exact_every=every), 4) for every in (0, 3)]
    assert torch.equal(*found) and sum(residual.UNSEEN in line for line in said) == 1


def test_under_a_compiler_nothing_is_kept(said, kept, monkeypatch):
    pipe = patched(pipeline())
    monkeypatch.setattr(shared_tome.scripts.base, "compiles", lambda: True)
    models.generate(pipe, 3)
    assert residual.COMPILED in said and kept[2] == []


def test_where_blocks_are_compiled_by_themselves_nothing_is_kept(said, kept):
    torch._dynamo.reset()
    pipe = models.pipeline(models.one_level())
    pipe.unet.compile_repeated_blocks(backend="eager")
    models.generate(patched(pipe), 2)
    torch._dynamo.reset()
    assert residual.COMPILED in said and kept[2] == []
