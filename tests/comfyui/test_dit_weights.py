"""One softmax over text and image: where the tokens of a cell are alike, the outcome is the unmerged one exactly."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from shared_tome import ToMeConfig, match_tokens

from .dit_host import attention_alone, kept

HEADS, D = 4, 16
AROUND = [(5, 3), (7, 0), (0, 4), (0, 0)]


@pytest.fixture(autouse=True)
def comfy(comfy_nodes):
    """All of these need ComfyUI's attention."""


def alike(grid, method, ratio, head, tail, *, heads=HEADS, batch=2, seed=0):
    """[batch, head + N + tail, heads * D], equal within each group of a plan for image tokens."""
    generator = torch.Generator().manual_seed(seed)
    count = math.prod(grid)
    x = torch.randn(batch, count, heads * D, generator=generator)
    if method in ("sample", "downsample"):
        config = ToMeConfig(method=method, ratio=ratio, min_tokens=0)
        groups = match_tokens(x, grid, config).groups[0]
    else:  # cells of 2x2 of each frame, whole ones: what is left over stands alone
        height, width = grid[-2:]
        y, z = torch.arange(count) // width % height, torch.arange(count) % width
        frame = torch.arange(count) // (height * width)
        whole = (y < height // 2 * 2) & (z < width // 2 * 2)
        cell = (frame * height + y // 2 * 2) * width + z // 2 * 2
        groups = torch.where(whole, cell, torch.arange(count))
    image = x[:, groups]
    rest = torch.randn(batch, head + tail, heads * D, generator=generator)
    return torch.cat((rest[:, :head], image, rest[:, head:]), dim=1)


def split(x, heads=HEADS):
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


def full(q, k, v, mask=None, kv_heads=HEADS, scale=None):
    k, v = (split(x, kv_heads).repeat_interleave(HEADS // kv_heads, dim=1) for x in (k, v))
    out = F.scaled_dot_product_attention(split(q).double(), k.double(), v.double(), attn_mask=mask, scale=scale)
    return out.transpose(1, 2).flatten(2)


def same(a, b, tolerance=2e-5):
    assert a.shape == b.shape
    error = float((a.double() - b.double()).abs().max())
    assert error < tolerance


@pytest.mark.parametrize("ratio", [0.75, 0.7, 0.5, 0.9])
@pytest.mark.parametrize("grid", [(8, 12), (7, 9), (3, 4, 6), (5, 3, 5), (1, 40)])
@pytest.mark.parametrize(("head", "tail"), AROUND)
def test_sampling(grid, ratio, head, tail):
    k, v = (alike(grid, "sample", ratio, head, tail, seed=seed) for seed in (0, 1))
    q = torch.randn(k.shape, generator=torch.Generator().manual_seed(2)) * 2
    for own in (False, True):
        run = attention_alone(grid, head, tail, method="sample", ratio=ratio, own_token=own)
        same(run(q, k, v, HEADS), full(q, k, v))
    plain = attention_alone(grid, head, tail, method="sample", ratio=ratio, proportional=False)(q, k, v, HEADS)
    count = math.prod(grid)
    if head + tail or count % kept(count, ratio):
        assert (plain - full(q, k, v)).abs().max() > 1e-2  # the counterpart: without its weights it is another


@pytest.mark.parametrize("method", ["merge", "merge_queries", "merge_keys", "downsample"])
@pytest.mark.parametrize("grid", [(8, 12), (7, 9), (3, 4, 6)])
@pytest.mark.parametrize(("head", "tail"), AROUND)
@pytest.mark.parametrize("layout", ["flat", "split"])
def test_other_methods(grid, method, head, tail, layout):
    q, k, v = (alike(grid, method, 0.5, head, tail, seed=seed) for seed in (0, 1, 2))
    # More than half of the tokens of the odd grid are in whole cells, three of four of which can go.
    run = attention_alone(grid, head, tail, method=method, ratio=0.5)
    if layout == "flat":
        same(run(q, k, v, HEADS), full(q, k, v))
    else:
        same(run(split(q), split(k), split(v), HEADS, skip_reshape=True), full(q, k, v))
        out = run(split(q), split(k), split(v), HEADS, skip_reshape=True, skip_output_reshape=True)
        same(out.transpose(1, 2).flatten(2), full(q, k, v))


@pytest.mark.parametrize("method", ["sample", "merge", "merge_keys", "downsample"])
@pytest.mark.parametrize("kv_heads", [HEADS, 2, 1])
@pytest.mark.parametrize("layout", ["flat", "split", "split out", "four"])
@pytest.mark.parametrize("own", [False, True])
def test_layouts_and_grouped_heads(method, kv_heads, layout, own):
    grid, head, tail = (8, 12), 5, 3
    k, v = (alike(grid, method, 0.75, head, tail, heads=kv_heads, seed=seed) for seed in (0, 1))
    q = alike(grid, method, 0.75, head, tail, seed=2)
    grouped = {"enable_gqa": True} if kv_heads < HEADS else {}
    run = attention_alone(grid, head, tail, method=method, ratio=0.75, own_token=own)
    expected = full(q, k, v, kv_heads=kv_heads)
    if layout == "flat":
        return same(run(q, k, v, HEADS, **grouped), expected)
    if layout == "four":  # SD3's values
        return same(run(q, k, v.unflatten(-1, (kv_heads, -1)), HEADS, **grouped), expected)
    out = run(
        split(q), split(k, kv_heads), split(v, kv_heads), HEADS, skip_reshape=True,
        skip_output_reshape=layout == "split out", **grouped,
    )  # fmt: skip
    same(out.transpose(1, 2).flatten(2) if layout == "split out" else out, expected)


def masks(length, head):
    generator = torch.Generator().manual_seed(5)
    keys = torch.zeros(2, 1, 1, length)
    keys[:, :, :, :head] = torch.randn(2, 1, 1, head, generator=generator)
    keys[:, :, :, -3:] = torch.randn(2, 1, 1, 3, generator=generator)
    keys[0, ..., 1] = -torch.inf
    queries = torch.zeros(1, 1, length, length)
    queries[:, :, : head + 9, :head] = torch.randn(1, 1, head + 9, head, generator=generator)
    return {
        "keys": keys,
        "keys of three dimensions": keys[:, 0],
        "bool": keys > -1.0,
        "queries": queries,
        "queries of two dimensions": queries[0, 0],
    }


@pytest.mark.parametrize("kind", masks(20, 5))
@pytest.mark.parametrize("method", ["sample", "merge_keys", "downsample"])
def test_masks(method, kind):
    grid, head, tail = (8, 12), 5, 3
    k, v = (alike(grid, method, 0.75, head, tail, seed=seed) for seed in (0, 1))
    q = torch.randn(k.shape, generator=torch.Generator().manual_seed(2))
    mask = masks(k.shape[1], head)[kind]
    wide = mask if mask.dim() == 4 else mask[:, None] if mask.dim() == 3 else mask
    wide = wide if wide.dtype == torch.bool else wide.double()
    run = attention_alone(grid, head, tail, method=method, ratio=0.75)
    same(run(q, k, v, HEADS, mask=mask), full(q, k, v, wide))


def test_masks_of_merged_queries():
    """Queries of one cell that a mask treats alike."""
    grid, head, tail = (8, 12), 5, 3
    q, k, v = (alike(grid, "merge", 0.75, head, tail, seed=seed) for seed in (0, 1, 2))
    mask = torch.zeros(1, 1, k.shape[1], k.shape[1])
    mask[:, :, head : head + 48, : head - 1] = -torch.inf  # the upper half: whole cells
    run = attention_alone(grid, head, tail, method="merge", ratio=0.75)
    same(run(q, k, v, HEADS, mask=mask), full(q, k, v, mask.double()))


@pytest.mark.parametrize("scale", [0.1, 0.5])
@pytest.mark.parametrize("other", [False, True])
def test_a_scale_of_the_models_own(scale, other):
    grid, head = (8, 12), 5
    k, v = (alike(grid, "sample", 0.75, head, 0, seed=seed) for seed in (0, 1))
    q = torch.randn(k.shape, generator=torch.Generator().manual_seed(2))
    run = attention_alone(grid, head, 0, blind if other else None, method="sample", ratio=0.75)
    same(run(q, k, v, HEADS, scale=scale), full(q, k, v, scale=scale))


def blind(func, q, k, v, heads, mask=None, skip_reshape=False, **kwargs):
    """An override as SageAttention's nodes are: a few head sizes, and no thought of `scale`."""
    assert (q.shape[-1] if skip_reshape else q.shape[-1] // heads) in (64, 96, 128)
    return func(q, k, v, heads, mask=mask, skip_reshape=skip_reshape, _inside_attn_wrapper=True)


@pytest.mark.parametrize("method", ["sample", "merge_keys"])
@pytest.mark.parametrize("layout", ["flat", "split"])
def test_through_another_override(method, layout):
    grid, head, tail = (8, 12), 5, 3
    k, v = (alike(grid, method, 0.75, head, tail, seed=seed) for seed in (0, 1))
    q = torch.randn(k.shape, generator=torch.Generator().manual_seed(2))
    run = attention_alone(grid, head, tail, blind, method=method, ratio=0.75)
    if layout == "flat":
        same(run(q, k, v, HEADS), full(q, k, v))
    else:
        same(run(split(q), split(k), split(v), HEADS, skip_reshape=True), full(q, k, v))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype):
    """No further from the truth than twice what the same precision does without ToMe."""
    grid, head = (8, 12), 5
    k, v = (alike(grid, "sample", 0.75, head, 0, seed=seed).to(dtype) for seed in (0, 1))
    q = torch.randn(k.shape, generator=torch.Generator().manual_seed(2)).to(dtype)
    truth = full(q, k, v)
    own = F.scaled_dot_product_attention(split(q), split(k), split(v)).transpose(1, 2).flatten(2)
    ours = attention_alone(grid, head, 0, method="sample", ratio=0.75)(q, k, v, HEADS)
    assert (ours.double() - truth).abs().max() <= 2 * (own.double() - truth).abs().max()
