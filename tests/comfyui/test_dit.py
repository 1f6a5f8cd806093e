"""ToMe in small diffusion transformers of ComfyUI's own classes: every row of the table that can be built small."""

from __future__ import annotations

import functools
import logging

import pytest
import torch

from . import dit_host, host
from .dit_host import SMALL, call, kept, served, watch

METHODS = ("sample", "merge", "merge_queries", "merge_keys", "downsample", "prune")
SHARED = ("flux", "sd3", "hunyuan", "wan_fun", "hidream", "stable_audio")  # one of each order of tokens


@pytest.fixture(scope="session")
def dit(comfy_nodes):
    """dit(name) -> the small model, built once."""
    return functools.lru_cache(dit_host.small)


def log(caplog) -> list[str]:
    return [record.message for record in caplog.records if record.name == "ToMe"]


def nothing(reason: str, where: str) -> list[str]:
    """What the log has where a call of the model merges nothing for one reason."""
    return [f"[ToMe] {reason} ({where})", f"[ToMe] {reason} ({where}) (nothing was merged in this call of the model)"]


@pytest.mark.parametrize("name", SMALL)
def test_keys_go_and_all_others_stay(dit, tome, name):
    model, which = dit(name), SMALL[name]
    with watch() as before:
        plain = call(model, name)
    with watch() as after:
        sampled = call(tome(model, ratio=0.75), name)
    rows = plain.shape[0]
    full, few = served(before, which), served(after, which)
    others = [other for other in range(len(before)) if before[other] not in full]
    assert [dit_host.lengths(before)[other] for other in others] == [dit_host.lengths(after)[other] for other in others]
    assert plain.shape == sampled.shape and sampled.isfinite().all()
    assert (sampled - plain).norm() / plain.norm() > 1e-4
    for one, other in zip(full, few, strict=True):
        length = one.k.shape[-2]
        rest = length - which.image
        assert length in (which.image, which.image + which.others)
        assert other.q.shape[-2] == length - which.elsewhere
        assert other.k.shape[-2] == other.v.shape[-2] == rest + kept(which.image, 0.75)
        weighed = other.k.shape[-1] > one.k.shape[-1]
        assert weighed == (rest > 0)
    # The first layer's inputs are the same in both runs: see which of its keys are there.
    one, other = full[0], few[0]
    d = one.k.shape[-1]
    place: list[int] = []  # of each key, among those of the unmerged run; Z-Image's padding repeats itself
    for key in other.k[0, 0]:
        found = (one.k[0, 0] == key[:d]).all(-1).nonzero().flatten().tolist()
        place.append(next(token for token in found if token not in place))
    assert torch.equal(other.k[..., :d], one.k[:, :, place]) and torch.equal(other.v[..., :d], one.v[:, :, place])
    start = head_of(name, one.k.shape[-2])
    image = [token for token in place if start <= token < start + which.image]
    assert [token for token in place if token not in image] == [
        token for token in range(one.k.shape[-2]) if not start <= token < start + which.image
    ]
    assert len(set(image)) == kept(which.image, 0.75) and rows == which.latent[0]


def head_of(name: str, length: int) -> int:
    """Where the image begins, said once more: by the papers and not by the table."""
    which = SMALL[name]
    if length == which.image or name in ("hidream", "s2v", "humo", "lens", "joy", "mochi"):
        return 0
    return {"zimage": 20, "scail": 24}.get(name, which.others)


@pytest.mark.parametrize("name", SMALL)
def test_ratio_0_changes_nothing(dit, tome, name):
    model = dit(name)
    plain = call(model, name)
    assert torch.equal(call(tome(model, ratio=0.0), name), plain)
    assert torch.equal(call(tome(model, min_tokens=4096), name), plain)
    call(tome(model), name)
    assert torch.equal(call(model, name), plain)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", SHARED)
def test_methods(dit, tome, name, method):
    model, which = dit(name), SMALL[name]
    plain = call(model, name)
    with watch() as seen:
        merged = call(tome(model, method=method, ratio=0.5, stride_y=1 if name == "stable_audio" else 2), name)
    assert merged.shape == plain.shape and merged.isfinite().all() and not torch.equal(merged, plain)
    rest = which.image // 2 + which.others
    queries = method in ("merge", "merge_queries", "prune")
    keys = method != "merge_queries"
    last = seen[-1] if name not in ("wan_fun", "stable_audio") else seen[-2]
    full = which.image + which.others
    assert last.q.shape[-2] == (rest if queries else full) and last.k.shape[-2] == (rest if keys else full)


