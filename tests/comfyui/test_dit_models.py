"""What single models have of their own: sounds, references, caches, and attentions that tell no node of themselves."""

from __future__ import annotations

import functools
import logging

import pytest
import torch

from . import dit_host, host
from .dit_host import APART, SMALL, call, kept, lengths, watch

ALL = {**SMALL, **APART}
SILENT = ("ernie", "pixart", "hydit")  # as ACE-Step, which has test_dit_ace.py
METHODS = ("sample", "merge", "merge_queries", "merge_keys", "downsample", "prune")


@pytest.fixture(scope="session")
def dit(comfy_nodes):
    return functools.lru_cache(dit_host.small)


def check_float64(layers, which):
    """softmax(q k' + log(how many each key stands for)) v' over the drawn keys, which are the image's own."""
    assert len(layers) >= which.layers
    for plan, attention, q, k, v, start, out in layers:
        q, k, v = (x.double() for x in attention.by_head())
        d, length = q.shape[-1], k.shape[2]
        k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
        assert plan.tokens == which.image and length in (which.image, which.image + which.others)
        places = torch.cat((torch.arange(start), plan.index[0] + start, torch.arange(start + plan.tokens, length)))
        weights = torch.ones(len(places), dtype=torch.float64)
        weights[start : start + plan.kept] = plan.sizes[0].double()
        assert weights.sum() == length
        logits = q @ k[:, :, places].transpose(-1, -2) * (attention.kwargs.get("scale") or d**-0.5) + weights.log()
        if attention.mask is not None:
            logits = logits + attention.mask[..., places]
        truth = (logits.softmax(-1) @ v[:, :, places]).transpose(1, 2)  # (B, L, H, d)
        truth = truth.transpose(1, 2) if attention.kwargs.get("skip_output_reshape") else truth.flatten(2)
        torch.testing.assert_close(out.double(), truth, atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize("ratio", [0.75, 0.6])
@pytest.mark.parametrize("name", ALL)
def test_a_layer_is_what_float64_says(dit, tome, merged_layers, name, ratio):
    which = ALL[name]
    call(tome(dit(name), ratio=ratio, own_token=False), name)
    assert len(merged_layers) == which.layers
    check_float64(merged_layers, which)


def hooks(model):
    modules = model.model.diffusion_model.modules()
    return sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in modules)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", SILENT)
def test_attentions_that_tell_no_node_are_met_where_they_call_torch(dit, tome, name, method):
    """Those of the image are merged, those to the prompt are not, and nothing stays behind."""
    model, which = dit(name), APART[name]
    with watch() as before:
        plain = call(model, name)
    count = hooks(model)
    with watch() as after:
        merged = call(tome(model, method=method, ratio=0.5), name)
    assert merged.shape == plain.shape and merged.isfinite().all() and not torch.equal(merged, plain)
    full, few = which.image + which.others, which.image // 2 + which.others
    queries = few if method in ("merge", "merge_queries", "prune") else full
    keys = full if method == "merge_queries" else few
    assert lengths(before).count((full, full)) == 2
    # Each first comes here whole, and is then met on its way to torch.
    assert lengths(after).count((queries, keys)) == 2 and len(after) == len(before) + 2
    crossed = [pair for pair in lengths(before) if pair != (full, full)]
    assert [pair for pair in lengths(after) if pair not in ((full, full), (queries, keys))] == crossed
    assert hooks(model) == count and torch.equal(call(model, name), plain)
    for options in ({"ratio": 0.0}, {"min_tokens": 4096}):
        assert torch.equal(call(tome(model, method=method, **options), name), plain)


