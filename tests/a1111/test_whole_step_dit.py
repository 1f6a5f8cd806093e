"""levels "auto" on a GPU: a transformer's whole step is run both ways in Forge before anything is merged, by the
model's own call without patches."""

from __future__ import annotations

import sys

import pytest
import torch
from support.made_up_gpu import MadeUpTransformers
from torch import nn

from .test_decisions import LABEL, part
from .test_forge import _hooks
from .test_forge_dit import ON, SMALL, backend, call_of, clean, flux_host, lines  # noqa: F401

LAYERS = "8x8/32/2/256"
# Forge's small Flux has three attentions.
TWO, THREE = [0, *[3, 0] * 4], [0, *[3, 0, 0] * 4]


@pytest.fixture
def gpu(tome, monkeypatch, tmp_path):
    """On it steps wait for the processor, and merging a layer takes that longer than it saves."""
    call = sys.modules[tome.forge.forge_dit.TransformerCall.__module__]
    auto = sys.modules[call.DiTDecisions.__module__]
    return MadeUpTransformers(monkeypatch, tmp_path, part("store"), call, auto, part("step"))


def model_of(host):
    return host.shared.sd_model.original.unet.model.diffusion_model


@pytest.mark.parametrize(
    ("times", "text", "ways"),
    [
        ((100, 95, 5, 8), "-8x8", THREE),  # 100 ms, with all attentions 119 by the processor
        ((200, 80, 5, 8), f"+8x8 +{LAYERS}", THREE),  # 200, 185: the processor's time does not show
        ((200, 80, 5, 1), f"+8x8 +{LAYERS}", TWO),  # each attention pays beside a processor that is waited for
        ((100, 99, 5, 1), "-8x8", TWO),  # 100, 102: and yet the step does not
        ((500, 80, 5, 8), f"+8x8 +{LAYERS}", [0]),  # long enough without a look
    ],
)
def test_the_step_decides(flux_host, gpu, lines, times, text, ways):  # noqa: F811
    gpu.gpu_ms, gpu.cpu_ms, gpu.saves_ms, gpu.costs_ms = times
    merges = text.startswith("+")
    plain, _ = flux_host.generate()
    merged, _ = flux_host.generate([{**ON[0], "levels": "0"}])
    expected = merged if merges else plain
    assert (plain[0] != merged[0]).any() and not gpu.keys
    lines.clear()
    found, p = flux_host.generate(ON)
    assert (found[0] == expected[0]).all() and gpu.ways == ways and len(set(gpu.steps)) == 1
    assert p.extra_generation_params.get(LABEL) == (text if merges else None)
    said = "merging does not pay here: a step takes 100.0 ms without and 1"
    assert sum(said in line and "nothing is merged" in line for line in lines) == (not merges)
    assert any(said in comment for comment in p.comments) != merges
    gpu.forget(), gpu.ways.clear()
    assert (flux_host.generate(ON)[0][0] == expected[0]).all() and not gpu.ways
    gpu.clear(), gpu.keys.clear()
    assert (flux_host.generate([{**ON[0], "decisions": text}])[0][0] == expected[0]).all() and not gpu.keys
    assert _hooks(flux_host) == 0


def test_images_of_several_seeds_go_by_one_decision(flux_host, gpu):  # noqa: F811
    plain, _ = flux_host.generate(seeds=(1, 2), batch_size=2)
    found, _ = flux_host.generate(ON, seeds=(1, 2), batch_size=2)
    assert all((a == b).all() for a, b in zip(plain, found, strict=True)) and gpu.ways == THREE


