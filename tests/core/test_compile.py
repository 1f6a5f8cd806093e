"""One graph without a break, and no new one for another seed or step."""

from __future__ import annotations

import pytest
import torch

from shared_tome import METHODS, ModelCall, match_tokens
from shared_tome.attention.bias import attend
from shared_tome.core.schedule import config_at

from .helpers import MATCHING, PARTITIONS, config, tokens

GRID = (6, 8)


@pytest.fixture(autouse=True)
def fresh():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


class Counting:
    """A backend that runs what was traced and counts how often it was asked.

    A number read from a tensor is traced too and breaks no graph, but it waits for the device: counted.
    """

    def __init__(self):
        self.graphs = self.waits = 0

    def __call__(self, graph, inputs):
        self.graphs += 1
        self.waits += sum(node.target in ("item", "tolist", "nonzero", "unique") for node in graph.graph.nodes)
        return graph.forward


def heads(x):
    return x.unflatten(-1, (2, -1)).transpose(1, 2)  # (B, N, C) -> (B, H, N, d)


def layer(x, ours, seed, step, partial=None):
    """Match, merge, attend, unmerge, as a host does."""
    plan = match_tokens(x, GRID, ours, seed=seed, step=step, **(partial or {}))
    merged, kind = plan.merge(x), ours.kind
    q, k = (merged if part else x for part in (kind.queries, kind.keys))
    bias = plan.key_bias() if kind.keys and not kind.fills else None
    out = attend(heads(q), heads(k), heads(k), bias).transpose(1, 2).flatten(2)  # (B, N or M, C)
    return plan.unmerge(out) if kind.queries else out, plan.sizes, plan.groups


CASES = [(method, "random_2d", {}) for method in METHODS]
CASES += [("merge", partition, {}) for partition in PARTITIONS[1:]]
CASES += [("merge", "alternate", {"class_token": True, "distill_token": True})]


@pytest.mark.parametrize(("method", "partition", "partial"), CASES)
def test_one_graph(method, partition, partial):
    # 0.6: unequal runs, so that sample has a bias too
    ours = config(method=method, partition=partition, ratio=0.4 if partition == "alternate" else 0.6)
    backend = Counting()
    compiled = torch.compile(layer, fullgraph=True, backend=backend)
    x = tokens(2, GRID, 8)
    results = []
    for seed, step in ((1, 0), (2, 0), (1, 1), (2**33 + 1, 7)):
        for seeds in (torch.tensor(seed), torch.tensor([seed, seed + 1])):
            arguments = (x, ours, seeds, torch.tensor(step), partial)
            got, expected = compiled(*arguments), layer(*arguments)
            assert torch.equal(got[2], expected[2]) and torch.equal(got[1], expected[1])
            torch.testing.assert_close(got[0], expected[0], rtol=1e-5, atol=1e-6)
            results.append(expected[2] if method in MATCHING else expected[0])
    assert (backend.graphs, backend.waits) == (2, 0)  # one for a single seed, one for a seed a row
    if partition != "alternate" and partition != "fixed_2d" and method != "downsample":
        assert not torch.equal(results[0], results[2])


def test_another_config_is_another_graph():
    """The rest is decided in Python; a guard on the config notices."""
    backend = Counting()
    compiled = torch.compile(layer, fullgraph=True, backend=backend)
    x, seed, step = tokens(2, GRID, 8), torch.tensor(1), torch.tensor(0)
    for method, ratio in (("merge", 0.5), ("sample", 0.5), ("merge", 0.25), ("sample", 0.5), ("merge", 0.5)):
        ours = config(method=method, ratio=ratio)
        torch.testing.assert_close(compiled(x, ours, seed, step)[0], layer(x, ours, seed, step)[0])
    assert backend.graphs == 3


@pytest.mark.parametrize("method", METHODS)
def test_ahead_of_time(method):
    """aot_eager traces every operation with fake tensors; gradients go through."""
    ours = config(method=method, ratio=0.6)
    x, seed, step = tokens(2, GRID, 8), torch.tensor(5), torch.tensor(2)
    grads = []
    for function in (torch.compile(layer, fullgraph=True, backend="aot_eager"), layer):
        here = x.clone().requires_grad_()
        out = function(here, ours, seed, step)[0]
        out.square().sum().backward()
        grads.append((out.detach(), here.grad))
    for got, expected in zip(*grads, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)


