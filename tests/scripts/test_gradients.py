"""Training a patched model: gradients through merged layers, and gradient checkpointing."""

from __future__ import annotations

import pytest
import torch

import shared_tome

from . import dits, models

SAID = "ToMe skips a call under gradient checkpointing"


def unet(model):
    x, context = models.noise(2, 4, 16, 20, seed=1), models.noise(2, 7, 16, seed=2)
    return model(x, 500, encoder_hidden_states=context).sample


MODELS = {
    "U-Net": (models.sd15, unet),
    "Wan": (dits.DITS["Wan"].model, lambda model: dits.DITS["Wan"].call(model, (3, 6, 10), models.ALL)),
}

LAST = ("up_blocks.1.attentions.1.transformer_blocks.0.attn1.to_v.weight", "blocks.1.attn1.to_v.weight")


def gradients(name, checkpointing=False, **options):
    """(the output, the gradients of all weights) of one call."""
    make, call = MODELS[name]
    model = make().requires_grad_(True).train()
    if options:
        shared_tome.apply_patch(model, config=shared_tome.ToMeConfig(min_tokens=0, **options))
    if checkpointing:
        model.enable_gradient_checkpointing()
    with torch.enable_grad():
        out = call(model)
        out.square().sum().backward()
    found = [weight.grad for weight in model.parameters() if weight.grad is not None]
    return out.detach(), torch.cat([grad.flatten() for grad in found])


@pytest.mark.parametrize("method", ["sample", "merge", "merge_queries", "downsample"])
@pytest.mark.parametrize("name", MODELS)
def test_gradients_are_those_of_the_merged_model(name, method):
    """Along a direction, against the change of the loss."""
    make, call = MODELS[name]
    options = {"ratio": 0.5, "method": method, "own_token": False, "proportional": False}
    model = shared_tome.apply_patch(make().double(), config=shared_tome.ToMeConfig(min_tokens=0, **options))
    # Of the last values alone: which tokens are alike hangs on all else, and changes in jumps.
    weights = [w for n, w in model.named_parameters() if n.endswith(LAST)]
    assert len(weights) == 1
    step = [models.noise(*weight.shape, seed=9).double() for weight in weights]

    def loss(way=0.0):
        for weight, by in zip(weights, step, strict=True):
            weight.data += way * by
        out = in_double(call, model).square().sum()
        for weight, by in zip(weights, step, strict=True):
            weight.data -= way * by
        return out

    for weight in weights:
        weight.requires_grad_(True)
    with torch.enable_grad():
        loss().backward()
    by_gradient = sum((weight.grad * by).sum() for weight, by in zip(weights, step, strict=True))
    with torch.no_grad():
        by_change = (loss(1e-4) - loss(-1e-4)) / 2e-4
    torch.testing.assert_close(by_gradient, by_change, rtol=1e-3, atol=1e-6)


def in_double(call, model):
    old = torch.get_default_dtype()
    try:
        torch.set_default_dtype(torch.float64)
        return call(model)
    finally:
        torch.set_default_dtype(old)


@pytest.mark.parametrize("method", ["sample", "merge"])
@pytest.mark.parametrize("name", MODELS)
def test_under_checkpointing_nothing_is_merged(name, method, caplog):
    """A block would be run again when the call's choices are gone."""
    plain = gradients(name)
    found = gradients(name, checkpointing=True, method=method, ratio=0.5)
    torch.testing.assert_close(found, plain, rtol=1e-4, atol=1e-5)
    assert caplog.text.count(SAID) == 1
    assert not torch.allclose(gradients(name, method=method, ratio=0.5)[0], plain[0], rtol=1e-3)
