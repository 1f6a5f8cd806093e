"""Flux and SD3 through diffusers: image keys are sampled and weighed by channels, text keys and all queries stay."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode

import shared_tome
from shared_tome import ModelCall, ToMeConfig
from shared_tome.scripts.rows import ROWS, attentions_of

from . import models

MODELS = {"flux": (models.flux, models.run_flux, True), "sd3": (models.sd3, models.run_sd3, False)}
TEXT, IMAGE = 5, 60


def config(**options):
    return ToMeConfig(**{"ratio": 0.7, "min_tokens": 0, "own_token": False, **options})


class Record(TorchFunctionMode):
    """Each attention's (q, k, v, scale, output) [B, H, L, d], as torch gets it."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if func is F.scaled_dot_product_attention:
            names = ("query", "key", "value")
            q, k, v = args if args else (kwargs[name] for name in names)
            self.calls.append((q, k, v, kwargs.get("scale"), out))
        return out


@pytest.fixture
def seen():
    with Record() as mode:
        yield mode.calls


@pytest.mark.parametrize("name", MODELS)
def test_the_first_attention_against_float64(name, seen):
    make, run, text_first = MODELS[name]
    model = make()
    before = run(model)
    full = list(seen)
    seen.clear()
    shared_tome.apply_patch(model, config=config())
    merged = run(model)
    assert not torch.equal(merged, before) and len(seen) == len(full)
    # 60 image tokens less 42, in runs of unequal length
    for (q, k, *_), (q0, k0, *_) in zip(seen, full, strict=True):
        assert q.shape[2] == q0.shape[2] and k.shape[2] == k0.shape[2] - 42
    q, k, v, _, _ = full[0]
    call = ModelCall(config(), (6, 10), k.device)
    plan = call.plan(torch.zeros(2, IMAGE, 1), (6, 10))
    place = TEXT if text_first else 0
    bias = torch.full((TEXT + IMAGE,), -torch.inf, dtype=torch.float64)
    bias[:TEXT] = 0.0
    if not text_first:
        bias = bias.roll(-TEXT)
    bias[plan.index[0] + place] = plan.sizes[0].double().log()
    logits = q.double() @ k.double().transpose(-1, -2) / q.shape[-1] ** 0.5 + bias
    expected = logits.softmax(-1) @ v.double()
    found = seen[0][-1][..., : q.shape[-1]].double()
    assert (found - expected).abs().max() < 2e-6
    assert (seen[0][-1][..., q.shape[-1] :] == 0).all()


@pytest.mark.parametrize("name", MODELS)
def test_nothing_stays_behind(name):
    make, run, _ = MODELS[name]
    model = make()
    before = run(model)
    shared_tome.apply_patch(model, config=config())
    merged = run(model)
    block = attentions_of(model, ROWS[type(model).__name__])[1]
    heads = [models.noise(2, 2, TEXT + IMAGE, 16, seed=seed) for seed in range(3)]
    attended = F.scaled_dot_product_attention(*heads)
    for error in (ZeroDivisionError, KeyboardInterrupt):

        def fail(module, args, error=error):
            raise error

        handle = block.to_k.register_forward_pre_hook(fail)
        with pytest.raises(error):
            run(model)
        handle.remove()
        if error is not KeyboardInterrupt:  # for which torch runs no hook
            assert torch._C._len_torch_function_stack() == 0
            assert not model._shared_tome.calls, "no tensor of the call is kept"
        assert torch.equal(F.scaled_dot_product_attention(*heads), attended), "somebody else's attention"
        assert torch.equal(run(model), merged) and torch._C._len_torch_function_stack() == 0
    shared_tome.apply_patch(model, config=config(ratio=0.0))
    assert torch.equal(run(model), before)
    shared_tome.remove_patch(model)
    assert torch.equal(run(model), before) and models.count_hooks(model) == 0


def test_reference_tokens_are_kept(seen):
    model = models.flux()
    shared_tome.apply_patch(model, config=config())
    models.run_flux(model, reference=9)
    assert {k.shape[2] for _, k, *_ in seen} == {TEXT + 18 + 9}


def test_another_size_is_another_grid(seen):
    model = models.flux()
    shared_tome.apply_patch(model, config=config(ratio=0.5))
    for height, width in ((6, 10), (10, 6), (4, 15), (7, 9)):
        seen.clear()
        models.run_flux(model, height, width)
        count = height * width
        assert {k.shape[2] for _, k, *_ in seen} == {TEXT + count - int(count * 0.5)}


def test_a_pipelines_transformer_is_found():
    from types import SimpleNamespace

    model = models.flux()
    pipe = SimpleNamespace(transformer=model, scheduler=SimpleNamespace(timesteps=None))
    assert shared_tome.apply_patch(pipe, config=config()) is pipe
    assert models.count_hooks(model) > 0
    assert shared_tome.remove_patch(pipe) is pipe and models.count_hooks(model) == 0
