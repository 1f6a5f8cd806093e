"""Attention with a bias for each key in Triton's interpreter, and the ways to it. Started by
test_interpreted_attend.py."""

from __future__ import annotations

import os
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from support.attention import drawn
from support.attention import weighed as truth

from shared_tome import ToMeConfig, kernels
from shared_tome.attention import bias as attention
from shared_tome.attention import sequence as joint
from shared_tome.attention.sdpa import AroundSdpa
from shared_tome.hooks import heads
from shared_tome.merging.call import ModelCall
from shared_tome.scripts import apply_patch

assert os.environ.get("TRITON_INTERPRET") == "1" and kernels.ready()
from shared_tome.kernels.impl.attend import launch_attend

from .interpreted import watch_launches

HALF = [torch.float16, torch.bfloat16]


@pytest.fixture(autouse=True)
def nothing_fell_back():
    yield
    assert not kernels.switch.load()._broken


@pytest.fixture
def launched(monkeypatch):
    names = []
    watch_launches(monkeypatch, names)
    return names


def near(got, expected, dtype):
    return (got.double() - expected).abs().max() < 2 * torch.finfo(dtype).eps * expected.abs().max()


@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize(
    ("rows", "queries", "keys", "d", "config"),
    [(1, 37, 21, 64, (32, 16, 4, 2)), (2, 16, 32, 128, (16, 16, 4, 2)), (4, 65, 1, 64, None), (2, 130, 100, 40, None)],
)
def test_weighs_each_key(dtype, rows, queries, keys, d, config):
    """Tiles that fit and tiles that do not; a bias for all rows, for every second row, for each."""
    q, k, v = drawn(4, 2, queries, keys, d, dtype)
    bias = torch.randint(1, 40, (rows, keys), generator=torch.Generator().manual_seed(1)).float().log()
    for scale in (d**-0.5, 0.3):
        got = launch_attend(q, k, v, bias, scale, config)
        assert got.shape == q.shape and got.dtype == dtype and got.transpose(1, 2).is_contiguous()
        assert near(got, truth(q, k, v, bias, scale), dtype)


def test_logits_of_any_size():
    """Far below and above what exp takes; the running maximum moves from block to block."""
    q, k, v = drawn(1, 1, 8, 64, 64, torch.float16)
    bias = torch.linspace(-3000.0, 3000.0, 64)[None]
    for turned in (bias, bias.flip(1)):
        got = launch_attend(q, k, v, turned, 0.125, (16, 16, 4, 2))
        assert near(got, truth(q, k, v, turned, 0.125), torch.float16)


def test_strides_of_any_kind():
    q, k, v = (torch.cat((x, x), -1)[..., :64] for x in drawn(2, 3, 20, 24, 64, torch.float16))
    for parts in ((q, k, v), [x.contiguous() for x in (q, k, v)], [x.mT.contiguous().mT for x in (q, k, v)]):
        assert near(
            launch_attend(*parts, torch.zeros(1, 24), 0.125), truth(q, k, v, torch.zeros(1, 24), 0.125), q.dtype
        )


def test_taken_where_further_channels_would_double_the_heads(launched, monkeypatch):
    for d, dtype, served in ((64, torch.float16, True), (128, torch.bfloat16, True), (40, torch.float16, False)):
        q, k, v = drawn(2, 2, 9, 7, d, dtype)
        bias = torch.rand(1, 7)
        launched.clear()
        attention.attend(q, k, v, bias)
        assert launched == (["_attend_kernel"] if served else ["_widen_kernel"])
    assert not kernels.can_attend(*drawn(1, 1, 4, 4, 64, torch.float32), torch.zeros(1, 4))
    q, k, v = drawn(1, 2, 4, 4, 64, torch.float16)
    assert not kernels.can_attend(q, k[:, :1], v[:, :1], torch.zeros(1, 4))  # grouped heads
    many = torch.zeros(1, 1, 1, 64, dtype=torch.float16).expand(40000, 2, 1, 64)
    assert not kernels.can_attend(many, many, many, torch.zeros(1, 1))  # more than a GPU's grid has room for
    monkeypatch.setattr(kernels.heads, "_FARTHEST", 4 * k.stride(2))  # offsets that 32 bits do not hold
    assert not kernels.can_attend(q, k, v, torch.zeros(1, 4))
    with pytest.raises(ValueError, match="a plan for 2 rows does not fit a batch of 3"):
        launch_attend(*drawn(3, 1, 4, 4, 64, torch.float16), torch.zeros(2, 4), 0.1)


