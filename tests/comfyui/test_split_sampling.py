"""A picture sampled in parts (KSampler (Advanced), Wan 2.2's two models) is the one sampled at once."""

from __future__ import annotations

import pytest
import torch

from . import dit_host, host

STEPS = 6
EULER = ("euler", "normal")


def part(model, latent, first, last, kind, noise, leftover, conds):
    import nodes

    sampler, scheduler = kind
    return nodes.KSamplerAdvanced().sample(
        model, noise, 1, STEPS, 3.0, sampler, scheduler, *conds, latent, first, last, leftover
    )[0]  # fmt: skip


def whole(model, start, conds, kind=EULER):
    return part(model, start, 0, STEPS, kind, "enable", "disable", conds)["samples"]


def parts(models, start, conds, kind=EULER, at=(2,)):
    """Sampled by each model in turn, which change at these steps."""
    edges, latent = (0, *at, STEPS), start
    for number, model in enumerate(models):
        noise, leftover = "enable" if number == 0 else "disable", "enable" if number < len(at) else "disable"
        latent = part(model, latent, edges[number], edges[number + 1], kind, noise, leftover, conds)
    return latent["samples"]


def unscaled(patcher, monkeypatch):
    """Without the latent's scale, on the way out of a sampler and in again, two parts are bit for bit the whole."""
    monkeypatch.setattr(patcher.model, "process_latent_in", lambda latent: latent)
    monkeypatch.setattr(patcher.model, "process_latent_out", lambda latent: latent)


@pytest.fixture
def unet(short, tome, monkeypatch):
    unscaled(short, monkeypatch)
    start = {"samples": torch.zeros(1, 4, 16, 16)}
    conds = host.conditioning(1), host.conditioning(2)
    return lambda **options: tome(short, min_tokens=0, **options), start, conds


OPTIONS = [
    *({"method": method} for method in ("sample", "merge", "merge_keys", "merge_queries", "downsample", "prune")),
    {"method": "sample", "ratio": 0.75, "own_token": True},
    {"method": "sample", "start": 0.3},
    {"method": "merge", "end": 0.7},
    {"method": "sample", "ratio": 0.75, "ratio_end": 0.0},
]


@pytest.mark.parametrize("options", OPTIONS, ids=lambda options: " ".join(map(str, options.values())))
def test_two_parts_are_the_whole(unet, options):
    made, start, conds = unet
    model = made(**options)
    expected = whole(model, start, conds)
    assert torch.equal(parts([model] * 2, start, conds), expected)
    assert not torch.equal(expected, whole(made(ratio=0.0), start, conds))


KINDS = [
    ("euler", "karras"), ("euler", "beta"), ("euler", "sgm_uniform"), ("heun", "normal"), ("heun", "karras"),
    ("dpm_2", "normal"), ("dpm_2", "exponential"), ("exp_heun_2_x0", "simple"),
]  # fmt: skip


@pytest.mark.parametrize("kind", KINDS, ids=" ".join)
def test_two_parts_are_the_whole_with_other_samplers(unet, kind):
    made, start, conds = unet
    plain, model = made(ratio=0.0), made(method="sample", ratio=0.75, start=0.3)
    assert torch.equal(parts([plain] * 2, start, conds, kind), whole(plain, start, conds, kind))
    assert torch.equal(parts([model] * 2, start, conds, kind), whole(model, start, conds, kind))


def test_parts_of_one_step(unet):
    made, start, conds = unet
    model = made(method="sample", ratio=0.75, ratio_end=0.25)
    assert torch.equal(parts([model] * 4, start, conds, at=(1, 4, 5)), whole(model, start, conds))


def test_two_models_that_share_a_run(unet):
    """Each with a node of its own, as Wan 2.2's for high and low noise."""
    made, start, conds = unet
    options = {"method": "sample", "ratio": 0.75, "start": 0.5}
    both = [made(**options), made(**options)]
    assert torch.equal(parts(both, start, conds, at=(4,)), whole(both[0], start, conds))


def test_a_start_counts_noise_and_not_the_steps_of_a_part(unet):
    """The second part alone: all of it is behind the start."""
    made, start, conds = unet
    half = part(made(ratio=0.0), start, 0, 3, EULER, "enable", "enable", conds)
    late = part(made(method="sample", start=0.5), half, 3, STEPS, EULER, "disable", "disable", conds)
    always = part(made(method="sample"), half, 3, STEPS, EULER, "disable", "disable", conds)
    assert torch.equal(late["samples"], always["samples"])


@pytest.mark.parametrize("options", [{"ratio": 0.75}, {"ratio": 0.5, "start": 0.3}, {"ratio": 0.5, "ratio_end": 0.0}])
@pytest.mark.parametrize("name", ["flux", "wan"])
def test_transformers_too(tome, monkeypatch, name, options):
    which, model = dit_host.SMALL[name], dit_host.small(name)
    unscaled(model, monkeypatch)
    start = {"samples": torch.zeros(1, *which.latent[1:])}

    def conditioning(seed):
        generator = torch.Generator().manual_seed(seed)
        return [[torch.randn(1, *which.text, generator=generator), {"pooled_output": torch.ones(1, 32)}]]

    conds = conditioning(1), conditioning(2)
    merged = tome(model, method="sample", min_tokens=0, **options)
    for kind in (("euler", "simple"), ("euler", "beta")):
        plain, expected = whole(model, start, conds, kind), whole(merged, start, conds, kind)
        off = apart(parts([merged] * 2, start, conds, kind), expected)
        # A flow's latents are divided and multiplied between two parts: not bit for bit the same without ToMe either.
        assert off < 10 * apart(parts([model] * 2, start, conds, kind), plain) + 1e-6
        assert apart(expected, plain) > 100 * off


def apart(one, other):
    """Relative difference of two latents."""
    return float((one - other).norm() / other.norm())
