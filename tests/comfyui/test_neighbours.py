"""Beside other nodes: each keeps doing what it does, in either order, and nothing crashes in mid-sampling."""

from __future__ import annotations

import functools
import logging

import pytest
import torch

from . import host
from .host import conditioning, run_node, tokens, watch

sample = functools.partial(host.sample, height=128, width=128)
FIRST = "input_blocks.1.1"
ORDERS = pytest.mark.parametrize("tome_first", [True, False], ids=["tome first", "tome last"])
# Each method and each order: a node that stands before or after meets the same hooks whatever the method.
WAYS = pytest.mark.parametrize(
    ("method", "tome_first"),
    [("sample", True), ("sample", False), ("merge", True), ("merge_keys", False)],
    ids=["sample, tome first", "sample, tome last", "merge, tome first", "merge_keys, tome last"],
)
DRAWN = {"own_token": False}  # keys before their projections, where they are counted
METHODS = pytest.mark.parametrize("method", ["sample", "merge", "merge_keys"])


def chain(model, tome, node, tome_first, **options):
    """ToMe and another node, in either order."""
    return node(tome(model, **options)) if tome_first else tome(node(model), **options)


@pytest.fixture(scope="module")
def before():
    """Pictures made before ToMe was on, by what made them: the model alone, or with the node of a test."""
    return {}


@pytest.fixture
def check(sd15, before, request):
    """Both on: like neither alone, the same on repeat, and the model as before any of a test's cases."""
    node = request.function.__name__, request.node.callspec.params.get("factor")

    def run(node_alone, both):
        for name, model in (("plain", sd15), (node, node_alone)):
            if name not in before:
                before[name] = sample(model)
        made = sample(both)
        assert made.isfinite().all()
        assert torch.equal(sample(both), made)
        assert not torch.equal(made, before[node])
        assert torch.equal(sample(node_alone), before[node])
        assert torch.equal(sample(sd15), before["plain"])

    return run


@WAYS
def test_perturbed_attention_guidance(sd15, tome, check, comfy_nodes, tome_first, method):
    def pag(model):
        return run_node(comfy_nodes["PerturbedAttentionGuidance"], model=model, scale=3.0)

    check(pag(sd15), chain(sd15, tome, pag, tome_first, method=method))


@WAYS
def test_replaced_attention_is_left_alone(sd15, tome, check, tome_first, method):
    """PAG hands the values on as they are: the block that it replaces must see all of them, in order."""
    seen = []

    def replace(q, k, v, extra_options):
        seen.append((q.shape[1], v.shape[1]))
        return v

    def node(model):
        model = model.clone()
        model.set_model_attn1_replace(replace, "middle", 0)
        return model

    check(node(sd15), chain(sd15, tome, node, tome_first, method=method))
    assert set(seen) == {(16, 16)}


@pytest.mark.parametrize("method", ["sample", "merge_keys"])
def test_layers_behind_a_replaced_one_keep_their_choices(tome, method):
    """PAG replaces a layer in one of two calls and scales up their difference: it is not to be one of draws."""
    unet, blocks = host.pack_module("unet"), (("input", 1), ("middle", 0), ("output", 0))
    config = unet.ToMeConfig(method=method, ratio=0.5, levels="0", min_tokens=0, own_token=False)
    x = torch.randn(1, 64, 8, generator=torch.Generator().manual_seed(0))

    def keys(options):
        call, found = unet.UNetCall(unet.ModelCall(config, (8, 8), torch.device("cpu")), options), {}
        patches = call.options["patches"]
        for block in blocks:
            extra = {"block": block, "block_index": 0, "activations_shape": [1, 8, 8, 8], "n_heads": 1}
            query, found[block], _ = patches["attn1_patch"][-1](x, x, x, extra)
            patches["attn1_output_patch"][0](query, extra)
        return [found[block] for block in blocks]

    first, middle, last = keys({})
    assert not torch.equal(middle, last)
    whole = keys({"patches_replace": {"attn1": {("middle", 0): None}}})
    assert torch.equal(whole[0], first) and torch.equal(whole[1], x) and torch.equal(whole[2], last)


