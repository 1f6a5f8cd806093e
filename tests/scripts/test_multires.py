"""`multires` through diffusers' Flux, SD3 and U-Nets."""

from __future__ import annotations

import pytest
import torch

import shared_tome
from shared_tome import kernels
from shared_tome.autotune.paying import Decision
from shared_tome.scripts import joint_autotune

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
    assert ran and "ToMe skips" not in caplog.text
    ran.clear()
    mask = torch.zeros(1, 1, TEXT + 60, TEXT + 60)
    mask[..., -1, -2] = -1.0  # between two of the image's tokens
    told = {"joint_attention_kwargs": {"attention_mask": mask}}
    merged = run("flux", model, **told)
    assert not ran and "ToMe skips an attention with a mask" in caplog.text
    assert caplog.text.count("sample takes its place") == 0
    shared_tome.remove_patch(model)
    assert torch.equal(merged, run("flux", model, **told))


@pytest.fixture
def timed(monkeypatch):
    """timed(pays): attentions of transformers are measured, with this outcome. What was run, and the names."""
    found = {"names": [], "rows": []}

    def give(pays):
        def compared(full, merged, device):
            found["rows"].append((full(), merged()))
            return Decision(100.0, 40.0 if pays else 99.0, 5.0)

        def known_or_measured(key, device, measure):
            found["names"].append(key)
            return measure()

        monkeypatch.setattr(joint_autotune, "measures", lambda config, grid, device: config.levels == "auto")
        monkeypatch.setattr(joint_autotune, "known_or_measured", known_or_measured)
        monkeypatch.setattr(joint_autotune, "compared", compared)
        return found

    return give


@pytest.mark.parametrize("method", ["multires", "sample"])
@pytest.mark.parametrize("name", ["flux", "sd3"])
def test_attentions_that_do_not_pay_are_left_alone(name, method, timed, caplog):
    """Of one row of their own tokens; named levels are merged whatever they cost. Each shape is asked about once."""
    model = MODELS[name][0]()
    before = run(name, model)
    shared_tome.apply_patch(model, config=config(method=method, levels="0", ratio=0.75, seed=3))
    merged = run(name, model)
    found = timed(pays=False)
    shared_tome.apply_patch(model, config=config(method=method, ratio=0.75, seed=3))
    assert torch.equal(run(name, model), before)
    assert "merging does not pay here: it saves 1 of 100 us" in caplog.text
    assert "nothing is merged: merging does not pay here" in caplog.text
    shapes = 1 if name == "flux" else 2  # SD3 has attentions to the image alone
    assert len(found["names"]) == len(set(found["names"])) == len(found["rows"]) == shapes
    assert all(type(model).__name__ in key and f"{method}, 0.7500" in key for key in found["names"])
    for full, less in found["rows"]:
        assert full.shape == less.shape and full.shape[0] == 1 and not torch.allclose(full, less, **SAME)
    timed(pays=True)
    shared_tome.apply_patch(model, config=config(method=method, ratio=0.75, seed=3))
    assert torch.equal(run(name, model), merged), "the draws that were timed are not the picture's"
    asked = len(found["names"])
    for unasked in ({"method": method, "levels": "0"}, {"method": "merge"}):
        shared_tome.apply_patch(model, config=config(**unasked))
        run(name, model)
    assert len(found["names"]) == asked


@pytest.mark.parametrize("own", [True, False])
def test_a_u_net(ran, own):
    unet = models.sd15()
    before = models.run(unet)
    shared_tome.apply_patch(
        unet, config=shared_tome.ToMeConfig(method="multires", ratio=0.004, min_tokens=0, own_token=own)
    )
    torch.testing.assert_close(models.run(unet), before, **SAME)
    assert ran and {start for _, start in ran} == {0}
