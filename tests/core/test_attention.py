"""Proportional attention by further channels of the head equals a bias of log(size) on the logits.

The error of low precision is bounded by that of the plain reference in the same precision, both against float64.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from shared_tome import attend, match_tokens
from shared_tome.attention.bias import attend_tokens
from shared_tome.core.channels import extend_heads

from .helpers import config, tokens

HEAD_SIZES = (4, 40, 64, 80, 160)
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def make(batch, heads, queries, keys, d, dtype=torch.float32, rows=None, seed=0):
    """q [B, H, N, d], k and v [B, H, M, d], whole sizes [b, M] from 1 to 64."""
    generator = torch.Generator().manual_seed(seed)
    q = torch.randn(batch, heads, queries, d, generator=generator)
    k, v = (torch.randn(batch, heads, keys, d, generator=generator) for _ in range(2))
    sizes = torch.randint(1, 65, (rows or batch, keys), generator=generator)
    return q.to(dtype), k.to(dtype), v.to(dtype), sizes


def reference(q, k, v, bias, dtype=torch.float64):
    """softmax(q k / sqrt(d) + bias) v, written out, computed in `dtype`."""
    q, k, v = (x.to(dtype) for x in (q, k, v))
    scores = q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5 + bias[:, None, None].to(dtype)  # (B, H, N, M)
    return scores.softmax(dim=-1) @ v


def as_tokens(x):
    return x.transpose(1, 2).flatten(2)  # (B, H, N, d) -> (B, N, H * d)


def host_attention(heads):
    """A host's own kernel on [B, N, H * d]."""

    def attention(q, k, v, scale):
        q, k, v = (x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in (q, k, v))  # (B, H, N, d)
        return as_tokens(F.scaled_dot_product_attention(q, k, v, scale=scale))

    return attention


