"""The benchmarks of transformers and of the sampler: a real ComfyUI's models are timed as said."""

from __future__ import annotations

import json
import math
from types import SimpleNamespace

import pytest
import torch

from lab import timing
from lab.speed import dit as dits

LENGTHS = """
import os, json, torch
from pathlib import Path
from installer import inprocess
inprocess.start(Path(os.environ["COMFYUI_DIR"]), ["--cpu"], absent=["av"])
from torch.utils._python_dispatch import TorchDispatchMode
from lab.speed import dit as dits
from lab.speed import dit
device, found = torch.device("cpu"), {}

class Watch(TorchDispatchMode):  # what reaches the kernel, whoever calls it
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if "scaled_dot_product" in str(func):
            seen.append((args[0].shape[2], args[1].shape[2], args[0].shape[3]))
        return func(*args, **(kwargs or {}))

for name in ("flux-tiny", "wan-tiny"):
    size = next(iter(dits.MODELS[name].latents))
    tokens = dits.MODELS[name].tokens(size)
    model, call = dits.build(name, device, torch.float32), dits.ModelInputs(name, size, device)
    for variant in dit.VARIANTS:
        seen = []
        with Watch():
            out = call(dit.variant(model, variant, tokens))
        assert out.shape == call.x.shape
        found[name + " " + variant] = sorted(set(seen))
print(json.dumps(found))
"""


def test_variants_attend_to_what_they_say(run_in_comfyui):
    found = {name: [tuple(one) for one in seen] for name, seen in json.loads(run_in_comfyui("-c", LENGTHS)).items()}
    # Flux: 96 tokens of the image and 7 of text in one attention, heads of 32; apart where keys have weights.
    assert found["flux-tiny unmerged"] == [(103, 103, 32)]
    assert found["flux-tiny sample 0.75"] == [(103, 7, 32), (103, 24, 32)]
    assert found["flux-tiny sample 0.75, unweighted"] == [(103, 24 + 7, 32)]
    assert found["flux-tiny sample 0.9375"] == [(103, 6, 32), (103, 7, 32)]
    assert found["flux-tiny merge 0.5"] == [(48 + 7, 48 + 7, 40)]  # wider: weights in further channels
    assert found["flux-tiny limit"] == []
    # Wan: 72 tokens to themselves, and to 7 of text, which nothing touches.
    assert found["wan-tiny unmerged"] == [(72, 7, 32), (72, 72, 32)]
    assert found["wan-tiny sample 0.75"] == [(72, 7, 32), (72, 18, 32)]
    assert found["wan-tiny limit"] == [(72, 7, 32)]


def test_the_short_form_of_transformers(run_in_comfyui, tmp_path):
    out = tmp_path / "dit.csv"
    command = ("-m", "lab.speed.dit", "--device", "cpu", "--seconds", "0", "--least", "1", "--json", "--out", str(out))
    rows = json.loads(run_in_comfyui(*command))
    assert {row["model"] for row in rows} == {"flux-tiny", "wan-tiny"} and len(rows) == 30
    for row in rows:
        assert row["step_ms"] > row["measured_ms"] > 0  # scaled to a depth of 57 or 40 blocks
        assert math.isfinite(float(row["attention_share"]))  # a difference of times: on a busy machine it is anything
    before = out.read_text()
    run_in_comfyui(*command)
    assert out.read_text() == before


def test_the_short_form_of_comfyuis_sampler(run_in_comfyui, tmp_path):
    out = tmp_path / "hosts.csv"
    command = (
        "-m", "lab.speed.hosts", "--device", "cpu", "--models", "tiny", "--sizes", "128", "--steps", "3", "--seconds",
        "0", "--least", "1", "--json", "--out", str(out), "--variants",
    )  # fmt: skip
    rows = json.loads(run_in_comfyui(*command, "unmerged", "sample 0.75", "comfyui core 0.5", "limit"))
    assert [row["variant"] for row in rows] == ["unmerged", "sample 0.75", "comfyui core 0.5", "limit"]
    assert all(row["step_ms"] > 0 and row["backend"] == "default" and row["steps"] == 1 for row in rows)
    assert len(out.read_text().splitlines()) == 5


def test_what_a_call_sets_up_once_is_counted_once(monkeypatch):
    """It stands in the first block; a real model has many more blocks, and no more of that."""
    now = [0.0]

    class Takes(torch.nn.Module):
        def __init__(self, seconds):
            super().__init__()
            self.seconds = seconds

        def forward(self):
            now[0] += self.seconds

    blocks = torch.nn.ModuleList([Takes(0.06), Takes(0.01)])
    monkeypatch.setattr(timing, "time", SimpleNamespace(perf_counter=lambda: now[0]))
    monkeypatch.setitem(dits.MODELS, "made up", SimpleNamespace(depths={"blocks": (2, 12)}))
    model = SimpleNamespace(model=SimpleNamespace(diffusion_model=SimpleNamespace(blocks=blocks)))
    clock = dits.BlockClock(model, "made up", torch.device("cpu"))
    assert clock.time(lambda: [block() for block in blocks]) == pytest.approx((70.0, 170.0))
