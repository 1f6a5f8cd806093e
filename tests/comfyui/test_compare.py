"""ToMe Compare: its numbers are the metrics' own, and pictures that cannot be compared are refused."""

from __future__ import annotations

import math

import pytest
import torch


@pytest.fixture
def compare(comfy_nodes):
    """compare(image, other) -> (difference, text, PSNR, SSIM), through the node itself."""

    def run(image, other, **values):
        out = comfy_nodes["ToMeCompare"].execute(image=image, other=other, **values)
        assert out.ui.as_dict()["text"] == (out.result[1],)
        return out.result

    return run


def pictures(count: int, height: int = 24, width: int = 40) -> torch.Tensor:
    return torch.rand(count, height, width, 3, generator=torch.Generator().manual_seed(1)) * 0.5 + 0.2


def test_numbers_by_hand(compare):
    image = pictures(1)
    drawn, text, psnr, ssim = compare(image, image + 0.01, factor=10)
    assert psnr == pytest.approx(40.0, abs=1e-3) and 0.99 < ssim < 1
    assert torch.allclose(drawn, torch.full_like(image, 0.1), atol=1e-5)
    assert text.startswith("PSNR 40.00 dB, SSIM 0.99") and "difference 2.55 of 255 on average, 3 at most" in text


def test_ssim_is_that_of_scikit_image(compare):
    structural_similarity = pytest.importorskip("skimage.metrics").structural_similarity
    image = pictures(1)
    other = (image + 0.1 * torch.randn(image.shape, generator=torch.Generator().manual_seed(2))).clamp(0, 1)
    expected = structural_similarity(
        image[0].double().numpy(), other[0].double().numpy(), channel_axis=-1, data_range=1.0,
        gaussian_weights=True, sigma=1.5, use_sample_covariance=False,
    )  # fmt: skip
    assert compare(image, other)[3] == pytest.approx(expected, abs=1e-6)


def test_equal_pictures_are_the_same(compare):
    drawn, text, psnr, ssim = compare(pictures(1), pictures(1))
    assert (text, psnr, ssim, drawn.max().item()) == ("the same", 100.0, pytest.approx(1.0), 0.0)


def test_a_batch_is_compared_picture_by_picture(compare):
    image = pictures(3)
    other = image.clone()
    other[1] += 0.1
    drawn, text, psnr, _ = compare(image, other)
    assert psnr == pytest.approx((100 + 20 + 100) / 3, abs=1e-3)
    head, *lines = text.split("\n")
    assert head.startswith("3 pictures: PSNR 73.33 dB") and len(lines) == 3
    assert lines[0] == "0: the same" and lines[1].startswith("1: PSNR 20.00 dB")
    assert drawn.shape == image.shape and [one.max().item() > 0 for one in drawn] == [False, True, False]


def test_what_lies_out_of_the_range_is_clipped_as_a_saved_picture_is(compare):
    white = torch.ones(1, 16, 16, 3)
    assert compare(white, white * 2)[2] == 100.0
    drawn, _, psnr, _ = compare(white, white * 0, factor=64)
    assert psnr == pytest.approx(0.0) and drawn.max() == 1 and math.isfinite(psnr)


def test_a_picture_of_nan_is_black_as_it_is_saved(compare):
    """As a VAE in float16 makes it where it overflows."""
    image, broken = pictures(1), torch.full((1, 24, 40, 3), math.nan)
    shown, text, *numbers = compare(image, broken)
    black = compare(image, torch.zeros_like(image))
    assert text == black[1] and text.startswith("PSNR ") and numbers == list(black[2:])
    assert torch.equal(shown, black[0]) and compare(broken, broken)[1] == "the same"


@pytest.mark.parametrize(
    ("other", "words"),
    [
        (pictures(1, 32), "image is 1 of 40x24 with 3 channels, other is 1 of 40x32 with 3 channels"),
        (pictures(2), "other is 2 of 40x24"),
        (torch.rand(1, 24, 40, 4), "with 4 channels"),
    ],
)
def test_other_sizes_are_refused_with_both(compare, other, words):
    with pytest.raises(ValueError, match=words):
        compare(pictures(1), other)


def test_no_picture_is_refused(compare):
    with pytest.raises(ValueError, match="ToMe Compare needs at least one picture, got none"):
        compare(pictures(0), pictures(0))


def test_pictures_smaller_than_the_window_are_refused(compare):
    with pytest.raises(ValueError, match="at least 11 pixels a side, got 40x10"):
        compare(pictures(1, 10), pictures(1, 10))
