"""The picture of groups shows each group's mean colour and edges between groups, and nothing else."""

from __future__ import annotations

import pytest
import torch

from shared_tome.vit.picture import draw_groups


def picture(frames, height, width, seed=0):
    shape = (3, frames, height, width) if frames else (3, height, width)
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed))


def test_each_patch_has_its_groups_mean_colour():
    pixels = picture(0, 12, 20)
    sources = torch.tensor([7, 7, 3, 3, 9, 7, 3, 3, 3, 9, 7, 7, 9, 9, 9])  # 3 rows of 5 patches of 4x4 pixels
    found = draw_groups(pixels, sources, (3, 5), edge=0)
    groups = sources.reshape(3, 5).repeat_interleave(4, 0).repeat_interleave(4, 1)
    assert found.shape == pixels.shape
    for number in (3, 7, 9):
        inside = groups == number
        mean = pixels[:, inside].mean(dim=1)
        torch.testing.assert_close(found[:, inside], mean[:, None].expand(-1, int(inside.sum())))


@pytest.mark.parametrize("edge", [1, 2])
def test_edges_lie_between_groups_alone(edge):
    pixels = picture(0, 8, 16)
    sources = torch.tensor([0, 0, 1, 1, 0, 0, 1, 1])  # 2 rows of 4: the left half and the right half
    found, plain = draw_groups(pixels, sources, (2, 4), edge=edge), draw_groups(pixels, sources, (2, 4), edge=0)
    changed = (found != plain).any(dim=0)
    expected = torch.zeros(8, 16, dtype=torch.bool)
    expected[:, 8 - edge : 8 + edge] = True
    assert torch.equal(changed, expected)
    assert not torch.equal(found[:, 0, 7], found[:, 0, 8]), "each side has a colour of its own"
    one = draw_groups(pixels, torch.zeros(8, dtype=torch.int64), (2, 4), edge=edge)
    assert (one == one[:, :1, :1]).all(), "one group has no edge inside"


def test_a_group_over_frames_has_one_colour_and_frames_have_no_edge_between_them():
    pixels = picture(2, 8, 8)
    sources = torch.tensor([0, 1, 2, 3, 0, 1, 2, 4])  # 2 frames of 2x2 patches
    found = draw_groups(pixels, sources, (2, 2, 2))
    assert found.shape == (3, 2, 8, 8)
    torch.testing.assert_close(found[:, 0, 0, 0], pixels[:, :, :4, :4].mean(dim=(1, 2, 3)))
    assert torch.equal(found[:, 0, :3, :3], found[:, 1, :3, :3])
    torch.testing.assert_close(found[:, 1, 7, 7], pixels[:, 1, 4:, 4:].mean(dim=(1, 2)))
    same = draw_groups(pixels, torch.tensor([0] * 4 + [1] * 4), (2, 2, 2))
    assert (same[:, 0] == same[:, 0, :1, :1]).all()


@pytest.mark.parametrize(
    ("shape", "count", "grid", "words"),
    [
        ((3, 8, 8), 4, (2, 3), "no 2x3 patches"),
        ((3, 8, 8), 5, (2, 2), "each of 4 patches, got \\(5,\\)"),
        ((1, 8, 8), 4, (2, 2), "must be \\[3, H, W\\]"),
        ((3, 3, 8, 8), 8, (2, 2, 2), "got \\(3, 3, 8, 8\\)"),
    ],
)
def test_sizes_that_do_not_fit_are_told(shape, count, grid, words):
    with pytest.raises(ValueError, match=words):
        draw_groups(torch.zeros(shape), torch.zeros(count, dtype=torch.int64), grid)
