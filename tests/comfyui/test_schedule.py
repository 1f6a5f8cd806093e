"""A schedule asks for the noise level, for which the processor waits, only until its ratio can change no more."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from . import host
from .test_split_sampling import STEPS, unet, whole  # noqa: F401

SCHEDULED = {"method": "sample", "ratio": 0.75, "start": 0.3}


@pytest.fixture
def asked(monkeypatch):
    """The progress of each call that was asked for."""
    found, module = [], host.pack_module("schedule")
    ask = module.progress_of

    def progress_of(*given):
        found.append(ask(*given))
        return found[-1]

    monkeypatch.setattr(module, "progress_of", progress_of)
    return found


@pytest.fixture
def always(monkeypatch):
    """Calling it makes each call ask."""
    return lambda: monkeypatch.setattr(host.pack_module("outcome"), "never_rises", lambda sampler, sigmas: False)


@pytest.mark.parametrize("options, most", [
    (SCHEDULED, 3), ({"method": "sample", "start": 0.3, "end": 0.7}, STEPS - 1),
    ({"method": "sample", "ratio": 0.75, "ratio_end": 0.25}, STEPS),
])  # fmt: skip
def test_asks_until_nothing_changes(unet, asked, always, options, most):  # noqa: F811
    made, start, conds = unet
    picture = whole(made(**options), start, conds)
    assert len(asked) == most
    always()
    asked.clear()
    assert torch.equal(whole(made(**options), start, conds), picture)
    assert len(asked) == STEPS


def test_each_sampling_asks_anew(unet, asked):  # noqa: F811
    made, start, conds = unet
    model = made(**SCHEDULED)
    pictures = [whole(model, start, conds) for _ in range(2)]
    assert torch.equal(*pictures)
    assert asked == asked[:3] * 2


def test_transformers_too(tome, asked):
    from . import dit_host

    which, model = dit_host.SMALL["flux"], dit_host.small("flux")
    prompt = [[torch.randn(1, *which.text), {"pooled_output": torch.ones(1, 32)}]]
    start = {"samples": torch.zeros(1, *which.latent[1:])}
    whole(tome(model, min_tokens=0, **SCHEDULED), start, (prompt, prompt), ("euler", "simple"))
    assert 0 < len(asked) <= STEPS // 2


def test_every_sampler_that_is_said_to_fall_does(unet, sd15, monkeypatch, always):  # noqa: F811
    """After a call at a step's own level none is at more noise, whatever the model makes."""
    from comfy import samplers

    (made, _, conds), start = unet, {"samples": torch.zeros(1, 4, 8, 8)}
    monkeypatch.setattr(sd15.model, "_apply_model", lambda x, *_, **__: 0.9 * x)
    module, rises = host.pack_module("outcome"), {}
    named = [name for name in samplers.KSAMPLER_NAMES if name in module._FALLING]
    assert len(named) > 30
    real, levels = host.pack_module("model_call")._levels, []

    def watch(options, device):
        found = real(options, device)
        levels.append((found[1].item(), bool((found[0] == found[1]).any())))
        return found

    always()
    monkeypatch.setattr(host.pack_module("model_call"), "_levels", watch)
    model = made(method="sample", ratio=0.0, ratio_end=0.5)  # asks in each call
    for name in (*named, "heunpp2"):
        levels.clear()
        whole(model, start, conds, (name, "normal"))
        assert len(levels) >= STEPS
        lowest, rises[name] = float("inf"), False
        for level, own in levels:
            rises[name] |= level > lowest
            lowest = min(lowest, level) if own else lowest
    assert [name for name in rises if rises[name]] == ["heunpp2"]


def test_noise_added_before_a_step(comfy_nodes):
    from comfy import samplers

    never_rises, falling = host.pack_module("outcome").never_rises, torch.tensor([3.0, 2.0, 2.0, 0.0])
    assert never_rises(samplers.ksampler("euler"), falling)
    assert not never_rises(samplers.ksampler("euler"), falling.flip(0))
    assert not never_rises(samplers.ksampler("euler", {"s_churn": 1.0}), falling)
    assert not any(never_rises(samplers.ksampler(name), falling) for name in ("heunpp2", "dpm_adaptive", "dpm_fast"))
    assert not never_rises(SimpleNamespace(), falling)
