"""The schedule, the sampler and the averages."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lab.models import optimize, samplers


def test_sigmas_rise_strictly_between_finite_ends() -> None:
    sigmas = samplers.cosine_sigmas()
    assert sigmas.shape == (1000,)
    assert (sigmas.diff() > 0).all()
    assert sigmas[0].item() == pytest.approx(samplers.SIGMA_MIN, rel=1e-5)
    assert sigmas[-1].item() == pytest.approx(samplers.SIGMA_MAX, rel=1e-4)


def test_noisy_pictures_keep_unit_variance_and_give_back_the_picture() -> None:
    generator = torch.Generator().manual_seed(0)
    x0, noise = (torch.randn(64, 3, 8, 8, generator=generator) for _ in range(2))
    sigmas = samplers.cosine_sigmas()[torch.randint(1000, (64,), generator=generator)]
    x, v = optimize.noisy(x0, noise, sigmas)
    signal, share = (f[:, None, None, None] for f in samplers.signal_and_noise(sigmas))
    assert x.var().item() == pytest.approx(1, abs=0.05)
    torch.testing.assert_close(signal * x - share * v, x0, atol=1e-4, rtol=0)
    torch.testing.assert_close(share * x + signal * v, noise, atol=1e-4, rtol=0)


@pytest.mark.parametrize("steps", [1, 4, 30])
def test_a_perfect_network_is_sampled_to_its_picture(steps: int) -> None:
    """A network that knows the answer gives it, whatever the guidance between equal predictions."""
    generator = torch.Generator().manual_seed(1)
    answer, start = (torch.randn(2, 3, 4, 4, generator=generator) for _ in range(2))
    sigmas = samplers.cosine_sigmas()

    def network(x, times, context):
        signal, share = (f[:, None, None, None] for f in samplers.signal_and_noise(sigmas[times.long()]))
        return (signal * x - answer.repeat(2, 1, 1, 1)) / share

    context = torch.zeros(2, 1, 1)
    out = samplers.sample(network, start, context, context[:1], sigmas, steps=steps, guidance=3.0)
    torch.testing.assert_close(out, answer, atol=1e-3, rtol=0)


def test_guidance_goes_past_the_prompted_prediction() -> None:
    sigmas = samplers.cosine_sigmas()
    contexts = torch.ones(1, 1, 1), torch.zeros(1, 1, 1)

    def network(x, times, context):
        return context[:, :, :, None].expand_as(x)

    one, three = (
        samplers.sample(network, torch.zeros(1, 3, 2, 2), *contexts, sigmas, steps=1, guidance=g) for g in (1.0, 3.0)
    )
    torch.testing.assert_close(three, 3 * one)


def test_sampling_steps_start_at_pure_noise_and_fall() -> None:
    for count in (1, 7, 30, 1000):
        steps = samplers.step_sigmas(samplers.cosine_sigmas(), count)[0]
        assert len(steps) == count
        assert steps[0] == 999 and steps[-1] >= 0
        assert all(a > b for a, b in zip(steps, steps[1:], strict=False))


def test_stratified_steps_cover_the_schedule() -> None:
    steps = optimize.stratified_steps(100, 1000, torch.Generator().manual_seed(0), torch.device("cpu"))
    assert (steps // 10).tolist() == list(range(100))


def test_loss_weights_stay_in_range() -> None:
    weights = optimize.loss_weights(samplers.cosine_sigmas())
    assert weights[-1] == 1 and weights[0] == pytest.approx(0.15)
    assert (weights.diff() >= 0).all()


def test_ema_follows() -> None:
    layer = nn.Linear(2, 2, bias=False)
    ema = optimize.Ema(layer, decay=0.5)
    start = layer.weight.detach().clone()
    layer.weight.data += 1
    ema.update()  # young: decay 2 / 11
    torch.testing.assert_close(ema.average[0], start + 9 / 11)
    assert ema.model.weight.equal(ema.average[0])  # what pictures are made with


def test_learning_rate_warms_up_and_falls() -> None:
    assert optimize.learning_rate(0, 0.0, 1.0) == pytest.approx(1 / 150)
    assert optimize.learning_rate(1000, 0.0, 1.0) == 1
    assert optimize.learning_rate(1000, 1.0, 1.0) == pytest.approx(0.02)
    assert optimize.learning_rate(1000, 2.0, 1.0) == pytest.approx(0.02)
