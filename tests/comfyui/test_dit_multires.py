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


@pytest.fixture
def ran(monkeypatch):
    """(tokens of the row, where the image begins, layer) of each attention at three resolutions."""
    sequence = sys.modules[host.pack_module("dit").JointCall.__module__]
    seen, real = [], sequence.kernels.attend_multires

    def spy(q, k, v, tiles, drawn, counts, layer, scale):
        rows = tiles.rows[: tiles.image * tiles.size]
        seen.append((q.shape[2], int(rows.min()), layer))
        return real(q, k, v, tiles, drawn, counts, layer, scale)

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
