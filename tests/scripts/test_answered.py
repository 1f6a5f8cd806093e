"""Attentions that diffusers' own hooks answer in the model's place: its caches, and guidance that skips layers."""

from __future__ import annotations

import contextlib

import pytest
import torch

import shared_tome

from . import dits, models

hooks = pytest.importorskip("diffusers.hooks", reason="diffusers is not installed, see requirements/test.txt")
SKIPPED = "ToMe skips attentions that something else answers in the model's place"


def broadcast():
    return hooks.PyramidAttentionBroadcastConfig(
        spatial_attention_block_skip_range=2, spatial_attention_timestep_skip_range=(0, 1000),
        spatial_attention_block_identifiers=("transformer_blocks", "blocks"), current_timestep_callback=lambda: 500,
    )  # fmt: skip


def taylor():
    return hooks.TaylorSeerCacheConfig(cache_interval=2, disable_cache_before_step=1, max_order=1)


def config(method):
    return shared_tome.ToMeConfig(method=method, ratio=0.5, min_tokens=0)


@torch.no_grad()
def run(name, model, steps=4):
    """The outputs of a few calls, as a pipeline makes them."""
    context = model.cache_context("cond") if hasattr(model, "cache_context") else contextlib.nullcontext()
    with context:
        call = models.run_flux if name == "flux" else dits.DITS[name].run
        return [call(model) for _ in range(steps)]


def make(name):
    return models.flux() if name == "flux" else dits.DITS[name].model()


@pytest.mark.parametrize("tome_first", [True, False], ids=["tome first", "tome last"])
@pytest.mark.parametrize("method", ["sample", "merge"])
@pytest.mark.parametrize(
    ("name", "cache"), [("flux", broadcast), ("flux", taylor), ("Wan", broadcast), ("CogVideoX", broadcast)]
)
def test_a_cache_answers_with_what_merged_attentions_gave(name, cache, method, tome_first, caplog):
    """Each second call is answered by what the one before it gave."""
    model = make(name)
    if not tome_first:
        model.enable_cache(cache())
    shared_tome.apply_patch(model, config=config(method))
    if tome_first:
        model.enable_cache(cache())
    found = run(name, model)
    merged = run(name, shared_tome.apply_patch(make(name), config=config(method)))
    assert torch.equal(found[0], merged[0]) and all(x.isfinite().all() for x in found)
    if cache is broadcast:  # the calls are alike
        torch.testing.assert_close(found, merged, rtol=1e-5, atol=1e-6)
    assert caplog.text.count(SKIPPED) == 1
    model.disable_cache()
    assert torch.equal(run(name, model, 1)[0], merged[0])


@pytest.mark.parametrize("method", ["sample", "merge"])
def test_guidance_by_skipped_scores_sees_the_layers_own_values(method, caplog):
    """diffusers' PerturbedAttentionGuidance, on a transformer."""
    skip = hooks.LayerSkipConfig(indices=[0, 1], skip_attention=False, skip_attention_scores=True, skip_ff=False)
    plain = make("QwenImage")
    hooks.apply_layer_skip(plain, skip)
    model = shared_tome.apply_patch(make("QwenImage"), config=config(method))
    hooks.apply_layer_skip(model, skip)
    assert torch.equal(run("QwenImage", model, 1)[0], run("QwenImage", plain, 1)[0])
    assert caplog.text.count(SKIPPED) == 1


def test_another_attention_than_torchs_is_still_an_error():
    """Nothing answers in its place: merging would do nothing, in silence."""

    class Another:
        _attention_backend = _parallel_config = None

        def __call__(self, attn, hidden_states, *args, **kwargs):
            return hidden_states

    model = shared_tome.apply_patch(make("PixArt"), config=config("sample"))
    model.set_attn_processor(Another())
    with pytest.raises(RuntimeError, match="did not call torch's scaled_dot_product_attention"):
        run("PixArt", model, 1)


@pytest.mark.parametrize("tome_first", [True, False], ids=["tome first", "tome last"])
@pytest.mark.parametrize("method", ["sample", "merge", "merge_queries", "merge_keys", "downsample"])
@pytest.mark.parametrize("own", [True, False], ids=["own tokens", "none"])
def test_on_a_u_net_such_attentions_stay_whole(method, own, tome_first, caplog):
    """A cache has what another step's merged tokens gave; PAG wants as many values as queries."""
    hooked = "mid_block.attentions.0.transformer_blocks"
    skip = hooks.LayerSkipConfig(
        indices=[0], fqn=hooked, skip_attention=False, skip_attention_scores=True, skip_ff=False
    )
    unet, options = models.sd15(), config(method).replace(own_token=own)
    if not tome_first:
        hooks.apply_layer_skip(unet, skip)
    shared_tome.apply_patch(unet, config=options)
    if tome_first:
        hooks.apply_layer_skip(unet, skip)
    seen = []
    attn1 = unet.get_submodule(hooked)[0].attn1
    attn1.register_forward_hook(lambda m, args, kwargs, out: seen.append((args, kwargs, out)), with_kwargs=True)
    models.run(unet)
    (x,), kwargs, out = seen[0]
    assert kwargs.get("encoder_hidden_states") is None
    torch.testing.assert_close(out, attn1.to_out[0](attn1.to_v(x)), rtol=1e-5, atol=1e-6)
    assert caplog.text.count("ToMe skips a self-attention that another node or extension replaces") == 1


@pytest.mark.parametrize("method", ["sample", "merge"])
def test_layers_behind_skipped_ones_keep_their_choices(method, monkeypatch):
    """Stable Diffusion 3's skip_guidance_layers: a call of its own without some blocks, whose difference is scaled up.
    The first of the two blocks has two attentions."""
    plan, seen = shared_tome.ModelCall.plan, []

    def watched(call, metric, grid):
        number = call._layers.get(grid, 0)
        seen.append(number)
        return plan(call, metric, grid)

    monkeypatch.setattr(shared_tome.ModelCall, "plan", watched)
    model = shared_tome.apply_patch(models.sd3(), config=config(method))
    models.run_sd3(model)
    models.run_sd3(model, skip_layers=[0])
    models.run_sd3(model, skip_layers=[1])
    assert seen == [0, 1, 2] + [2] + [0, 1]
