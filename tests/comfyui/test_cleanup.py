"""Whatever ends a run, the model is afterwards what it was."""

from __future__ import annotations

import pytest
import torch

from .host import sample

EVERYTHING = {"method": "merge", "cross_attention": True, "mlp": True}


def hooks(model) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.model.diffusion_model.modules())


def explode(model, error, at_step):
    """The model raising in its middle block at a step."""
    calls = []

    def patch(q, k, v, extra_options):
        if extra_options["block"][0] == "middle":
            calls.append(1)
            if len(calls) == at_step:
                raise error
        return q, k, v

    model = model.clone()
    model.set_model_attn1_patch(patch)
    return model


@pytest.mark.parametrize("options", [{}, EVERYTHING], ids=["sample", "everything"])
def test_exception_in_mid_run(sd15, tome, options):
    before, merged = sample(sd15), sample(tome(sd15, **options))
    with pytest.raises(RuntimeError, match="in mid-run"):
        sample(explode(tome(sd15, **options), RuntimeError("in mid-run"), 2), steps=3)
    assert hooks(sd15) == 0
    assert torch.equal(sample(sd15), before)
    assert torch.equal(sample(tome(sd15, **options)), merged)


def test_interrupt_in_mid_run(sd15, tome):
    import comfy.model_management

    before = sample(sd15)
    interrupt = comfy.model_management.InterruptProcessingException()
    with pytest.raises(comfy.model_management.InterruptProcessingException):
        sample(explode(tome(sd15, **EVERYTHING), interrupt, 2), steps=3)
    assert hooks(sd15) == 0
    assert torch.equal(sample(sd15), before)


def test_hooks_are_there_while_it_runs(sd15, tome):
    """The counterpart: the count above can be other than 0."""
    counts = []

    def patch(q, k, v, extra_options):
        counts.append(hooks(sd15))
        return q, k, v

    model = tome(sd15, **EVERYTHING)
    model.set_model_attn1_patch(patch)
    sample(model, steps=1)
    assert min(counts) == 20  # two on each of the ten feed-forward layers


def test_options_of_the_node_stay_as_they_were(sd15, tome):
    model = tome(sd15, method="merge")
    options = repr(model.model_options)
    sample(model)
    assert repr(model.model_options) == options