@pytest.mark.parametrize(
    ("name", "latent", "image"),
    [
        ("flux", (1, 16, 33, 41), 17 * 21),
        ("chroma", (1, 16, 33, 16), 17 * 8),
        ("sd3", (2, 16, 17, 24), 9 * 12),
        ("qwen", (1, 16, 1, 17, 23), 9 * 12),
        ("qwen", (1, 16, 3, 16, 24), 3 * 96),
        ("lumina", (1, 16, 15, 25), 8 * 13),
        ("zimage", (1, 16, 15, 25), 8 * 13),
        ("aura", (1, 4, 15, 25), 8 * 13),
        ("hidream", (1, 16, 15, 25), 8 * 13),
        ("wan", (1, 16, 1, 16, 24), 96),
        ("wan", (1, 16, 2, 9, 11), 2 * 5 * 6),
        ("wan", (1, 16, 5, 8, 12), 5 * 24),
        ("hunyuan", (1, 16, 5, 8, 12), 5 * 24),
        ("cosmos", (1, 16, 2, 9, 11), 2 * 5 * 6),
        ("ltxv", (1, 16, 7, 3, 5), 105),
        ("stable_audio", (1, 16, 131), 131),
    ],
)
@pytest.mark.parametrize("ratio", [0.7, 0.875])
def test_odd_sizes_and_lengths(dit, tome, name, latent, image, ratio):
    told = {"guidance": torch.zeros(1)} if name == "chroma" else {}
    with watch() as seen:
        out = call(tome(dit(name), ratio=ratio), name, latent=latent, **told)
    assert out.shape == latent and out.isfinite().all()
    found = {one.k.shape[-2] for one in seen}
    others = {"zimage": 20 + -image % 20}.get(name, SMALL[name].others)
    assert others + kept(image, ratio) in found


@pytest.mark.parametrize(
    ("name", "told", "added"),
    [
        ("flux", {"ref_latents": [torch.ones(2, 16, 10, 13), torch.ones(2, 16, 4, 4)]}, 5 * 7 + 4),
        ("flux", {"ref_latents": [torch.ones(2, 16, 8, 8)], "ref_latents_method": "uxo"}, 16),
        ("qwen", {"ref_latents": [torch.ones(2, 16, 1, 10, 13)]}, 5 * 7),
        ("lumina", {"ref_latents": [torch.ones(2, 16, 8, 8)], "ref_contexts": [torch.ones(1, 5, 48)]}, None),
        ("hunyuan", {"ref_latent": torch.ones(1, 16, 1, 8, 12), "latent": (1, 16, 3, 8, 12)}, 24),
        ("wan", {"context_latents": [torch.ones(2, 16, 1, 8, 12)]}, 24),
        ("wan", {"time_dim_concat": torch.ones(2, 16, 2, 8, 12)}, 48),
        ("wan_fun", {"context_latents": [torch.ones(2, 16, 1, 8, 12)]}, 24),
    ],
)
def test_references_are_never_merged(dit, tome, name, told, added):
    which = SMALL[name]
    if name == "lumina":
        name, which, added = "zimage", SMALL["zimage"], 20 + 20
        told = {**told, "ref_contexts": [torch.ones(1, 5, 48)]}
    with watch() as before:
        call(dit(name), name, **told)
    with watch() as after:
        call(tome(dit(name), ratio=0.75), name, **told)
    full, few = served(before, which), served(after, which)
    for one, other in zip(full, few, strict=True):
        assert one.k.shape[-2] == which.image + which.others + added
        assert other.k.shape[-2] == kept(which.image, 0.75) + which.others + added
    one, other = full[0], few[0]
    d = one.k.shape[-1]
    image = dit_start(name, one)
    outside = [token for token in range(one.k.shape[-2]) if not image <= token < image + which.image]
    stayed = torch.cat((other.k[:, :, :image], other.k[:, :, image + kept(which.image, 0.75) :]), dim=2)
    assert torch.equal(stayed[..., :d], one.k[:, :, outside])


def dit_start(name, one):
    which = SMALL[name]
    if name in ("flux", "qwen"):
        return 7
    if name == "zimage":
        return one.k.shape[-2] - which.image - 4
    if name == "hunyuan":
        return one.k.shape[-2] - which.image
    return which.others


