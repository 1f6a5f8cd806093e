"""When a block's further layers are left alone: shared by all hosts."""

from __future__ import annotations

import torch
from torch import nn

from shared_tome.hooks.guard import is_replaced, why_left_whole


def test_a_forward_of_its_own():
    layer = nn.Linear(2, 2)
    assert not is_replaced(layer) and not is_replaced(None)
    own = layer.forward
    layer.forward = lambda x: x
    assert is_replaced(layer)
    layer.forward = own  # as ComfyUI restores it
    assert not is_replaced(layer)
    layer.forward = nn.Linear(2, 2).forward  # another layer's
    assert is_replaced(layer)


def test_rows_and_tokens_of_the_plan():
    x = torch.zeros(2, 12, 3)
    assert why_left_whole("attn2", x, 2, 12) is None
    for rows, tokens in ((1, 12), (4, 12), (2, 6)):
        assert "a cross-attention whose rows or tokens" in why_left_whole("attn2", x, rows, tokens)
    assert why_left_whole("ff", x, 2, 12, replaced=True).startswith("ToMe skips a feed-forward layer that another node")