@pytest.mark.parametrize("ratio", [0.7, 0.875])
@pytest.mark.parametrize(
    ("name", "latent", "image"),
    [
        ("ltx2", (1, 1, 16 * 7 * 3 * 5 + 8 * 20 * 16), 105),
        ("omnigen", (1, 16, 15, 25), 8 * 13),
        ("boogu", (1, 16, 15, 25), 8 * 13),
        ("krea", (1, 16, 15, 25), 8 * 13),
        ("ideogram", (1, 16, 9, 11), 99),
        ("mage", (1, 16, 9, 11), 99),
        ("lens", (1, 16, 9, 11), 99),
        ("joy", (1, 16, 1, 15, 25), 8 * 13),
        ("pixeldit", (1, 3, 30, 50), 8 * 13),
        ("mochi", (1, 12, 2, 10, 14), 2 * 5 * 7),
        ("cogvideo", (1, 16, 2, 10, 14), 2 * 5 * 7),
        ("cogvideo15", (1, 16, 3, 9, 13), 2 * 5 * 7),
        ("kandinsky", (1, 16, 2, 10, 14), 2 * 5 * 7),
        ("kandinsky", (1, 16, 16, 26), 8 * 13),  # the image model's latent
        ("minimax", (1, 1, 24 * 2 * 9 * 11 + 32 * 2 * 5), 2 * 5 * 6),
        ("cosmos1", (1, 16, 2, 10, 14), 2 * 5 * 7),
        ("hidream_o1", (1, 3, 7 * 32, 13 * 32), 7 * 13),
        ("ernie", (1, 16, 9, 11), 99),
        ("pixart", (1, 4, 36, 52), 9 * 13),
        ("hydit", (1, 4, 15, 25), 8 * 13),
        ("causal", (1, 16, 2, 9, 11), 2 * 5 * 6),
    ],
)
def test_odd_sizes(dit, tome, name, latent, image, ratio):
    shapes = {
        "ltx2": [(1, 16, 7, 3, 5), (1, 8, 20, 16)],
        "minimax": [(1, 24, 2, 9, 11), (1, 32, 2, 5)],
    }  # of the packed latents
    told = {"latent_shapes": shapes[name]} if name in shapes else {}
    with watch() as before:
        plain = call(dit(name), name, latent=latent, **told)
    with watch() as seen:
        out = call(tome(dit(name), ratio=ratio), name, latent=latent, **told)
    assert out.shape == plain.shape and out.isfinite().all() and not torch.equal(out, plain)
    which = ALL[name]
    whole = image + which.others
    # Boogu's two attentions of the image alone, and PixelDiT's one, are the rest of the layers.
    assert lengths(before).count((whole - which.elsewhere, whole)) >= which.layers // 2
    few = (whole - which.elsewhere, kept(image, ratio) + which.others)
    assert lengths(seen).count(few) == lengths(before).count((whole - which.elsewhere, whole))


@pytest.mark.parametrize(
    ("name", "told", "added", "start"),
    [
        ("omnigen", {"ref_latents": [torch.ones(2, 16, 10, 13), torch.ones(2, 16, 20, 20)]}, 5 * 7 + 100, 7 + 135),
        ("boogu", {"ref_latents": [torch.ones(2, 16, 10, 13), torch.ones(2, 16, 20, 20)]}, 5 * 7 + 100, 7 + 135),
        ("krea", {"ref_latents": [torch.ones(2, 16, 1, 10, 13)], "ref_latents_method": "index"}, 5 * 7, 7),
        ("krea", {"ref_latents": [torch.ones(2, 16, 8, 8)], "ref_latents_method": "index_timestep_zero"}, 16, 7),
        ("krea", {"ref_latents": [torch.ones(2, 16, 8, 8)]}, 0, 7),  # no method: not taken
        ("mage", {"ref_latents": [torch.ones(2, 16, 5, 7)]}, 35, 7),
        ("joy", {"ref_latents": [torch.ones(2, 16, 1, 10, 13), torch.ones(2, 16, 2, 8, 8)]}, 5 * 7 + 2 * 16, 0),
    ],
)
def test_references_stay(dit, tome, merged_layers, name, told, added, start):
    """Before the image or behind it, each of their keys is there, and nobody takes them for another node's."""
    which = SMALL[name]
    host.forget_log()
    said = host.pack_module("log")._said
    plain = call(dit(name), name, **told)
    out = call(tome(dit(name), ratio=0.75, own_token=False), name, **told)
    assert out.isfinite().all() and not torch.equal(out, plain)
    assert not any("left alone" in line or "ToMe skips" in line for line in said)
    joint = [layer for layer in merged_layers if layer[2].shape[-2 if layer[1].split else 1] > which.image + added]
    assert len(joint) == (3 if name == "boogu" else 2) - (name == "boogu")
    for plan, attention, _, _, _, begin, _ in joint:
        assert begin == start and plan.kept == kept(which.image, 0.75)
        assert attention.length == which.image + which.others + added
    alone = [layer for layer in merged_layers if not any(layer is one for one in joint)]
    assert [layer[5] for layer in alone] == ([added] if name == "boogu" else [])  # behind them


SOUND = 20  # tokens of LTX-2's small latent


def ltx2_latent(frames: int, sound: int = SOUND) -> dict:
    """call's keywords for two rows of so many frames of 4x6 tokens, and so many tokens of sound."""
    shapes = [(2, 16, frames, 4, 6), (2, 8, sound, 16)]
    return {"latent": (2, 1, 16 * frames * 24 + 8 * sound * 16), "latent_shapes": shapes}