def test_guides_of_ltxv(dit, tome):
    """Two frames of guides behind three of the video, one of them half masked away."""
    mask = torch.ones(1, 1, 5, 4, 6)
    mask[:, :, 4, :2] = -1.0
    told = {
        "keyframe_idxs": torch.zeros(2, 3, 48, 2),
        "denoise_mask": mask.expand(2, -1, -1, -1, -1),
    }
    with watch() as before:
        plain = call(dit("ltxv"), "ltxv", latent=(2, 16, 5, 4, 6), **told)
    with watch() as after:
        sampled = call(tome(dit("ltxv"), ratio=0.75), "ltxv", latent=(2, 16, 5, 4, 6), **told)
    assert sampled.isfinite().all() and not torch.equal(plain, sampled)
    assert before[0].k.shape[-2] == 72 + 36 and after[0].k.shape[-2] == 18 + 36
    assert torch.equal(after[0].k[:, :, 18:, :32], before[0].k[:, :, 72:])


@pytest.mark.parametrize("method", METHODS)
def test_guides_of_a_strength_other_than_1(dit, tome, comfy_nodes, caplog, method):
    """Attention is then called twice a layer, for the video's queries and for the guides', with all keys each time."""
    mask = torch.ones(2, 1, 5, 4, 6)
    entry = {"pre_filter_count": 48, "strength": 0.7, "pixel_mask": None, "latent_shape": [2, 4, 6]}
    told = {"keyframe_idxs": torch.zeros(2, 3, 48, 2), "denoise_mask": mask, "guide_attention_entries": [entry]}
    told["latent"] = (2, 16, 5, 4, 6)
    model = dit("ltxv")
    recorded, record = comfy_nodes["ToMeRecord"].execute(model=tome(model, method=method, ratio=0.75)).result
    host.forget_log()
    with watch() as before:
        plain = call(model, "ltxv", **told)
    with caplog.at_level(logging.INFO, logger="ToMe"), watch() as after:
        merged = call(recorded, "ltxv", **told)
    said = log(caplog)
    told = record.run().tally.report()
    assert dit_host.lengths(before) == 2 * [(72, 120), (48, 120), (120, 7)]
    if method in ("merge", "merge_queries", "prune"):
        assert torch.equal(merged, plain) and dit_host.lengths(after) == dit_host.lengths(before)
        reason = (
            "ToMe skips attentions that take a part of the queries each (guides of LTXV, HiDream-O1, later frames of "
            "Wan CausalAR), because this method merges queries"
        )
        assert said == nothing(reason, "LTXV")
        assert told.merged_steps == 0 and [layer.reason for layer in told.layers] == [reason]
        return
    assert not torch.equal(merged, plain) and merged.isfinite().all()
    assert dit_host.lengths(after) == 2 * [(72, 18 + 48), (48, 18 + 48), (120, 7)]
    first, second = after[:2]
    assert torch.equal(first.k, second.k) and torch.equal(first.v, second.v)  # one layer, one choice
    assert first.mask.shape[-1] == second.mask.shape[-1] == 66 and second.mask.shape[-2] == 48
    assert said == (["[ToMe] own token has no effect under a mask"] if method == "sample" else [])
    assert told.merged_steps == 1 and [layer.number for layer in told.merged] == [0, 1]


def test_a_part_of_the_queries_without_a_mask_keeps_no_own_tokens(dit, tome, caplog):
    """Own tokens need all queries; the keys that a part of the queries gets are the same."""
    layout = host.pack_module("dit").Layout((8, 12), 0, None, parts=True)
    attend = dit_host.attention_alone(layout.grid, 0, None, layout=layout, ratio=0.75, own_token=True, method="sample")
    q, k, v = (torch.randn(2, 96, 64, generator=torch.Generator().manual_seed(seed)) for seed in range(3))
    host.forget_log()
    with caplog.at_level(logging.INFO, logger="ToMe"), watch() as seen:
        parts = [attend(q[:, :60], k, v, 2), attend(q[:, 60:], k, v, 2)]
    assert log(caplog) == ["[ToMe] own token has no effect where an attention takes a part of the queries alone"]
    assert dit_host.lengths(seen) == [(60, 24), (36, 24)]
    attend = dit_host.attention_alone(layout.grid, 0, None, layout=layout, ratio=0.75, own_token=False, method="sample")
    assert torch.allclose(torch.cat(parts, 1), attend(q, k, v, 2), atol=1e-5)


def test_an_image_beside_its_source_is_left_alone(dit, tome, caplog):
    """HiDream E1's rows hold both images by turns."""
    told = {"image_cond": torch.ones(2, 16, 16, 24)}
    host.forget_log()
    with caplog.at_level(logging.INFO, logger="ToMe"):
        assert torch.equal(call(tome(dit("hidream")), "hidream", **told), call(dit("hidream"), "hidream", **told))
    assert log(caplog) == nothing("ToMe skips an image whose tokens do not lie on one grid", "HiDream")


