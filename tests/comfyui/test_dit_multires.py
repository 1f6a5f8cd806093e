"""`multires` in ComfyUI's transformers and U-Nets: where it runs, what it runs on, and where sample takes its place."""

from __future__ import annotations

import sys

import pytest
import torch

from . import dit_host, host
from .host import forget_log

# What ComfyUI's own attention kernels differ by from a softmax in one piece, on pictures of these small models.
SAME = {"rtol": 1e-3, "atol": 2e-4}


@pytest.fixture(autouse=True)
def comfy(comfy_nodes):
    """All of these need ComfyUI's attention."""


class Ran(list):
    def __init__(self):
        super().__init__()
        self.masks = []


@pytest.fixture
def ran(monkeypatch):
    """(tokens of the row, where the image begins, layer) of each attention at three resolutions; `masks` of each."""
    sequence = sys.modules[host.pack_module("dit_call").JointCall.__module__]
    seen, real = Ran(), sequence.kernels.attend_multires

    def spy(q, k, v, tiles, drawn, counts, layer, scale, mask=None):
        rows = tiles.rows[: tiles.image * tiles.size]
        seen.append((q.shape[2], int(rows.min()), layer))
        seen.masks.append(mask)
        return real(q, k, v, tiles, drawn, counts, layer, scale, mask)

    monkeypatch.setattr(sequence.kernels, "attend_multires", spy)
    return seen


def options(**more):
    return {"method": "multires", "min_tokens": 0, "levels": "0", **more}


@pytest.mark.parametrize("name", ["flux", "chroma", "sd3", "qwen", "zimage", "hunyuan", "wan"])
def test_in_each_family_a_ratio_of_nothing_keeps_the_picture(tome, ran, name):
    """And one of 0.75 does not. Every self-attention runs at three resolutions, with its text whole."""
    which = dit_host.SMALL[name]
    model = dit_host.small(name)
    before = dit_host.sample(model, name, steps=1)
    kept = dit_host.sample(tome(model, **options(ratio=0.02)), name, steps=1)
    assert ran and {length - which.image for length, _, _ in ran} <= {
        0,
        which.text,
        *(x - which.image for x, _, _ in ran),
    }
    torch.testing.assert_close(kept, before, **SAME)
    ran.clear()
    merged = dit_host.sample(tome(model, **options(ratio=0.75)), name, steps=1)
    assert ran and not torch.allclose(merged, before, **SAME)
    assert {layer for _, _, layer in ran} == set(range(len({layer for _, _, layer in ran})))


def told(name, kind):
    """What a model is told of a mask: text that is padded, or regions of the picture with a text each; and the line."""
    which = dit_host.SMALL[name]
    length, text = which.image + which.text[0], which.text[0]
    if kind == "padded":
        return {"attention_mask": torch.tensor([[1, 1, 1, 1, 0, 0, 0], [1, 1, 1, 1, 1, 1, 0]])}
    mask = torch.zeros(1, length, length)
    if kind == "regions":
        mask[:, text : text + 48, 4:7] = mask[:, text + 48 :, 1:4] = -torch.inf
        mask[:, 4:7, text : text + 48] = -torch.inf
    if kind == "redux":
        mask[:, :5, 5:7] = mask[:, text:, 5:7] = -0.7
    if kind == "regions apart":
        mask[:, text : text + 48, text + 48 :] = -torch.inf
    return {"attention_mask": mask}


@pytest.mark.parametrize(
    ("name", "kind"), [("qwen", "padded"), ("hunyuan", "padded"), ("flux", "regions"), ("flux", "redux")]
)
def test_a_mask_that_leaves_the_image_whole_is_served(tome, ran, caplog, name, kind):
    """At a ratio of nothing the picture is the unmerged one under the same mask, and without the mask another."""
    forget_log()
    model, mask = dit_host.small(name), told(name, kind)
    if name == "hunyuan":  # its mask is one for all rows
        mask = {"attention_mask": mask["attention_mask"][:1]}
    before, without = dit_host.call(model, name, **mask), dit_host.call(model, name)
    assert not torch.allclose(before, without, **SAME)
    with caplog.at_level("INFO"):
        kept = dit_host.call(tome(model, **options(ratio=0.02)), name, **mask)
    assert len(ran) == dit_host.SMALL[name].layers and all(mask is not None for mask in ran.masks)
    torch.testing.assert_close(kept, before, **SAME)
    merged = dit_host.call(tome(model, **options(ratio=0.75)), name, **mask)
    assert merged.isfinite().all() and not torch.allclose(merged, before, **SAME)
    assert not any("sample takes its place" in line or "own tokens" in line for line in caplog.messages)


