"""`share match`: one match serves both halves of a call where they are the same images; tiles of one are not."""

from __future__ import annotations

import pytest
import torch

from .test_forge import _Loaded
from .test_hooks import _attach, _inputs, _run, _unet

MERGE = {"method": "merge", "ratio": 0.5, "min_tokens": 0, "proportional": False, "own_token": False}


def _ldm(tome, inputs, share):
    unet = _unet()
    attachment = _attach(tome, unet, **MERGE, share_match=share)
    out = _run(unet, inputs)
    attachment.detach()
    return out


def _forge(tome, inputs, share):
    loaded, config = _Loaded(), tome.core.ToMeConfig(**MERGE, share_match=share)
    tome.forge.patch(loaded, tome.sampling.Sampling(config, (1,), tome.notes.Notes()))
    with torch.no_grad():
        return loaded.model.diffusion_model(*inputs)


@pytest.mark.parametrize("made", [_ldm, _forge], ids=["a1111", "forge"])
@pytest.mark.parametrize("alike", [True, False])
def test_halves_are_compared(tome, made, alike):
    """Two rows of one image: its two prompts, or two tiles of it, as tiling extensions hand them over."""
    x, *rest = _inputs()
    inputs = (x[:1].repeat(2, 1, 1, 1) if alike else x, *rest)
    shared, own = (made(tome, inputs, share) for share in (True, False))
    assert torch.equal(shared, own) is not alike


def test_nothing_is_compared_where_nothing_is_shared(tome, monkeypatch):
    """Comparing waits for the device."""
    monkeypatch.setattr(tome.sampling, "same_halves", lambda x: 1 / 0)
    x, _, _ = _inputs()
    for options in ({"share_match": False}, {"share_match": True, "method": "sample"}):
        config = tome.core.ToMeConfig(**{**MERGE, **options})
        assert tome.sampling.Sampling(config, (1,), tome.notes.Notes()).call(x).alike
        assert not tome.sampling.Sampling(config, (1, 2), tome.notes.Notes()).call(x).alike
