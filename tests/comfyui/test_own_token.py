"""The option own_token in ComfyUI's U-Nets and transformers: each query attends to itself beside the drawn tokens."""

from __future__ import annotations

import logging

import pytest
import torch
from support.self_token_weights import attended

from . import dit_host
from .host import forget_log, least_unet, run_node, sample, tokens, watch


def reference(q, k, v, heads, plan):
    """[B, N, H * d] each -> the same, in float64 from the formula of weights."""
    q, k, v = (x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in (q, k, v))
    return attended(q, k, v, plan).transpose(1, 2).flatten(2)


@pytest.mark.parametrize("ratio", [0.75, 0.6])
def test_against_float64(sd15, tome, monkeypatch, ratio):
    from .host import pack_module

    unet = pack_module("unet")
    seen = []
    attention = unet.UNetCall.attention

    def spied(self, func, q, k, v, heads, *args, **kwargs):
        plan = self._drawn
        out = attention(self, func, q, k, v, heads, *args, **kwargs)
        if plan is not None:
            seen.append((out, reference(q, k, v, heads, plan)))
        return out

    monkeypatch.setattr(unet.UNetCall, "attention", spied)
    sample(tome(sd15, ratio=ratio, own_token=True, min_tokens=100), steps=2)
    assert len(seen) == 12
    for out, expected in seen:
        assert (out.double() - expected).norm() / expected.norm() < 1e-5


def test_keys_are_projected_whole_and_the_picture_is_nearer(sd15, tome):
    plain = sample(sd15, steps=3)
    with watch(sd15) as seen:
        kept = sample(tome(sd15), steps=3)  # by default
    assert set(tokens(seen, "attn1.to_k")["input_blocks.1.1"]) == {1024}
    drawn = sample(tome(sd15, own_token=False), steps=3)
    assert not torch.equal(kept, drawn)
    assert (kept - plain).norm() < (drawn - plain).norm()
    assert torch.equal(kept, sample(tome(sd15, own_token=True), steps=3))


def test_another_nodes_attention_gets_the_drawn_tokens(sd15, tome, caplog):
    forget_log()
    calls = []

    def override(func, q, k, v, heads, *args, **kwargs):
        calls.append(k.shape[1])
        return func(q, k, v, heads, *args, **kwargs)

    model = sd15.clone()
    model.model_options["transformer_options"]["optimized_attention_override"] = override
    with caplog.at_level(logging.INFO, "ToMe"):
        made = sample(tome(model, own_token=True, min_tokens=100), steps=1)
    assert 512 in calls and "own token has no effect" in caplog.text
    assert torch.equal(made, sample(tome(model, own_token=False, min_tokens=100), steps=1))


def test_where_no_kernel_tells_its_sums_that_is_said(sd15, tome, caplog):
    """As on AMD's GPUs, and with an older PyTorch."""
    forget_log()
    torch.backends.cuda.enable_flash_sdp(False)  # the CPU's too
    try:
        with caplog.at_level(logging.INFO, "ToMe"):
            made, drawn = (sample(tome(sd15, own_token=own), steps=1) for own in (True, False))
    finally:
        torch.backends.cuda.enable_flash_sdp(True)
    assert torch.equal(made, drawn)
    assert caplog.text.count("own token has no effect: this PyTorch gives no log-sum-exp of its attention here") == 1


def test_methods_that_have_no_drawn_tokens_take_no_notice(sd15, tome):
    for method in ("merge", "downsample"):
        made, without = (sample(tome(sd15, method=method, own_token=own), steps=1) for own in (True, False))
        assert torch.equal(made, without)


def test_without_proportional_attention_there_is_nothing_to_weigh_it_against(sd15, tome):
    options = {"proportional": False, "ratio": 0.75}
    made, without = (sample(tome(sd15, own_token=own, **options), steps=1) for own in (True, False))
    assert torch.equal(made, without)


def test_under_torch_compile(comfy_nodes, tome):
    torch._dynamo.reset()
    model = least_unet()
    compiled = run_node(comfy_nodes["TorchCompileModel"], model=tome(model, own_token=True), backend="eager")
    made = sample(compiled, steps=1)
    torch._dynamo.reset()
    eager, drawn = (sample(tome(model, own_token=own), steps=1) for own in (True, False))
    assert (made - eager).norm() / eager.norm() < 1e-4 < (eager - drawn).norm() / eager.norm()


@pytest.mark.parametrize("name", ["flux", "wan", "sd3"])
def test_transformers(tome, comfy_nodes, name):
    model = dit_host.small(name)
    plain = dit_host.sample(model, name, steps=2)
    kept, again, drawn = (
        dit_host.sample(tome(model, own_token=own, ratio=0.75), name, steps=2) for own in (True, True, False)
    )
    assert torch.equal(kept, again) and not torch.equal(kept, drawn)
    assert (kept - plain).norm() / plain.norm() < 0.5