@WAYS
def test_self_attention_guidance(sd15, tome, check, comfy_nodes, tome_first, method):
    def sag(model):
        return run_node(comfy_nodes["SelfAttentionGuidance"], model=model, scale=0.5, blur_sigma=2.0)

    check(sag(sd15), chain(sd15, tome, sag, tome_first, method=method))


@WAYS
def test_hypertile(sd15, tome, comfy_nodes, tome_first, method, caplog):
    """HyperTile cuts the queries of the finest level into tiles: that level is its own, the others are merged."""

    def tile(model):
        return run_node(
            comfy_nodes["HyperTile"], model=model, tile_size=128, swap_size=1, max_depth=0, scale_depth=False
        )

    # Its tiles keep the keys in whole rows; a tile of 16x16 latents in a picture of 64x64.
    big = {"height": 512, "width": 512, "steps": 1}
    tiled, both = tile(sd15), chain(sd15, tome, tile, tome_first, method=method, **DRAWN)
    host.forget_log()
    with caplog.at_level(logging.INFO, logger="ToMe"), watch(sd15) as seen:
        made = sample(both, **big)
    assert caplog.text.count("another node has tiled or merged them") == 1
    with watch(sd15) as alone:
        sample(tiled, **big)
    assert made.isfinite().all()
    assert tokens(seen, "attn1.to_q")[FIRST] == tokens(alone, "attn1.to_q")[FIRST] != {4096}
    assert tokens(seen, "attn1.to_k")[FIRST] == tokens(alone, "attn1.to_k")[FIRST]
    assert tokens(seen, "attn1.to_k")["input_blocks.3.1"] == {512}


