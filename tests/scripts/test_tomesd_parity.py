"""With use_rand off the outputs equal those of PyPI's tomesd 0.1.3, on whole models of diffusers and ldm."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

import shared_tome

from . import models

tomesd = pytest.importorskip("tomesd", reason="needs tomesd 0.1.3, see requirements")

OPTIONS = [
    {},
    {"ratio": 0.25, "max_downsample": 2},
    {"ratio": 0.6, "max_downsample": 4},
    {"ratio": 0.75, "max_downsample": 8, "sx": 2, "sy": 2},
    {"ratio": 0.9, "max_downsample": 2},  # both take as much as the cells allow
    {"ratio": 0.5, "max_downsample": 2, "sx": 4, "sy": 2},
    {"ratio": 0.5, "max_downsample": 2, "merge_crossattn": True},
    {"ratio": 0.5, "max_downsample": 2, "merge_mlp": True},
    {"ratio": 0.4, "max_downsample": 2, "merge_attn": False, "merge_crossattn": True},
    {"ratio": 0.4, "max_downsample": 2, "merge_attn": False, "merge_mlp": True},
    {"ratio": 0.5, "max_downsample": 4, "merge_crossattn": True, "merge_mlp": True},
]


def both(model, run, options):
    """(unmerged, tomesd's, ours)."""
    before = run()
    tomesd.apply_patch(model, use_rand=False, **options)
    theirs = run()
    tomesd.remove_patch(model)
    assert shared_tome.apply_patch(model, use_rand=False, **options) is model
    ours = run()
    assert shared_tome.remove_patch(model) is model
    assert torch.equal(run(), before)
    return before, theirs, ours


def check(before, theirs, ours, *, merged=True):
    moved = (theirs - before).abs().max()
    assert (moved > 1e-3) == merged, "the options must show in the output"
    # float32 rounding: the sums of a mean are taken in another order, and every layer after it carries that on.
    assert (ours - theirs).abs().max() < 1e-5 * theirs.abs().max().clamp_min(1)


def named(options):
    return ",".join(f"{name}={value}" for name, value in options.items()) or "defaults"


@pytest.mark.parametrize("options", OPTIONS, ids=named)
@pytest.mark.parametrize("name", models.UNETS)
def test_diffusers(name, options):
    unet = models.UNETS[name]()
    # SDXL has no attention at full resolution: tomesd's default merges nothing there.
    merged = not (name == "sdxl" and "max_downsample" not in options)
    check(*both(unet, lambda: models.run(unet), options), merged=merged)


def test_blocks_that_attend_to_the_prompt_alone():
    """diffusers' only_cross_attention (the x4 upscaler): their queries are merged, the prompt's keys are not."""
    unet = models.sd15(only_cross_attention=True)
    check(*both(unet, lambda: models.run(unet), {"ratio": 0.6, "max_downsample": 2}))


@pytest.mark.parametrize("options", OPTIONS[:2] + OPTIONS[-1:])
def test_pipeline(options):
    pipe = models.pipeline()
    check(*both(pipe, lambda: models.generate(pipe), options))


@pytest.mark.parametrize("options", OPTIONS)
def test_ldm(options):
    from a1111 import models as ldm

    loaded = ldm.small_model(mult=(1, 2, 2))
    x, t, context = models.noise(2, 4, 16, 24, seed=1), torch.tensor([500, 500]), models.noise(2, 7, 16, seed=2)

    def run():
        with torch.no_grad():
            return loaded.model.diffusion_model(x, t, context=context)

    if options.get("sx") == 4:
        options = {**options, "sx": 2}  # tomesd cannot clamp a cell to the deepest grid
    check(*both(loaded, run, options))


@pytest.mark.parametrize("depth", ["LatentDiffusion", "DiffusionWrapper", "UNetModel"])
def test_ldm_is_found_at_every_depth(depth):
    from a1111 import models as ldm

    loaded = ldm.small_model()
    unet = loaded.model.diffusion_model
    given = {"LatentDiffusion": loaded, "DiffusionWrapper": loaded.model, "UNetModel": unet}[depth]
    assert shared_tome.apply_patch(given) is given
    assert models.count_hooks(unet) > 0
    assert shared_tome.remove_patch(given) is given
    assert models.count_hooks(unet) == 0


def test_a_model_that_tomesd_has_patched_is_refused():
    unet = models.sd15()
    tomesd.apply_patch(unet)
    with pytest.raises(ValueError, match=r"tomesd\.remove_patch"):
        shared_tome.apply_patch(unet)
    tomesd.remove_patch(unet)
    shared_tome.apply_patch(unet)


@pytest.mark.parametrize("wrong", [SimpleNamespace(), torch.nn.Linear(2, 2), None])
def test_what_is_not_served_is_named(wrong):
    with pytest.raises(ValueError, match="UNet2DConditionModel.*LatentDiffusion"):
        shared_tome.apply_patch(wrong)
    assert shared_tome.remove_patch(wrong) is wrong
