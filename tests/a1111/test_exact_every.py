"""exact_every in AUTOMATIC1111, Forge and reForge: each n-th call of the denoiser is exact, the others add what it
lacked."""

from __future__ import annotations

import gc
import math
import weakref

import pytest
import torch

from . import variants
from .test_forge import _Loaded, forge_host  # noqa: F401
from .test_hooks import _inputs, _run, _unet

LABEL = "ToMe exact every"
ON = {"ratio": 0.75, "min_tokens": 0, "exact_every": 3}


@pytest.fixture
def lines(tome, monkeypatch):
    """What the log gets."""
    found = []
    monkeypatch.setattr(tome.notes.logger, "info", lambda text, *args: found.append(text % args if args else text))
    return found


@pytest.fixture
def kept(tome, monkeypatch):
    """All Residuals that are made."""
    real, found = tome.sampling.Residuals, []

    class Watched(real):
        def __init__(self, *given):
            super().__init__(*given)
            found.append(self)

    monkeypatch.setattr(tome.sampling, "Residuals", Watched)
    return found


@pytest.fixture
def a1111(host, monkeypatch):
    from ldm.modules.attention import CrossAttention

    monkeypatch.setattr(CrossAttention, "forward", variants.sdp)
    return host


@pytest.fixture(params=["a1111", "forge", "reforge"])
def either(host, monkeypatch, request):
    if request.param == "a1111":
        return request.getfixturevalue("a1111")
    host.shared.sd_model, host.forge = _Loaded(request.param == "reforge"), True
    return host


def _attached(tome, unet, **options):
    sampling = tome.sampling.Sampling(tome.core.ToMeConfig(**{**ON, **options}), (1,), tome.notes.Notes())
    return tome.hooks.PassAttachment(unet, sampling)


def psnr(picture, exact):
    return 10 * math.log10(float((exact.max() - exact.min()) ** 2 / (picture - exact).square().mean()))


