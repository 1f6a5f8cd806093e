"""What a ModelCall refuses."""

from __future__ import annotations

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from shared_tome import METHODS, ModelCall

from .helpers import config


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("count", [60, 70])
@pytest.mark.parametrize("which", ["q", "k", "v", "metric"])
@pytest.mark.parametrize("own", [False, True])
def test_tokens_that_are_not_the_grids_are_refused(method, count, which, own):
    given = {name: torch.randn(1, count if name == which else 64, 8) for name in ("q", "k", "v", "metric")}
    call = ModelCall(config(method=method, levels="0"), (8, 8), torch.device("cpu"))
    with pytest.raises(ValueError, match=f"a grid of 8x8 has 64 tokens, the {which} has {count}"):
        call.attention(**given, grid=(8, 8), keeps_self=own)
    with pytest.raises(ValueError, match=f"the metric has {count}"):
        call.plan(given[which], (8, 8))
    small = ModelCall(config(method=method, levels="0", min_tokens=65), (8, 8), torch.device("cpu"))
    assert small.attention(**given, grid=(8, 8), keeps_self=own) is None  # not served: nobody looks at them


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("ahead", [False, True], ids=["", "split ahead"])
def test_a_layer_that_is_passed_over_counts(method, ahead, monkeypatch):
    """40 layers: more than are split at once."""
    if ahead:  # as on a GPU, in plain torch
        monkeypatch.setattr("shared_tome.kernels.can_split", lambda *_: True)
    tokens = torch.randn(1, 64, 8, generator=torch.Generator().manual_seed(0))
    layers = 40

    def choices(passed: set[int]) -> dict[int, torch.Tensor]:
        call, found = ModelCall(config(method=method, levels="0"), (8, 8), torch.device("cpu")), {}
        for layer in range(layers):
            if layer in passed:
                call.pass_over((8, 8))
            else:
                found[layer] = call.plan(tokens, (8, 8)).merge(tokens)
        return found

    every, some = choices(set()), choices({0, 5, *range(14, 18), *range(30, 34)})
    assert all(torch.equal(some[layer], every[layer]) for layer in some) and len(some) == 30


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize(
    ("method", "partition", "draws"),
    [
        ("sample", "random_2d", True),
        ("merge", "random_2d", True),
        ("merge", "fixed_2d", False),
        ("downsample", "", False),
    ],
)
def test_a_layer_that_runs_again_for_its_gradient_is_refused(method, partition, draws, reentrant):
    """Where it would draw other tokens. A call that is made in a backward pass is as any other."""
    options = config(method=method, levels="0", **({"partition": partition} if partition else {}))

    def loss(checkpoints):
        call, x = ModelCall(options, (8, 8), torch.device("cpu")), torch.linspace(-1, 1, 512).reshape(1, 64, 8)
        x.requires_grad_(True)

        def layer(x):
            return call.plan(x, (8, 8)).merge(x).square()

        made = checkpoint(layer, x, use_reentrant=reentrant) if checkpoints else layer(x)
        made.sum().backward()
        return x.grad

    if draws:
        with pytest.raises(RuntimeError, match="does not work with gradient checkpointing"):
            loss(True)
    else:
        assert torch.equal(loss(True), loss(False))
    seen, x = [], torch.ones(2, requires_grad=True)
    x.register_hook(torch.enable_grad()(lambda grad: seen.append(loss(False))))
    (2 * x).sum().backward()
    assert torch.equal(seen[0], loss(False))