@pytest.mark.parametrize("name", SMALL)
def test_what_is_run_is_the_first_row_of_the_call(call_of, gpu, name):  # noqa: F811
    """Of each model, as it is run without ToMe, and merged."""
    gpu.saves_ms, gpu.costs_ms, gpu.cpu_ms = 5, 1, 20
    plain, _ = call_of(name)
    expected, _ = call_of(name, {"levels": "0"})
    found, _ = call_of(name, {})
    assert (found == expected).all() and (found != plain).any()
    whole, merged = gpu.outs[:2]
    assert len(whole) == 1 and (whole - plain[:1]).abs().max() < 1e-5
    assert merged.shape == whole.shape and (merged - whole).abs().max() > 1e-3


def test_what_keeps_something_from_call_to_call_is_not_run(call_of, gpu, tome, monkeypatch):  # noqa: F811
    row = next(row for row in tome.forge.forge_dit.DIT_MODELS if row.name == "Flux")
    monkeypatch.setitem(vars(row), "elsewhere", lambda *_: 5)
    call_of("IntegratedFluxTransformer2DModel", {})
    assert not gpu.ways and not gpu.steps


def test_a_small_picture_of_each_row_is_not_run(call_of, gpu, backend):  # noqa: F811
    """Forge Neo hands PiD its small pictures by a global, one a row."""
    shared = backend.args.dynamic_args
    for rows, is_run in ((1, True), (2, False)):
        shared.lq_latent = [torch.zeros(rows, 16, 2, 3), torch.tensor([0.1])]
        call_of("IntegratedFluxTransformer2DModel", {})
        assert bool(gpu.ways) == is_run
        gpu.clear(), gpu.ways.clear()
    del shared.lq_latent


@pytest.mark.parametrize("package", ["einops", "adapter"])
def test_parts_of_the_models_own_packages_are_in_nobodys_way(flux_host, gpu, package):  # noqa: F811
    """Forge Neo's Anima has einops' layers."""

    class Part(nn.Identity):
        __module__ = f"{package}.layers.torch"

    model_of(flux_host).part = Part()
    flux_host.generate(ON)
    assert bool(gpu.ways) == (package == "einops")


@pytest.mark.parametrize("what", ["wrapper", "hook", "call", "large"])
def test_where_another_extension_is_in_the_way_nothing_is_run(flux_host, gpu, tome, monkeypatch, caplog, what):  # noqa: F811
    """The layers alone decide, as where steps wait."""
    base, seen = flux_host.shared.sd_model.original.unet.model, []
    if what == "wrapper":

        def wrapper(apply_model, args):  # it may call the model for tiles
            seen.append(1)
            return apply_model(args["input"], args["timestep"], **args["c"])

        flux_host.shared.sd_model.original.unet.model_options["model_function_wrapper"] = wrapper
    elif what == "hook":
        model_of(flux_host).register_forward_hook(lambda *_: seen.append(1))
    elif what == "call":
        own = base.apply_model
        monkeypatch.setattr(base, "apply_model", lambda *args, **c: seen.append(1) or own(*args, **c))
    else:  # a picture so large that merging always pays
        monkeypatch.setattr(tome.forge.forge_dit, "ALWAYS", 64)
    plain, _ = flux_host.generate()
    before, seen[:] = len(seen), []
    found, _ = flux_host.generate(ON)
    assert (found[0] == plain[0]).all() and not gpu.ways and len(seen) == before
    assert caplog.text.count("not measured (NotNow: another extension") == (what in ("hook", "call"))


def test_what_answers_the_attentions_is_a_part_of_the_name(flux_host, gpu, backend, monkeypatch):  # noqa: F811
    """So that a change of the attention measures anew."""
    flux_host.generate(ON)
    (key,) = set(gpu.steps)
    assert "backend.attention.attention_pytorch" in key and "up to 1024 tokens beside" in key

    def attention_sage(q, k, v, heads, *args, **kwargs):
        return backend.attention.attention_pytorch(q, k, v, heads, *args, **kwargs)

    monkeypatch.setattr(backend.flux, "attention_function", attention_sage)
    flux_host.generate(ON)
    assert len(set(gpu.steps)) == 2 and any("attention_sage" in one for one in gpu.steps)
