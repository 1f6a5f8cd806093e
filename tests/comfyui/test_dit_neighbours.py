"""ToMe in transformers beside attentions and models of others: what users chose is kept, and what is done is said."""

from __future__ import annotations

import asyncio
import dataclasses
import functools
import itertools
import logging
import types

import pytest
import torch

from . import dit_host, host
from .dit_host import attention_alone, call
from .test_dit import log, nothing
from .test_dit_weights import HEADS, alike, full, same

EMBEDDER = {"target": "torch.nn.Linear", "params": {"in_features": 48, "out_features": 192}}  # of SD3 with 3 blocks
NOT_KEPT = "[ToMe] own token has no effect: another attention than PyTorch's is in use"


@pytest.fixture(scope="session")
def dit(comfy_nodes):
    return functools.lru_cache(dit_host.small)


@pytest.fixture
def sage(comfy_nodes, monkeypatch):
    """sage(name): ComfyUI as with --use-sage-attention, of that function's name. Returns (queries, keys, channels of a
    head) of its calls. It minds no `scale`, as ComfyUI's attention3_sage."""
    import comfy.ldm.flux.math
    import comfy.ldm.wan.model
    from comfy.ldm.modules import attention

    def start(name="attention_sage"):
        calls = []

        def chosen(q, k, v, heads, *args, scale=None, **kwargs):
            place = 2 if kwargs.get("skip_reshape") else 1
            calls.append((q.shape[place], k.shape[place], q.shape[-1] if place == 2 else q.shape[-1] // heads))
            assert calls[-1][2] <= 128
            return attention.attention_pytorch(q, k, v, heads, *args, **kwargs)

        chosen.__name__ = chosen.__qualname__ = name
        for module in (attention, comfy.ldm.flux.math, comfy.ldm.wan.model):
            monkeypatch.setattr(module, "optimized_attention", attention.wrap_attn(chosen))
        return calls

    host.forget_log()
    return start


@pytest.mark.parametrize(
    "name", ["attention_sage", "attention3_sage", "attention_comfy_kitchen_int8", "attention_pytorch"]
)
def test_a_chosen_attention_gets_the_drawn_keys(dit, tome, sage, caplog, name):
    """Own tokens need PyTorch's attention: the chosen one is worth more. Names do not tell, the function does."""
    calls = sage(name)
    with caplog.at_level(logging.INFO, logger="ToMe"):
        merged = call(tome(dit("wan"), ratio=0.75), "wan")
    assert calls == 2 * [(72, 18, 32), (72, 7, 32)]
    assert log(caplog) == [NOT_KEPT]
    calls.clear()
    assert torch.equal(call(tome(dit("wan"), ratio=0.75, own_token=False), "wan"), merged)
    assert calls == 2 * [(72, 18, 32), (72, 7, 32)]


@pytest.mark.parametrize("method", ["sample", "merge"])
def test_weights_reach_it_in_heads_of_a_size_that_it_takes(dit, tome, sage, caplog, method):
    """Heads of 32 beside text become 64."""
    expected = call(tome(dit("flux"), ratio=0.75, method=method, own_token=False), "flux")
    calls = sage()
    with caplog.at_level(logging.INFO, logger="ToMe"):
        merged = call(tome(dit("flux"), ratio=0.75, method=method), "flux")
    queries = 103 if method == "sample" else 31
    assert calls == 2 * [(queries, 31, 64)]
    assert log(caplog) == ([NOT_KEPT] if method == "sample" else [])
    same(merged, expected, tolerance=1e-4)


@pytest.mark.parametrize("method", ["sample", "merge", "merge_keys"])
def test_heads_too_wide_for_it_are_left_to_it(dit, tome, sage, caplog, method):
    """Heads of 128 would become 136. What it does is not given to another attention unless that was measured to pay."""
    wide = dit_host.small("flux", hidden_size=256, axes_dim=[32, 48, 48])
    plain, calls = call(wide, "flux"), sage()
    with caplog.at_level(logging.INFO, logger="ToMe"):
        left = call(tome(wide, method=method, levels="auto"), "flux")
    assert torch.equal(left, plain) and calls == 2 * [(103, 103, 128)]
    assert log(caplog) == nothing(
        "ToMe skips an attention where keys need weights (text beside the image, or an uneven ratio) and so heads "
        "of 136 channels: attention_sage may not take them",
        "Flux",
    )


@pytest.mark.parametrize("levels", ["0", "auto"])
def test_pytorchs_attention_steps_in_where_that_pays(tome, sage, caplog, monkeypatch, levels):
    """Where it was measured, or where the user names the levels, which are merged whatever it costs."""
    module, asked = host.pack_module("dit_call"), []

    def known_or_measured(key, device, measure):
        asked.append(key)
        return module.Decision(100.0, 40.0, 5.0)

    monkeypatch.setattr(module, "known_or_measured", known_or_measured)
    monkeypatch.setattr(host.pack_module("dit_auto"), "may_measure", lambda device: True)
    wide = dit_host.small("flux", hidden_size=256, axes_dim=[32, 48, 48])
    by_torch, calls = call(tome(wide, levels="0"), "flux"), sage()
    with caplog.at_level(logging.INFO, logger="ToMe"):
        merged = call(tome(wide, levels=levels), "flux")
    assert torch.equal(merged, by_torch) and not calls  # own tokens included
    assert log(caplog) == [
        "[ToMe] PyTorch's attention takes the place of attention_sage where keys need weights (text beside the image, "
        "or an uneven ratio) and so heads of 136 channels"
    ]
    assert [".attention_sage, " in key for key in asked] == ([True] if levels == "auto" else [])


def test_what_is_measured_is_the_chosen_attention_against_what_would_take_its_place(tome, sage, monkeypatch):
    module, seen = host.pack_module("dit_call"), []
    monkeypatch.setattr(module, "known_or_measured", lambda key, device, measure: measure())
    monkeypatch.setattr(host.pack_module("dit_auto"), "may_measure", lambda device: True)
    calls = sage()

    def compared(whole, merged, device):
        calls.clear()
        seen.append((whole(), list(calls), merged(), list(calls)))
        return module.Decision(100.0, 99.0, 5.0)

    monkeypatch.setattr(module, "compared", compared)
    wide = dit_host.small("flux", hidden_size=256, axes_dim=[32, 48, 48])
    call(tome(wide, levels="auto"), "flux")
    ((whole, before, merged, after),) = seen
    assert before == after == [(103, 103, 128)]
    assert whole.shape == merged.shape and 0 < (whole - merged).norm() / whole.norm() < 1


def sparse_node(model, called, declines=()):
    """As ComfyUI's node for block-sparse attention: it computes calls with as many keys as queries itself."""

    def override(func, q, k, v, heads, mask=None, **kwargs):
        if q.shape != k.shape or mask is not None or len(called) in declines:
            called.append("declined")
            return func(q, k, v, heads, mask=mask, **kwargs)
        called.append(tuple(q.shape))
        return v.transpose(1, 2).flatten(2)  # each token attends to itself alone; Flux's q, k, v are [B, H, L, d]

    override.__qualname__ = "make_override.<locals>.override"
    override.__module__ = "/home/x/ComfyUI/comfy_extras/nodes_sparse_attention"
    return with_override(model, override)


def with_override(model, override):
    model = model.clone()
    model.model_options["transformer_options"]["optimized_attention_override"] = override
    return model


SPARSE = "ToMe skips attentions that another node's sparse attention computes, and merges those that it declines"


@pytest.mark.parametrize("tome_first", [True, False], ids=["tome first", "sparse first"])
@pytest.mark.parametrize("method", ["sample", "merge"])
def test_sparse_attention_goes_first(dit, tome, caplog, method, tome_first):
    """It gets all tokens in their places, whatever the method; ToMe has nothing to add."""
    called, alone = [], []
    expected = call(sparse_node(dit("flux"), alone), "flux")
    model = tome(dit("flux"), method=method) if tome_first else dit("flux")
    model = sparse_node(model, called)
    host.forget_log()
    with caplog.at_level(logging.INFO, logger="ToMe"):
        made = call(model if tome_first else tome(model, method=method), "flux")
    assert torch.equal(made, expected) and called == alone == 2 * [(2, 2, 103, 32)]
    assert log(caplog) == nothing(SPARSE, "Flux")


@pytest.mark.parametrize("method", ["sample", "merge"])
def test_what_sparse_attention_declines_is_merged(dit, tome, caplog, method):
    """As if it were not there: own tokens included."""
    called = []
    plain = call(tome(dit("flux"), method=method), "flux")
    host.forget_log()
    with caplog.at_level(logging.INFO, logger="ToMe"):
        made = call(tome(sparse_node(dit("flux"), called, declines=(0, 1)), method=method), "flux")
    assert torch.equal(made, plain) and called == 2 * ["declined"]
    assert log(caplog) == [f"[ToMe] {SPARSE} (Flux)"]


def plainly(func, *args, **kwargs):
    return func(*args, **kwargs)


class BlockSparse:
    def __call__(self, func, *args, **kwargs):
        return func(*args, **kwargs)


@pytest.mark.parametrize(
    ("module", "name", "sparse"),
    [
        ("/x/ComfyUI/comfy_extras/nodes_sparse_attention", "make_attention_override.<locals>.override", True),
        ("/x/ComfyUI/custom_nodes/ComfyUI-RadialAttn.nodes", "attention_override", True),
        ("/x/ComfyUI/custom_nodes/pack", "SLAPatch.override", True),
        ("/x/ComfyUI/custom_nodes/pack", "apply_sparge_attn", True),
        ("/home/sparse/ComfyUI/custom_nodes/ComfyUI-KJNodes.nodes.nodes", "PathchSageAttentionKJ.override", False),
        ("/x/custom_nodes/translate", "slapdash", False),
        (None, "override", False),
    ],
)
def test_sparse_attention_is_known_by_whole_words(comfy_nodes, module, name, sparse):
    is_sparse = host.pack_module("dit_attention").is_sparse
    override = types.FunctionType(plainly.__code__, {})
    override.__module__, override.__qualname__ = module, name
    assert is_sparse(override) == is_sparse(functools.partial(override)) == sparse
    assert is_sparse(BlockSparse()) and is_sparse(BlockSparse().__call__)


@pytest.mark.parametrize("method", ["sample", "merge"])
def test_an_unknown_override_gets_merged_tokens_and_that_is_said(dit, tome, caplog, method):
    host.forget_log()
    with caplog.at_level(logging.INFO, logger="ToMe"):
        call(tome(with_override(dit("wan"), plainly), method=method), "wan")
    said = (
        "[ToMe] another node's attention gets the merged tokens; if that attention is sparse, use one of the two "
        "nodes, because sparse attention needs all tokens in their places"
    )
    assert log(caplog) == ([said, NOT_KEPT] if method == "sample" else [said])


@dataclasses.dataclass
class Unhashable:
    """A dataclass that may change has no hash."""

    calls: int = 0

    def __call__(self, func, *args, **kwargs):
        self.calls += 1
        return func(*args, **kwargs)


@pytest.mark.parametrize("method", ["sample", "merge"])
def test_an_override_without_a_hash_is_called_as_any_other(dit, tome, method):
    override = Unhashable()
    assert torch.equal(
        call(tome(with_override(dit("wan"), override), method=method), "wan"),
        call(tome(with_override(dit("wan"), plainly), method=method), "wan"),
    )
    assert override.calls > 0


@pytest.mark.parametrize("name", ["basic", "sub_quad", "split", "pytorch"])
@pytest.mark.parametrize("minds", [True, False])
def test_weights_are_right_whether_an_attention_minds_scale_or_not(comfy_nodes, monkeypatch, name, minds):
    """ComfyUI's up to 0.20.1 take `scale` and forget it."""
    from comfy.ldm.modules import attention

    chosen = getattr(attention, f"attention_{name}")
    if not minds:
        raw = chosen.__wrapped__

        def forgets(q, k, v, heads, mask=None, attn_precision=None, skip_reshape=False, **kwargs):
            return raw(q, k, v, heads, mask=mask, skip_reshape=skip_reshape)

        forgets.__module__ = attention.__name__
        chosen = attention.wrap_attn(forgets)
        monkeypatch.setattr(attention, f"attention_{name}", chosen)
    monkeypatch.setattr(attention, "optimized_attention", chosen)
    monkeypatch.setattr(host.pack_module("chosen").Chosen, "kernels", lambda *_, **__: ())
    k, v = (alike((8, 12), "sample", 0.75, 5, 0, seed=seed) for seed in (0, 1))
    q = torch.randn(k.shape, generator=torch.Generator().manual_seed(2))
    same(attention_alone((8, 12), 5, 0, method="sample", ratio=0.75)(q, k, v, HEADS), full(q, k, v))


def swap(model, kind):
    """As RES4LYF does: the class of the loaded model is another one, for all that hold it."""
    model.model.diffusion_model.__class__ = kind


def test_a_swapped_class_that_changes_nothing_is_served(tome, comfy_nodes):
    model = dit_host.small("flux")
    merged = tome(model)
    expected = call(merged, "flux")
    swap(model, type("ReFlux", (type(model.model.diffusion_model),), {"__init__": lambda self: None, "extra": 1}))
    assert torch.equal(call(merged, "flux"), expected)
    assert torch.equal(call(tome(model), "flux"), expected)


@pytest.mark.parametrize("kind", ["wrapper", "model"])
@pytest.mark.parametrize("name", ["flux", "wan"])
def test_a_neighbour_gets_no_keyword_of_tome(tome, name, kind):
    """A wrapper around the model, or a model swapped for the call, may take ComfyUI's own keywords alone."""
    model = dit_host.small(name)
    merged, plain = tome(model), call(model, name)
    expected, base = call(merged, name), model.model
    network, seen = base.diffusion_model, []

    def watch(run):
        def watched(*args, **kwargs):
            seen.append("tome" in kwargs)
            return run(*args, **kwargs)

        return watched

    def swapped(executor, *args, **kwargs):
        base.diffusion_model = Swapped(watch(network), network.dtype)
        try:
            return executor(*args, **kwargs)
        finally:
            base.diffusion_model = network

    if kind == "model":
        merged.add_wrapper_with_key("apply_model", "other", swapped)
    else:
        merged.add_wrapper_with_key("diffusion_model", "other", lambda executor, *a, **k: watch(executor)(*a, **k))
    assert torch.equal(call(merged, name), expected) and not torch.equal(expected, plain) and seen == [False]


class Swapped(torch.nn.Module):
    """Runs something else in a model's place."""

    def __init__(self, run, dtype):
        super().__init__()
        self.forward, self.dtype = run, dtype


@pytest.mark.parametrize("changed", ["forward", "forward_orig", "process_img"])
def test_a_swapped_class_that_runs_in_another_way_is_left_alone(tome, comfy_nodes, caplog, changed):
    model = dit_host.small("flux")
    merged, plain, kind = tome(model), call(model, "flux"), type(model.model.diffusion_model)
    swap(
        model,
        type("ReFlux", (kind,), {changed: lambda self, *args, **kwargs: getattr(kind, changed)(self, *args, **kwargs)}),
    )
    host.forget_log()
    with caplog.at_level(logging.INFO, logger="ToMe"):
        assert torch.equal(call(merged, "flux"), plain)
    reason = "ToMe skips this model: another node has replaced it by one that ToMe does not know"
    assert log(caplog) == nothing(reason, "ReFlux")


def test_a_block_that_another_node_only_stands_around_counts_once(tome):
    model = tome(dit_host.small("flux", depth=3, depth_single_blocks=2), ratio=0.5)
    expected = dit_host.sample(model, "flux")
    around = model.clone()
    for place in (("double_block", 1), ("double_block", 2), ("single_block", 1)):
        around.set_model_patch_replace(lambda args, extra: extra["original_block"](args), "dit", *place)
    assert torch.equal(dit_host.sample(around, "flux"), expected)


@pytest.mark.parametrize(
    ("name", "changes", "skipped"),
    [
        ("flux", {"depth": 2, "depth_single_blocks": 2}, ("0", "0")),
        ("sd3", {"depth": 3, "context_embedder_config": EMBEDDER}, ("0", "")),  # its first block attends twice
        ("wan", {"num_layers": 3}, ("1", "")),
    ],
)
def test_layers_behind_a_skipped_block_keep_their_choices(
    tome, comfy_nodes, merged_layers, monkeypatch, name, changes, skipped
):
    """SkipLayerGuidanceDiT runs a call of its own without some blocks, and scales up the difference of two calls: it is
    not to be one of draws."""
    import nodes

    file = host.comfyui_dir() / "comfy_extras" / "nodes_slg.py"
    asyncio.run(nodes.load_custom_node(str(file), module_parent="comfy_extras"))
    told, numbers = host.pack_module("record").CallRecord, []
    real = told.layer
    monkeypatch.setattr(told, "layer", lambda *args, **kwargs: numbers.append(real(*args, **kwargs)))
    model, _ = comfy_nodes["ToMeRecord"].execute(model=tome(dit_host.small(name, **changes), ratio=0.5)).result
    guided = host.run_node(
        nodes.NODE_CLASS_MAPPINGS["SkipLayerGuidanceDiT"],
        model=model,
        scale=3.0, start_percent=0.0, end_percent=1.0, double_layers=skipped[0], single_layers=skipped[1],
    )  # fmt: skip
    dit_host.sample(guided, name, steps=1, cfg=1.0)
    drawn = [layer[0].choice[0] for layer in merged_layers]
    gone = {"flux": {0, 2}, "sd3": {0, 1}, "wan": {1}}[name]
    layers = (len(drawn) + len(gone)) // 2
    whole, behind = drawn[:layers], drawn[layers:]
    assert not any(torch.equal(one, other) for one, other in itertools.pairwise(whole))
    left = [one for place, one in enumerate(whole) if place not in gone]
    assert len(left) == len(behind) and all(map(torch.equal, behind, left))
    assert numbers == [*range(layers), *(place for place in range(layers) if place not in gone)]  # of the map


def test_a_skipped_block_counts_as_often_as_it_is_merged(tome, merged_layers, monkeypatch):
    """Of the two attentions of SD3.5 medium's first blocks merging may pay in one alone."""
    given = host.pack_module("dit_auto").Given
    monkeypatch.setattr(host.pack_module("dit").DiTCall, "_decision", lambda self, call, start: given(start > 0))
    config = {"depth": 3, "context_embedder_config": EMBEDDER, "x_block_self_attn_layers": [0, 1]}
    model = tome(dit_host.small("sd3", **config), ratio=0.5)
    dit_host.sample(model, "sd3", steps=1, cfg=1.0)
    whole = [layer[0].choice[0] for layer in merged_layers]
    merged_layers.clear()
    model.set_model_patch_replace(lambda args, extra: args, "dit", "double_block", 1)
    dit_host.sample(model, "sd3", steps=1, cfg=1.0)
    assert len(whole) == 3 and not torch.equal(whole[1], whole[2])
    assert all(torch.equal(layer[0].choice[0], one) for layer, one in zip(merged_layers, whole[::2], strict=True))


@pytest.mark.parametrize("tome_first", [True, False], ids=["tome first", "tome last"])
def test_no_keyword_of_tomes_reaches_other_wrappers(dit, tome, tome_first):
    """They may take the model's own keywords alone. (Compiled models need one: test_dit_compile.py.)"""
    flux, seen = dit("flux"), []

    def watched(model):
        model = model.clone()

        def wrapper(executor, *args, **kwargs):
            seen.append(set(kwargs))
            return executor(*args, **kwargs)

        model.add_wrapper_with_key("diffusion_model", "other", wrapper)
        return model

    call(watched(flux), "flux")
    merged = call(watched(tome(flux)) if tome_first else tome(watched(flux)), "flux")
    assert len(seen) == 2 and seen[0] == seen[1]
    assert torch.equal(merged, call(tome(flux), "flux"))


def test_attentions_that_do_not_come_to_tome(tome, comfy_nodes, monkeypatch, caplog):
    """Another node's attention in the place of the model's own, which asks no override (RES4LYF, RadialAttn)."""
    import comfy.ldm.wan.model
    from comfy.ldm.modules import attention

    raw = attention.attention_pytorch.__wrapped__
    monkeypatch.setattr(comfy.ldm.wan.model, "optimized_attention", raw)
    model = dit_host.small("wan")
    recorded, record = comfy_nodes["ToMeRecord"].execute(model=tome(model)).result
    host.forget_log()
    with caplog.at_level(logging.INFO, logger="ToMe"):
        dit_host.sample(recorded, "wan", steps=2)
    reason = (
        "no attention of the model reached ToMe: another node has replaced them, or this ComfyUI is too old to pass "
        "them on"
    )
    assert log(caplog) == [f"[ToMe] nothing was merged in this sampling: {reason} (Wan)"]
    told = record.run().tally.report()
    assert told.merged_steps == 0 and [layer.reason for layer in told.layers] == [reason]


@pytest.mark.parametrize("name", ["cosmos", "anima", "flux", "chroma", "radiance", "qwen", "wan"])
def test_a_comfyui_that_tells_no_numbers_of_blocks(tome, comfy_nodes, name):
    """Cosmos-Predict2 and Anima up to ComfyUI 0.27, the others up to 0.3.64 at least."""
    model = dit_host.small(name)
    expected, plain = call(tome(model), name), call(model, name)

    def forget(module, args, kwargs):
        kwargs["transformer_options"] = {
            key: value for key, value in kwargs["transformer_options"].items() if key != "block_index"
        }
        return args, kwargs

    unet = model.model.diffusion_model
    parts = ("blocks", "double_blocks", "single_blocks", "transformer_blocks")
    for block in (block for part in parts for block in getattr(unet, part, ())):
        block.register_forward_pre_hook(forget, with_kwargs=True)
    assert torch.equal(call(tome(model), name), expected) and not torch.equal(expected, plain)


def test_models_of_a_comfyui_that_lack_newer_attributes(comfy_nodes):
    """ComfyUI 0.3.64's Lumina 2 fills nothing up, its Stable Audio subtracts nothing: that must not end a sampling."""
    tokens, facts = host.pack_module("dit_tokens"), types.SimpleNamespace
    assert tokens.padding(facts(), {}, (3, 5)) == 0
    assert tokens.padding(facts(pad_tokens_multiple=32), {}, (3, 5)) == 17

    def audio(**told):
        return facts(transformer=facts(layers=[facts(self_attn=facts(**told))]))

    assert [tokens.calls_of_stable_audio(m) for m in (audio(), audio(differential=True))] == [1, 2]


@pytest.mark.parametrize(
    ("options", "reason", "change"),
    [
        (
            {"min_tokens": 2048},
            "fewer than min tokens 2048 (8x12 tokens)",
            "make a larger picture, or lower min tokens",
        ),
        (
            {"start": 0.9},
            "no step of this sampling lies between start 0.9 and end 1",
            "lower start, raise end or take more steps",
        ),
        ({"ratio": 0.001}, "the ratio takes away no whole token (Flux)", "raise the ratio"),
    ],
)
def test_why_nothing_is_merged(dit, tome, caplog, options, reason, change):
    plain = dit_host.sample(dit("flux"), "flux", steps=2)
    with caplog.at_level(logging.INFO, logger="ToMe"):
        assert torch.equal(dit_host.sample(tome(dit("flux"), **options), "flux", steps=2), plain)
    assert log(caplog) == [f"[ToMe] nothing was merged in this sampling: {reason}. To change that: {change}"]
    caplog.clear()
    with caplog.at_level(logging.INFO, logger="ToMe"):
        dit_host.sample(tome(dit("flux")), "flux", steps=2)
    assert not [line for line in log(caplog) if "nothing was merged" in line]
