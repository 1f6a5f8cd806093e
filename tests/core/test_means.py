"""Means of tokens near the end of their dtype, and in float64: neither infinite nor less exact than the dtype."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from shared_tome import match_tokens
from shared_tome.core import matching
from shared_tome.core.groups import group_sum
from shared_tome.merging.plan import MergePlan

from .helpers import config, tokens

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def plan_of(groups: list[int]) -> MergePlan:
    groups = torch.tensor([groups])
    index = torch.stack([(groups[0] == group).nonzero()[0, 0] for group in range(int(groups.max()) + 1)])[None]
    return MergePlan(2, index, groups, mean=True)


@pytest.mark.parametrize("dtype", DTYPES[:3])
@pytest.mark.parametrize("count", [2, 3, 5, 64, 4096])
def test_constants_at_the_dtypes_end_stay(dtype, count):
    x = torch.full((2, count, 3), torch.finfo(dtype).max, dtype=dtype)
    x[..., 1] *= -1
    plan = plan_of([0] * count)
    weights = torch.arange(count)[None].expand(2, -1) % 5 + 1.0
    for merged in (plan.merge(x), plan.merge_again(x, weights)[0]):
        assert merged.dtype == dtype and torch.equal(merged, x[:, :1])


@pytest.mark.parametrize("dtype", DTYPES[:3])
def test_what_is_infinite_is_not_hidden(dtype):
    x = torch.full((2, 4, 3), torch.finfo(dtype).max, dtype=dtype)
    x[:, 1] = torch.inf
    assert plan_of([0, 0, 1, 1]).merge(x)[:, 0].isinf().all()


def test_means_of_float64_are_as_exact_as_float64():
    x, plan = tokens(2, (4, 8), 6, dtype=torch.float64) / 3.0, plan_of([0, 1, 1, 2] * 8)
    sizes = torch.arange(32)[None].expand(2, -1) % 7 + 1.0
    for merged, weights in (
        (plan.merge(x), torch.ones(2, 32)),
        (plan.merge_again(x, sizes)[0], sizes),
    ):
        weights = weights.double()
        for group in range(3):
            inside = plan.groups[0] == group
            weight = weights[:, inside, None]
            expected = (x[:, inside] * weight).sum(1) / weight.sum(1)
            torch.testing.assert_close(merged[:, group], expected, rtol=1e-14, atol=1e-15)


def test_tokens_merged_again_at_the_dtypes_end():
    """Vision transformers merge means, weighed by their sizes."""
    for dtype in DTYPES[:3]:
        x = torch.full((2, 8, 3), torch.finfo(dtype).max, dtype=dtype)
        merged, total = plan_of([0, 0, 0, 1, 1, 2, 2, 2]).merge_again(x, torch.full((2, 8), 100.0))
        assert torch.equal(merged, x[:, :3]) and total[0].tolist() == [300.0, 200.0, 300.0]


@pytest.mark.parametrize("dtype", DTYPES)
def test_sizes_are_added_exactly(dtype):
    plan = plan_of([0] * 9 + [1])
    merged = plan.merge_again(tokens(2, (2, 5), 3), torch.full((2, 10), 2.0, dtype=dtype))[1]
    assert merged.tolist() == [[18.0, 2.0]] * 2
    assert merged.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)


def test_half_precision_is_added_in_float32():
    """Where it cannot overflow: a wider sum would be slower."""
    assert group_sum(tokens(2, (1, 10), 3, dtype=torch.float16), torch.zeros(1, 10).long(), 1).dtype == torch.float32


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("share", [2.0**-2, 1.0, 2.0**-20])
def test_similarity_asks_for_no_square_that_is_none(dtype, share):
    """A cosine does not hang on how long tokens are, near the dtype's end and near its smallest numbers."""
    end = torch.finfo(dtype)
    x = tokens(2, (6, 8), 16, dtype=torch.float64)
    x = x / x.abs().amax()
    src, dst = (part.repeat(1, 1) for part in (torch.arange(24)[None], torch.arange(24, 48)[None]))
    expected = matching.nearest(x, src, dst)
    small = end.tiny if dtype != torch.float16 else 2.0**-10  # of half precision there is little below 1
    for scale in (end.max * share, small / share):
        similarity, target = matching.nearest((x * scale).to(dtype), src, dst)
        torch.testing.assert_close(similarity.double(), expected[0], rtol=0.0, atol=0.02)
        assert (target == expected[1]).double().mean() > 0.9


KERNELS_END = 1.8e19  # docs/kernels.md: beyond it a token's squares are no float32


@pytest.mark.parametrize("length", [KERNELS_END * 1.1, 1e25, 1e38, 1e-19, 1e-20, 1e-21, 1e-22, 1e-23, 1e-30, 1e-37])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_similarity_of_tokens_whose_squares_are_no_float32(dtype, length):
    x = tokens(2, (6, 8), 16, dtype=torch.float64)
    x = x / x.norm(dim=-1, keepdim=True)
    lost = (x * length).float().square().sum(-1)
    assert (lost.isinf() | (lost < 1e-37)).all()
    src, dst = torch.arange(24)[None], torch.arange(24, 48)[None]
    expected = matching.nearest(x, src, dst)
    similarity, target = matching.nearest((x * length).to(dtype), src, dst)
    torch.testing.assert_close(similarity.double(), expected[0], rtol=0.0, atol=2 * torch.finfo(dtype).eps)
    assert (target == expected[1]).double().mean() > 0.9


def test_the_kernels_page_names_their_end():
    page = (Path(__file__).parents[2] / "docs" / "kernels.md").read_text(encoding="utf-8")
    assert f"above {KERNELS_END:.1e}".replace("e+", "e") in " ".join(page.split())
    assert torch.tensor(KERNELS_END).square().isfinite() and torch.tensor(KERNELS_END * 1.1).square().isinf()


@pytest.mark.parametrize("dtype", DTYPES)
def test_ordinary_similarities_are_those_of_plain_norms(dtype):
    """Bit for bit: a seed keeps its picture."""
    x = tokens(2, (6, 8), 16, dtype=torch.float32)
    x[:, 3] = 0.0
    x = x.to(dtype)
    plain = x / x.norm(dim=-1, keepdim=True).clamp_min(torch.finfo(dtype).tiny)
    assert torch.equal(matching._unit(x), plain)


def test_a_match_near_the_end_is_one_of_the_same_tokens():
    x = tokens(2, (8, 8), 16)
    far, near = (match_tokens(x * scale, (8, 8), config()) for scale in (2.0**100, 1.0))
    assert torch.equal(far.groups, near.groups)
