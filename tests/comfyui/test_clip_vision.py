"""The node "ToMe CLIP Vision" on ComfyUI's own encoders, small and with random weights."""

from __future__ import annotations

import json
import logging
import sys
import tempfile
import threading
from pathlib import Path

import pytest
from support.made_up_gpu import MadeUpGPU

from . import host
from .host import forget_log, pack_module

NAMES = ("clip", "clip_llava", "siglip", "siglip2")


def encoder(name="clip"):
    """A ClipVisionModel of ComfyUI's with 5x5 patches."""
    import comfy.clip_vision
    import torch

    config = {
        "model_type": "siglip_vision_model" if name.startswith("siglip") else "clip_vision_model",
        "num_hidden_layers": 5, "hidden_size": 32, "num_attention_heads": 2, "intermediate_size": 64, "image_size": 40,
        "patch_size": 8, "num_channels": 3, "hidden_act": "gelu",
    }  # fmt: skip
    if name == "siglip2":
        config.update(model_type="siglip2_vision_model", num_patches=25, image_size=-1)
    if name.startswith("clip"):
        config["projection_dim"] = 16
    if name == "clip_llava":
        config["projector_type"] = "llava3"
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "config.json"
        file.write_text(json.dumps(config))  # older ones take no dict
        made = comfy.clip_vision.ClipVisionModel(str(file))
    made.model.float()
    host.fill(made.model)
    with torch.no_grad():
        for parameter, weight in made.model.named_parameters():
            if parameter.endswith(("q_proj.weight", "k_proj.weight")):
                weight *= 4
            elif "embedding" in parameter and "patch" not in parameter:
                weight.copy_(torch.randn(weight.shape, generator=torch.Generator().manual_seed(weight.numel())))
    return made


def image(seed=1):
    import torch

    return torch.rand(2, 40, 40, 3, generator=torch.Generator().manual_seed(seed))


def outputs(clip_vision, seed=1):
    """Every tensor that encode_image gives, by name."""
    import torch

    with torch.no_grad():
        out = vars(clip_vision.encode_image(image(seed)))
    return {name: value for name, value in out.items() if isinstance(value, torch.Tensor)}


@pytest.fixture
def merge(comfy_nodes):
    def apply(clip_vision, **options):
        return host.run_node(comfy_nodes["ToMeCLIPVision"], clip_vision=clip_vision, **{"ratio": 0.6, **options})

    return apply


def hooks(clip_vision):
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in clip_vision.model.modules())


def same(a, b):
    import torch

    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("name", NAMES)
def test_fewer_tokens_inside_all_of_them_outside(merge, name):
    plain = encoder(name)
    before, seen = outputs(plain), []
    for layer in plain.model.vision_model.encoder.layers:
        layer.mlp.register_forward_hook(lambda m, args, out: seen.append(out.shape[1]))
    merged = merge(plain)
    after = outputs(merged)
    prefix = int(name.startswith("clip"))
    assert seen == [prefix + 22, prefix + 19, prefix + 16, prefix + 13, prefix + 10]
    assert {key: value.shape for key, value in after.items()} == {key: value.shape for key, value in before.items()}
    assert {"last_hidden_state", "image_embeds", "penultimate_hidden_states"} <= set(after)
    for key, value in after.items():
        assert value.isfinite().all()
        error = (value - before[key]).norm() / before[key].norm()
        assert 1e-4 < error < 0.9, (key, error)
    rows = after["last_hidden_state"][0].unique(dim=0)
    assert len(rows) == prefix + 10, "merged tokens share one value"


@pytest.mark.parametrize("name", ["clip", "siglip"])
def test_equals_the_same_tower_in_transformers(merge, name):
    """The same weights in transformers under vit.apply_patch: what the node does is what is tested there."""
    import comfy.clip_model
    import torch

    transformers = pytest.importorskip("transformers")
    vit = host.pack_module("clip_vision")
    plain = encoder(name)
    sizes = {key: value for key, value in plain.config.items() if key not in ("model_type", "projector_type")}
    kind = "CLIPVision" if name == "clip" else "SiglipVision"
    other = getattr(transformers, f"{kind}Model{'WithProjection' if name == 'clip' else ''}")(
        getattr(transformers, f"{kind}Config")(**sizes, layer_norm_eps=1e-5)
    ).eval()
    weights = plain.model.state_dict()
    weights.update({key.removeprefix("vision_model."): value for key, value in weights.items()})  # either layout
    missing = other.load_state_dict(weights, strict=False).missing_keys
    assert all("head" in key for key in missing), missing
    options = vit.Options(ratio=0.6, restore="all")
    attachment = vit.VitAttachment(vit.find_tower(other), options)
    pixels = comfy.clip_model.clip_preprocess(image(), size=40, mean=plain.image_mean, std=plain.image_std)
    with torch.no_grad():
        theirs = other(pixel_values=pixels, output_hidden_states=True)
    attachment.detach()
    ours = outputs(merge(plain))
    torch.testing.assert_close(ours["penultimate_hidden_states"], theirs.hidden_states[-2], rtol=1e-4, atol=1e-4)
    if name == "clip":
        torch.testing.assert_close(ours["image_embeds"], theirs.image_embeds, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["clip", "siglip"])
