"""vit.apply_patch on transformers' CLIP and SigLIP: the paper's loops, all outputs, the text tower untouched."""

from __future__ import annotations

import pytest
import torch

import shared_tome.vit as vit

from . import reference

transformers = pytest.importorskip("transformers", reason="transformers is not installed, see requirements/test.txt")

VISION = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 4, "num_attention_heads": 2, "image_size": 40,
    "patch_size": 8, "projection_dim": 16,
}  # fmt: skip
TEXT = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 50,
    "max_position_embeddings": 12, "projection_size": 32,
}  # fmt: skip


def make(name, **more):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        if name == "clip":
            model = transformers.CLIPVisionModelWithProjection(transformers.CLIPVisionConfig(**VISION, **more))
        elif name == "siglip":
            model = transformers.SiglipVisionModel(transformers.SiglipVisionConfig(**VISION, **more))
        elif name == "clip_both":
            model = transformers.CLIPModel(transformers.CLIPConfig(text_config=TEXT, vision_config=VISION))
        else:
            model = transformers.SiglipModel(transformers.SiglipConfig(text_config=TEXT, vision_config=VISION))
        for parameter, weight in model.named_parameters():
            if parameter.endswith(("q_proj.weight", "k_proj.weight")):
                weight.data *= 6
            elif "embed" in parameter and weight.dim() < 4:
                weight.data = torch.randn_like(weight)
    return model.eval()


def pixels(dtype=torch.float32):
    return torch.randn(2, 3, 40, 40, generator=torch.Generator().manual_seed(1)).to(dtype)


def parts(layer):
    attn = layer.self_attn

    def qkv(x):
        x = layer.layer_norm1(x)
        return tuple(
            project(x).unflatten(-1, (attn.num_heads, -1))[0].transpose(0, 1)
            for project in (attn.q_proj, attn.k_proj, attn.v_proj)
        )

    return qkv, attn.out_proj, lambda x: layer.mlp(layer.layer_norm2(x))


def encoder(model):
    return next(m for m in model.modules() if isinstance(getattr(m, "layers", None), torch.nn.ModuleList))


@torch.no_grad()
@pytest.mark.parametrize("rs", [[3] * 4, [0, 8, 0, 2]], ids=str)
@pytest.mark.parametrize("name", ["clip", "siglip"])
def test_equals_the_papers_loops(name, rs):
    model = make(name).double()
    layers, entered = encoder(model).layers, []
    handle = layers[0].register_forward_pre_hook(lambda m, args: entered.append(args[0].clone()))
    before = model(pixels(torch.float64))
    handle.remove()
    vit.apply_patch(model, rs, restore="all", trace=True)
    left = []
    layers[-1].register_forward_hook(lambda m, args, out: left.append(out[0] if isinstance(out, tuple) else out))
    found = model(pixels(torch.float64), output_hidden_states=True)
    prefix = int(name == "clip")
    for row in range(2):
        merged, members, counts = reference.run_blocks(layers, entered[0][row], rs, prefix, True, parts)
        expected = reference.spread(merged, members)
        assert (left[0][row] - expected).abs().max() < 1e-5 * expected.abs().max()
        assert vit.trace(model).counts == tuple(counts)
    assert found.last_hidden_state.shape == before.last_hidden_state.shape == (2, prefix + 25, 32)
    assert [tuple(state.shape) for state in found.hidden_states] == [(2, prefix + 25, 32)] * 5
    pooled = "image_embeds" if name == "clip" else "pooler_output"
    assert (found[pooled] - before[pooled]).abs().max() > 1e-4
    layers[-1]._forward_hooks.clear()
    vit.remove_patch(model)
    after = model(pixels(torch.float64))
    assert torch.equal(after.last_hidden_state, before.last_hidden_state) and torch.equal(after[pooled], before[pooled])


