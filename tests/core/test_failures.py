"""A lack of memory while something is tried out says nothing about it: it is raised, or tried again."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from shared_tome.autotune import detached
from shared_tome.core.failures import is_out_of_memory
from shared_tome.hooks import heads

from .test_store import OUT_OF_MEMORY


@pytest.mark.parametrize("error", OUT_OF_MEMORY, ids=repr)
def test_what_a_lack_of_memory_looks_like(error):
    assert is_out_of_memory(error)


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("CUDA error: an illegal memory access was encountered"),
        RuntimeError("out of resource: shared memory, Required: 131072, Hardware limit: 101376"),
        ValueError("out of memory"),
        KeyError("q"),
    ],
    ids=repr,
)
def test_what_does_not(error):
    assert not is_out_of_memory(error)


def failing(error):
    def forward(*_, **__):
        raise error

    return forward


@pytest.mark.parametrize("error", OUT_OF_MEMORY, ids=repr)
def test_trials_of_an_attention_are_not_decided_by_it(error):
    cpu = torch.device("cpu")
    with pytest.raises(type(error)):
        heads.find_rule(failing(error), 8, cpu, torch.float32)
    with pytest.raises(type(error)):
        heads.meets_at_sdpa(failing(error), 8, cpu, torch.float32)
    other = failing(RuntimeError("heads of 17 channels"))
    assert heads.find_rule(other, 8, cpu, torch.float32) is None
    assert not heads.meets_at_sdpa(other, 8, cpu, torch.float32)


class Block(nn.Module):
    def __init__(self, error):
        super().__init__()
        self.attn2, self.error = nn.Module(), error
        self.attn2.to_k = nn.Linear(4, 4)

    def forward(self, x, context=None):
        raise self.error


def test_a_block_that_has_no_room_is_not_one_that_does_not_run_by_itself():
    with pytest.raises(torch.cuda.OutOfMemoryError):
        detached.run_detached(Block(torch.cuda.OutOfMemoryError("CUDA out of memory")), torch.zeros(1, 4, 4))
    assert detached.run_detached(Block(TypeError("more arguments")), torch.zeros(1, 4, 4)) is None