OPTIONS = [{}, {"own_token": False}, {"method": "downsample", "proportional": False}, {"ratio": 0.6}]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("program", ["a1111", "forge", "reforge"])
def test_what_is_added_is_what_was_lacking(a1111, tome, lines, program, options):
    """Steps with the input of the exact one give its output, whatever they draw; others do not."""
    if program == "a1111":
        unet = _unet()
    else:
        loaded = _Loaded(program == "reforge")
        unet = loaded.model.diffusion_model
    inputs, outs = _inputs(), {}
    other = (_inputs(seed=8)[0], *inputs[1:])
    plain, far = _run(unet, inputs), _run(unet, other)
    for every in (0, 3):
        config = tome.core.ToMeConfig(**{**ON, **options, "exact_every": every})
        sampling = tome.sampling.Sampling(config, (1,), tome.notes.Notes())
        if program == "a1111":
            attachment = tome.hooks.PassAttachment(unet, sampling)
        else:
            loaded.reset()
            tome.forge.patch(loaded, sampling)
        outs[every] = []
        for step, given in enumerate((inputs, inputs, other, inputs)):
            sampling.begin_step(step, 9, 2)
            outs[every].append(_run(unet, given))
        if program == "a1111":
            attachment.detach()
    assert torch.equal(outs[3][0], plain) and torch.equal(outs[3][3], plain)
    torch.testing.assert_close(outs[3][1], plain, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(outs[0][1], plain, rtol=1e-2, atol=1e-3)
    assert not torch.allclose(outs[3][2], far, rtol=1e-2, atol=1e-3)
    assert not any("exact every has no effect" in line for line in lines)


@pytest.mark.parametrize("more", [{}, {"enable_hr": True}, {"seeds": (5, 6)}], ids=str)
def test_the_text_has_it_where_it_had_an_effect(either, monkeypatch, more):
    """Else another attention would make another picture of the text."""
    _, p = either.generate([ON], steps=4, **more)
    assert p.extra_generation_params[LABEL] == 3
    if not either.forge:
        from ldm.modules.attention import CrossAttention

        monkeypatch.setattr(CrossAttention, "forward", variants.SERVED["own_scale"])
        _, p = either.generate([ON], steps=4, **more)
        assert p.extra_generation_params["ToMe ratio"] == 0.75 and LABEL not in p.extra_generation_params
    for options in ({"method": "merge"}, {"exact_every": 0}):
        _, p = either.generate([{**ON, **options}], steps=4, **more)
        assert p.extra_generation_params["ToMe ratio"] == 0.75 and LABEL not in p.extra_generation_params


def test_the_first_step_of_a_pass_is_exact(either):
    one, p = either.generate([ON], steps=1)
    assert torch.equal(one[0], either.generate(steps=1)[0][0]) and len(p.troubles) == 1
    assert not torch.equal(one[0], either.generate([{**ON, "exact_every": 0}], steps=1)[0][0])


def test_the_report_tells_which_steps(either, lines):
    either.generate([{**ON, "own_token": False}], steps=5)
    line = next(line for line in lines if "tokens in" in line)
    assert "in 3 of 5 steps" in line and "exact in every 3rd step" in line
    lines.clear()
    either.generate([ON], steps=1)
    assert any("nothing was merged" in line and "exact in every 3rd step" in line for line in lines)


def test_it_does_not_matter_how_the_rows_are_split(a1111, lines):
    a1111.opts.data["batch_cond_uncond"] = True
    together, _ = a1111.generate([ON], steps=5, seeds=(5, 6), batch_size=2)
    a1111.opts.data["batch_cond_uncond"] = False
    apart, _ = a1111.generate([ON], steps=5, seeds=(5, 6), batch_size=2)
    for one, other in zip(together, apart, strict=True):
        assert psnr(one, other) > 90
    for seed, image in zip((5, 6), together, strict=True):
        assert psnr(a1111.generate([ON], steps=5, seeds=(seed,))[0][0], image) > 90
    assert not any("exact every has no effect" in line for line in lines)


def test_parts_of_the_picture_end_it(tome, a1111, lines, kept):
    """An extension that cuts the picture into tiles calls the model for each of them, whatever the step announced."""
    unet, inputs = _unet(), _inputs()
    outs = {}
    for every in (0, 3):
        attachment = _attached(tome, unet, exact_every=every)
        for step in range(3):
            attachment.sampling.begin_step(step, 3, 2)
            outs[every] = [_run(unet, inputs) for _ in range(2)]
        attachment.detach()
    assert all(torch.equal(one, other) for one, other in zip(outs[0], outs[3], strict=True))
    assert sum("cannot tell apart" in line for line in lines) == 1 and not kept[-1]._kept


def test_rows_that_the_step_did_not_announce_end_it(tome, a1111, lines, kept):
    unet = _unet()
    attachment = _attached(tome, unet, exact_every=3)
    attachment.sampling.begin_step(0, 3, 2)
    _run(unet, _inputs(batch=3))
    attachment.detach()
    assert sum("cannot tell apart" in line for line in lines) == 1 and not kept[-1]._kept


def test_a_wrapper_that_calls_the_model_twice_ends_it(forge_host, lines, kept):  # noqa: F811
    def other(apply_model, args):
        return (apply_model(args["input"], args["timestep"], **args["c"]) * 3 + run(apply_model, args)) / 4

    def run(apply_model, args):
        return apply_model(args["input"] * 0.5, args["timestep"], **args["c"])

    forge_host.shared.sd_model.original.unet.set_model_unet_function_wrapper(other)
    forge_host.generate([ON], steps=4)
    assert sum("cannot tell apart" in line for line in lines) == 1 and not any(one._kept for one in kept)
    # Nor is a layer called exact that is merged from then on.
    assert any("in 4 of 4 steps" in line for line in lines) and not any("exact in every" in line for line in lines)


def test_another_attention_is_said(host, monkeypatch, lines, kept):
    from ldm.modules.attention import CrossAttention

    monkeypatch.setattr(CrossAttention, "forward", variants.SERVED["own_scale"])
    found, p = host.generate([ON], steps=4)
    assert sum("ToMe cannot see an attention" in line for line in lines) == 1
    assert any("in 4 of 4 steps" in line for line in lines) and LABEL not in p.extra_generation_params
    assert torch.equal(found[0], host.generate([{**ON, "exact_every": 0}], steps=4)[0][0])


@pytest.mark.parametrize("how", ["done", "interrupted"])
def test_what_is_kept_goes_with_the_pass(either, kept, how, tome, monkeypatch):
    tensors, real = [], tome.core.merging.residual.Residuals.keep

    def keep(self, found):
        tensors.extend(weakref.ref(part) for part in found.values())
        real(self, found)

    monkeypatch.setattr(tome.core.merging.residual.Residuals, "keep", keep)
    either.interrupt_at = 2 if how == "interrupted" else None
    either.generate([ON], steps=5, enable_hr=how == "done")
    either.interrupt_at = None
    gc.collect()
    assert tensors and all(ref() is None for ref in tensors)
    assert len(kept) == (2 if how == "done" else 1) and not any(one._kept or one.is_on for one in kept)


def test_another_model_on_the_way_gets_nothing_of_the_first(a1111, tome):
    unet = _unet()
    attachment = _attached(tome, unet)
    sampling = attachment.sampling
    sampling.begin_step(0, 5, 2)
    _run(unet, _inputs())
    assert sampling._residuals._kept
    sampling.another_model()
    assert not sampling._residuals._kept
    attachment.detach()


def test_off_and_other_methods_make_none(either, kept, lines):
    either.generate([{**ON, "exact_every": 0}])
    assert kept == []
    either.generate([{**ON, "method": "merge"}])
    assert kept == [] and sum("it is for sample and downsample" in line for line in lines) == 1