def test_a_mask_between_parts_of_the_image_is_for_sample(tome, ran, caplog):
    forget_log()
    model, mask = dit_host.small("flux"), told("flux", "regions apart")
    with caplog.at_level("INFO"):
        made = dit_host.call(tome(model, **options(ratio=0.75)), "flux", **mask)
    said = [line for line in caplog.messages if "hides parts of an image from others" in line]
    assert not ran and len(said) == 1
    sampled = dit_host.call(tome(model, **options(ratio=0.75, method="sample")), "flux", **mask)
    assert torch.equal(made, sampled)


@pytest.mark.parametrize("schedule", [{"start": 0.5}, {"end": 0.5}])
def test_a_schedule_and_own_tokens(tome, ran, schedule):
    """Before `start` and behind `end` nothing is merged; the option `own token` changes nothing."""
    model = dit_host.small("flux")
    made = []
    for own in (True, False):
        made.append(
            [
                dit_host.call(tome(model, **options(ratio=0.75, own_token=own, **schedule)), "flux", sigma=sigma)
                for sigma in (1.0, 0.3)
            ]
        )
    before = dit_host.call(model, "flux")
    merged = [not torch.equal(one, before) for one in made[0]]
    assert merged == ([False, True] if "start" in schedule else [True, False])
    assert all(torch.equal(*pair) for pair in zip(*made, strict=True)) and len(ran) == 4


def test_seeds_and_runs(tome, ran):
    model = dit_host.small("flux")
    one, again, other = (
        dit_host.sample(tome(model, **options(ratio=0.9, seed=seed)), "flux", steps=2) for seed in (1, 1, 2)
    )
    assert torch.equal(one, again) and not torch.equal(one, other) and ran


def test_a_batch_is_its_pictures(tome, ran):
    model = tome(dit_host.small("flux"), **options(ratio=0.75))
    two = dit_host.sample(model, "flux", steps=1, batch=2)
    assert ran and two.shape[0] == 2 and two.isfinite().all()


def test_beside_another_nodes_attention_sample_takes_its_place(tome, ran, caplog):
    forget_log()
    model = dit_host.small("flux")
    model.model_options["transformer_options"]["optimized_attention_override"] = lambda func, *args, **kwargs: func(
        *args, **kwargs
    )
    with caplog.at_level("INFO"):
        made = dit_host.sample(tome(model, **options(ratio=0.75)), "flux", steps=1)
    said = [line for line in caplog.messages if "multires needs PyTorch's attention" in line]
    assert not ran and len(said) == 1 and made.isfinite().all()
    sampled = dit_host.sample(tome(model, **options(ratio=0.75, method="sample")), "flux", steps=1)
    assert torch.equal(made, sampled)


@pytest.mark.parametrize("another", [False, True])
def test_auto_is_multires_where_its_kernel_is_reached(tome, ran, caplog, monkeypatch, another):
    """Beside another node's attention it is sample at once, with nothing to say of multires."""
    forget_log()
    monkeypatch.setattr(host.pack_module("dit_patch").kernels, "serves", lambda *tensors: True)  # as on a CUDA GPU
    model = dit_host.small("flux")
    if another:
        model.model_options["transformer_options"]["optimized_attention_override"] = lambda func, *args, **kwargs: func(
            *args, **kwargs
        )
    with caplog.at_level("INFO"):
        made = dit_host.sample(tome(model, **options(ratio=0.9, method="auto")), "flux", steps=1)
    assert bool(ran) != another and not any("multires needs" in line for line in caplog.messages)
    assert any("at most ratio 0.84, in place of 0.9" in line for line in caplog.messages) != another
    named = options(ratio=0.9, method="sample") if another else options(ratio=0.84)
    assert torch.equal(made, dit_host.sample(tome(model, **named), "flux", steps=1))


def test_in_a_u_net(sd15, tome, ran):
    before = host.sample(sd15, steps=1)
    kept = host.sample(tome(sd15, method="multires", ratio=0.002), steps=1)
    assert ran and {start for _, start, _ in ran} == {0}
    torch.testing.assert_close(kept, before, rtol=1e-3, atol=2e-3)
    merged = host.sample(tome(sd15, method="multires", ratio=0.75), steps=1)
    assert not torch.allclose(merged, before, **SAME)