def test_only_in_place_of_torchs_own(launched):
    """Heads and channels together: another attention gets the wider heads that it can take."""
    q, k, v = (x.transpose(1, 2).flatten(2) for x in drawn(2, 2, 9, 7, 64, torch.float16))
    bias = torch.rand(2, 7)

    def host(q, k, v, scale):
        q, k, v = (x.unflatten(-1, (2, -1)).transpose(1, 2) for x in (q, k, v))
        return F.scaled_dot_product_attention(q, k, v, scale=scale).transpose(1, 2).flatten(2)

    made = [attention.attend_tokens(q, k, v, 2, bias, host, is_torchs) for is_torchs in (True, False)]
    assert launched == ["_attend_kernel", "_widen_kernel"]
    torch.testing.assert_close(*made, rtol=0, atol=2e-3)


@pytest.mark.parametrize("options", [{}, {"scale": 0.2}, {"is_causal": True}, {"dropout_p": 0.5}])
def test_at_a_hosts_call(launched, options):
    q, k, v = drawn(2, 2, 9, 9, 64, torch.float16)
    bias = torch.rand(1, 9)
    with AroundSdpa(lambda host, q, k, v: host(q, k, v, bias=bias)):
        got = F.scaled_dot_product_attention(q, k, v, **options)
    plain = not {"is_causal", "dropout_p"} & set(options)
    assert launched == (["_attend_kernel"] if plain else ["_widen_kernel"])
    if plain:
        assert near(got, truth(q, k, v, bias, options.get("scale", 0.125)), torch.float16)


@pytest.mark.parametrize("kernel", ["flash", "cudnn"])
def test_image_beside_text_at_once(launched, monkeypatch, kernel):
    """As by wider heads; cuDNN's parts joined are faster and stay."""
    monkeypatch.setattr(joint, "choose_kernel", lambda *_: kernel)
    monkeypatch.setattr(joint, "attend_combined", lambda *_: None)
    call = ModelCall(ToMeConfig(ratio=0.75, min_tokens=0), (8, 8), torch.device("cpu"))
    q, k, v = drawn(2, 2, 70, 70, 64, torch.float16)
    plan = call.plan(k[:, 0, 6:], (8, 8))
    shared = joint.JointCall(True, (kernel,), lambda *_: None)
    launched.clear()
    got = shared.attend(q, k, v, 6, plan)
    assert (got is not None) == (kernel == "flash") == ("_attend_kernel" in launched)
    if got is not None:
        around = shared.around(plan, 6, 70)
        index = around.index(plan, 6)
        assert len(index) == 6 + 16 and set(around.bias[0].exp().round().tolist()) == {1.0, 4.0}
        assert near(got.transpose(1, 2), truth(q, k[:, :, index], v[:, :, index], around.bias, 0.125), torch.float16)


@pytest.mark.parametrize("processor", ["AttnProcessor2_0", "AttnProcessor"])
def test_in_a_diffusers_unet(launched, monkeypatch, processor):
    """Heads stay as they are where a layer meets at torch's attention; another processor's are widened."""
    from diffusers import UNet2DConditionModel
    from diffusers.models import attention_processor

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        sample_size=8, in_channels=4, out_channels=4, layers_per_block=1, norm_num_groups=8, block_out_channels=(128,),
        down_block_types=("CrossAttnDownBlock2D",), up_block_types=("CrossAttnUpBlock2D",), cross_attention_dim=16,
        attention_head_dim=2, mid_block_type=None,
    )  # fmt: skip
    unet = unet.half().eval()
    unet.set_attn_processor(getattr(attention_processor, processor)())
    x, text = torch.randn(1, 4, 8, 8).half(), torch.randn(1, 5, 16).half()
    pipe = SimpleNamespace(unet=unet, scheduler=None)
    apply_patch(pipe, config=ToMeConfig(method="merge", ratio=0.5, min_tokens=0, levels="0"))
    launched.clear()
    with torch.inference_mode():
        got = unet(x, 3, text).sample
        names = set(launched)
        monkeypatch.setattr(heads.kernels, "attends", lambda *_: False)
        expected = unet(x, 3, text).sample
    met = processor == "AttnProcessor2_0"
    assert ("_attend_kernel" in names) == met and ("_widen_kernel" in names) == (not met)
    torch.testing.assert_close(got, expected, rtol=0, atol=0.02)
