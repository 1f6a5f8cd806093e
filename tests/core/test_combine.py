"""Attention in parts, combined by log-sum-exp, is one softmax over all keys with their weights."""

from __future__ import annotations

import math

import pytest
import torch
from support.attention import attention_in_parts
from torch.nn.attention import SDPBackend, sdpa_kernel

from shared_tome.attention.bias import attend
from shared_tome.attention.combine import KERNELS, TORCHS, attend_in_parts, attend_with_lse, choose_kernel

CPU = torch.device("cpu")
SIZES = [
    [(24, 4.0), (7, 1.0)],
    [(5, 3.0), (2, 1.0)],
    [(1720, 4.0), (3, 3.0)],
    [(30, 3.0), (11, 4.0), (9, 1.0)],
    [(9, 2.0)],
]


def draw(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def made(sizes, *, batch=2, heads=3, queries=37, d=16, dtype=torch.float32):
    """q, parts, and the weights of all keys [1, M] as log(counts)."""
    count = sum(length for length, _ in sizes)
    q = draw(batch, heads, queries, d, dtype=dtype) * 2
    k, v = (draw(batch, heads, count, d, seed=seed, dtype=dtype) for seed in (1, 2))
    lengths = [length for length, _ in sizes]
    parts = [
        (*each, math.log(weight))
        for *each, (_, weight) in zip(k.split(lengths, 2), v.split(lengths, 2), sizes, strict=True)
    ]
    bias = torch.cat([torch.full((1, length), math.log(weight)) for length, weight in sizes], dim=1)
    return q, parts, bias


@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("scale", [None, 0.1, 0.6])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-12)])
def test_parts_are_one_softmax(sizes, scale, dtype, tolerance):
    q, parts, _ = made(sizes, dtype=dtype)
    out, expected = attend_in_parts(q, parts, "cpu", scale), attention_in_parts(q, parts, scale)
    assert out.shape == expected.shape and out.is_contiguous() and out.dtype == dtype
    assert (out - expected).abs().max() < tolerance
    if len(sizes) > 1:  # the counterpart: without their weights the parts are something else
        plain = attend_in_parts(q, [(k, v, 0.0) for k, v, _ in parts], "cpu", scale)
        assert (plain - expected).abs().max() > 1e-3


@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_rounds_each_part_once(sizes, dtype):
    q, parts, bias = made(sizes, queries=200, dtype=dtype)
    expected = attention_in_parts(q, parts)
    ours = attend_in_parts(q, parts, "cpu")
    k, v = (torch.cat([part[at] for part in parts], 2) for at in (0, 1))
    channels = attend(q, k, v, bias).transpose(1, 2)
    error, other = (float((out.double() - expected).norm() / expected.norm()) for out in (ours, channels))
    assert error < 1.5 * len(parts) * other
    assert (ours.double() - expected).abs().max() < len(parts) * torch.finfo(dtype).eps * expected.abs().max()


@pytest.mark.parametrize("weight", [1.0, 4.0, 64.0])
def test_the_share_of_a_few_keys_is_not_lost(weight):
    """Text that holds nearly all of the weight, and text that holds nearly none."""
    q, parts, _ = made([(24, weight), (7, 1.0)], d=8)
    for far in (-6.0, 6.0):
        text = parts[1][0] + far * q.mean((2,), keepdim=True)
        shifted = [parts[0], (text, *parts[1][1:])]
        assert (attend_in_parts(q, shifted, "cpu") - attention_in_parts(q, shifted)).abs().max() < 1e-5


def test_lse_is_the_logarithm_of_the_sum():
    q, k, v = draw(1, 2, 9, 32), draw(1, 2, 5, 32, seed=1), draw(1, 2, 5, 32, seed=2)
    out, lse = attend_with_lse(q, k, v, "cpu")
    logits = q @ k.transpose(-1, -2) / 32**0.5
    assert torch.allclose(lse, logits.logsumexp(-1), atol=1e-5)
    assert torch.allclose(out, logits.softmax(-1) @ v, atol=1e-5)


