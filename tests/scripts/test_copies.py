"""Copies and pickles of what apply_patch has patched: merged as the model itself, and by a life of their own."""

from __future__ import annotations

import copy
import io
import logging
import pickle

import pytest
import torch

import shared_tome
from shared_tome import ToMeConfig

from . import models

OPTIONS = [{"exact_every": 3}, {"method": "merge", "cross_attention": True, "mlp": True}, {"own_token": False}]


def patched(model, **options):
    return shared_tome.apply_patch(model, config=ToMeConfig(**{"ratio": 0.75, "min_tokens": 0, **options}))


def saved(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_a_copy_of_a_pipeline_goes_by_its_own_scheduler(options):
    """Whatever becomes of the pipeline that it was copied from."""
    pipe = patched(models.pipeline(), **options)
    expected = models.generate(pipe, 7)
    twin = copy.deepcopy(pipe)
    models.generate(pipe, 4)
    assert torch.equal(models.generate(twin, 7), expected)
    del pipe
    assert torch.equal(models.generate(twin, 7), expected)


def test_a_copy_of_a_model_alone_goes_by_the_pipeline_of_the_model():
    pipe = patched(models.pipeline(), exact_every=3)
    expected = models.generate(pipe, 7)
    pipe.unet = copy.deepcopy(pipe.unet)
    assert torch.equal(models.generate(pipe, 7), expected)


@pytest.mark.parametrize("again", [saved, lambda model: pickle.loads(pickle.dumps(model))], ids=["save", "pickle"])
@pytest.mark.parametrize("options", OPTIONS[1:], ids=str)
@pytest.mark.parametrize("ran", [False, True])
def test_a_unet_can_be_saved_whole(again, options, ran):
    unet = models.sd15()
    plain, expected = models.run(unet), models.run(patched(models.sd15(), **options))
    patched(unet, **options)
    if ran:
        models.run(unet)
    loaded = again(unet)
    assert torch.equal(models.run(loaded), expected) and not torch.equal(expected, plain)
    shared_tome.remove_patch(loaded)
    assert torch.equal(models.run(loaded), plain)
    assert not any(one._forward_hooks or one._forward_pre_hooks for one in loaded.modules())
    assert torch.equal(models.run(unet), expected)


@pytest.mark.parametrize("method", ["sample", "merge"])
def test_a_transformer_can_be_saved_whole(method):
    model = models.flux()
    plain = models.run_flux(model)
    expected = models.run_flux(patched(model, method=method))
    loaded = saved(model)
    assert torch.equal(models.run_flux(loaded), expected) and not torch.equal(expected, plain)
    shared_tome.remove_patch(loaded)
    assert torch.equal(models.run_flux(loaded), plain)


def test_what_was_said_and_decided_is_not_saved(caplog):
    """The other process has a log and a device of its own. A copy in this one knows what is known here."""
    caplog.set_level(logging.INFO)
    unet = models.sd15()
    plain, merged = models.run(unet), models.run(patched(unet, exact_every=3))
    for kind in unet._shared_tome._whole_steps._verdicts._known:
        unet._shared_tome._hooks.rest(kind)  # as if merging paid nowhere
    assert torch.equal(models.run(unet), plain) and torch.equal(models.run(copy.deepcopy(unet)), plain)
    caplog.clear()
    assert torch.equal(models.run(saved(unet)), merged)
    assert caplog.text.count("nothing tells here which step it is") == 1
