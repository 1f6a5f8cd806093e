"""Flux and SD3 of diffusers: sampled keys in an attention call of their own, and where heads are widened instead."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

import shared_tome
from shared_tome.attention import sequence as joint
from shared_tome.scripts import joint as script_joint

from . import models
from .test_joint import MODELS, TEXT, Record
from .test_joint_methods import config, run


@pytest.fixture
def joined(monkeypatch):
    """How many keys the parts of each joined attention have, in the order of the calls."""
    seen, attend = [], joint.attend_in_parts

    def spy(q, parts, *args):
        seen.append([part[0].shape[2] for part in parts])
        return attend(q, parts, *args)

    monkeypatch.setattr(joint, "attend_in_parts", spy)
    return seen


@pytest.fixture
def by_channels(monkeypatch):
    """Has made attentions from here on weigh their keys by channels."""
    return lambda: monkeypatch.setattr(script_joint, "TORCHS", ())


@pytest.mark.parametrize(
    ("name", "ratio", "reference", "parts"),
    [
        ("flux", 0.75, 0, [[15, TEXT]] * 3),
        ("flux", 0.75, 9, [[15, TEXT + 9]] * 3),
        ("flux", 0.7, 0, [[12, 6 * 4 + TEXT]] * 3),  # 60 = 12 * 3 + 6 * 4
        ("sd3", 0.75, 0, [[15, TEXT]] * 2),  # its third attention is to the image alone, all keys alike
        ("sd3", 0.7, 0, [[12, 24 + TEXT], [12, 24], [12, 24 + TEXT]]),
    ],
)
def test_keys_of_one_weight_are_a_part(name, ratio, reference, parts, joined, by_channels):
    model = MODELS[name][0]()
    shared_tome.apply_patch(model, config=config(ratio=ratio))
    ours = run(name, model, reference=reference)
    assert joined == parts
    by_channels()
    with Record() as mode:
        wide = run(name, model, reference=reference)
    assert joined == parts and {one[1].shape[-1] for one in mode.calls} >= {24}
    assert (ours - wide).norm() / wide.norm() < 2e-6


def call_of(call, shared):
    """Of two rows of a model whose image has a grid of (6, 10), with text before it."""
    decisions = script_joint.JointDecisions(call, (6, 10), "Flux")
    return script_joint._TransformerCall(call, shared, (6, 10), 2, TEXT, 0, decisions)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype, joined, by_channels):
    """No further from float64 than three times what wider heads are."""
    model = models.flux()
    shared_tome.apply_patch(model, config=config(ratio=0.7))
    q, k, v = (models.noise(2, 4, TEXT + 60, 16, seed=seed).to(dtype) for seed in (1, 2, 3))
    attachment = model._shared_tome

    def attend(*tensors):
        made = shared_tome.ModelCall(attachment.config, (6, 10), q.device)
        shared = joint.JointCall(True, script_joint.TORCHS, print)
        attachment.call = call_of(made, shared)
        func = script_joint.HostAttention(F.scaled_dot_product_attention, {}, None)
        return attachment._attend(func, *tensors)

    ours = attend(q, k, v)
    assert len(joined) == 1 and ours.dtype == dtype
    by_channels()
    wide, truth = attend(q, k, v), attend(q.double(), k.double(), v.double())
    error, other = (float((x.double() - truth).norm()) for x in (ours, wide))
    assert error < 3 * other


class Watch(Record):
    """Another's mode, which would miss the call."""


@pytest.mark.parametrize("why", ["method", "uneven", "unweighted", "mode", "gradient", "switched off"])
def test_what_is_not_joined(why, joined, monkeypatch):
    options = {
        "method": {"method": "merge"}, "uneven": {"method": "downsample"}, "unweighted": {"proportional": False}
    }.get(why, {})  # fmt: skip
    model = models.flux()
    shared_tome.apply_patch(model, config=config(ratio=0.6, **options))
    if why == "mode":
        with Watch() as mode:
            run("flux", model)
        assert len(mode.calls) == 3
    elif why == "gradient":
        model.requires_grad_(True)
        with torch.enable_grad():
            models.run_flux.__wrapped__(model).sum().backward()
        assert model.context_embedder.weight.grad.abs().sum() > 0
        model.requires_grad_(False)
    elif why == "switched off":
        with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
            run("flux", model)
    else:
        run("flux", model)
    assert joined == []
    shared_tome.apply_patch(model, config=config(ratio=0.6))
    run("flux", model)
    assert len(joined) == 3


def test_the_default_device_hides_nothing(joined):
    """torch.set_default_device is a mode too."""
    model = models.flux()
    shared_tome.apply_patch(model, config=config())
    with torch.device("cpu"):
        run("flux", model)
    assert len(joined) == 3


def test_dropout_and_scale(joined):
    """What a processor asks torch for holds in the joined calls, or nothing is joined."""
    model = models.flux()
    shared_tome.apply_patch(model, config=config(ratio=0.75))
    attachment = model._shared_tome
    q, k, v = (models.noise(2, 2, TEXT + 60, 16, seed=seed) for seed in (1, 2, 3))
    made = {}
    for kernels in (script_joint.TORCHS, ()):
        for scale in (None, 0.6):
            call = shared_tome.ModelCall(attachment.config, (6, 10), q.device)
            attachment.call = call_of(call, joint.JointCall(True, kernels, print))
            func = script_joint.HostAttention(F.scaled_dot_product_attention, {"scale": scale}, None)
            made[bool(kernels), scale] = attachment._attend(func, q, k, v)
    assert len(joined) == 2
    for scale in (None, 0.6):
        assert (made[True, scale] - made[False, scale]).abs().max() < 2e-6
    assert (made[True, None] - made[True, 0.6]).abs().max() > 1e-2
    dropping = script_joint.HostAttention(F.scaled_dot_product_attention, {"dropout_p": 0.1}, None)
    assert not dropping.is_torchs_alone
    attachment.call = None


def test_a_kernel_that_refuses_is_left_for_wider_heads(by_channels, monkeypatch, caplog):
    """Asked once a call of the model; it is said once."""
    tried = []

    def refuse(*args):
        tried.append(args)
        raise RuntimeError("not on this device\nand more")

    model = models.flux()
    shared_tome.apply_patch(model, config=config(ratio=0.75))
    monkeypatch.setattr(joint, "attend_in_parts", refuse)
    ours = [run("flux", model) for _ in range(2)]
    assert len(tried) == 2
    assert [record.message for record in caplog.records] == [
        "[ToMe] the cpu kernel cannot combine attentions here; ToMe widens heads instead (not on this device)"
    ]
    by_channels()
    wide = run("flux", model)
    assert all(torch.equal(out, wide) for out in ours)


def test_no_memory_is_not_taken_for_a_refusal(monkeypatch):
    def full_up(*args):
        raise torch.cuda.OutOfMemoryError("no memory")

    model = models.flux()
    shared_tome.apply_patch(model, config=config())
    monkeypatch.setattr(joint, "attend_in_parts", full_up)
    with pytest.raises(torch.cuda.OutOfMemoryError):
        run("flux", model)