def test_any_memory_order_and_no_input_is_written_to():
    q, parts, _ = made(SIZES[0])
    expected = attend_in_parts(q, parts, "cpu")
    others = [q, *(x for part in parts for x in part[:2])]
    for order in (lambda x: x.transpose(1, 2).contiguous().transpose(1, 2), lambda x: torch.cat((x, x), -1)[..., :16]):
        given = [order(x) for x in others]
        before = [x.clone() for x in given]
        out = attend_in_parts(given[0], [(given[1], given[2], parts[0][2]), (given[3], given[4], 0.0)], "cpu")
        assert torch.allclose(out, expected, atol=1e-6) and out.is_contiguous()
        assert all(torch.equal(x, y) for x, y in zip(given, before, strict=True))


def test_the_kernel_that_is_chosen():
    assert choose_kernel(KERNELS, CPU, torch.float32, 16) == "cpu"
    with sdpa_kernel([SDPBackend.MATH]):
        assert choose_kernel(KERNELS, CPU, torch.float32, 16) is None
    assert choose_kernel(KERNELS, torch.device("meta"), torch.bfloat16, 128) is None


@pytest.fixture
def cuda(monkeypatch):
    """A GPU's answers: cuda(flash=..., efficient=..., cudnn=...) say which kernels are able."""
    real = torch.empty

    def answer(**able):
        for name in ("flash", "efficient", "cudnn"):
            monkeypatch.setattr(
                torch.backends.cuda, f"can_use_{name}_attention", lambda params, name=name: able.get(name, False)
            )
        monkeypatch.setattr(torch, "empty", lambda *shape, device, dtype: real(*shape, dtype=dtype))
        monkeypatch.setattr(torch.version, "hip", None)
        return lambda order, d=128: choose_kernel(order, torch.device("cuda"), torch.bfloat16, d)

    return answer


def test_the_hosts_order_decides_on_a_gpu(cuda):
    ask = cuda(flash=True, efficient=True, cudnn=True)
    assert ask(("flash", "cudnn")) == "flash" and ask(("cudnn", "flash")) == "cudnn" and ask(()) is None
    assert ask(("MATH", "flash")) is None  # the host would take what tells no log-sum-exp
    assert ask(KERNELS, d=68) is None
    assert cuda(cudnn=True)(("flash", "cudnn")) == "cudnn"
    assert cuda()(KERNELS) is None


def test_torchs_own_choice_decides_where_no_order_is_given(cuda, monkeypatch):
    """cuDNN first on an H100, whatever our own list says."""
    ask = cuda(flash=True, efficient=True, cudnn=True)
    for number, name in ((1, "flash"), (2, "efficient"), (3, "cudnn"), (0, None), (-1, None)):
        monkeypatch.setattr(torch, "_fused_sdp_choice", lambda *x, number=number: number)
        assert ask(TORCHS) == name and ask(("flash",)) == "flash"
    assert ask(TORCHS, d=68) is None


def test_an_old_torch_or_a_rocm_has_none(cuda, monkeypatch):
    ask = cuda(flash=True)
    monkeypatch.setattr(torch.version, "hip", "6.2")
    assert ask(KERNELS) is None
    monkeypatch.setattr(torch.version, "hip", None)
    assert ask(KERNELS) == "flash"
    monkeypatch.delattr(torch.backends.cuda, "can_use_cudnn_attention")
    assert ask(KERNELS) is None


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_one_graph_under_compile(backend):
    def attention(q, k, v, text_k, text_v):
        kernel = choose_kernel(KERNELS, q.device, q.dtype, q.shape[-1])
        return attend_in_parts(q, [(k, v, math.log(4)), (text_k, text_v, 0.0)], kernel)

    q, parts, _ = made(SIZES[0])
    given = (q, *parts[0][:2], *parts[1][:2])
    torch._dynamo.reset()
    with torch.inference_mode():
        out = torch.compile(attention, fullgraph=True, backend=backend)(*given)
    torch._dynamo.reset()
    assert torch.allclose(out, attention(*given), atol=1e-6)
