"""`share match` serves both halves of a call with one match, where they are the same images and nowhere else."""

from __future__ import annotations

import pytest
import torch

from . import host
from .host import conditioning, sample

SHARED = {"method": "merge", "share_match": True}


@pytest.fixture
def alike(comfy_nodes):
    module, config = host.pack_module("model_call"), host.pack_module("unet").ToMeConfig(**SHARED)
    return lambda x, chunks: module.halves_alike({"cond_or_uncond": chunks}, x, config)


def test_halves_that_are_the_same_images(alike):
    images = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    assert alike(torch.cat([images, images]), [0, 1]) and alike(torch.cat([images, images]), [1, 0])
    assert not alike(images, [0, 1])  # two tiles, each with its own image
    assert not alike(images.repeat_interleave(2, dim=0), [0, 1])  # each tile's two prompts in turn
    assert not alike(torch.cat([images, images]), [0])
    assert not alike(images[:1].repeat(3, 1, 1, 1), [0, 1])


def test_tiles_in_one_call_have_matches_of_their_own(sd15, tome):
    """Tiled sampling nodes hand the tiles of both prompts to one call: [tile 0, tile 0, tile 1, tile 1]."""

    def tiled(model, share):
        model = tome(model, method="merge", share_match=share)

        def wrapper(apply_model, args):
            x, t, c = args["input"], args["timestep"], dict(args["c"])
            tiles = [x[..., :16], x[..., 16:]]
            c["c_crossattn"] = c["c_crossattn"].repeat(2, 1, 1)
            out = apply_model(torch.cat(tiles), t.repeat(2), **c)
            return torch.cat(out.chunk(2), dim=-1)

        model.set_model_unet_function_wrapper(wrapper)
        return sample(model, steps=1, positive=conditioning(1), negative=conditioning(2))

    assert torch.equal(tiled(sd15, True), tiled(sd15, False))


def test_a_whole_picture_still_shares(sd15, tome):
    made = [sample(tome(sd15, method="merge", share_match=share), steps=1) for share in (True, False)]
    assert not torch.equal(*made)
