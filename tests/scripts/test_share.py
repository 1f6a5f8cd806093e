"""`share match` in scripts: one match serves both halves of a batch where they are the same images, nowhere else."""

from __future__ import annotations

import pytest
import torch

import shared_tome
from shared_tome import ToMeConfig
from shared_tome.scripts import base

from . import models
from .test_joint import MODELS


def config(share, method="merge"):
    options = {"method": method, "ratio": 0.5, "min_tokens": 0, "levels": "0,1", "proportional": False}
    return ToMeConfig(**options, share_match=share)


def unet_run(x):
    context = models.noise(len(x), 7, 16, seed=2)
    return lambda unet: unet(x, 500, encoder_hidden_states=context).sample


def both(model, run):
    """What the model gives with and without a shared match."""
    made = []
    for share in (True, False):
        shared_tome.apply_patch(model, config=config(share))
        with torch.no_grad():
            made.append(run(model))
    shared_tome.remove_patch(model)
    return made


@pytest.mark.parametrize("rows", [2, 4])
def test_images_without_guidance_have_matches_of_their_own(rows):
    assert torch.equal(*both(models.sd15(), unet_run(models.noise(rows, 4, 16, 20, seed=1))))


@pytest.mark.parametrize("images", [1, 2])
def test_prompted_and_unprompted_rows_share_one(images):
    assert not torch.equal(*both(models.sd15(), unet_run(models.noise(images, 4, 16, 20, seed=1).repeat(2, 1, 1, 1))))


@pytest.mark.parametrize("alike", [True, False])
@pytest.mark.parametrize("name", MODELS)
def test_models_of_text_and_image(name, alike):
    make, run, _ = MODELS[name]
    model = make()

    def repeat(module, args, kwargs):
        x = kwargs["hidden_states"]
        return args, {**kwargs, "hidden_states": x[: len(x) // 2].repeat(2, *(1,) * (x.dim() - 1))}

    if alike:
        model.register_forward_pre_hook(repeat, with_kwargs=True)
    assert torch.equal(*both(model, run)) is not alike


def test_a_captured_call_does_as_its_warm_up(monkeypatch):
    """It cannot wait for the device."""
    unet, x = models.sd15(), models.noise(1, 4, 16, 20, seed=1).repeat(2, 1, 1, 1)
    shared, own = both(unet, unet_run(x))
    shared_tome.apply_patch(unet, config=config(True))
    with torch.no_grad():
        for captures, compared, expected in ((True, 1, own), (False, 0, shared), (True, 1, shared)):
            with monkeypatch.context() as patch:
                patch.setattr(base, "captures", lambda device, now=captures: now)
                if compared:
                    patch.setattr(base, "same_halves", lambda x: 1 / 0)
                assert torch.equal(unet_run(x)(unet), expected)


def test_under_torch_compile_nothing_is_shared(monkeypatch, caplog):
    unet, x = models.sd15(), models.noise(1, 4, 16, 20, seed=1).repeat(2, 1, 1, 1)
    _, own = both(unet, unet_run(x))
    monkeypatch.setattr(base, "compiles", lambda: True)
    shared_tome.apply_patch(unet, config=config(True))
    with torch.no_grad():
        assert all(torch.equal(unet_run(x)(unet), own) for _ in range(2))
    assert [record.getMessage() for record in caplog.records].count(
        "[ToMe] share match is off under torch.compile: each image is matched alone"
    ) == 1


def test_nothing_is_compared_where_nothing_is_shared(monkeypatch):
    """Comparing waits for the device."""
    monkeypatch.setattr(base, "same_halves", lambda x: 1 / 0)
    unet = models.sd15()
    for options in (config(False), config(True, "sample"), config(True, "downsample")):
        shared_tome.apply_patch(unet, config=options)
        models.run(unet)
