"""The map as a function of image and owners, without a host."""

from __future__ import annotations

import pytest
import torch

from shared_tome import ToMeConfig, match_tokens
from shared_tome.inspect.drawing import coverage, draw_map, owners
from shared_tome.inspect.legend import draw_legend

GREY = torch.full((64, 64, 3), 0.5)


def own(*numbers):
    return torch.tensor(numbers)


def test_owners_of_a_plan():
    plan = match_tokens(torch.randn(3, 64, 8), (8, 8), ToMeConfig(method="merge", ratio=0.5))
    found = owners(plan)
    assert found.shape == (3, 64) and found.dtype == torch.int32
    for row in range(3):
        for token in range(64):
            assert found[row, token] == plan.index[row, plan.groups[row, token]]
    assert (found.gather(1, found.long()) == found).all(), "who stands for others stands for itself"


def test_nothing_merged_is_the_picture_itself():
    image = torch.rand(40, 56, 3)
    assert torch.equal(draw_map(image, torch.arange(16), (4, 4)), image)
    assert torch.equal(draw_map(image, torch.arange(16), (4, 4), show="kept tokens"), image)


def test_opacity_0_leaves_the_colours_out():
    drawn = draw_map(GREY, own(0, 0, 2, 3), (2, 2), opacity=0.0)
    assert (drawn[2, 2] == 0.5).all() and (drawn[2, 40] == 0.5).all()


def test_one_group_is_one_colour_however_far_apart():
    drawn = draw_map(GREY, own(0, 1, 2, 0), (2, 2))
    assert torch.equal(drawn[2, 2], drawn[34, 34]) and (drawn[2, 2] != 0.5).any()
    assert (drawn[2, 34] == 0.5).all(), "on its own"


def test_colours_depend_on_the_owner_and_not_on_the_others():
    """So maps of following steps can be compared."""
    a = draw_map(GREY, own(0, 0, 2, 2), (2, 2))
    b = draw_map(GREY, own(0, 0, 2, 3), (2, 2))
    assert torch.equal(a[2, 2], b[2, 2])


def test_neighbouring_groups_have_colours_that_can_be_told_apart():
    plan = match_tokens(torch.zeros(1, 1024, 1), (32, 32), ToMeConfig())
    drawn = draw_map(torch.full((256, 256, 3), 0.5), owners(plan)[0], (32, 32))
    owner, colour = owners(plan)[0].reshape(32, 32), drawn[1::8, 1::8]
    differ = owner[:, 1:] != owner[:, :-1]
    apart = (colour[:, 1:] - colour[:, :-1]).norm(dim=-1)
    assert differ.any() and apart[differ].min() > 0.05


@pytest.mark.parametrize("size", [512, 2048])
def test_borders_and_dots_grow_with_the_picture(size):
    drawn = draw_map(torch.full((size, size, 3), 0.5), torch.arange(4096) // 2 * 2, (64, 64))
    side = size // 64
    row = drawn[side // 2, : 4 * side]
    dots = int((row[: 2 * side] == 1.0).all(-1).sum())
    assert dots >= side // 4
    dark = int((row.amax(-1) < 0.3).sum())
    assert dark >= side // 8


def test_a_frame_of_a_video():
    owner = own(0, 0, 0, 0, 4, 5, 4, 5)  # two frames of 2x2
    first, second = (draw_map(GREY, owner, (2, 2, 2), frame=frame, show="kept tokens") for frame in (0, 1))
    assert [float(x[8, 8, 0]) == 0.5 for x in (first, second)] == [True, True]
    assert [float(x[8, 40, 0]) == 0.5 for x in (first, second)] == [False, True]


@pytest.mark.parametrize(
    ("latent", "grid", "spanned"),
    [((64, 64), (64, 64), (64, 64)), ((25, 33), (13, 17), (12.5, 16.5)), ((25, 33), (7, 9), (6.25, 8.25)),
     ((41, 41), (6, 6), (5.125, 5.125)), ((9, 16), (5, 8), (4.5, 8)), ((10, 10), (7, 7), (7, 7))],
)  # fmt: skip
def test_coverage(latent, grid, spanned):
    assert coverage(latent, grid) == spanned


def test_the_last_token_of_an_odd_grid_is_cut_off_at_the_edge():
    drawn = draw_map(torch.full((8, 24, 3), 0.5), own(0, 1, 1), (1, 3), covers=(1, 2.5), show="kept tokens", opacity=1)
    wide = (drawn[4, :, 0] < 0.4).nonzero().flatten()
    assert wide.tolist() == list(range(19, 24))  # of 9.6 pixels a token


@pytest.mark.parametrize("size", [256, 512, 2048])
def test_a_legend_lies_in_the_lower_edge_and_fits(size):
    image = torch.full((size, size, 3), 0.5)
    lines = (
        "merge_queries 0.75: 65536 to 16384 tokens (-75%)",
        "level 0 (256x256), layer 12 (output block 11), step 7",
    )
    drawn = draw_legend(image, lines, [("colours", "a group"), ("dot", "stands for its group"), ("plain", "alone")])
    changed = (drawn != image).any(-1).any(-1).nonzero().flatten()
    assert changed[-1] == size - 1 and changed[0] > size * 0.7
    band = drawn[changed[0] :]
    assert (band > 0.8).any() and (band[:, -max(2, size // 200) :] < 0.3).all(), "bright letters, none cut off"


def test_a_picture_too_small_for_letters_has_no_legend():
    image = torch.full((64, 64, 3), 0.5)
    assert torch.equal(draw_legend(image, ["level 0 (256x256), layer 12 (output block 11), step 7"]), image)


def test_a_legend_without_sizes_of_letters(monkeypatch):
    """Before Pillow 10.1 the default font has one size."""
    from PIL import ImageFont

    old = ImageFont.load_default_imagefont if hasattr(ImageFont, "load_default_imagefont") else ImageFont.load_default

    monkeypatch.setattr(ImageFont, "load_default", lambda: old())
    image = torch.full((1024, 1024, 3), 0.5)
    drawn = draw_legend(image, ["step 7"])
    bright = (drawn > 0.8).all(-1).nonzero()
    assert bright[:, 0].max() - bright[:, 0].min() > 15, "as large as with a font that has sizes"


def test_it_draws_the_same_again_and_touches_nothing():
    image, state = torch.rand(96, 64, 3), torch.random.get_rng_state()
    kept, owner = image.clone(), owners(match_tokens(torch.zeros(1, 96, 1), (12, 8), ToMeConfig()))[0]
    assert torch.equal(draw_map(image, owner, (12, 8)), draw_map(image, owner, (12, 8)))
    assert torch.equal(image, kept) and torch.equal(torch.random.get_rng_state(), state)


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"image": torch.zeros(64, 64)}, r"image must be \[H, W, 3\], got \[64, 64\]"),
        ({"owner": torch.arange(5)}, r"owner must be \[4\] for grid \(2, 2\), got \[5\]"),
        ({"show": "all"}, "show must be one of groups, kept tokens, got 'all'"),
        ({"opacity": 1.5}, "opacity must be a number in 0 to 1, got 1.5"),
        ({"frame": 1}, "frame must be in 0 to 0, got 1"),
    ],
)
def test_bad_input_is_named(wrong, said):
    values = {"image": GREY, "owner": torch.arange(4), "grid": (2, 2), **wrong}
    with pytest.raises(ValueError, match=said):
        draw_map(**values)
