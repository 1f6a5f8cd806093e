"""Attention in parts on each of a GPU's kernels that tell their log-sum-exps, against float64."""

from __future__ import annotations

import math

import pytest
import torch
from support.attention import attention_in_parts

from shared_tome.attention.combine import KERNELS, attend_in_parts, attend_with_lse, choose_kernel

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA GPU on this machine"),
]
CUDA = torch.device("cuda")
LAYOUTS = {
    "heads first": lambda x: x,
    "tokens first": lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),
    "of one projection": lambda x: (
        torch.cat((x, x, x), -1).transpose(1, 2).contiguous().transpose(1, 2)[..., : x.shape[-1]]
    ),
}


@pytest.fixture(params=KERNELS)
def kernel(request):
    if choose_kernel((request.param,), CUDA, torch.bfloat16, 128) is None:
        pytest.skip(f"this GPU or torch has no {request.param} kernel")
    return request.param


def made(dtype, d, layout, queries=1003, sizes=((205, 4.0), (37, 3.0), (13, 1.0))):
    generator = torch.Generator("cuda").manual_seed(0)

    def draw(length):
        x = torch.randn(2, 3, length, d, generator=generator, device="cuda", dtype=torch.float32)
        return LAYOUTS[layout](x.to(dtype))

    return draw(queries), [(draw(length), draw(length), math.log(weight)) for length, weight in sizes]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("d", "scale"), [(64, None), (128, None), (128, 0.2)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("count", [2, 3])
def test_parts_are_one_softmax(kernel, dtype, d, scale, layout, count):
    q, parts = made(dtype, d, layout)
    parts = parts[:count]
    out, expected = attend_in_parts(q, parts, kernel, scale), attention_in_parts(q, parts, scale)
    assert out.shape == expected.shape and out.is_contiguous() and out.dtype == dtype
    assert (out - expected).abs().max() < count * torch.finfo(dtype).eps * expected.abs().max()


def test_lse_is_natural(kernel):
    q, parts = made(torch.bfloat16, 128, "heads first")
    _, lse = attend_with_lse(q, *parts[0][:2], kernel)
    expected = (q.double() @ parts[0][0].double().transpose(-1, -2) * 128**-0.5).logsumexp(-1)
    assert lse.shape == expected.shape and (lse - expected).abs().max() < 0.02


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_one_graph_under_compile(dtype):
    def attention(q, k, v, text_k, text_v):
        chosen = choose_kernel(KERNELS, q.device, q.dtype, q.shape[-1])
        return attend_in_parts(q, [(k, v, math.log(4)), (text_k, text_v, 0.0)], chosen)

    q, parts = made(dtype, 128, "heads first")
    given = (q, *parts[0][:2], *parts[1][:2])
    torch._dynamo.reset()
    with torch.inference_mode():
        out = torch.compile(attention, fullgraph=True)(*given)
        expected = attention(*given)
    torch._dynamo.reset()
    assert (out - expected).abs().max() < 2 * torch.finfo(dtype).eps * expected.abs().max()


def test_a_kernel_that_is_switched_off_is_not_chosen():
    from torch.nn.attention import SDPBackend, sdpa_kernel

    with sdpa_kernel([SDPBackend.EFFICIENT_ATTENTION]):
        assert choose_kernel(("flash", "cudnn", "efficient"), CUDA, torch.bfloat16, 128) == "efficient"
    assert choose_kernel(("flash", "cudnn", "efficient"), CUDA, torch.bfloat16, 128) != "efficient"
    assert choose_kernel(("flash", "cudnn"), CUDA, torch.float32, 128) is None