@pytest.mark.parametrize("method", METHODS)
def test_masks(dit, tome, caplog, method):
    """Qwen's text mask: what it hides does not matter, and what it shows does."""
    host.forget_log()
    model = tome(dit("qwen"), method=method, ratio=0.5)
    mask = torch.tensor([[1, 1, 1, 1, 0, 0, 0], [1, 1, 1, 1, 1, 1, 0]])
    text = torch.randn(2, 7, 48, generator=torch.Generator().manual_seed(3))
    with caplog.at_level(logging.INFO, logger="ToMe"), watch() as seen:
        first = call(model, "qwen", c_crossattn=text, attention_mask=mask)
    assert ("[ToMe] own token has no effect under a mask" in log(caplog)) == (method == "sample")
    assert seen[0].mask.shape[-1] == seen[0].k.shape[-2]
    hidden = torch.where(mask[..., None].bool(), text, text + 1.0)
    assert torch.allclose(call(model, "qwen", c_crossattn=hidden, attention_mask=mask), first, atol=1e-4)
    shown = text.clone()
    shown[:, 0] += 1.0
    assert not torch.allclose(call(model, "qwen", c_crossattn=shown, attention_mask=mask), first, atol=1e-3)


@pytest.mark.parametrize("method", METHODS)
def test_masks_over_queries_too(dit, tome, method):
    """Flux's regional prompts: a mask [1, L, L] that keeps the upper half of the image from the text's second half."""
    length = 7 + 96
    mask = torch.zeros(1, length, length)
    mask[:, 7 : 7 + 48, 4:7] = -torch.inf
    model = tome(dit("flux"), method=method, ratio=0.5)
    with watch() as seen:
        merged = call(model, "flux", attention_mask=mask)
    shape = seen[0].mask.shape
    assert merged.isfinite().all() and shape[-2:] == (seen[0].q.shape[-2], seen[0].k.shape[-2])
    assert (merged - call(model, "flux")).norm() / merged.norm() > 1e-3


def test_a_mask_not_over_keys_is_left_alone(dit, tome, caplog):
    model = tome(dit("flux"))
    mask = torch.zeros(1, 1, 1, 1)
    host.forget_log()
    with caplog.at_level(logging.INFO, logger="ToMe"):
        merged = call(model, "flux", attention_mask=mask)
    assert torch.equal(merged, call(dit("flux"), "flux", attention_mask=mask))
    assert log(caplog) == nothing("ToMe skips an attention whose mask is not one over its keys", "Flux")


def with_override(model, called):
    def override(func, q, k, v, heads, *args, **kwargs):
        called.append((q.shape, k.shape, {key: value for key, value in kwargs.items() if key in ("scale", "mask")}))
        return func(q, k, v, heads, *args, **kwargs)

    model = model.clone()
    model.model_options["transformer_options"]["optimized_attention_override"] = override
    return model


@pytest.mark.parametrize("tome_first", [True, False], ids=["tome first", "override first"])
@pytest.mark.parametrize("name", ["flux", "wan", "stable_audio"])
def test_another_override_is_called(dit, tome, caplog, name, tome_first):
    called = []
    model = dit(name)
    both = with_override(tome(model), called) if tome_first else tome(with_override(model, called))
    host.forget_log()
    with caplog.at_level(logging.INFO, logger="ToMe"), watch() as seen:
        merged = call(both, name)
    said = "own token has no effect: another attention than PyTorch's is in use"
    assert sum(said in line for line in log(caplog)) == 1
    alone = call(tome(model, own_token=False), name)  # what is not PyTorch's attention keeps no own tokens
    assert len(called) == len(seen)
    if name == "wan":  # nothing to weigh: as alone, bit for bit
        assert torch.equal(merged, alone)
        assert called[0][0][1] == 72 and called[0][1][1] == 36
    else:  # heads of 32 with weights, in a size that every kernel takes and at the scale that it takes by itself
        assert torch.allclose(merged, alone, atol=1e-4)
        assert called[0][0][-1] == called[0][1][-1] == 64 and "scale" not in called[0][2]


