"""`multires` through diffusers' Flux, SD3 and U-Nets."""

from __future__ import annotations

import pytest
import torch

import shared_tome
from shared_tome import kernels

from . import models
from .test_joint import MODELS, TEXT
from .test_joint_methods import config, run

SAME = {"rtol": 1e-3, "atol": 2e-4}


@pytest.fixture
def ran(monkeypatch):
    """(tokens of the row, where the image begins) of each attention at three resolutions."""
    seen, real = [], kernels.attend_multires

    def spy(q, k, v, tiles, *given):
        seen.append((q.shape[2], int(tiles.rows[: tiles.image * tiles.size].min())))
        return real(q, k, v, tiles, *given)

    monkeypatch.setattr(kernels, "attend_multires", spy)
    return seen


@pytest.mark.parametrize("name", ["flux", "sd3"])
def test_transformers(name, ran):
    model = MODELS[name][0]()
    before = run(name, model)
    shared_tome.apply_patch(model, config=config(method="multires", ratio=0.02))
    torch.testing.assert_close(run(name, model), before, **SAME)
    # Flux has its text first, SD3 its image; SD3 has one attention to the image alone.
    rows = {"flux": {(60 + TEXT, TEXT)}, "sd3": {(60 + TEXT, 0), (60, 0)}}[name]
    assert set(ran) == rows
    shared_tome.apply_patch(model, config=config(method="multires", ratio=0.75))
    assert not torch.allclose(run(name, model), before, **SAME)
    shared_tome.remove_patch(model)
    assert torch.equal(run(name, model), before)


def test_a_text_mask(ran, caplog):
    """What it hides does not matter, and at a ratio of nothing the picture is the unmerged one."""
    model, mask = models.flux(), torch.zeros(2, 1, 1, TEXT + 60)
    mask[:, :, :, 3:TEXT] = -torch.inf
    told = {"joint_attention_kwargs": {"attention_mask": mask}}
    before, without = run("flux", model, **told), run("flux", model)
    assert not torch.allclose(before, without, **SAME)
    shared_tome.apply_patch(model, config=config(method="multires", ratio=0.02))
    torch.testing.assert_close(run("flux", model, **told), before, **SAME)
    assert ran and "left alone" not in caplog.text
    ran.clear()
    mask = torch.zeros(1, 1, TEXT + 60, TEXT + 60)
    mask[..., -1, -2] = -1.0  # between two of the image's tokens
    told = {"joint_attention_kwargs": {"attention_mask": mask}}
    merged = run("flux", model, **told)
    assert not ran and "an attention with a mask is left alone" in caplog.text
    assert caplog.text.count("sample takes its place") == 0
    shared_tome.remove_patch(model)
    assert torch.equal(merged, run("flux", model, **told))


@pytest.mark.parametrize("own", [True, False])
def test_a_u_net(ran, own):
    unet = models.sd15()
    before = models.run(unet)
    shared_tome.apply_patch(
        unet, config=shared_tome.ToMeConfig(method="multires", ratio=0.004, min_tokens=0, own_token=own)
    )
    torch.testing.assert_close(models.run(unet), before, **SAME)
    assert ran and {start for _, start in ran} == {0}
