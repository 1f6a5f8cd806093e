"""Keys weighed where they meet the queries, as on a GPU whose kernel takes the heads as they are."""

from __future__ import annotations

import pytest
import torch
from torch.overrides import _get_current_function_mode_stack

import shared_tome
from shared_tome import ModelCall, ToMeConfig
from shared_tome.hooks import engine, parts
from shared_tome.hooks.heads import GIVEN, OWN, widen_query
from shared_tome.scripts import hooks as script_hooks

from . import models


@pytest.fixture
def met(monkeypatch):
    """As if a kernel of ours were there; nothing may be widened."""
    monkeypatch.setattr(engine, "is_met", lambda config, d, x, meets: meets())
    monkeypatch.setattr(parts, "widen_query", lambda *_: 1 / 0)


def expected_of(attn1, x, metric, grid, config):
    """What attn1 is to give for x; metric: the block's input, which the paper measures similarity on."""
    layer = ModelCall(config, grid, x.device).attention(x, x, x, grid, metric=metric)
    q, k, v = (
        (y.double() @ project.weight.double().T).unflatten(-1, (attn1.heads, -1)).transpose(1, 2)
        for y, project in ((layer.q, attn1.to_q), (layer.k, attn1.to_k), (layer.v, attn1.to_v))
    )
    assert float(layer.bias.max()) > 0
    logits = q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5 + layer.bias.double()[:, None, None]
    out = (logits.softmax(-1) @ v).transpose(1, 2).flatten(2)
    return layer.unmerge(out @ attn1.to_out[0].weight.double().T + attn1.to_out[0].bias.double())


@pytest.mark.parametrize("name", models.UNETS)
@pytest.mark.parametrize(
    "options", [{"method": "merge", "ratio": 0.5}, {"method": "merge_keys", "ratio": 0.5}, {"ratio": 0.6}]
)
def test_against_float64(met, name, options):
    unet, seen, size = models.UNETS[name](), {}, (15, 17)
    config = ToMeConfig(**{"min_tokens": 0, "own_token": False, **options})
    block = next(script_hooks.served_blocks(unet))
    block.register_forward_pre_hook(lambda m, args: seen.setdefault("metric", args[0].clone()))
    shared_tome.apply_patch(unet, config=config)
    block.attn1.register_forward_pre_hook(lambda m, args: seen.setdefault("x", args[0].clone()), prepend=True)
    block.attn1.register_forward_hook(lambda m, args, out: seen.setdefault("out", out.clone()))
    models.run(unet, *size)
    grid = size if name == "sd15" else tuple((n + 1) // 2 for n in size)
    expected = expected_of(block.attn1, seen["x"], seen["metric"], grid, config)
    assert (seen["out"].double() - expected).abs().max() < 2e-6
    assert not _get_current_function_mode_stack()


def test_as_wider_heads_do(met, monkeypatch):
    config = ToMeConfig(method="merge", ratio=0.5, min_tokens=0)
    unet = models.sd15()
    shared_tome.apply_patch(unet, config=config)
    here = models.run(unet)
    monkeypatch.undo()
    shared_tome.apply_patch(unet, config=config)
    torch.testing.assert_close(here, models.run(unet), rtol=1e-5, atol=1e-5)
    assert models.count_hooks(unet) > 0
    shared_tome.remove_patch(unet)
    assert models.count_hooks(unet) == 0


def test_a_processor_elsewhere_gets_wider_heads(met, monkeypatch):
    """One that does not meet at torch's attention."""
    from diffusers.models.attention_processor import AttnProcessor

    unet, rules = models.sd15(), set()
    unet.set_attn_processor(AttnProcessor())
    monkeypatch.setattr(parts, "widen_query", lambda out, n, rule: rules.add(rule) or widen_query(out, n, rule))
    shared_tome.apply_patch(unet, config=ToMeConfig(method="merge", ratio=0.5, min_tokens=0))
    models.run(unet)
    assert rules and rules <= {OWN, GIVEN}


def test_a_trial_of_a_layer_is_not_taken_for_the_layer(met, caplog):
    """Whether a processor makes its keys of the tokens is tried out before anything stands around torch's attention."""
    unet = models.sd15()
    config = ToMeConfig(method="merge_keys", ratio=0.5, min_tokens=0)
    shared_tome.apply_patch(unet, config=config)
    expected = models.run(unet)
    unet.set_attn_processor({n: models.Torchs() if "attn1" in n else p for n, p in unet.attn_processors.items()})
    torch.testing.assert_close(models.run(unet), expected, rtol=1e-5, atol=1e-5)
    assert not caplog.text