def log(caplog) -> list[str]:
    return [record.message for record in caplog.records if record.name == "ToMe"]


def test_ltx2_keeps_its_sound_whole(dit, tome):
    """Its own attention, and those between sound and video, are as without ToMe; video alone works too."""
    told = {"ref_audio": {"tokens": torch.ones(1, 6, 128)}}
    for given, sound in ((ltx2_latent(3), SOUND), ({**ltx2_latent(3), **told}, SOUND + 6)):
        with watch() as before:
            call(dit("ltx2"), "ltx2", **given)
        with watch() as after:
            call(tome(dit("ltx2"), ratio=0.75), "ltx2", **given)
        layer = [(72, 72), (72, 7), (sound, sound), (sound, 7), (72, sound), (sound, 72)]
        assert lengths(before) == 2 * layer and lengths(after) == 2 * [(72, 18), *layer[1:]]
    with watch() as seen:
        call(tome(dit("ltx2"), ratio=0.75), "ltx2", latent=(2, 16, 3, 4, 6), latent_shapes=[(2, 16, 3, 4, 6)])
    assert lengths(seen) == 2 * [(72, 18), (72, 7)]


def test_ltx2_with_sound_as_long_as_its_video(dit, tome, caplog):
    """By the length alone one cannot be told from the other."""
    given = ltx2_latent(1, 24)
    host.forget_log()
    with caplog.at_level(logging.INFO, logger="ToMe"):
        assert torch.equal(call(tome(dit("ltx2")), "ltx2", **given), call(dit("ltx2"), "ltx2", **given))
    reason = "ToMe skips an image of as many tokens as its prompt: self- and cross-attention look alike"
    assert log(caplog)[0] == f"[ToMe] {reason} (LTX-2)"


@pytest.mark.parametrize("strength", [1.0, 0.7])
def test_ltx2_with_guides(dit, tome, strength):
    """As LTXV's: whole; of another strength they take an attention of their own, which sound is never taken for."""
    entry = {"pre_filter_count": 48, "strength": strength, "pixel_mask": None, "latent_shape": [2, 4, 6]}
    given = {**ltx2_latent(5, 48), "keyframe_idxs": torch.zeros(2, 3, 48, 2), "denoise_mask": torch.ones(2, 1, 5, 4, 6)}
    given["guide_attention_entries"] = [entry]
    with watch() as before:
        plain = call(dit("ltx2"), "ltx2", **given)
    with watch() as after:
        merged = call(tome(dit("ltx2"), ratio=0.75), "ltx2", **given)
    assert merged.isfinite().all() and not torch.equal(plain, merged)
    video = [(120, 120)] if strength == 1.0 else [(72, 120), (48, 120)]
    rest = [(120, 7), (48, 48), (48, 7), (120, 48), (48, 120)]
    assert lengths(before) == 2 * [*video, *rest]
    assert lengths(after) == 2 * [*((queries, 18 + 48) for queries, _ in video), *rest]


def test_hidream_o1_remembers_its_prompt(dit, tome, merged_layers):
    """From the second step on the model has the prompt's keys and values in a cache, which ToMe leaves whole."""
    model, told = dit("hidream_o1"), dit_host.hidream_o1_told(torch.zeros(1, 3, 256, 384))
    merged = tome(model, ratio=0.75)
    cold = call(merged, "hidream_o1", latent=(1, 3, 256, 384), **told)
    entries = model.model.diffusion_model._kv_cache_entries
    assert len(entries) == 1 and all(k.shape[2] == 6 for k, _ in entries[0]["kv"])
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, 3, 256, 384, generator=generator)
    with watch() as seen, torch.no_grad():
        warm = merged.model.apply_model(
            x, torch.full((1,), 0.7), transformer_options=dit_host.options_of(merged, 0.7), **told
        )
    assert lengths(seen) == 2 * [(97, 7 + 24)]
    torch.testing.assert_close(warm, cold, atol=1e-4, rtol=1e-4)
    assert len({tuple(layer[0].index[0].tolist()) for layer in merged_layers}) == 2  # a draw for each layer, each step


