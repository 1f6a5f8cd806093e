"""What autotune decided of a script's model, as a text: set in `decisions`, the same is merged on another GPU."""

from __future__ import annotations

import pytest
import torch
from support.made_up_gpu import MadeUpTimes

import shared_tome
from shared_tome import ToMeConfig, decisions_of
from shared_tome.autotune import decisions, layer, store
from shared_tome.autotune import step as step_auto
from shared_tome.autotune.paying import Decision
from shared_tome.scripts import joint_autotune

from . import models
from .test_joint import MODELS
from .test_joint_methods import run

OPTIONS = {"min_tokens": 0, "ratio": 0.5, "method": "sample"}


@pytest.fixture
def gpu(monkeypatch, tmp_path):
    """On it the finest layers (16x20) do not pay; `step`: what a merged step takes, of 100 ms."""
    gpu = MadeUpTimes(monkeypatch, tmp_path, store, layer, decisions)
    gpu.step, gpu.attention = 60.0, True
    monkeypatch.setattr(step_auto, "may_measure", lambda device: True)
    monkeypatch.setattr(step_auto, "_compared", lambda *_: Decision(1e5, 1e3 * gpu.step, 0.0))
    monkeypatch.setattr(joint_autotune, "measures", lambda config, grid, device: config.levels == "auto")
    monkeypatch.setattr(joint_autotune, "compared", lambda *_: Decision(80.0, 40.0 if gpu.attention else 79.0, 0.0))
    gpu.another(x16x20=False)
    return gpu


def patched(unet, **options):
    shared_tome.apply_patch(unet, config=ToMeConfig(**{**OPTIONS, **options}))
    return unet


@pytest.mark.parametrize("method", ["sample", "merge", "auto"])
def test_the_text_of_a_unet_makes_the_same_outcome_on_another_gpu(gpu, method):
    unet = patched(models.sd15(), method=method)
    assert decisions_of(unet) == ("sample" if method == "auto" else "")
    made, text = models.run(unet), decisions_of(unet)
    words = text.split()
    assert words[0] == "sample" if method == "auto" else words[0] == "+16x20"
    assert "+16x20" in words and any(word.startswith("-16x20/") for word in words)
    assert any(word.startswith("+8x10/") for word in words)
    gpu.another(x8x10=False)
    assert not torch.equal(models.run(patched(unet, method=method)), made)
    gpu.step = 99.0
    gpu.keys.clear()
    assert torch.equal(models.run(patched(unet, method=method, decisions=text)), made) and not gpu.keys
    assert decisions_of(unet) == text
    shared_tome.remove_patch(unet)
    assert decisions_of(unet) == ""


def test_a_step_that_was_left_alone_stays_so(gpu, caplog):
    unet, gpu.step = models.sd15(), 99.0
    plain = models.run(unet)
    assert torch.equal(models.run(patched(unet)), plain)
    text = decisions_of(unet)
    assert "-16x20" in text.split()
    gpu.another()
    gpu.step = 60.0
    assert not torch.equal(models.run(patched(unet)), plain)
    gpu.keys.clear()
    assert torch.equal(models.run(patched(unet, decisions=text)), plain) and not gpu.keys
    assert "the decisions that are set leave it alone; nothing is merged" in caplog.text


@pytest.mark.parametrize("name", ["flux", "sd3"])
def test_transformers_have_them_too(gpu, name):
    model = MODELS[name][0]()
    plain = run(name, model)
    made, texts = [], []
    for gpu.attention, gpu.step in ((True, 60.0), (False, 60.0), (True, 99.0)):
        gpu.another()
        made.append(run(name, patched(model)))
        texts.append(decisions_of(model))
    assert "-" not in texts[0] and texts[1] == texts[0].replace("+6x10/", "-6x10/") and texts[2] == "-6x10"
    assert torch.equal(made[1], plain) and torch.equal(made[2], plain) and not torch.equal(made[0], plain)
    for text, expected, gpu.attention in zip(texts, made, (False, True, True), strict=True):
        gpu.another()
        gpu.step = 60.0 if text.startswith("-") else 99.0
        assert torch.equal(run(name, patched(model, decisions=text)), expected) and not gpu.keys


def test_a_compiled_unet_follows_them():
    """Nothing is measured under torch.compile, but what is set holds."""
    unet = patched(models.two_levels())
    models.run(unet)
    text = decisions_of(unet)  # on the CPU all is merged
    assert "-" not in text and text.split()[1].startswith("+16x20/")
    alone = models.run(patched(unet, levels="1"))
    merged = models.run(patched(unet, levels="0,1"))
    torch._dynamo.reset()
    set_ = text.replace("+16x20/", "-16x20/")
    made = models.run(torch.compile(patched(unet, decisions=set_, own_token=False), backend="eager"))
    torch._dynamo.reset()
    eager = models.run(patched(unet, levels="1", own_token=False))
    torch.testing.assert_close(made, eager, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(alone, merged, rtol=1e-4, atol=1e-5)
