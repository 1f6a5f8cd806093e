"""transformers' ViT, DeiT, ViT-MSN, DINOv2 and DINOv3, and padded inputs of all towers that take them."""

from __future__ import annotations

import pytest
import torch

import shared_tome.vit as vit

from . import reference
from .test_served import VISION, apart, hooks, tensors

transformers = pytest.importorskip("transformers", reason="transformers is not installed, see requirements/test.txt")
timm = pytest.importorskip("timm", reason="timm is not installed, see requirements/test.txt")

# Prefix tokens, and what makes a small model of 5x5 patches.
FAMILIES = {
    "ViT": (1, {}),
    "DeiT": (2, {}),
    "ViTMSN": (1, {}),
    "Dinov2": (1, {"layerscale_value": 0.7}),
    "Dinov2WithRegisters": (4, {"num_register_tokens": 3, "layerscale_value": 0.7}),
    "DINOv3ViT": (3, {"num_register_tokens": 2, "layerscale_value": 0.7}),
}
SWIGLU = {"Dinov2": {"use_swiglu_ffn": True}, "DINOv3ViT": {"use_gated_mlp": True}}


def make(family, kind="Model", **more):
    """In float64, with attention that tells tokens apart."""
    config = getattr(transformers, f"{family}Config")(**{**VISION, **FAMILIES[family][1], **more})
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = getattr(transformers, f"{family}{kind}")(config).double().eval()
        for name, weight in model.named_parameters():
            if name.endswith(("q_proj.weight", "k_proj.weight")):
                weight.data *= 8
            elif weight.dim() > 1:
                weight.data.normal_(std=0.3 if "embed" in name or "token" in name else weight[0].numel() ** -0.5)
    return model


def pixels(height=40, width=40):
    return torch.randn(2, 3, height, width, generator=torch.Generator().manual_seed(1)).double()


def layers_of(model):
    return next(m for m in model.modules() if isinstance(m, torch.nn.ModuleList))


def parts(layer):
    """For the reference: the layer's own modules, put together as the paper has it."""
    attention, heads = layer.attention, VISION["num_attention_heads"]
    first = getattr(layer, "norm1", None) or layer.layernorm_before
    second = getattr(layer, "norm2", None) or layer.layernorm_after

    def scaled(name, x):
        return getattr(layer, name)(x) if hasattr(layer, name) else x

    def qkv(x):
        x = first(x)
        return tuple(
            project(x).unflatten(-1, (heads, -1))[0].transpose(0, 1)
            for project in (attention.q_proj, attention.k_proj, attention.v_proj)
        )

    return (
        qkv,
        lambda x: scaled("layer_scale1", attention.o_proj(x)),
        lambda x: scaled("layer_scale2", layer.mlp(second(x))),
    )


def turn_of(model, x, prefix):
    """DINOv3's rotation as loops: each token by the mean of the turns of the patches that it stands for."""
    if not hasattr(model, "rope_embeddings"):
        return None
    cos, sin = model.rope_embeddings(x)  # [25, d]

    def turn(heads, members):
        out = []
        for place, group in enumerate(members):
            token = heads[:, place]  # [H, d]
            if group[0] < prefix:
                out.append(token)
                continue
            half = token.shape[-1] // 2
            beside = torch.cat((-token[:, half:], token[:, :half]), dim=-1)
            turned = [token * cos[patch - prefix] + beside * sin[patch - prefix] for patch in group]
            out.append(sum(turned) / len(turned))
        return torch.stack(out, dim=1)

    return turn


