"""A patched model under torch.compile, torch.export, torch.jit.trace, FakeTensorMode and torch.vmap, and in plain calls
afterwards."""

from __future__ import annotations

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import shared_tome

from . import models

OPTIONS = {
    "tomesd": {"ratio": 0.5, "max_downsample": 2},
    "sample": {"config": shared_tome.ToMeConfig(ratio=0.6, min_tokens=0, own_token=False)},
    "merge": {"config": shared_tome.ToMeConfig(ratio=0.5, min_tokens=0, method="merge")},
    "downsample": {"config": shared_tome.ToMeConfig(ratio=0.75, min_tokens=0, method="downsample")},
}


def patched(name):
    return shared_tome.apply_patch(models.two_levels(), **OPTIONS[name])


def given():
    return models.noise(2, 4, 16, 20, seed=1), torch.tensor(500), models.noise(2, 7, 16, seed=2)


def check_plain_calls(name, unet, sizes=((16, 20), (18, 22))):
    for size in sizes:
        out = models.run(unet, *size)
        assert type(out) is torch.Tensor and torch.equal(out, models.run(patched(name), *size))


@pytest.mark.parametrize("name", ["sample", "merge"])
def test_an_exported_model_merges_as_the_model_does(name):
    unet = patched(name)
    with torch.no_grad():  # the first call: what is tried out is tried beside the trace
        made = torch.export.export(unet, given(), {"return_dict": False}, strict=False).module()
        out = made(*given(), return_dict=False)[0]
    assert torch.equal(out, models.run(patched(name)))
    check_plain_calls(name, unet, [(16, 20)])


@pytest.mark.parametrize("name", OPTIONS)
def test_a_traced_model_merges_as_the_model_does(name):
    """There a tensor's sizes are tensors, too."""
    unet = patched(name)
    with torch.no_grad():
        made = torch.jit.trace(unet, given(), strict=False, check_trace=False)
        out = made(*given())["sample"]
    torch.testing.assert_close(out, models.run(patched(name)), rtol=1e-5, atol=1e-6)
    check_plain_calls(name, unet, [(16, 20)])


@pytest.mark.parametrize("name", OPTIONS)
def test_nothing_of_a_fake_call_stays(name):
    """Neither in the model nor in what is remembered for all models."""
    unet = patched(name)
    models.run(unet)
    with FakeTensorMode(), torch.no_grad():
        fake = models.seeded(models.two_levels)
        shared_tome.apply_patch(fake, **OPTIONS[name])
        for _ in range(2):
            x, prompt = torch.empty(2, 4, 18, 22), torch.empty(2, 7, 16)
            assert fake(x, torch.tensor(500), encoder_hidden_states=prompt).sample.shape == x.shape
    with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
        unet(torch.empty(2, 4, 18, 22), torch.tensor(500), encoder_hidden_states=torch.empty(2, 7, 16))
    check_plain_calls(name, unet)


@pytest.mark.parametrize("name", ["sample", "downsample"])
def test_nothing_of_a_vectorized_call_stays(name):
    unet, x, prompt = patched(name), models.noise(1, 4, 16, 20, seed=1), models.noise(1, 7, 16, seed=2)
    models.run(unet)

    def call(timestep):
        return unet(x, timestep, encoder_hidden_states=prompt).sample

    with torch.no_grad():
        torch.vmap(call)(torch.tensor([500, 400]))
    check_plain_calls(name, unet, [(16, 20)])


@pytest.mark.parametrize(("first", "processor"), [("called", None), ("compiled", models.Torchs)])
def test_a_compiled_model_merges_as_the_model_does(first, processor):
    """With what was found out in plain calls before, and without."""
    torch._dynamo.reset()
    unet = models.one_level()
    if processor is not None:
        unet.set_attn_processor(
            {name: processor() if "attn1" in name else known for name, known in unet.attn_processors.items()}
        )
    shared_tome.apply_patch(unet, **OPTIONS["merge"])
    if first == "called":
        models.run(unet)
    compiled = torch.compile(unet, backend="eager")
    with torch.no_grad():
        out = compiled(*given(), return_dict=False)[0]
    torch.testing.assert_close(out, models.run(unet), rtol=1e-5, atol=1e-6)
    torch._dynamo.reset()
