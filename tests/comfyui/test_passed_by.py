"""A node that runs the U-Net itself, past apply_model: ToMe works there, or says at the end that it was never asked."""

from __future__ import annotations

import logging

import pytest
import torch

from . import host
from .host import sample

NEVER = "no call of the model reached ToMe, because another node runs the model itself"


def direct(model, run=None):
    """A model_function_wrapper that does what apply_model does, without calling it (ComfyUI-deepcache's kind)."""
    model = model.clone()
    base = model.model

    def wrapper(apply_model, args):
        x, t, c = args["input"], args["timestep"], args["c"]
        out = (run or base.diffusion_model)(
            base.model_sampling.calculate_input(t, x), base.model_sampling.timestep(t).float(),
            context=c["c_crossattn"], control=c.get("control"), transformer_options=c["transformer_options"],
        )  # fmt: skip
        return base.model_sampling.calculate_denoised(t, out.float(), x)

    model.set_model_unet_function_wrapper(wrapper)
    return model


@pytest.mark.parametrize("tome_first", [True, False], ids=["tome first", "tome last"])
@pytest.mark.parametrize("options", [{"method": "sample"}, {"method": "merge", "mlp": True}], ids=["sample", "merge"])
def test_a_wrapper_that_calls_the_unet_itself(sd15, tome, options, tome_first):
    """What apply_model would give, bit for bit."""
    both = direct(tome(sd15, **options)) if tome_first else tome(direct(sd15), **options)
    assert torch.equal(sample(both), sample(tome(sd15, **options)))


def test_what_is_recorded_of_it(sd15, tome, comfy_nodes):
    model, record = comfy_nodes["ToMeRecord"].execute(model=direct(tome(sd15))).result
    sample(model)
    text = comfy_nodes["ToMeReport"].execute(record=record, after=None, measure_time=True).result[0]
    assert "2 steps, merged in 2" in text and "level 0 (32x32): 1024 to 512 tokens" in text
    assert "the time was not measured: another node or the sampler runs the model itself" in text


def test_a_wrapper_that_runs_something_else(sd15, tome, comfy_nodes, caplog):
    """The wrapper's own copy of a U-Net's forward: no hook of ComfyUI's is called."""
    copy = sd15.model.diffusion_model._forward
    model, record = comfy_nodes["ToMeRecord"].execute(model=direct(tome(sd15), copy)).result
    host.forget_log()
    with caplog.at_level(logging.INFO, logger="ToMe"):
        sample(tome(sd15))  # an older sampling, which the report must not take for this one
        assert torch.equal(sample(model), sample(sd15))
    ours = [one.message for one in caplog.records if one.name == "ToMe"]  # ComfyUI may warn of models of other tests
    assert ours == [f"[ToMe] nothing was merged in this sampling: {NEVER}"]
    text = comfy_nodes["ToMeReport"].execute(record=record, after=None, measure_time=True).result[0]
    assert "Nothing was merged." in text and NEVER in text


class Strict(torch.nn.Module):
    """Stands for the U-Net during a call and knows ComfyUI's arguments alone."""

    def __init__(self, model):
        super().__init__()
        self.model, self.dtype = [model], model.dtype

    def forward(self, x, timesteps=None, context=None, y=None, control=None, transformer_options=None):
        return self.model[0](x, timesteps, context, y, control, transformer_options or {})


@pytest.mark.parametrize("inside", [True, False], ids=["within ToMe's wrapper", "around it"])
def test_a_model_swapped_for_the_call(sd15, tome, inside):
    """It takes no keyword of ToMe's, and the U-Net in it is merged."""
    model, base = tome(sd15), sd15.model
    unet = base.diffusion_model

    def swapped(run):
        def wrapper(*args, **kwargs):
            base.diffusion_model = Strict(unet)
            try:
                return run(*args, **kwargs)
            finally:
                base.diffusion_model = unet

        return wrapper

    if inside:
        model.add_wrapper_with_key(
            "apply_model", "swap", lambda executor, *args, **kwargs: swapped(executor)(*args, **kwargs)
        )
    else:
        model.set_model_unet_function_wrapper(
            lambda apply_model, args: swapped(apply_model)(args["input"], args["timestep"], **args["c"])
        )
    assert torch.equal(sample(model), sample(tome(sd15)))
