"""A block by itself, to be timed: no hook runs, no weight is shared, and what is not understood is refused."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from shared_tome.autotune.detached import run_detached

diffusers = pytest.importorskip("diffusers.models.attention", reason="the blocks are diffusers'")
X = torch.randn(2, 12, 16, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def block():
    torch.manual_seed(0)
    return diffusers.BasicTransformerBlock(16, 2, 8, cross_attention_dim=24).eval()


def test_it_does_what_the_block_does(block):
    expected = block(X, encoder_hidden_states=torch.zeros(2, 77, 24))
    assert torch.equal(run_detached(block, X)(), expected)


def test_hooks_of_others_do_not_run_and_stay_where_they_are(block):
    ran = []
    for module in block.modules():
        module.register_forward_pre_hook(lambda *_: ran.append(1))
        module.register_forward_hook(lambda *_: ran.append(2))
    run_detached(block, X)()
    assert not ran
    block(X, encoder_hidden_states=torch.zeros(2, 77, 24))
    assert ran


def test_a_forward_that_writes_into_its_weights_does_not_reach_the_models(block):
    """As A1111's LoRA does, on the way through each layer."""

    class Writes(nn.Linear):
        def forward(self, x):
            with torch.no_grad():
                self.weight += 1.0
            return super().forward(x)

    block.attn2.to_q.__class__ = Writes
    kept = {name: value.clone() for name, value in block.state_dict().items()}
    assert run_detached(block, X)().isfinite().all()
    assert all(torch.equal(value, kept[name]) for name, value in block.state_dict().items())


def test_the_classs_own_forward_put_back_is_no_replacement(block):
    """ComfyUI leaves it on a module whose object patch it takes off. The copy must not run the original's weights."""
    expected = block(X, encoder_hidden_states=torch.zeros(2, 77, 24))
    block.attn1.to_k.forward = block.attn1.to_k.forward
    run = run_detached(block, X)
    with torch.no_grad():
        block.attn1.to_k.weight.zero_()
    assert torch.equal(run(), expected)


@pytest.mark.parametrize("what", ["forward", "no prompt", "raises", "another shape"])
def test_what_is_not_understood_is_not_timed(block, what):
    if what == "forward":
        kept = block.attn1.to_k.forward
        block.attn1.to_k.forward = lambda x: kept(x)  # as offloading and patches of single layers do
    elif what == "no prompt":
        block.attn2 = None
    elif what == "raises":
        block.ff = nn.Linear(5, 5)
    else:

        class Doubles(type(block)):
            def forward(self, hidden_states, encoder_hidden_states=None):
                return torch.cat((hidden_states, hidden_states))

        block.__class__ = Doubles
    assert run_detached(block, X) is None