@torch.no_grad()
@pytest.mark.parametrize("rs", [[3] * 4, [0, 8, 0, 2]], ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_equals_the_papers_loops(family, rs):
    prefix = FAMILIES[family][0]
    for more in ({}, SWIGLU.get(family, {})):
        model, x = make(family, **more), pixels()
        layers, entered, left = layers_of(model), [], []
        handle = layers[0].register_forward_pre_hook(lambda m, args, entered=entered: entered.append(args[0].clone()))
        before = model(x)
        handle.remove()
        for proportional in (True, False):
            vit.apply_patch(model, rs, proportional=proportional, trace=True)
            handle = layers[-1].register_forward_hook(lambda m, args, out, left=left: left.append(out))
            after = model(x)
            handle.remove()
            trace, found = vit.trace(model), left.pop()
            for row in range(2):
                tokens, members, counts = reference.run_blocks(
                    layers, entered[0][row], rs, prefix, proportional, parts, turn_of(model, x, prefix)
                )
                expected = reference.spread(tokens, members)
                assert (found[row] - expected).abs().max() < 1e-6 * expected.abs().max()
                assert trace.counts == tuple(counts)
                ours = [(trace.sources[row] == place).nonzero().flatten().tolist() for place in range(counts[-1])]
                assert ours == members
            assert after.last_hidden_state.shape == before.last_hidden_state.shape == (2, prefix + 25, 32)
            assert (after.last_hidden_state - before.last_hidden_state).abs().max() > 1e-3
            vit.remove_patch(model)
            assert torch.equal(model(x).last_hidden_state, before.last_hidden_state) and hooks(model) == 0


@torch.no_grad()
@pytest.mark.parametrize("family", ["DINOv3ViT", "Dinov2"])
def test_other_sizes_have_other_places(family):
    model, x, prefix = make(family), pixels(48, 32), FAMILIES[family][0]
    layers, entered = layers_of(model), []
    handle = layers[0].register_forward_pre_hook(lambda m, args: entered.append(args[0].clone()))
    model(x)
    handle.remove()
    vit.apply_patch(model, 4, restore="none")
    class_token = model(x).last_hidden_state[:, 0]
    vit.apply_patch(model, 4)
    found = model(x).last_hidden_state
    torch.testing.assert_close(class_token, found[:, 0])
    for row in range(2):
        turn = turn_of(model, x, prefix)
        tokens, members, _ = reference.run_blocks(layers, entered[0][row], [4] * 4, prefix, True, parts, turn)
        norm = getattr(model, "norm", None) or model.layernorm
        torch.testing.assert_close(found[row], norm(reference.spread(tokens, members)))


@torch.no_grad()
@pytest.mark.parametrize(
    ("family", "kind"),
    [
        ("ViT", "ForImageClassification"),
        ("DeiT", "ForImageClassification"),
        ("DeiT", "ForImageClassificationWithTeacher"),
        ("ViTMSN", "ForImageClassification"),
        ("Dinov2", "ForImageClassification"),
        ("Dinov2WithRegisters", "ForImageClassification"),
        ("ViT", "ForMaskedImageModeling"),
    ],
)
def test_heads(family, kind):
    model = make(family, kind)
    before = tensors(model(pixels()))
    vit.apply_patch(model, 0)
    assert apart(tensors(model(pixels())), before) < 1e-12
    vit.apply_patch(model, 4)
    assert apart(tensors(model(pixels())), before) > 1e-4
    vit.remove_patch(model)
    assert apart(tensors(model(pixels())), before) == 0.0


@torch.no_grad()
@pytest.mark.parametrize("family", ["Dinov2", "Dinov2WithRegisters", "DINOv3ViT"])
def test_backbones_read_the_tokens_between_the_blocks(family):
    model = make(family, "Backbone", out_features=["stage2", "stage4"])
    with pytest.raises(ValueError, match=f"{family}Backbone reads the tokens between the blocks"):
        vit.apply_patch(model, 4)
    before = model(pixels()).feature_maps
    vit.apply_patch(model, 4, restore="all")
    after = model(pixels()).feature_maps
    assert all(a.shape == b.shape and (a - b).abs().max() > 1e-3 for a, b in zip(after, before, strict=True))


@pytest.mark.parametrize("family", ["ViT", "DINOv3ViT"])
def test_gradients_flow_and_dropout_is_the_hosts(family):
    more = {"hidden_dropout_prob": 0.5} if family == "ViT" else {"drop_path_rate": 0.5}
    model = make(family, **more).train()

    def loss():
        torch.manual_seed(3)
        return model(pixels()).last_hidden_state.square().sum()

    vit.apply_patch(model, 4)
    first = loss()
    first.backward()
    assert all(p.grad.isfinite().all() for p in layers_of(model).parameters())
    assert torch.equal(loss(), first)
    branch = layers_of(model)[-1]
    zero = branch.dropout if family == "ViT" else branch.drop_path
    seen = []
    zero.register_forward_hook(lambda m, args, out: seen.append((out == 0).double().mean()), prepend=True)
    loss()
    assert len(seen) == 2 and all(0.2 < float(share) < 0.8 or float(share) in (0.0, 0.5, 1.0) for share in seen)


# --- Padded inputs ----------------------------------------------------------------------------------------------------

HIDDEN = torch.tensor([19, 14])  # from which patch on each image of 25 is padding
RS = [0, 6, 4, 3]


def valid():
    return torch.arange(25) < HIDDEN[:, None]


class Padded:
    """A small model in float64 without places, and its outputs for patches [2, 25, 3 * 8 * 8]. prefix: its tokens."""

    def __init__(self, name):
        self.name = name
        with torch.random.fork_rng():
            torch.manual_seed(0)
            if name == "naflex":
                self.model = timm.create_model(
                    "naflexvit_base_patch16_map", depth=4, embed_dim=32, num_heads=2, num_classes=5, patch_size=8,
                )  # fmt: skip
            elif name == "naflex mean":
                self.model = timm.create_model(
                    "naflexvit_base_patch16_gap", depth=4, embed_dim=32, num_heads=2, num_classes=5, patch_size=8,
                )  # fmt: skip
            elif name == "siglip2":
                config = transformers.Siglip2VisionConfig(**{**VISION, "num_patches": 25})
                self.model = transformers.Siglip2VisionModel(config)
            else:
                config = getattr(transformers, f"{name}Config")(**{**VISION, **FAMILIES[name][1]})
                self.model = getattr(transformers, f"{name}Model")(config)
            for parameter, weight in self.model.named_parameters():
                if "pos_embed" in parameter or "position_embedding" in parameter:
                    weight.data.zero_()
                elif weight.dim() > 1:
                    weight.data.normal_(std=weight[0].numel() ** -0.5)
        self.model.double().eval()
        self.prefix = FAMILIES[name][0] if name in FAMILIES else getattr(self.model, "num_prefix_tokens", 0)

    @torch.no_grad()
    def __call__(self, patches):
        if self.name.startswith("naflex"):
            coord = torch.stack((torch.arange(25) // 5, torch.arange(25) % 5), dim=-1).expand(2, -1, -1)
            given = {"patches": patches, "patch_coord": coord, "patch_valid": valid()}
            out = self.model.forward_features(**given)
            tokens = out["patches"] if isinstance(out, dict) else out
            head = self.model(given)
        elif self.name == "siglip2":
            out = self.model(patches, valid().long(), torch.tensor([[5, 5], [5, 5]]))
            tokens, head = out.last_hidden_state, out.pooler_output
        else:
            image = (
                patches.unflatten(1, (5, 5)).unflatten(-1, (3, 8, 8)).permute(0, 3, 1, 4, 2, 5).flatten(4).flatten(2, 3)
            )
            mask = torch.cat((torch.ones(2, self.prefix), valid()), dim=1)
            out = self.model(image, attention_mask=mask)
            tokens, head = out.last_hidden_state, out.last_hidden_state[:, : self.prefix]
        if tokens.shape[1] == 25 + self.prefix:
            tokens = tokens[:, self.prefix :]
        return {"tokens": tokens[valid()], "head": head}


def looks():
    """[2, 25]: three looks of patches in stripes; what is hidden has one of its own."""
    stripes = (torch.arange(25) // 6 % 3).expand(2, -1)
    return torch.where(valid(), stripes, 3)


def patches_of(looks):
    each = torch.randn(4, 192, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return each[looks]


PADDED = ["naflex", "naflex mean"] * bool(timm.list_models("naflexvit*"))
PADDED += ["siglip2", "ViT", "DeiT", "Dinov2", "Dinov2WithRegisters"]


@pytest.mark.parametrize("proportional", [True, False])
@pytest.mark.parametrize("name", PADDED)
def test_padding_is_hidden(name, proportional):
    """Equal patches merge without a trace, whatever stands in the padding."""
    padded, x = Padded(name), patches_of(looks())
    before = padded(x)
    vit.apply_patch(padded.model, 0, proportional=proportional)
    assert apart(padded(x), before) < 1e-12
    vit.apply_patch(padded.model, RS, proportional=proportional, trace=True)
    after, trace = padded(x), vit.trace(padded.model)
    assert (apart(after, before) < 1e-6) == proportional
    assert [trace.counts[0] - count for count in trace.counts] == [0, 6, 10, 13]
    assert trace.sizes.sum(1).tolist() == [padded.prefix + int(count) for count in HIDDEN]
    x[~valid()] = 7.0
    assert apart(padded(x), after) < 1e-9
    vit.remove_patch(padded.model)
    assert apart(padded(x), before) < 1e-12 and hooks(padded.model) == 0


@pytest.mark.parametrize("name", PADDED)
def test_padding_goes_first(name):
    """Two of it become one before any patch does; in the second image there is more than enough of it."""
    padded = Padded(name)
    vit.apply_patch(padded.model, [0, 5, 0, 0], trace=True)
    padded(torch.randn(2, 25, 192, generator=torch.Generator().manual_seed(2), dtype=torch.float64))
    trace = vit.trace(padded.model)
    for row, count in enumerate(HIDDEN):
        step = trace.sources[row, padded.prefix :]
        seen, hidden = step[:count], step[count:]
        assert not set(seen.tolist()) & set(hidden.tolist())
        assert len(hidden) - len(hidden.unique()) == min(5, len(hidden) // 2)
        assert len(seen) - len(seen.unique()) == 5 - min(5, len(hidden) // 2)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(dtype):
    padded = Padded("ViT")
    padded.model.to(dtype)
    vit.apply_patch(padded.model, RS)
    x = patches_of(looks()).to(dtype)
    other = x.clone()
    other[~valid()] = 7.0
    found = padded(x)
    assert all(value.isfinite().all() for value in found.values())
    assert apart(padded(other), found) < 1e-2


def test_merged_tokens_do_not_leave_a_padded_tower():
    padded = Padded("ViT")
    vit.apply_patch(padded.model, RS, restore="none")
    with pytest.raises(ValueError, match="padded inputs need restore 'last' or 'all'"):
        padded(patches_of(looks()))


@pytest.mark.parametrize("kind", ["causal", "weighs", "heads"])
def test_a_mask_of_more_than_padding_is_told(kind):
    model = vit.apply_patch(make("ViT"), 2)
    mask = torch.ones(26, 26).tril().bool() if kind == "causal" else torch.zeros(26, dtype=torch.float64)
    mask = mask.expand(2, 2 if kind == "heads" else 1, 26, 26).clone()
    if kind == "weighs":
        mask[..., 4] = -1.0
    with torch.no_grad(), pytest.raises(ValueError, match="a mask of more than padding"):
        layers_of(model)[0](torch.randn(2, 26, 32).double(), mask)
