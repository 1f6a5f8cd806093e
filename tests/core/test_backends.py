"""What other backends lack must not be used: float64 (MPS), scatter_reduce (DirectML), sorts of int64."""

from __future__ import annotations

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from shared_tome import METHODS, ModelCall, ToMeConfig
from shared_tome.core import groups
from shared_tome.core.curve import hilbert_order
from shared_tome.methods import PARTITIONS

LACKING = ("scatter_reduce", "index_reduce", "segment_reduce", "unique", "nonzero", "_local_scalar_dense")
SORTS = ("sort", "argsort", "topk")


class Record(TorchDispatchMode):
    """Fails on the spot, so that the traceback shows the line."""

    def __init__(self):
        super().__init__()
        self.calls = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        assert not any(lacking in name for lacking in LACKING), name
        if name.startswith(SORTS):
            assert args[0].dtype != torch.int64, f"{name} of int64"
        out = func(*args, **(kwargs or {}))
        for tensor in torch.utils._pytree.tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                self.calls += 1
                assert tensor.dtype not in (torch.float64, torch.complex128), f"{name} made a {tensor.dtype}"
        return out


CASES = [
    (method, partition)
    for method in METHODS
    for partition in (PARTITIONS if METHODS[method].matches else ["random_2d"])
]


@pytest.mark.parametrize(("method", "partition"), CASES)
def test_nothing_that_a_backend_lacks(monkeypatch, method, partition):
    monkeypatch.setattr(groups, "WITH_FLOAT64", ())  # as on the devices that lack it
    grid = (9, 14)
    x = torch.randn(2, 126, 8)
    config = ToMeConfig(ratio=0.4, method=method, partition=partition, min_tokens=0)
    hilbert_order(grid, x.device)
    with Record() as record:
        call = ModelCall(config, grid, x.device, seed=torch.tensor([1, 2]), step=torch.tensor(3))
        merged = call.attention(x, x, x, grid)
        merged.unmerge(merged.q)
        assert merged.plan.groups.shape == (2, 126) and merged.plan.sizes.shape[0] == 2
    assert record.calls > 10
