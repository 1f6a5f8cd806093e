"""ComfyUI's TorchCompileModel drops every guard on transformer_options: a patch must take effect all the same.

Run with dynamo's "eager" backend: what can go wrong here is which graph is taken, not the code made from it.
"""

from __future__ import annotations

import pytest
import torch

from .host import run_node, sample, short_unet

OPTIONS = [
    {"method": "sample", "ratio": 0.5},
    {"method": "sample", "ratio": 0.75},
    {"method": "sample", "ratio": 0.75, "own_token": False},
    {"method": "merge", "ratio": 0.5},
    {"method": "merge_keys", "ratio": 0.5, "reduce": "pick"},
    {"method": "merge", "ratio": 0.5, "mlp": True, "cross_attention": True},
]


@pytest.fixture
def model(comfy_nodes):
    torch._dynamo.reset()
    yield short_unet()
    torch._dynamo.reset()


@pytest.fixture
def compiled(comfy_nodes):
    return lambda model: run_node(comfy_nodes["TorchCompileModel"], model=model, backend="eager")


def same(a, b):
    assert (a - b).norm() / b.norm() < 1e-4, "a compiled model gave another picture than the eager one"


@pytest.mark.parametrize("tome_first", [True, False], ids=["tome first", "compile first"])
def test_takes_effect_after_a_plain_compiled_run(model, tome, compiled, tome_first):
    plain = sample(model, steps=1)
    same(sample(compiled(model), steps=1), plain)
    for options in OPTIONS if tome_first else OPTIONS[:2]:  # compiling takes seconds each
        eager = sample(tome(model, **options), steps=1)
        both = compiled(tome(model, **options)) if tome_first else tome(compiled(model), **options)
        made = sample(both, steps=1)
        assert (made - plain).norm() / plain.norm() > 1e-3, f"{options} was ignored"
        same(made, eager)
    same(sample(compiled(model), steps=1), plain)


def test_plain_run_after_a_merged_one(model, tome, compiled):
    merged = sample(compiled(tome(model)), steps=1)
    plain = sample(compiled(model), steps=1)
    same(plain, sample(model, steps=1))
    assert not torch.equal(plain, merged)


def test_seed_and_step_need_no_new_graph(model, tome, compiled):
    sample(compiled(tome(model, seed=1)), steps=2)
    frames = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    assert frames > 0
    other = sample(compiled(tome(model, seed=2)), steps=3)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == frames
    same(other, sample(tome(model, seed=2), steps=3))


def test_no_graph_break_of_ours(model, tome, compiled):
    sample(compiled(model), steps=1)
    breaks = dict(torch._dynamo.utils.counters["graph_break"])
    sample(compiled(tome(model, method="sample")), steps=1)
    sample(compiled(tome(model, method="merge")), steps=1)
    ours = {reason for reason in torch._dynamo.utils.counters["graph_break"] if reason not in breaks}
    assert not ours