def blocks(x, call):
    """A model of three layers on one ModelCall made outside the graph, as hosts do."""
    for _ in range(3):
        merged = call.attention(x, x, x, GRID)
        out = attend(heads(merged.q), heads(merged.k), heads(merged.v), merged.bias)
        x = x + merged.unmerge(out.transpose(1, 2).flatten(2))
    return x


@pytest.mark.parametrize("method", METHODS)
def test_a_model_call(method):
    """Made for each call of the model, handed to the same graph: its seed and step are tensors and cost no new one."""
    ours = config(method=method, ratio=0.6)
    backend = Counting()
    compiled = torch.compile(blocks, fullgraph=True, backend=backend)
    x = tokens(2, GRID, 8)
    for seed, step in ((1, 0), (2, 0), (2**40, 5)):
        got, expected = (
            function(x, ModelCall(ours, GRID, x.device, seed=seed, step=torch.tensor(step)))
            for function in (compiled, blocks)
        )
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)
    assert (backend.graphs, backend.waits) == (1, 0)


@pytest.mark.parametrize("method", ["sample", "merge"])
def test_a_moving_ratio(method):
    """A second graph, for any ratio, and none for another seed, step or stage of the schedule."""
    ours = config(method=method, ratio=0.75, ratio_end=0.25, start=0.1)
    backend = Counting()
    compiled = torch.compile(blocks, fullgraph=True, backend=backend)
    x = tokens(2, GRID, 8)
    for seed in (1, 2):
        for step in range(0, 20, 3):
            now = config_at(ours, lambda step=step: step / 20)
            if now.ratio > 0.0:
                call = ModelCall(now, GRID, x.device, seed=seed, step=torch.tensor(step))
                again = ModelCall(now, GRID, x.device, seed=seed, step=torch.tensor(step))
                torch.testing.assert_close(compiled(x, call), blocks(x, again), rtol=1e-5, atol=1e-5)
    assert backend.graphs == 2


# What a compiler keeps as a tensor, in place of writing it into what reads it.
KEPT = ("placeholder", "sort", "scatter", "attention", "max", "topk", "matmul", "bmm", "repeat_interleave")


def written_out(graph):
    """How many operations a compiler writes for one element at most, where it writes each into those that read it."""
    terms, most = {}, 0
    for node in graph.graph.nodes:
        read = 1 + sum(terms[x] for x in node.all_input_nodes)
        terms[node] = 1 if any(name in f"{node.op} {node.target}" for name in KEPT) else read
        most = max(most, read)
    return most


@pytest.mark.parametrize("method", METHODS)
def test_what_is_traced_does_not_grow_beyond_measure(method):
    """Where each of a few steps reads the one before in two places, a compiler needs minutes: for 64x64 tokens a curve
    was 2,000,000 operations so, and over five minutes."""
    graphs = []

    def kept(graph, inputs):
        graphs.append(graph)
        return graph.forward

    @torch.compile(fullgraph=True, backend=kept)
    def matched(x, ours, seed):
        plan = match_tokens(x, (64, 64), ours, seed=seed)
        return plan.groups, plan.sizes

    matched(torch.zeros(1, 64 * 64, 2), config(method=method, ratio=0.6), torch.tensor(1))
    assert [written_out(graph) < 5000 for graph in graphs] == [True]


def test_a_model_call_brings_its_curve():
    """Not worked out in the graph, and in each layer."""
    traced = []

    def kept(graph, inputs):
        traced.extend(str(node.target) for node in graph.graph.nodes)
        return graph.forward

    @torch.compile(fullgraph=True, backend=kept)
    def runs(x, call):
        return [call.attention(x, x, x, GRID).plan.runs + 1 for _ in range(3)]

    x = tokens(2, GRID, 8)
    for found in runs(x, ModelCall(config(method="sample", ratio=0.6), GRID, x.device)):
        assert torch.equal(found, match_tokens(x, GRID, config(method="sample", ratio=0.6)).runs + 1)
    assert len(traced) > 3 and not any("repeat_interleave" in name for name in traced)


def test_a_break_would_be_seen():
    def broken(x):
        return x if x.sum() > 0 else -x

    with pytest.raises(torch._dynamo.exc.TorchDynamoException):
        torch.compile(broken, fullgraph=True, backend=Counting())(torch.ones(3))