def test_the_original_is_untouched(merge, name):
    plain = encoder(name)
    before = outputs(plain)
    merged = merge(plain)
    assert merged is not plain and type(merged) is type(plain) and merged.patcher is plain.patcher
    assert not same(outputs(merged), before)
    assert same(outputs(plain), before) and hooks(plain) == 0
    assert same(outputs(merge(plain, ratio=0.0)), before)
    assert merged.get_sd().keys() == plain.get_sd().keys()


def test_nodes_that_call_the_model_themselves(merge):
    """IP-Adapter's nodes run clip_vision.model, not encode_image."""
    import torch

    merged = merge(encoder())
    with torch.no_grad():
        out = merged.model(pixel_values=torch.rand(1, 3, 40, 40), intermediate_output=-2)
    assert out[0].shape == out[1].shape == (1, 26, 32)
    assert len(out[1][0].unique(dim=0)) == 14


def test_options_change_the_result(merge):
    plain = encoder()
    results = [
        outputs(merge(plain, **options))
        for options in ({}, {"schedule": "falling"}, {"proportional": False}, {"ratio": 0.3})
    ]
    assert not any(same(a, b) for place, a in enumerate(results) for b in results[:place])
    assert same(results[0], outputs(merge(plain, schedule="constant", proportional=True)))


def test_after_an_exception_nothing_is_left(merge):
    plain = encoder()
    before, merged = outputs(plain), merge(plain)
    handle = plain.model.vision_model.encoder.layers[3].mlp.register_forward_pre_hook(lambda module, args: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        outputs(merged)
    handle.remove()
    assert hooks(plain) == 0 and same(outputs(plain), before)


def test_a_clone_at_work_leaves_other_threads_alone(merge):
    """While one thread is inside the clone, another is inside the original and a third inside another clone."""
    plain = encoder()
    models = {"plain": plain, "most": merge(plain, ratio=0.8), "some": merge(plain, ratio=0.4)}
    wanted, found = {name: outputs(model) for name, model in models.items()}, {}
    barrier = threading.Barrier(3, timeout=20)

    def meet(*args):
        barrier.wait()

    handles = [plain.model.vision_model.embeddings.register_forward_hook(meet)]
    for layer in plain.model.vision_model.encoder.layers:
        handles.append(layer.self_attn.q_proj.register_forward_pre_hook(meet))

    def work(name):
        found[name] = outputs(models[name])

    threads = [threading.Thread(target=work, args=(name,)) for name in models]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for handle in handles:
        handle.remove()
    assert len(found) == 3 and all(same(found[name], wanted[name]) for name in models)
    assert hooks(plain) == 0


def test_what_is_not_served_is_told(merge):
    import torch

    plain = encoder()
    with pytest.raises(ValueError, match="already merged by another ToMe node"):
        merge(merge(plain))
    plain.model = torch.nn.Linear(2, 2)
    with pytest.raises(ValueError, match="serves CLIP and SigLIP encoders; this one is Linear"):
        merge(plain)


@pytest.mark.parametrize("pays", [True, False])
@pytest.mark.parametrize("name", ["clip", "siglip2"])
def test_on_a_gpu_it_is_left_alone_where_merging_does_not_pay(merge, monkeypatch, tmp_path, caplog, name, pays):
    """Measured on one picture of the batch, both ways, once for each set of options; others' hooks see no call more."""
    auto, seen, ran = sys.modules[pack_module("clip_vision").decision_of.__module__], [], []

    def compared(full, merged, device, repeats):
        seen.append((full(), merged()))
        return auto.Decision(100.0, 40.0 if pays else 99.0, 5.0)

    plain = encoder(name)
    plain.model.register_forward_pre_hook(lambda *_: ran.append(1))
    merged = outputs(merge(plain))
    forget_log()
    monkeypatch.setattr(auto, "may_measure", lambda device: True)
    monkeypatch.setattr(auto.timing, "compared", compared)
    gpu = MadeUpGPU(monkeypatch, tmp_path, sys.modules[auto.NotNow.__module__])
    ran.clear()
    with caplog.at_level(logging.INFO, "ToMe"):
        assert same(outputs(merge(plain)), merged if pays else outputs(plain))
    assert ("merging does not pay here: it saves 1 of 100 us" in caplog.text) == (not pays)
    (full, less), (key,) = seen[0], gpu.kept
    assert len(ran) == (1 if pays else 2)  # and the unmerged call above
    assert full[0].shape == less[0].shape and full[0].shape[0] == 1
    assert 0 < (full[0] - less[0]).norm() / full[0].norm() < 1
    assert "5 blocks, 32 channels" in key and "0.6000, constant, proportional True" in key
    outputs(merge(plain, schedule="falling"))
    assert len(gpu.kept) == len(seen) == 2 and hooks(plain) == 1