@pytest.mark.parametrize("method", ["sample", "merge"])
def test_another_override_with_no_room_for_weights(dit, tome, caplog, method):
    """Heads of 128 would become 136, which SageAttention does not take."""
    wide = dit_host.small("flux", hidden_size=256, axes_dim=[32, 48, 48])
    called = []
    host.forget_log()
    with caplog.at_level(logging.INFO, logger="ToMe"):
        left = call(tome(with_override(wide, called), method=method), "flux")
    assert torch.equal(left, call(wide, "flux")) and len(called) == 2
    assert log(caplog) == nothing(
        "ToMe skips an attention where keys need weights (text beside the image, or an uneven ratio) and so heads "
        "of 136 channels: another node's attention may not take them",
        "Flux",
    )
    with watch() as seen:
        call(tome(with_override(wide, called), proportional=False), "flux")
        call(tome(wide), "flux")
    assert [one.k.shape[-1] for one in seen] == [128, 128, 136, 136]


def test_tokens_that_another_node_adds(dit, tome, caplog):
    """USO puts style tokens before the text. Flux tells in its single blocks alone where the image begins."""

    def add(args):
        zeros = torch.zeros_like(args["txt"][:, :3])
        ids = torch.zeros_like(args["txt_ids"][:, :3])
        return {**args, "txt": torch.cat((zeros, args["txt"]), 1), "txt_ids": torch.cat((ids, args["txt_ids"]), 1)}

    model = tome(dit("flux"), ratio=0.75, own_token=False)
    model.set_model_patch(add, "post_input")
    host.forget_log()
    with caplog.at_level(logging.INFO, logger="ToMe"), watch() as seen:
        call(model, "flux")
    assert dit_host.lengths(seen) == [(106, 106), (106, 10 + 24)]
    assert len(log(caplog)) == 1 and "another node has added some" in log(caplog)[0]


def test_an_image_as_long_as_its_prompt(dit, tome, caplog):
    text = torch.randn(2, 72, 48, generator=torch.Generator().manual_seed(0))
    host.forget_log()
    with caplog.at_level(logging.INFO, logger="ToMe"):
        merged = call(tome(dit("wan")), "wan", c_crossattn=text)
    assert torch.equal(merged, call(dit("wan"), "wan", c_crossattn=text))
    assert "self- and cross-attention look alike" in log(caplog)[0]


def test_differential_attention_samples_both_halves_alike(dit, tome):
    with watch() as seen:
        call(tome(dit("stable_audio_3")), "stable_audio_3")
    first, second = served(seen, SMALL["stable_audio_3"])[:2]
    third = served(seen, SMALL["stable_audio_3"])[2]
    assert torch.equal(first.v, second.v) and not torch.equal(first.k, second.k)
    assert first.v.shape == third.v.shape


def test_options_that_only_a_unet_has(dit, tome, caplog):
    for options in ({"mlp": True}, {"cross_attention": True}):
        with pytest.raises(ValueError, match="needs a model with a U-Net; Flux is served at its self-attention alone"):
            tome(dit("flux"), method="merge", **options)
    with pytest.raises(ValueError, match="Wan has one resolution, level 0; levels '1,2' would merge nothing"):
        tome(dit("wan"), levels="1,2")
    plain = call(tome(dit("wan")), "wan")
    with caplog.at_level(logging.INFO, logger="ToMe"):
        assert torch.equal(call(tome(dit("wan"), levels="0,1"), "wan"), plain)
    assert log(caplog) == ["[ToMe] Wan has one resolution: of levels 0,1 only 0 exists"]


def test_a_model_that_is_not_served(comfy_nodes, tome):
    import comfy.ldm.flux.model

    class Other(comfy.ldm.flux.model.Flux):
        """A subclass may order its tokens anew."""

        def forward_orig(self, *args, **kwargs):
            return super().forward_orig(*args, **kwargs)

    model = dit_host.small("flux")
    model.model.diffusion_model.__class__ = Other
    with pytest.raises(ValueError, match=r"and Flux, Chroma, .*, ACE-Step 1.5; this one is Flux with Other"):
        tome(model)


def test_every_row_names_classes_that_are_there(comfy_nodes):
    """In this ComfyUI at least; and every row has a small model above but for the classes listed here."""
    import importlib

    table = host.pack_module("dit_models")
    rows = {name: row for row in table.DIT_MODELS for name in row.classes}
    for name in rows:
        module, _, kind = f"comfy.ldm.{name}".rpartition(".")
        assert hasattr(importlib.import_module(module), kind)
    built = {type(dit_host.small(name).model.diffusion_model).__qualname__ for name in {**SMALL, **dit_host.APART}}
    assert {name.rpartition(".")[2] for name in rows} - built == {
        "NextDiTPixelSpace", "AnimateWanModel", "WanDancerModel", "SCAIL2WanModel",
    }  # fmt: skip
