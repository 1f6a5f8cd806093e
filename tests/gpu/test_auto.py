"""Measuring whether a layer pays, on a real GPU."""

from __future__ import annotations

import json
import time

import pytest
import torch

from shared_tome import ModelCall, ToMeConfig
from shared_tome.autotune import layer as auto
from shared_tome.autotune import store
from shared_tome.autotune.decisions import Decisions
from shared_tome.autotune.paying import Decision

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA GPU"),
]
LAYER = {"grid": (64, 64), "channels": 640, "heads": 10, "dtype": torch.float16}


@pytest.fixture
def kept(monkeypatch, tmp_path):
    monkeypatch.setenv(store.FOLDER, str(tmp_path))
    monkeypatch.setattr(store, "_decided", {})
    monkeypatch.delenv(auto.SWITCH, raising=False)
    return tmp_path


def measured(**changes) -> Decision:
    return auto.decision_on(**{**LAYER, "device": torch.device("cuda"), "config": ToMeConfig(), **changes})


def test_times_are_those_of_a_graph(kept):
    """Without the gaps between launches: within a factor of two of what the same calls take as a CUDA graph."""
    case = auto.Case((96, 96), 640, 10, torch.float16, ToMeConfig(min_tokens=0))
    decision = auto.measure(case, torch.device("cuda"))
    assert decision.pays() and decision.merged_us < 0.6 * decision.full_us
    x = torch.randn(2, 9216, 640, device="cuda", dtype=torch.float16)
    weight = torch.randn(640, 640, device="cuda", dtype=torch.float16) * 0.04

    def full():
        q, k, v = (x @ weight for _ in range(3))
        return auto.torch_attention(q, k, v, 10) @ weight

    for _ in range(3):
        full()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(10):
            full()
    graph.replay()
    torch.cuda.synchronize()
    start = time.perf_counter()
    graph.replay()
    torch.cuda.synchronize()
    taken = 1e5 * (time.perf_counter() - start)
    assert taken / 2 < decision.full_us < taken * 2


def test_it_is_kept_and_said(kept, caplog):
    state = torch.cuda.get_rng_state()
    with caplog.at_level("INFO", "ToMe"):
        first = measured()
        assert measured() == first
    assert torch.equal(state, torch.cuda.get_rng_state())
    assert caplog.text.count("measured on") == 1
    (file,) = kept.glob("*.json")
    (layer,) = json.loads(file.read_text())["layers"].values()
    assert layer["full_us"] == pytest.approx(first.full_us, abs=0.01)


def test_what_loses_is_left_alone(kept):
    """An attention that takes no time: nothing can be saved."""

    def free(q, k, v, heads, scale=None):
        return q

    call = ModelCall(ToMeConfig(method="merge", ratio=0.5, min_tokens=0), (64, 64), torch.device("cuda"))
    layers = Decisions(call)
    x = torch.randn(2, 4096, 640, device="cuda", dtype=torch.float16)
    assert "does not pay" in layers.why_not_paid(layers.decision(x, (64, 64), 10, free))


def test_nothing_is_measured_while_a_graph_is_captured(kept):
    layers = Decisions(ModelCall(ToMeConfig(min_tokens=0), (64, 64), torch.device("cuda")))
    x = torch.randn(2, 4096, 640, device="cuda", dtype=torch.float16)
    with torch.cuda.graph(torch.cuda.CUDAGraph()):
        assert layers.decision(x, (64, 64), 10) is None
        x.add(1)
    assert not list(kept.iterdir())
