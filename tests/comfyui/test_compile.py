"""ComfyUI's TorchCompileModel drops every guard on transformer_options: a patch must take effect all the same.

Run with dynamo's "eager" backend: what can go wrong here is which graph is taken, not the code made from it. A graph
takes seconds to make, so each is made once: what a test needs of it is asked there.
"""

from __future__ import annotations

import pytest
import torch

from . import host
from .host import least_unet, run_node, sample

# Another number alone, another flag alone, another method, and one of other modules beside the attention.
OPTIONS = [
    {"method": "sample", "ratio": 0.5},
    {"method": "sample", "ratio": 0.75},
    {"method": "sample", "ratio": 0.75, "own_token": False},
    {"method": "merge_keys", "ratio": 0.5, "reduce": "pick"},
    {"method": "merge", "ratio": 0.5, "mlp": True, "cross_attention": True},
]


@pytest.fixture(scope="module")
def model(comfy_nodes):
    """One for all tests: a graph that one of them made serves the others."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()  # of other files' graphs
    yield least_unet()
    torch._dynamo.reset()


@pytest.fixture
def compiled(comfy_nodes):
    return lambda model: run_node(comfy_nodes["TorchCompileModel"], model=model, backend="eager")


def same(a, b):
    assert (a - b).norm() / b.norm() < 1e-4, "a compiled model gave another picture than the eager one"


def graphs():
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


def test_takes_effect_after_a_plain_compiled_run_and_breaks_no_graph(model, tome, compiled):
    """In both orders of the nodes, which share a graph; each order is the first, which makes it, in its turn."""
    plain = sample(model, steps=1)
    same(sample(compiled(model), steps=1), plain)
    breaks, before = set(torch._dynamo.utils.counters["graph_break"]), graphs()
    for number, options in enumerate(OPTIONS, 1):
        eager = sample(tome(model, **options), steps=1)
        assert (eager - plain).norm() / plain.norm() > 1e-3
        orders = [compiled(tome(model, **options)), tome(compiled(model), **options)]
        for patched in orders if number % 2 else reversed(orders):
            same(sample(patched, steps=1), eager)
            assert graphs() == before + number, f"{options}: another graph, or none of its own"
    same(sample(compiled(model), steps=1), plain)
    assert not set(torch._dynamo.utils.counters["graph_break"]) - breaks


def test_exact_steps_are_left_out_of_a_graph(model, tome, compiled):
    """What is kept would have each step compiled anew; it says so."""
    host.forget_log()
    made = sample(compiled(tome(model, ratio=0.75)), steps=4)
    known = graphs()
    same(sample(compiled(tome(model, ratio=0.75, exact_every=2)), steps=4), made)
    assert graphs() == known
    assert any("exact every has no effect in a graph" in why for why in host.pack_module("log")._said)


def test_seed_and_step_need_no_new_graph_and_a_plain_run_after_them_is_plain(model, tome, compiled):
    sample(compiled(tome(model, seed=1)), steps=2)
    frames = graphs()
    assert frames > 0
    other = sample(compiled(tome(model, seed=2)), steps=3)
    assert graphs() == frames
    same(other, sample(tome(model, seed=2), steps=3))
    plain = sample(compiled(model), steps=3)
    same(plain, sample(model, steps=3))
    assert not torch.equal(plain, other)
