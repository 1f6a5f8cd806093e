"""ACE-Step 1.5: its attentions tell no node of themselves, so they are met where they call torch, in one call alone."""

from __future__ import annotations

import logging
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode, _get_current_function_mode_stack

from . import dit_host
from .dit_host import APART, call, kept
from .host import forget_log, pack_module, run_node

ACE, METHODS = APART["ace"], ("sample", "merge", "merge_queries", "merge_keys", "downsample", "prune")


class Watch(TorchFunctionMode):
    """What reaches torch's own attention: (q, k, v, mask)."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is F.scaled_dot_product_attention:
            self.seen.append((*args[:3], (kwargs or {}).get("attn_mask")))
        return func(*args, **(kwargs or {}))

    def lengths(self):
        return [(q.shape[2], k.shape[2]) for q, k, *_ in self.seen]


@pytest.fixture(scope="module")
def ace(comfy_nodes):
    return dit_host.small("ace")


def hooks(model):
    modules = model.model.diffusion_model.modules()
    return sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in modules)


def test_keys_of_the_whole_attentions_go_and_all_else_stays(ace, tome):
    with Watch() as before:
        plain = call(ace, "ace")
    with Watch() as after:
        sampled = call(tome(ace, ratio=0.75), "ace")
    assert plain.shape == sampled.shape and sampled.isfinite().all()
    assert (sampled - plain).norm() / plain.norm() > 1e-4
    few = kept(ACE.image, 0.75)
    assert few == ACE.image // 4
    # Windows (masked), attentions to the prompt and those of the encoder are as they were.
    changed = [pair for pair in zip(before.lengths(), after.lengths(), strict=True) if pair[0] != pair[1]]
    assert changed == [((ACE.image, ACE.image), (ACE.image, few))] * 2
    windows = [one for one in after.seen if one[3] is not None and one[0].shape[2] == ACE.image]
    assert len(windows) == 2 and all(k.shape[2] == ACE.image for _, k, *_ in windows)
    # The first served layer's inputs differ in nothing yet: its keys are some of the whole ones, a value with each.
    place = [pair[0] != pair[1] for pair in zip(before.lengths(), after.lengths(), strict=True)].index(True)
    (q, k, v, _), (q2, k2, v2, _) = before.seen[place], after.seen[place]
    chosen = [(k[0, 0] == key).all(-1).nonzero().item() for key in k2[0, 0]]
    assert torch.equal(q, q2) and torch.equal(k2, k[:, :, chosen]) and torch.equal(v2, v[:, :, chosen])
    assert k.shape[1] == 2 and q.shape[1] == 4  # fewer heads of keys than of queries, and it stays so
    assert sorted(index // 4 for index in chosen) == list(range(few))  # one of each run of four


@pytest.mark.parametrize("method", METHODS)
def test_methods(ace, tome, method):
    plain = call(ace, "ace")
    with Watch() as seen:
        merged = call(tome(ace, method=method, ratio=0.5, stride_y=1), "ace")
    assert merged.shape == plain.shape and merged.isfinite().all() and not torch.equal(merged, plain)
    half = ACE.image // 2
    queries = half if method in ("merge", "merge_queries", "prune") else ACE.image
    keys = ACE.image if method == "merge_queries" else half
    assert seen.lengths().count((queries, keys)) == 2


@pytest.mark.parametrize("length", [131, 250])
@pytest.mark.parametrize("ratio", [0.7, 0.875])
def test_odd_lengths(ace, tome, length, ratio):
    told = {"refer_audio": torch.zeros(1, 8, length)}
    with Watch() as seen:
        out = call(tome(ace, ratio=ratio), "ace", latent=(1, 8, length), lyric_embed=torch.zeros(1, 5, 32), **told)
    tokens = -(-length // 2)
    assert out.shape == (1, 8, length) and out.isfinite().all()
    assert seen.lengths().count((tokens, kept(tokens, ratio))) == 2


def test_ratio_0_changes_nothing_and_nothing_stays_behind(ace, tome):
    plain, count = call(ace, "ace"), hooks(ace)
    for options in ({"ratio": 0.0}, {"min_tokens": 4096}):
        assert torch.equal(call(tome(ace, **options), "ace"), plain)
    merged = tome(ace)
    first = call(merged, "ace")
    assert torch.equal(call(merged, "ace"), first) and not torch.equal(first, plain)
    assert torch.equal(call(ace, "ace"), plain)
    assert hooks(ace) == count


class Stopped(BaseException):
    """As ComfyUI's InterruptProcessingException: no Exception."""