@WAYS
@pytest.mark.parametrize("factor", [1.2, 2.0])
def test_deep_shrink(sd15, tome, check, comfy_nodes, tome_first, method, factor):
    def shrink(model):
        return run_node(
            comfy_nodes["PatchModelAddDownscale"], model=model, block_number=3, downscale_factor=factor,
            start_percent=0.0, end_percent=1.0, downscale_after_skip=True, downscale_method="bicubic",
            upscale_method="bicubic",
        )  # fmt: skip

    check(shrink(sd15), chain(sd15, tome, shrink, tome_first, method=method))
    with watch(sd15) as seen:
        sample(chain(sd15, tome, shrink, tome_first, method=method, **DRAWN), steps=1)
    keys = tokens(seen, "attn1.to_k")
    assert keys[FIRST] == {128}
    shrunk = round(8 / factor)  # block 3 halves the 16 rows and then shrinks; the middle halves again
    half = (shrunk + 1) // 2
    assert keys["middle_block.1"] == {half * half - half * half // 2}


@WAYS
def test_freeu(sd15, tome, check, comfy_nodes, tome_first, method):
    def freeu(model):
        return run_node(comfy_nodes["FreeU_V2"], model=model, b1=1.3, b2=1.4, s1=0.9, s2=0.2)

    # FreeU acts on 4 and 2 times the model's channels; the small U-Net has both.
    check(freeu(sd15), chain(sd15, tome, freeu, tome_first, method=method))


@WAYS
def test_context_windows(sd15, tome, check, comfy_nodes, tome_first, method):
    node = comfy_nodes["ContextWindowsManual"]
    options = dict(
        context_length=12, context_overlap=4, context_schedule="standard_static", context_stride=1, closed_loop=False,
        fuse_method="pyramid", dim=3, freenoise=False, causal_window_fix=False,
    )  # fmt: skip
    known = {one.id for one in node.define_schema().inputs}  # older ones have no causal_window_fix

    def windows(model):
        return run_node(node, model=model, **{name: value for name, value in options.items() if name in known})

    check(windows(sd15), chain(sd15, tome, windows, tome_first, method=method))
    with watch(sd15) as seen:
        sample(chain(sd15, tome, windows, tome_first, method=method, **DRAWN), steps=1)
    assert tokens(seen, "attn1.to_k")[FIRST] == {16 * 12 // 2}


@WAYS
def test_lora(sd15, tome, check, tome_first, method):
    key = "diffusion_model.input_blocks.1.1.transformer_blocks.0.attn1.to_k.weight"
    shape = sd15.model.diffusion_model.input_blocks[1][1].transformer_blocks[0].attn1.to_k.weight.shape
    change = torch.randn(shape, generator=torch.Generator().manual_seed(0))

    def lora(model):
        model = model.clone()
        assert model.add_patches({key: ("diff", (change,))}, 0.5)
        return model

    check(lora(sd15), chain(sd15, tome, lora, tome_first, method=method))


@METHODS
def test_control_network_is_never_merged(sd15, tome, method):
    import comfy.cldm.cldm
    import comfy.controlnet
    import comfy.ops
    import nodes

    control = comfy.cldm.cldm.ControlNet(
        image_size=32, in_channels=4, model_channels=32, hint_channels=3, num_res_blocks=[1, 1, 1],
        channel_mult=[1, 2, 2], transformer_depth=[1, 1, 1], transformer_depth_middle=1, num_head_channels=32,
        use_spatial_transformer=True, context_dim=64, legacy=False, operations=comfy.ops.disable_weight_init,
    )  # fmt: skip
    host.fill(control, seed=3)
    net = comfy.controlnet.ControlNet(control, load_device=torch.device("cpu"))
    image = torch.rand(1, 128, 128, 3, generator=torch.Generator().manual_seed(0))
    positive, negative = nodes.ControlNetApplyAdvanced().apply_controlnet(
        conditioning(1), conditioning(2), net, image, 1.0, 0.0, 1.0
    )
    counts = []
    first = control.input_blocks[1][1].transformer_blocks[0].attn1.to_k
    handle = first.register_forward_hook(lambda _m, args, _out: counts.append(args[0].shape[1]))
    try:
        with watch(sd15) as seen:
            merged = sample(tome(sd15, method=method, **DRAWN), positive=positive, negative=negative)
    finally:
        handle.remove()
    assert counts and set(counts) == {256}
    assert tokens(seen, "attn1.to_k")[FIRST] == {128}
    assert not torch.equal(merged, sample(tome(sd15, method=method, **DRAWN)))
    assert not torch.equal(merged, sample(sd15, positive=positive, negative=negative))


@WAYS
def test_another_attention_override_is_called(sd15, tome, tome_first, method):
    """SageAttention and its kind take the one slot there is."""
    called = []

    def override(func, *args, **kwargs):
        called.append(args[0].shape[1])
        return func(*args, **kwargs)

    def node(model):
        model = model.clone()
        model.model_options["transformer_options"]["optimized_attention_override"] = override
        return model

    alone = sample(tome(sd15, method=method, own_token=False))  # for the override queries keep no own tokens
    made = sample(chain(sd15, tome, node, tome_first, method=method))
    if method == "sample":
        assert torch.equal(made, alone)
    else:  # keys with weights: queries are scaled beforehand, as nobody knows whether the override minds `scale`
        torch.testing.assert_close(made, alone, rtol=1e-4, atol=2e-3)
    assert called


@ORDERS
def test_keys_from_another_image_are_left_alone(sd15, tome, tome_first, caplog):
    """Reference nodes put further tokens beside the image's own; they are not on its grid."""

    def longer(q, k, v, extra_options):
        return q, torch.cat([k, k], dim=1), torch.cat([v, v], dim=1)

    def node(model):
        model = model.clone()
        model.set_model_attn1_patch(longer)
        return model

    host.forget_log()
    with caplog.at_level(logging.INFO, logger="ToMe"):
        assert torch.equal(sample(chain(sd15, tome, node, tome_first)), sample(node(sd15)))
    assert [record.message for record in caplog.records if record.name == "ToMe"] == [
        "[ToMe] ToMe skips a layer that does not attend to its own tokens (input block 1)",
        "[ToMe] nothing was merged in this sampling: ToMe skips a layer that does not attend to its own tokens "
        "(input block 1, input block 3, input block 5, middle block 0, output block 0, output block 1 and 4 more)",
    ]


def test_core_node_after_ours_is_an_error_before_the_first_step(sd15, tome, comfy_nodes):
    """In this order the node cannot know; the sampler's start is the first to see both."""
    both = run_node(comfy_nodes["TomePatchModel"], model=tome(sd15), ratio=0.3)
    with pytest.raises(ValueError, match="merged by ToMe and by ComfyUI's own node TomePatchModel too"):
        sample(both)


@pytest.mark.parametrize("name", ["customextras", "my_customer_pack", "nodes_customedits", "comfy_todo.nodes"])
def test_a_pack_whose_name_looks_like_ours_is_accepted(sd15, tome, name):
    def patch(q, k, v, extra_options):
        return q, k, v

    patch.__module__ = f"custom_nodes.{name}"
    other = sd15.clone()
    other.set_model_attn1_patch(patch)
    assert tome(other).get_wrappers("apply_model", "ToMe")
    patch.__module__ = "custom_nodes.my-tome.nodes_tome"
    with pytest.raises(ValueError, match="a node of custom_nodes.my-tome.nodes_tome"):
        tome(other)


def test_core_node_before_ours_is_an_error(sd15, tome, comfy_nodes):
    merged = run_node(comfy_nodes["TomePatchModel"], model=sd15, ratio=0.3)
    with pytest.raises(ValueError, match="already merged by ComfyUI's own node TomePatchModel"):
        tome(merged)


def test_two_of_ours_are_an_error(sd15, tome):
    with pytest.raises(ValueError, match="already merged by another ToMe node"):
        tome(tome(sd15))
    tome(tome(sd15, ratio=0.0))  # one that does nothing is none


def test_a_model_without_a_unet_is_an_error(comfy_nodes, tome):
    import comfy.ldm.flux.model
    import comfy.model_patcher

    class Flux(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.diffusion_model = torch.nn.Linear(1, 1)

    model = comfy.model_patcher.ModelPatcher(Flux(), torch.device("cpu"), torch.device("cpu"))
    with pytest.raises(ValueError, match=r"serves models with a U-Net \(SD 1.x.*this one is Flux"):
        tome(model)


def test_attention_over_time_is_left_alone(comfy_nodes, tome):
    """SVD's time_stack calls the same patches with its frames as tokens."""
    import comfy.ldm.modules.attention as attention
    import comfy.ops

    block = attention.SpatialVideoTransformer(
        32, 1, 32, depth=1, context_dim=64, timesteps=4, disable_self_attn=False, ff_in=True,
        operations=comfy.ops.disable_weight_init,
    )  # fmt: skip
    host.fill(block)
    counts = {"space": [], "time": []}
    block.transformer_blocks[0].attn1.to_k.register_forward_hook(
        lambda _m, args, _out: counts["space"].append(args[0].shape[1])
    )
    block.time_stack[0].attn1.to_k.register_forward_hook(lambda _m, args, _out: counts["time"].append(args[0].shape[1]))
    options = host.call_options({"ratio": 0.5, "min_tokens": 0}, (16, 16))
    x = torch.randn(4, 32, 16, 16, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        block(
            x, context=torch.randn(4, 7, 64), timesteps=4, image_only_indicator=torch.zeros(1, 4),
            transformer_options=options,
        )  # fmt: skip
    assert counts == {"space": [128], "time": [4]}
