"""A run in which nothing is merged says so in one line, with the reason; a run that merges says nothing."""

from __future__ import annotations

import re

import pytest
import torch

import shared_tome

from . import models


def config(**options):
    return shared_tome.ToMeConfig(**{"method": "sample", "ratio": 0.5, "min_tokens": 0, "levels": "0,1", **options})


FEW = ". To change that: make a larger picture, or lower min tokens"
LEVEL = ". To change that: set levels to auto"
RATIO = ". To change that: raise the ratio"
STEPS = ". To change that: lower start, raise end or take more steps"
CASES = {
    "few tokens": ({"min_tokens": 512}, rf"fewer than min tokens 512 \(16x20 tokens, 8x10 tokens\){FEW}"),
    "no such level": ({"levels": "2,3"}, rf"its level is not one of levels 2,3 \(16x20 tokens, 8x10 tokens\){LEVEL}"),
    "no whole token": ({"ratio": 0.003}, rf"the ratio takes away no whole token \(16x20 tokens, 8x10 tokens\){RATIO}"),
    "no ratio": ({"ratio": 0.0}, "ratio is 0"),
    "no steps": ({"start": 0.5, "end": 0.5}, f"no step of the run lies between start 0.5 and end 0.5{STEPS}"),
}


def lines(caplog):
    return [record.getMessage() for record in caplog.records if "nothing is merged" in record.getMessage()]


@pytest.mark.parametrize("name", CASES)
def test_a_unet_alone_says_it_once(name, caplog):
    options, words = CASES[name]
    unet = models.sd15()
    before = models.run(unet)
    shared_tome.apply_patch(unet, config=config(**options))
    for timestep in (500, 400):
        models.run(unet, timestep=timestep)
    assert torch.equal(models.run(unet), before)
    shared_tome.remove_patch(unet)
    assert len(lines(caplog)) == 1
    assert re.fullmatch(rf"\[ToMe\] nothing is merged: {words}", lines(caplog)[0])


def test_a_ratio_that_the_method_cannot_take_is_told_once(caplog):
    """tomesd takes as much as it can there, and says nothing."""
    unet = models.sd15()
    shared_tome.apply_patch(unet, 0.9)
    for timestep in (500, 400):
        models.run(unet, timestep=timestep)
    assert [record.getMessage() for record in caplog.records] == [
        "[ToMe] ratio 0.9 is more than method merge can take at stride 2x2: 0.75 is what it does"
    ]


def test_sdxl_at_tomesds_defaults_says_that_it_has_no_such_level(caplog):
    unet = models.sdxl()
    before = models.run(unet)
    shared_tome.apply_patch(unet, 0.5)
    assert torch.equal(models.run(unet), before)
    assert lines(caplog) == [
        "[ToMe] nothing is merged: its level is not one of levels 0 (8x10 tokens, 4x5 tokens)" + LEVEL
    ]


@pytest.mark.parametrize("options", [{"min_tokens": 4096}, {"start": 1.0}])
def test_each_run_of_a_pipeline_says_it(options, caplog):
    pipe = models.pipeline()
    before = models.generate(pipe)
    shared_tome.apply_patch(pipe, config=config(**options))
    for count in (1, 2):
        assert torch.equal(models.generate(pipe), before)
        assert len(lines(caplog)) == count
    shared_tome.remove_patch(pipe)
    assert len(lines(caplog)) == 2


@pytest.mark.parametrize("options", [{}, {"start": 0.5}, {"end": 0.5}, {"levels": "1,2"}])
def test_a_run_that_merges_says_nothing(options, caplog):
    pipe = models.pipeline()
    before = models.generate(pipe, steps=4)
    shared_tome.apply_patch(pipe, config=config(**options))
    assert not torch.equal(models.generate(pipe, steps=4), before)
    shared_tome.remove_patch(pipe)
    assert not lines(caplog)


def test_a_run_that_begins_behind_the_end_says_it(caplog):
    """img2img: the scheduler knows the whole run, of which the first steps are not run."""
    parts = models.pipeline().components
    pipe = models.diffusers.StableDiffusionImg2ImgPipeline(**parts, requires_safety_checker=False)
    pipe.set_progress_bar_config(disable=True)

    def run(strength):
        pipe(
            image=models.noise(1, 4, 16, 16), prompt_embeds=models.noise(1, 7, 16, seed=2), num_inference_steps=6,
            negative_prompt_embeds=models.noise(1, 7, 16, seed=3), strength=strength, output_type="latent",
            generator=torch.Generator().manual_seed(7),
        )  # fmt: skip
        said = lines(caplog)
        caplog.clear()
        return said

    shared_tome.apply_patch(pipe, config=config(end=0.4))
    line = "[ToMe] nothing is merged: no step of the run lies between start 0 and end 0.4" + STEPS
    assert [run(strength) for strength in (1.0, 0.5, 0.5, 1.0, 0.5)] == [[], [line], [line], [], [line]]
    shared_tome.apply_patch(pipe, config=config(start=0.6))
    assert run(0.5) == []


def test_a_ratio_that_moves_from_zero_is_told_as_such(caplog):
    unet = models.sd15()
    shared_tome.apply_patch(unet, config=config(ratio=0.0, ratio_end=0.5))
    models.run(unet, timestep=999)
    shared_tome.remove_patch(unet)
    why = "the ratio is 0 at each step of the run: it moves from 0 to 0.5 between start 0 and end 1"
    assert lines(caplog) == [f"[ToMe] nothing is merged: {why}. To change that: raise the ratios or take more steps"]


def test_a_start_behind_the_last_step_of_a_unet_alone_is_told_at_the_end(caplog):
    unet = models.sd15()
    shared_tome.apply_patch(unet, config=config(start=0.9))
    models.run(unet, timestep=500)
    assert not lines(caplog)
    shared_tome.remove_patch(unet)
    assert lines(caplog) == ["[ToMe] nothing is merged: no step of the run lies between start 0.9 and end 1" + STEPS]


@pytest.mark.parametrize(("make", "run"), [(models.flux, models.run_flux), (models.sd3, models.run_sd3)])
def test_a_transformer_says_it(make, run, caplog):
    model = make()
    before = run(model)
    shared_tome.apply_patch(model, config=config(min_tokens=1024))
    assert torch.equal(run(model), before) and torch.equal(run(model), before)
    assert lines(caplog) == ["[ToMe] nothing is merged: fewer than min tokens 1024 (6x10 tokens)" + FEW]
    caplog.clear()
    shared_tome.apply_patch(model, merge_attn=False)
    assert lines(caplog) == ["[ToMe] nothing is merged: attention is off"]


def test_a_unet_without_any_part_to_merge_says_it(caplog):
    shared_tome.apply_patch(models.sd15(), merge_attn=False)
    assert lines(caplog) == ["[ToMe] nothing is merged: attention, cross-attention and MLP are all off"]