@pytest.mark.parametrize("error", [ValueError, Stopped])
def test_a_call_that_ends_early_leaves_nothing(ace, tome, monkeypatch, error):
    plain, count = call(ace, "ace"), hooks(ace)
    attention = pack_module("dit").DiTCall.attention

    def stops(self, *args, **kwargs):
        raise error

    monkeypatch.setattr(pack_module("dit").DiTCall, "attention", stops)
    with pytest.raises(error):
        call(tome(ace), "ace")
    monkeypatch.setattr(pack_module("dit").DiTCall, "attention", attention)
    assert hooks(ace) == count and not _get_current_function_mode_stack()
    assert torch.equal(call(ace, "ace"), plain)


def test_an_attention_that_is_not_pytorchs_is_left_alone(ace, tome, monkeypatch, caplog):
    """ComfyUI started with --use-split-cross-attention and its kind."""
    forget_log()
    module = sys.modules["comfy.ldm.ace.ace_step15"]

    def other(q, k, v, heads, mask=None, skip_reshape=True, enable_gqa=False, **kwargs):
        k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
        logits = q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5 + (0.0 if mask is None else mask)
        return (logits.softmax(-1) @ v).transpose(1, 2).flatten(2)

    monkeypatch.setattr(module, "optimized_attention", other)
    plain = call(ace, "ace")
    with caplog.at_level(logging.INFO, "ToMe"):
        assert torch.equal(call(tome(ace), "ace"), plain)
    assert "ToMe skips an attention that is not PyTorch's" in caplog.text


def test_own_tokens_are_left_out_where_heads_share_keys(ace, tome):
    """The kernels that could join them want as many heads of keys as of queries: the same tokens without."""
    assert torch.equal(call(tome(ace, own_token=True), "ace"), call(tome(ace, own_token=False), "ace"))


def test_the_report_names_the_model_and_its_layers(ace, tome, comfy_nodes):
    model, kept_record = comfy_nodes["ToMeRecord"].execute(model=tome(ace, ratio=0.75)).result
    call(model, "ace")
    out = comfy_nodes["ToMeReport"].execute(record=kept_record, after=None, measure_time=False)
    assert "96 to 24 tokens (-75%), 2 layers" in out.result[0] and "ACE-Step 1.5" in out.result[0]


def test_two_threads_do_not_mix(ace, tome):
    """Two clones of one model, which share its modules, sampled differently at once."""
    models = [tome(ace, ratio=0.75), tome(ace, ratio=0.5, seed=7), ace]
    alone = [call(model, "ace") for model in models]
    barrier = threading.Barrier(len(models))

    def run(model):
        barrier.wait()
        return [call(model, "ace") for _ in range(6)]

    with ThreadPoolExecutor(len(models)) as pool:
        found = list(pool.map(run, models))
    for expected, made in zip(alone, found, strict=True):
        assert all(torch.equal(one, expected) for one in made)


@pytest.mark.slow
def test_under_compile_it_is_the_same(ace, tome, comfy_nodes):
    """Whatever was compiled before; then it is gone."""
    torch._dynamo.reset()

    def compiled(model):
        return call(run_node(comfy_nodes["TorchCompileModel"], model=model, backend="eager"), "ace")

    plain = compiled(ace)
    for seed in (1, 2):
        merged, eager = compiled(tome(ace, seed=seed)), call(tome(ace, seed=seed), "ace")
        assert torch.allclose(merged, eager, atol=1e-5) and not torch.allclose(merged, plain, atol=1e-3)
    assert torch.equal(compiled(ace), plain)
    torch._dynamo.reset()
