"""TorchCompileModel with transformers: a patch takes effect whatever was compiled before, in both orders."""

from __future__ import annotations

import logging
from types import SimpleNamespace

import pytest
import torch

from . import dit_host, host
from .dit_host import call, sample

OPTIONS = [{"ratio": 0.5}, {"ratio": 0.5, "own_token": False}, {"method": "merge", "ratio": 0.5}]


@pytest.fixture
def compiled(comfy_nodes):
    return lambda model: host.run_node(comfy_nodes["TorchCompileModel"], model=model, backend="eager")


@pytest.fixture(scope="module")
def small(comfy_nodes):
    """small(name) -> the model. Until another one is asked for, the tests share it and what was compiled of it."""
    made = {}

    def get(name):
        if name not in made:
            made.clear()
            torch._dynamo.reset()
            made[name] = dit_host.small(name, **WITHOUT_KEYWORD.get(name, {}))
        return made[name]

    yield get
    torch._dynamo.reset()


def graphs():
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


def same(a, b):
    error = float((a - b).norm() / b.norm())
    assert error < 1e-4, "a compiled model gave another picture than the eager one"


def test_takes_effect_after_a_plain_compiled_run_and_breaks_no_graph(small, tome, compiled):
    """In both orders of the nodes, which share a graph; each order is the first, which makes it, in its turn."""
    name, model = "flux", small("flux")
    plain = call(model, name)
    same(call(compiled(model), name), plain)
    breaks, before = set(torch._dynamo.utils.counters["graph_break"]), graphs()
    for number, options in enumerate(OPTIONS, 1):
        eager = call(tome(model, **options), name)
        assert (eager - plain).norm() / plain.norm() > 1e-3
        orders = [compiled(tome(model, **options)), tome(compiled(model), **options)]
        for patched in orders if number % 2 else reversed(orders):
            same(call(patched, name), eager)
            assert graphs() == before + number, f"{options}: another graph, or none of its own"
    same(call(compiled(model), name), plain)
    assert not set(torch._dynamo.utils.counters["graph_break"]) - breaks


def test_the_key_says_what_a_graph_takes_for_granted(comfy_nodes):
    """Where the image lies is fixed in a graph, also in one that the compiler made for any size: another size, or
    another length of the text, needs another. Another seed does not."""
    dit, table = host.pack_module("dit"), host.pack_module("dit_models")

    def key(grid=(8, 12), head=7, tail=0, seed=0, **values):
        config = host.pack_module("dit_patch").ToMeConfig(min_tokens=0, seed=seed, **values)
        call = dit.ModelCall(config, grid, torch.device("cpu"))
        return dit.DiTCall(call, table.DIT_MODELS[0], dit.Layout(grid, head, tail), {}).key

    others = [{"grid": (12, 8)}, {"grid": (1, 8, 12)}, {"head": 8}, {"tail": 4}, {"ratio": 0.5}, {"method": "merge"}]
    others += [{"own_token": False}]
    keys = [key(), *(key(**other) for other in others)]
    assert len(set(keys)) == len(keys) and key(seed=3) == key()


def test_seed_and_step_need_no_new_graph(small, tome, compiled):
    model = small("flux")
    sample(compiled(tome(model, seed=1)), "flux", steps=2)
    frames = graphs()
    assert frames > 0
    other = sample(compiled(tome(model, seed=2)), "flux", steps=3)
    assert graphs() == frames
    same(other, sample(tome(model, seed=2), "flux", steps=3))


# Models that hand their wrappers no keyword. Deep enough that blocks which are alike share a graph.
WITHOUT_KEYWORD = {
    "sd3": {
        "depth": 4,
        "x_block_self_attn_layers": [],
        "context_embedder_config": {
            "target": "torch.nn.Linear",
            "params": {"in_features": 48, "out_features": 256},
        },
    },
    "hidream": {},
    "stable_audio": {"depth": 3},
}


@pytest.mark.parametrize("name", WITHOUT_KEYWORD)
def test_a_model_that_takes_no_keyword(small, tome, compiled, caplog, name):
    """In both orders of the nodes. Another seed, step or ratio needs no new graph. The layers tell what they did.
    Without ToMe nothing is left."""
    model = small(name)
    host.forget_log()
    caplog.set_level(logging.INFO, logger="ToMe")
    plain, plain_compiled = call(model, name), call(compiled(model), name)
    same(plain_compiled, plain)
    made = []
    for seed, ratio, sigma in ((0, 0.5, 0.7), (3, 0.5, 0.7), (3, 0.75, 0.3)):
        options = {"seed": seed, "ratio": ratio}
        eager = call(tome(model, **options), name, sigma=sigma)
        assert (eager - plain).norm() / plain.norm() > 1e-3
        same(call(compiled(tome(model, **options)), name, sigma=sigma), eager)
        same(call(tome(compiled(model), **options), name, sigma=sigma), eager)
        made.append(graphs())
    assert made[0] == made[-1]
    assert torch.equal(call(compiled(model), name), plain_compiled)
    assert not [line for line in caplog.messages if "left alone" in line or "skips" in line]


def test_a_schedule_holds_in_such_a_model(small, tome, compiled):
    """start and end by noise: each call takes the graph with ToMe or the one without."""
    name, model = "stable_audio", small("stable_audio")
    plain, patched = call(compiled(model), name), tome(model, start=0.72)  # between the two noise levels
    both = compiled(patched)
    for sigma in (0.3, 0.7, 0.3):
        eager = call(patched, name, sigma=sigma)
        same(call(both, name, sigma=sigma), eager)
        merged = not torch.equal(call(both, name, sigma=sigma), plain)
        assert merged is ((eager - plain).norm() / plain.norm() > 1e-3).item() is (sigma < 0.5)


def test_a_torch_that_does_not_compare_modes(small, tome, compiled, caplog, monkeypatch):
    """Nothing is merged there, and one line says so."""
    name, model = "stable_audio", small("stable_audio")
    host.forget_log()
    monkeypatch.setattr(host.pack_module("dit_patch"), "COMPARES_MODES", False)
    with caplog.at_level(logging.INFO, logger="ToMe"):
        same(call(compiled(tome(model)), name), call(model, name))
    says = "[ToMe] ToMe skips this model under torch.compile: the compiled graph would not notice ToMe (Stable Audio)"
    assert says in caplog.messages


def test_with_fullgraph_such_a_model_is_left_alone(tome, caplog, monkeypatch):
    model, told = dit_host.small("sd3"), {"torch_compile_kwargs": {"fullgraph": True}}
    patcher = SimpleNamespace(model_options=told, is_dynamic=lambda: False)
    monkeypatch.setattr(model.model, "current_patcher", patcher)
    monkeypatch.setattr(host.pack_module("dit_patch"), "is_compiled", lambda *_: True)
    host.forget_log()
    with caplog.at_level(logging.INFO, logger="ToMe"):
        assert torch.equal(call(tome(model), "sd3"), call(model, "sd3"))
    says = "ToMe skips this model under torch.compile with fullgraph: its attentions run outside of the graph"
    assert f"[ToMe] {says} (SD3)" in caplog.messages
    told["torch_compile_kwargs"]["fullgraph"] = False
    assert not torch.equal(call(tome(model), "sd3"), call(model, "sd3"))