def deaf_attention(heads):
    """A host's kernel that scales by the heads that it is given."""
    inner = host_attention(heads)
    return lambda q, k, v: inner(q, k, v, (q.shape[-1] // heads) ** -0.5)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("d", HEAD_SIZES)
def test_within_the_references_own_error(d, dtype):
    q, k, v, sizes = make(2, 3, 33, 47, d, dtype)
    bias = sizes.double().log()
    exact = reference(q, k, v, bias)
    bound = (F.scaled_dot_product_attention(q, k, v, bias[:, None, None].to(dtype)).double() - exact).abs()
    plain = F.scaled_dot_product_attention(q, k, v).double() - reference(q, k, v, torch.zeros_like(bias))
    bound, typical = max(bound.max(), plain.abs().max()), max(bound.mean(), plain.abs().mean())
    ours = attend(q, k, v, sizes.float().log())
    given = (*map(as_tokens, (q, k, v)), 3, sizes.float().log())
    brought = [attend_tokens(*given, host_attention(3)), attend_tokens(*given, deaf_attention(3), minds=False)]
    assert ours.shape == q.shape and all(out.dtype == dtype for out in (ours, *brought))
    for out in (ours, *(out.unflatten(-1, (3, -1)).transpose(1, 2) for out in brought)):
        error = (out.double() - exact).abs()
        assert error.max() <= 2 * bound and error.mean() <= 1.5 * typical
    assert (reference(q, k, v, torch.zeros_like(bias)) - exact).abs().max() > 8 * bound  # a lost bias would show


@pytest.mark.parametrize("d", HEAD_SIZES)
def test_a_key_of_size_s_is_as_s_keys(d):
    q, k, v, sizes = make(1, 2, 9, 11, d, torch.float64)
    repeated_k, repeated_v = (x.repeat_interleave(sizes[0], dim=2) for x in (k, v))
    expected = F.scaled_dot_product_attention(q, repeated_k, repeated_v)
    out = attend(q, k, v, sizes.float().log())
    torch.testing.assert_close(out, expected, rtol=1e-6, atol=1e-6)  # the bias itself is float32
    out = attend_tokens(as_tokens(q), as_tokens(k), as_tokens(v), 2, sizes.float().log(), host_attention(2))
    torch.testing.assert_close(out, as_tokens(expected), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("minds", [True, False])
@pytest.mark.parametrize("scale", [None, 0.3])
def test_whether_or_not_an_attention_minds_scale(scale, minds):
    q, k, v, sizes = make(2, 2, 9, 11, 20, torch.float64)
    bias = sizes.double().log()
    expected = F.scaled_dot_product_attention(q, k, v, attn_mask=bias[:, None, None], scale=scale)
    host = host_attention(2) if minds else deaf_attention(2)
    out = attend_tokens(*map(as_tokens, (q, k, v)), 2, bias.float(), host, scale=scale, minds=minds)
    torch.testing.assert_close(out, as_tokens(expected), rtol=1e-6, atol=1e-6)


@given(st.integers(1, 3), st.integers(1, 4), st.integers(1, 9), st.integers(1, 9), st.integers(1, 48), st.booleans())
def test_shapes(batch, heads, queries, keys, d, one_row):
    q, k, v, sizes = make(batch, heads, queries, keys, d, rows=1 if one_row else None)
    bias = sizes.float().log()
    expected = reference(q, k, v, bias.double()).float()
    torch.testing.assert_close(attend(q, k, v, bias), expected, rtol=1e-4, atol=1e-5)
    out = attend_tokens(as_tokens(q), as_tokens(k), as_tokens(v), heads, bias, host_attention(heads))
    torch.testing.assert_close(out, as_tokens(expected), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("d", range(1, 20))
def test_the_head_stays_a_multiple_of_8(d):
    """Fast kernels want it; the further channels add the bias to the logits and nothing to the values."""
    q, k, v, sizes = make(1, 1, 3, 5, d)
    bias = sizes.float().log()
    wide_q, wide_k, wide_v = extend_heads(q, k, v, bias[:, None])
    assert wide_q.shape[-1] == wide_k.shape[-1] == wide_v.shape[-1]
    assert wide_q.shape[-1] % 8 == 0 and 2 <= wide_q.shape[-1] - d <= 9
    assert torch.equal(wide_v[..., :d], v) and (wide_v[..., d:] == 0).all()
    logits = (wide_q @ wide_k.transpose(-1, -2)) * d**-0.5
    torch.testing.assert_close(logits, q @ k.transpose(-1, -2) * d**-0.5 + bias[:, None, None], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("d", HEAD_SIZES)
def test_the_bias_keeps_twice_the_precision(d, dtype):
    """One channel alone would round log(64) by up to 0.008 in bfloat16; a second one holds what the first lost."""
    q, k, v, _ = make(1, 1, 1, 64, d, dtype)
    bias = torch.arange(1, 65, dtype=torch.float32).log()
    wide_q, wide_k, _ = extend_heads(q, k, v, bias)
    added = (wide_q[..., d:].double() @ wide_k[..., d:].double().transpose(-1, -2)) * d**-0.5  # (1, 1, 1, 64)
    error = (added[0, 0, 0] - bias.double()).abs()
    assert (error <= bias.double() * torch.finfo(dtype).eps ** 2 + 1e-6).all()


def test_no_bias_is_plain_attention():
    q, k, v, _ = make(2, 2, 5, 7, 16)
    assert torch.equal(attend(q, k, v), F.scaled_dot_product_attention(q, k, v))


def test_sizes_of_one_change_nothing():
    q, k, v, _ = make(2, 2, 5, 7, 16)
    torch.testing.assert_close(attend(q, k, v, torch.zeros(1, 7)), attend(q, k, v), rtol=1e-5, atol=1e-6)


def test_gradients_are_the_references():
    q, k, v, sizes = make(1, 2, 4, 6, 8)
    bias = sizes.float().log()
    ours, theirs = ([x.clone().requires_grad_() for x in (q, k, v)] for _ in range(2))
    weight = torch.randn(1, 2, 4, 8, generator=torch.Generator().manual_seed(1))
    (attend(*ours, bias) * weight).sum().backward()
    (reference(*theirs, bias, torch.float32) * weight).sum().backward()
    for one, other in zip(ours, theirs, strict=True):
        assert one.grad.abs().max() > 0
        torch.testing.assert_close(one.grad, other.grad, rtol=1e-4, atol=1e-5)


def test_gradients_flow_through_merge_and_unmerge():
    x = tokens(2, (6, 6), 5).requires_grad_()
    for method in ("merge", "sample", "downsample", "prune"):
        plan = match_tokens(x, (6, 6), config(method=method))
        (grad,) = torch.autograd.grad(plan.unmerge(plan.merge(x)).sum(), x)
        if method == "merge":
            expected = torch.ones(2, 36)  # each of s members gets s times 1 / s
        else:
            shows = torch.ones_like(plan.sizes) if method == "prune" else plan.sizes
            expected = torch.zeros(2, 36).scatter(1, plan.index, shows)
        torch.testing.assert_close(grad, expected[..., None].expand_as(x))