def test_hidream_o1_keeps_references_whole(dit, tome):
    """They go through the model's eyes, before the image, and cut into patches, behind it."""
    picture = torch.rand(1, 64, 96, 3, generator=torch.Generator().manual_seed(0))
    told = dit_host.hidream_o1_told(torch.zeros(1, 3, 256, 384), ref_images=[picture])
    told["latent"] = (1, 3, 256, 384)
    with watch() as before:
        call(dit("hidream_o1"), "hidream_o1", **told)
    with watch() as after:
        call(tome(dit("hidream_o1"), ratio=0.75), "hidream_o1", **told)
    behind, ahead = told["ref_patches"].shape[1], told["input_ids"].shape[1]
    assert behind > 0 and ahead > 7
    changed = [pair for pair in zip(lengths(before), lengths(after), strict=True) if pair[0] != pair[1]]
    whole = ahead + 96 + behind
    assert changed == 2 * [((whole - told["ar_len"], whole), (whole - told["ar_len"], whole - 96 + 24))]


def test_minimax_keeps_all_that_is_not_its_video(dit, tome, merged_layers):
    """Prompt, a first frame and sound stand before the video."""
    frame = {"resolved_frame_index": 0, "latent": torch.zeros(1, 24, 1, 8, 12)}
    payload = {"keyframes": [frame], "cond_video_latents": [frame["latent"]], "frame_count": 9}
    out = call(tome(dit("minimax"), ratio=0.75, own_token=False), "minimax", minimax_payload=payload)
    assert out.isfinite().all() and len(merged_layers) == 2
    for plan, _, _, k, _, start, _ in merged_layers:
        assert plan.tokens == 72 and k.shape[2] == start + 72 and start == 7 + 24 + 10


@pytest.mark.parametrize("method", METHODS)
def test_wan_causal_frame_by_frame(dit, tome, method, merged_layers):
    """The keys of all frames so far are merged; the cache, which the next frames look at, is not."""
    outs, caches = [], []
    for merged in (False, True):
        model = (tome(dit("causal"), method=method, ratio=0.75) if merged else dit("causal")).clone()
        network = model.model.diffusion_model
        caches.append(network.init_kv_caches(2, 72, "cpu", torch.float32))
        state = {"kv_caches": caches[-1], "crossattn_caches": network.init_crossattn_caches(2, "cpu", torch.float32)}
        for frame in range(3):
            model.model_options["transformer_options"]["ar_state"] = {**state, "start_frame": frame}
            outs.append(call(model, "causal", latent=(2, 16, 1, 8, 12), seed=frame))
        assert hooks(model) == 0
    # The first block of the first frame gets the same tokens; a block's own keys go to the cache as they are.
    assert torch.equal(caches[0][0]["k"], caches[1][0]["k"]) and caches[1][0]["end"] == 72
    served = [(layer[2].shape[2], layer[3].shape[2], layer[0].tokens) for layer in merged_layers]
    if method in ("merge", "merge_queries", "prune"):  # the first frame's queries all come
        assert served == 2 * [(24, 24, 24)]
        return
    assert served == [(24, 24, 24)] * 2 + [(24, 48, 48)] * 2 + [(24, 72, 72)] * 2
    assert all(out.isfinite().all() for out in outs) and not torch.equal(outs[2], outs[5])


@pytest.mark.parametrize("name", ALL)
def test_what_compiles_hands_its_wrappers_a_keyword(dit, tome, monkeypatch, name):
    """The keyword is what a compiled graph notices (test_dit_compile.py); there too who takes none."""
    dit_call, model = host.pack_module("dit").DiTCall, tome(dit(name))
    expected, seen, real = call(model, name), [], dit_call._check_key

    def check(self, executor, *args, **kwargs):
        seen.append(kwargs["tome"])
        return real(self, executor, *args, **kwargs)

    monkeypatch.setattr(dit_call, "_check_key", check)
    monkeypatch.setattr(host.pack_module("dit_patch"), "is_compiled", lambda *_: True)
    assert torch.equal(call(model, name), expected)
    assert len(seen) == host.pack_module("dit_models").dit_model(model.model.diffusion_model).compiles


def test_what_is_recorded_of_a_latent_with_sound(dit, tome, comfy_nodes):
    """The size is the video's, of which the packed latent tells nothing."""
    model, record = comfy_nodes["ToMeRecord"].execute(model=tome(dit("ltx2"), ratio=0.75)).result
    call(model, "ltx2")
    (facts,) = record.run().facts.values()
    assert facts.latent == (4, 6)
    text = comfy_nodes["ToMeReport"].execute(record=record, after=None, measure_time=False).result[0]
    assert "72 to 18 tokens (-75%), 2 layers" in text and "LTX-2" in text