@torch.no_grad()
@pytest.mark.parametrize("name", ["clip_both", "siglip_both"])
def test_the_text_tower_is_left_alone(name):
    model = make(name)
    ids = torch.arange(2, 14).reshape(2, 6)
    before = model(input_ids=ids, pixel_values=pixels())
    vit.apply_patch(model, 4)
    after = model(input_ids=ids, pixel_values=pixels())
    assert torch.equal(after.text_embeds, before.text_embeds)
    assert (after.image_embeds - before.image_embeds).abs().max() > 1e-4
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.text_model.modules())
    vit.remove_patch(model)
    assert torch.equal(model(input_ids=ids, pixel_values=pixels()).image_embeds, before.image_embeds)


@torch.no_grad()
def test_half_precision_stays_half():
    model = make("clip").to(torch.bfloat16)
    vit.apply_patch(model, 4, restore="none")
    out = model(pixels(torch.bfloat16))
    assert out.last_hidden_state.dtype == torch.bfloat16 and out.last_hidden_state.shape == (2, 10, 32)


def test_gradients_flow():
    model = make("siglip").train()
    vit.apply_patch(model, 4)
    model(pixels()).pooler_output.square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    assert encoder(model).layers[0].self_attn.q_proj.weight.grad.abs().max() > 0


def test_what_cannot_be_served_is_told():
    with pytest.raises(ValueError, match="'sdpa', this model has 'eager'"):
        vit.apply_patch(make("clip", attn_implementation="eager"), 2)
    model = vit.apply_patch(make("clip"), 2)
    model.gradient_checkpointing_enable()
    with pytest.raises(ValueError, match="gradient checkpointing"):
        model.train()(pixels())
    model.gradient_checkpointing_disable()
    model.set_attn_implementation("eager")
    with pytest.raises(RuntimeError, match="attn_implementation='sdpa'"):
        model.eval()(pixels())


# Config and model of each listed layer's vision tower in transformers.
TOWERS = (
    "CLIPVision SiglipVision AltCLIPVision ChineseCLIPVision MetaClip2Vision CLIPSegVision OwlViTVision Owlv2Vision "
    "Blip2Vision InstructBlipVision JanusVision"
).split()


@torch.no_grad()
@pytest.mark.parametrize("name", TOWERS)
def test_every_listed_tower_is_merged(name):
    options = {key: value for key, value in VISION.items() if key != "projection_dim"}
    model = getattr(transformers, f"{name}Model")(getattr(transformers, f"{name}Config")(**options)).eval()
    before = model(pixel_values=pixels()).last_hidden_state
    vit.apply_patch(model, 0)
    assert torch.equal(model(pixel_values=pixels()).last_hidden_state, before)
    vit.apply_patch(model, 3, trace=True)
    after = model(pixel_values=pixels()).last_hidden_state
    counts = vit.trace(model).counts
    assert after.shape == before.shape and not torch.equal(after, before)
    assert [counts[0] - count for count in counts] == [0, 3, 6, 9] and counts[0] == before.shape[1] - 3
    vit.remove_patch(model)
    assert torch.equal(model(pixel_values=pixels()).last_hidden_state, before)


OTHERS = {
    "MLCDVision": {"num_key_value_groups": 1},  # turns keys by their place
    "XCLIPVision": {"num_frames": 2, "mit_hidden_size": 32, "mit_num_attention_heads": 2, "mit_num_hidden_layers": 1},
    "ViTMAE": {},  # keeps a random part of the patches and puts them back by their number
    "Yolos": {"image_size": [40, 40], "num_detection_tokens": 3},  # has tokens behind the patches
}


@pytest.mark.parametrize("name", OTHERS)
def test_what_is_not_listed_is_refused_by_name(name):
    options = {key: value for key, value in VISION.items() if key != "projection_dim"} | OTHERS[name]
    model = getattr(transformers, f"{name}Model")(getattr(transformers, f"{name}Config")(**options))
    with pytest.raises(ValueError, match=f"does not know {name}Model as a vision transformer. It serves timm's"):
        vit.apply_patch(model, 4)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
