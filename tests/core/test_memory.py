"""What a layer costs, counted in operations: no score matrix beyond a chunk, one topk, no sort, no synchronisation."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from shared_tome import METHODS, ModelCall, match_tokens
from shared_tome.attention.bias import attend, attend_tokens
from shared_tome.core import matching as matching_module
from shared_tome.core.groups import group_sum

from .helpers import MATCHING, PARTITIONS, config, tokens

GATHERS = ("index_select", "gather", "index", "take", "take_along_dim", "embedding")
# What would make the host wait for the device, or tensors whose size the device decides.
SYNCHRONISING = {"_local_scalar_dense", "is_nonzero", "equal", "nonzero", "masked_select", "_unique2", "bincount"}


class Ops(TorchDispatchMode):
    """Counts operations by name, and the largest tensor that one of them made."""

    def __init__(self):
        super().__init__()
        self.count, self.largest = Counter(), 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        self.count[name] += 1
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, torch.Tensor) and leaf.untyped_storage().nbytes():
                self.largest = max(self.largest, leaf.untyped_storage().nbytes() // leaf.element_size())
        return out

    def total(self, *names):
        return sum(self.count[name] for name in names)


def test_the_counter_counts():
    x = torch.randn(6, 2)
    with Ops() as ops:
        (x @ x.t()).argsort()
        x[0, 0].item()
        x.index_select(0, torch.tensor([1]))
        x[torch.tensor([1])]
    assert ops.total("sort", "argsort") and ops.total("_local_scalar_dense") == 1 and ops.total(*GATHERS) == 2
    with Ops() as ops:
        x @ x.t()
    assert ops.largest == 36


@pytest.mark.parametrize(("batch", "dtype"), [(1, torch.float32), (3, torch.bfloat16)], ids=str)
def test_no_score_matrix_beyond_a_chunk_at_16384_tokens(batch, dtype):
    metric = tokens(batch, (128, 128), 8, dtype=dtype)
    assert 12288 * 4096 > matching_module.CHUNK
    with Ops() as ops:
        plan = match_tokens(metric, (128, 128), config())
        plan.unmerge(plan.merge(metric))
    assert ops.largest <= matching_module.CHUNK
    assert ops.count["bmm"] == -(-12288 // (matching_module.CHUNK // (4096 * batch)))  # and no more than it takes


@pytest.mark.parametrize("partition", PARTITIONS)
def test_chunks_change_nothing(monkeypatch, partition):
    metric = tokens(3, (9, 13), 6).double()
    whole = match_tokens(metric, (9, 13), config(partition=partition))
    for chunk in (1, 100, 1000, 5000):
        monkeypatch.setattr(matching_module, "CHUNK", chunk)
        with Ops() as ops:
            parts = match_tokens(metric, (9, 13), config(partition=partition))
        assert ops.count["bmm"] > 1
        assert torch.equal(whole.groups, parts.groups) and torch.equal(whole.index, parts.index)


@pytest.mark.parametrize("partition", PARTITIONS)
@pytest.mark.parametrize("method", MATCHING)
def test_matching_selects_once_and_never_sorts(method, partition):
    metric = tokens(2, (16, 16), 6)
    with Ops() as ops:
        match_tokens(metric, (16, 16), config(method=method, partition=partition))
    assert ops.total("topk") == 1 + (partition == "random")  # drawing anywhere selects once more
    assert ops.total("sort", "argsort", "msort", "kthvalue") == 0


def test_a_class_token_costs_no_sort():
    with Ops() as ops:
        match_tokens(
            tokens(2, (1, 50), 6), (1, 50), config(partition="alternate"), class_token=True, distill_token=True
        )
    assert ops.total("topk") == 1 and ops.total("sort", "argsort") == 0


@pytest.mark.parametrize("partition", PARTITIONS)
@pytest.mark.parametrize("method", METHODS)
def test_nothing_waits_for_the_device(method, partition):
    x = tokens(2, (15, 16), 6)
    ours = config(method=method, partition=partition, ratio=0.6)
    seed, step = torch.tensor([3, 4]), torch.tensor(2)
    with Ops() as ops:
        plan = match_tokens(x, (15, 16), ours, seed=seed, step=step)
        plan.unmerge(plan.merge(x))
        plan.merge_again(x, torch.ones(2, 240))
        _ = plan.key_bias(), plan.groups, plan.sizes, plan.index
        layer = ModelCall(ours, (15, 16), x.device, seed=seed, step=step).attention(x, x, x, (15, 16))
        layer.unmerge(layer.q)
        if layer.bias is not None:
            attend(layer.q[:, None], layer.k[:, None], layer.v[:, None], layer.bias)
            attend_tokens(layer.q, layer.k, layer.v, 2, layer.bias, lambda q, k, v, scale: q)
    assert not SYNCHRONISING & set(ops.count)


@pytest.mark.parametrize("method", ["merge", "merge_queries", "downsample"])
@pytest.mark.parametrize("batch", [1, 2])
def test_unmerge_is_one_gather(method, batch):
    x = tokens(batch, (16, 16), 6)
    plan = match_tokens(x, (16, 16), config(method=method))
    y = plan.merge(x)
    with Ops() as ops:
        plan.unmerge(y)
    assert ops.total("index_select") == 1 and ops.total(*GATHERS) == 1
    assert ops.largest <= max(x.numel(), 2 * x.shape[1])


@pytest.mark.parametrize("seed", [1, torch.tensor(1), torch.tensor([1, 2])])
@pytest.mark.parametrize("method", ["sample", "downsample", "prune"])
def test_picking_is_one_gather(method, seed):
    x = tokens(2, (16, 16), 6)
    plan = match_tokens(x, (16, 16), config(method=method), seed=seed)
    with Ops() as ops:
        plan.merge(x)
    assert ops.total("index_select") == 1 and ops.total(*GATHERS) == 1
    if plan.index.stride(0) == 0:  # one choice for both rows: nothing else at all but views
        assert set(ops.count) <= {"index_select", "select"}


def test_a_mean_is_one_sum_in_a_wide_dtype():
    x = tokens(2, (16, 16), 6, dtype=torch.bfloat16)
    plan = match_tokens(x, (16, 16), config())
    with Ops() as ops:
        plan.merge(x)
    assert ops.total("index_add", "index_put", "scatter_add") == 1 and ops.total("scatter_reduce", *GATHERS) == 0
    big = torch.full((1, 4096, 3), 1.0, dtype=torch.bfloat16)  # in bfloat16 a sum of ones stops at 256
    big[:, ::2] = 3.0
    plan = match_tokens(torch.ones(1, 4096, 2), (64, 64), config(ratio=1.0, stride=(8, 8), partition="fixed_2d"))
    assert plan.sizes.max() > 4000 and group_sum(big, plan.groups, plan.kept).dtype == torch.float64
    assert float((plan.merge(big).float() * plan.sizes[..., None]).sum()) == pytest.approx(3 * 8192, rel=0.01)


def test_sampling_draws_many_layers_at_once():
    ours = config(method="sample", ratio=0.75)
    call = ModelCall(ours, (32, 32), torch.device("cpu"), step=torch.tensor(1))
    x = tokens(2, (32, 32), 4)
    call.plan(x, (32, 32))
    with Ops() as ops:
        for _ in range(15):
            call.plan(x, (32, 32)).merge(x)
    assert ops.total(*GATHERS) == ops.total("index_select") == 15
    assert ops.total("sort", "argsort", "topk", "arange", "bitwise_xor") == 0
