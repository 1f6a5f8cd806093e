"""Attention with a bias for each key on a GPU: against float64 and the same dtype by further channels."""

from __future__ import annotations

import pytest
import torch
from support.attention import drawn
from support.attention import weighed as truth

from shared_tome import ModelCall, ToMeConfig, kernels
from shared_tome.attention import bias as attention
from shared_tome.attention.sequence import JointCall

from .helpers import captured, launches

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA GPU on this machine"),
]
HALF = [torch.float16, torch.bfloat16]


def counts(rows, keys):
    return torch.randint(1, 40, (rows, keys), device="cuda", generator=torch.Generator("cuda").manual_seed(1)).log()


@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("d", [64, 128])
@pytest.mark.parametrize(
    ("rows", "heads", "queries", "keys"), [(1, 5, 4096, 1024), (2, 20, 1024, 512), (2, 3, 1003, 205), (1, 2, 17, 1)]
)
def test_three_ways(dtype, d, rows, heads, queries, keys):
    """In tiles that fit and that do not, few programs and many; no further from float64 than further channels are."""
    q, k, v = drawn(2, heads, queries, keys, d, dtype, "cuda")
    bias = counts(rows, keys)
    for scale in (d**-0.5, 0.3):
        got = kernels.attend(q, k, v, bias, scale)
        wider = kernels.attend(q, k, v, bias, scale, is_torchs=False)
        expected = truth(q, k, v, bias, scale)
        allowed = 2 * torch.finfo(dtype).eps * expected.abs().max()
        assert got.shape == q.shape and got.transpose(1, 2).is_contiguous() and got.dtype == dtype
        assert (got - expected).abs().max() < max(allowed, 1.5 * (wider - expected).abs().max())
        assert torch.equal(got, kernels.attend(q, k, v, bias, scale))


def test_a_layer_of_full_heads_is_six_launches():
    """One launch weighs the keys and attends: nothing is widened, nothing narrowed."""
    grid, x = (64, 64), torch.randn(2, 4096, 640, device="cuda").half()
    seed, step = torch.tensor(3, device="cuda"), torch.tensor(2, device="cuda")

    def layers():
        call = ModelCall(ToMeConfig(method="merge", ratio=0.5), grid, x.device, seed=seed, step=step)
        for _ in range(4):
            made = call.attention(x, x, x, grid)
            out = attention.attend_tokens(made.q, made.k, made.v, 10, made.bias, None, is_torchs=True)
            made.unmerge(out)

    assert launches(layers) <= 4 * 6 + 1


@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_one_graph_under_compile(dtype):
    """Another bias, seed or length of text needs no other graph of ours; the operator is one node of it."""
    q, k, v = drawn(2, 4, 512, 256, 64, dtype, "cuda")
    torch._dynamo.reset()
    compiled = torch.compile(lambda *given: attention.attend(*given), fullgraph=True)
    with torch.inference_mode():
        for rows in (1, 2):
            bias = counts(rows, 256)
            difference = compiled(q, k, v, bias) - truth(q, k, v, bias, 0.125)
            assert difference.abs().max() < 0.02
    torch._dynamo.reset()


def test_in_a_captured_graph():
    q, k, v = drawn(2, 4, 512, 256, 64, torch.float16, "cuda")
    bias = counts(1, 256)
    graph, out = captured(lambda: kernels.attend(q, k, v, bias, 0.125))
    bias.zero_()
    graph.replay()
    assert torch.equal(out, kernels.attend(q, k, v, bias, 0.125))


@pytest.mark.parametrize("kernel", ["flash", "efficient", "cudnn"])
def test_image_beside_text(kernel):
    """At once where torch's kernel would be slower, in combined parts else; both against float64."""
    call = ModelCall(ToMeConfig(ratio=0.75, min_tokens=0), (32, 32), torch.device("cuda"))
    q, k, v = drawn(2, 3, 77 + 1024, 77 + 1024, 128, torch.bfloat16, "cuda")
    plan = call.plan(k[:, 0, 77:], (32, 32))
    shared = JointCall(True, (kernel,), lambda *_: None)
    got = shared.attend(q, k, v, 77, plan)
    if got is None:
        pytest.skip(f"this GPU or torch has no {kernel} kernel")
    around = shared.around(plan, 77, 77 + 1024)
    index = around.index(plan, 77)
    expected = truth(q, k[:, :, index], v[:, :, index], around.bias, 128**-0.5).transpose(1, 2)
    assert (got - expected).abs().max() < 3 * torch.finfo(torch.bfloat16).eps * expected.abs().max()
