"""Keys with weights widen the heads: an attention function that does not mind `scale` must come to the same picture."""

from __future__ import annotations

import pytest
import torch

from . import host
from .host import sample
from .test_clip_vision import encoder, outputs

WEIGHTED = [
    {"method": "merge"},
    {"method": "merge_keys"},
    {"method": "sample", "ratio": 0.6},
]


@pytest.fixture
def torchs(comfy_nodes):
    """torch's attention, as nodes put it into the one slot there is; minds: whether it passes `scale` on (KJNodes'
    SageAttention, ComfyUI 0.20.1 and older do not)."""
    import comfy.ldm.modules.attention as host_attention

    def make(minds):
        def override(func, q, k, v, heads, mask=None, attn_precision=None, skip_reshape=False, **kwargs):
            named = {name: value for name, value in kwargs.items() if name == "scale" and minds}
            return host_attention.attention_pytorch.__wrapped__(q, k, v, heads, mask, **named)

        return override

    return make


def overridden(model, override):
    model = model.clone()
    model.model_options["transformer_options"]["optimized_attention_override"] = override
    return model


@pytest.mark.parametrize("options", WEIGHTED, ids=lambda options: options["method"])
def test_an_override_that_drops_scale(sd15, tome, torchs, options):
    made = {minds: sample(tome(overridden(sd15, torchs(minds)), **options), steps=1) for minds in (True, False)}
    assert torch.equal(made[True], made[False])
    plain = sample(tome(sd15, own_token=False, **options), steps=1)
    torch.testing.assert_close(made[False], plain, rtol=1e-3, atol=1e-2)
    assert not torch.allclose(plain, sample(tome(sd15, own_token=False, proportional=False, **options), steps=1), 1e-2)


def test_a_host_that_drops_scale(sd15, tome, monkeypatch):
    """ComfyUI 0.20.1's functions have no such argument."""
    import comfy.ldm.modules.attention as host_attention

    minding = host_attention.attention_pytorch.__wrapped__
    plain = sample(tome(sd15, method="merge"), steps=1)

    def attention_pytorch(q, k, v, heads, mask=None, attn_precision=None, skip_reshape=False, **kwargs):
        return minding(q, k, v, heads, mask)

    old = host_attention.wrap_attn(attention_pytorch)
    monkeypatch.setattr(host_attention, "optimized_attention", old)
    torch.testing.assert_close(sample(tome(sd15, method="merge"), steps=1), plain, rtol=1e-3, atol=1e-2)


def test_which_of_comfyuis_functions_mind_scale(comfy_nodes):
    import comfy.ldm.modules.attention as host_attention

    minds_scale = host.pack_module("unet").minds_scale
    names = ("basic", "sub_quad", "split", "pytorch")
    assert all(minds_scale(getattr(host_attention, f"attention_{name}")) for name in names)
    assert not minds_scale(host_attention.attention3_sage)
    assert not minds_scale(lambda q, k, v, heads, **kwargs: q)
    assert not minds_scale(torch.nn.functional.scaled_dot_product_attention)  # not Python


def test_a_scale_that_is_given_holds(comfy_nodes):
    """Another node's attention may call with a scale of its own."""
    unet = host.pack_module("unet")
    options = unet.ToMeConfig(ratio=0.5, method="merge_keys", min_tokens=0)
    call = unet.UNetCall(unet.ModelCall(options, (4, 4), torch.device("cpu")), {})
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, n, 16, generator=generator) for n in (16, 8, 8))
    bias = torch.arange(8.0)[None] / 4

    def attention(q, k, v, heads, mask=None, **kwargs):
        given = (x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in (q, k, v))
        return torch.nn.functional.scaled_dot_product_attention(*given, **kwargs).transpose(1, 2).flatten(2)

    call._bias = bias
    out = call.attention(attention, q, k, v, 2, scale=0.7)
    given = [x.double().unflatten(-1, (2, -1)).transpose(1, 2) for x in (q, k, v)]
    exact = torch.nn.functional.scaled_dot_product_attention(
        *given, attn_mask=bias.double()[:, None, None].expand(1, 2, 16, 8), scale=0.7
    )
    torch.testing.assert_close(out.double(), exact.transpose(1, 2).flatten(2), rtol=1e-5, atol=1e-5)


def test_an_encoder_whose_attention_drops_scale(comfy_nodes, monkeypatch):
    """CLIP vision, in which merged patches have weights."""
    import comfy.clip_model
    import comfy.ldm.modules.attention as host_attention

    clip = encoder()
    merged = host.run_node(comfy_nodes["ToMeCLIPVision"], clip_vision=clip, ratio=0.5)
    expected = outputs(merged)
    minding = host_attention.attention_pytorch.__wrapped__

    def attention_old(q, k, v, heads, mask=None, attn_precision=None, skip_reshape=False, **kwargs):
        return minding(q, k, v, heads, mask)

    called = []
    monkeypatch.setattr(
        comfy.clip_model, "optimized_attention_for_device", lambda *_, **__: called.append(1) or attention_old
    )
    for name, tensor in outputs(merged).items():
        assert (tensor - expected[name]).norm() / expected[name].norm() < 1e-4, name  # a softer softmax: 0.06 and more
    assert called