def test_a_cache_that_moves_on_is_not_measured(dit, tome, comfy_nodes):
    """A call of Wan CausalAR cannot be made again."""
    model, record = comfy_nodes["ToMeRecord"].execute(model=tome(dit("causal"), ratio=0.75)).result
    network = model.model.diffusion_model
    model.model_options["transformer_options"]["ar_state"] = {
        "kv_caches": network.init_kv_caches(2, 24, "cpu", torch.float32),
        "crossattn_caches": network.init_crossattn_caches(2, "cpu", torch.float32),
        "start_frame": 0,
    }
    call(model, "causal", latent=(2, 16, 1, 8, 12))
    text = comfy_nodes["ToMeReport"].execute(record=record, after=None, measure_time=True).result[0]
    assert "24 to 6 tokens" in text
    assert "the time was not measured: another node or the sampler runs the model itself" in text


def conditioning(which, seed: int) -> list:
    return [[torch.randn(1, *which.text, generator=torch.Generator().manual_seed(seed)), {}]]


@pytest.mark.parametrize("name", ["ltx2", "minimax"])
def test_a_sampler_with_video_and_sound(dit, tome, merged_layers, caplog, name):
    """Through ComfyUI's KSampler, which packs both latents into one and tells their shapes."""
    import nodes
    from comfy.nested_tensor import NestedTensor

    which = ALL[name]

    def sample(model):
        latent = NestedTensor([torch.zeros(1, *shape[1:]) for shape in which.constants["latent_shapes"]])
        prompts = (conditioning(which, seed) for seed in (1, 2))
        out = nodes.KSampler().sample(model, 1, 2, 3.0, "euler", "simple", *prompts, {"samples": latent}, 1.0)
        return out[0]["samples"].unbind()

    plain = sample(dit(name))
    assert not merged_layers
    host.forget_log()
    with caplog.at_level(logging.INFO, logger="ToMe"):
        merged = sample(tome(dit(name), ratio=0.75))
    assert merged_layers and {layer[0].tokens for layer in merged_layers} == {which.image}
    assert not any(word in line for line in log(caplog) for word in ("nothing was merged", "left alone", "ToMe skips"))
    for one, other in zip(plain, merged, strict=True):
        assert other.shape == one.shape and other.isfinite().all() and not torch.equal(one, other)
    again = sample(tome(dit(name), ratio=0.75))
    assert all(torch.equal(one, other) for one, other in zip(merged, again, strict=True))


def test_the_sampler_of_wan_causal(dit, tome, merged_layers):
    """ComfyUI's ar_video: a frame at a time, two steps each and one that fills the cache."""
    import comfy.sample
    import comfy.samplers

    def sample(model):
        sampler, prompts = comfy.samplers.ksampler("ar_video"), [conditioning(ALL["causal"], seed) for seed in (1, 2)]
        noise = torch.randn(1, 16, 3, 8, 12, generator=torch.Generator().manual_seed(1))
        sigmas, latent = torch.tensor([1.0, 0.6, 0.0]), torch.zeros(1, 16, 3, 8, 12)
        return comfy.sample.sample_custom(model, noise, 1.0, sampler, sigmas, *prompts, latent, seed=1)

    plain, merged = sample(dit("causal")), sample(tome(dit("causal"), ratio=0.75))
    assert merged.shape == plain.shape and merged.isfinite().all() and not torch.equal(merged, plain)
    assert [layer[0].tokens for layer in merged_layers] == [24] * 6 + [48] * 6 + [72] * 6
    assert hooks(dit("causal")) == 0 and torch.equal(sample(dit("causal")), plain)


def test_a_sampler_with_hidream_o1(dit, tome, merged_layers):
    """Through KSampler, which tells the prompt as numbers; each step after the first asks the cache for it."""
    import nodes
    from comfy.ldm.hidream_o1.model import TMS_TOKEN_ID

    def sample(model):
        model.model.diffusion_model.clear_kv_cache()
        told = [{"text_input_ids": torch.tensor([[first, 2, 3, 4, 5, 6, TMS_TOKEN_ID]])} for first in (1, 9)]
        prompts = [[[torch.zeros(1, 1, 48), one]] for one in told]
        latent = {"samples": torch.zeros(1, 3, 256, 384)}
        return nodes.KSampler().sample(model, 1, 2, 3.0, "euler", "simple", *prompts, latent, 1.0)[0]["samples"]

    plain, merged = sample(dit("hidream_o1")), sample(tome(dit("hidream_o1"), ratio=0.75))
    assert merged.isfinite().all() and not torch.equal(merged, plain)
    assert {(layer[2].shape[2], layer[3].shape[2], layer[5]) for layer in merged_layers} == {(97, 103, 7)}
    assert torch.equal(sample(tome(dit("hidream_o1"), ratio=0.75)), merged)
