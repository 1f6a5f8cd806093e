"""share_match through a ModelCall: one match for both halves of a batch, only where they are the same images."""

from __future__ import annotations

import pytest
import torch

from shared_tome import ModelCall

from .helpers import config, tokens

GRID = (12, 10)


@pytest.mark.parametrize("alike", [True, False])
@pytest.mark.parametrize("share", [True, False])
def test_one_match_for_both_halves(share, alike):
    call = ModelCall(config(method="merge", share_match=share), GRID, torch.device("cpu"), seed=5, step=2, alike=alike)
    one, two = (call.plan(tokens(4, GRID, 8, seed=seed), GRID) for seed in range(2))
    assert one.choice.shape[0] == two.choice.shape[0] == (2 if share and alike else 4)
    assert not torch.equal(one.groups, two.groups)  # each layer has its own
    if not (share and alike):
        own = ModelCall(config(method="merge"), GRID, torch.device("cpu"), seed=5, step=2)
        assert torch.equal(one.groups, own.plan(tokens(4, GRID, 8, seed=0), GRID).groups)
