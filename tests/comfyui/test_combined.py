"""ToMe with what people use beside it: the picture is what both make of it, and the gain of both is kept.

EasyCache and LazyCache are ComfyUI's own. A cache that skips is held against the same steps skipped by hand.
"""

from __future__ import annotations

import functools
import json
import logging
from dataclasses import dataclass
from typing import Any

import pytest
import torch

from . import dit_host, host
from .host import cached, run_node
from .newer import Sparse

STEPS = 6
ROUNDING = 1e-5
"""Products of odd sizes are rounded by where their factors lie in memory."""
ORDERS = pytest.mark.parametrize("tome_first", [True, False], ids=["tome first", "tome last"])
CACHES = pytest.mark.parametrize("cache", ["EasyCache", "LazyCache"])
MODELS = pytest.mark.parametrize("kind", ["unet", "flux", "wan"])
NEVER = "[ToMe] nothing was merged in this sampling: "


@dataclass(frozen=True)
class Kind:
    """A small model: how it is sampled, which module ends each of its runs, and its merged attentions' (queries, keys)
    whole and at ratio 0.5."""

    model: Any
    sample: Any
    last: str
    whole: tuple[int, int]
    merged: tuple[int, int]
    layers: int


@pytest.fixture
def chosen(kind, sd15, comfy_nodes):
    if kind == "unet":
        make = functools.partial(host.sample, height=128, width=128, steps=STEPS)
        return Kind(sd15, make, "out", (256, 256), (256, 128), 3)
    text = dit_host.SMALL[kind].others
    image = dit_host.SMALL[kind].image
    sizes = (image + text, image + text), (image + text, image // 2 + text)
    make = functools.partial(dit_host.sample, name=kind, steps=STEPS)
    return Kind(_small(kind), make, {"flux": "final_layer", "wan": "head"}[kind], *sizes, 2)


_small = functools.lru_cache(dit_host.small)


def error(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).norm() / b.norm())


class Steps:
    """A node that counts a sampler's steps and, by a hook, knows in which of them the model ran.

    skipping: (where a cache answers, the steps in which the model runs). In the others what the model changed at the
    last of these is added, around the model in place, as EasyCache does.
    """

    def __init__(self, kind: Kind):
        self.kind, self.now, self.ran = kind, -1, []

    def on(self, model: Any, skipping: tuple[str, list[int]] | None = None) -> Any:
        model, kept = model.clone(), []

        def step(executor: Any, *args: Any, **kwargs: Any) -> Any:
            self.now += 1
            return executor(*args, **kwargs)

        def by_hand(executor: Any, x: Any, *args: Any, **kwargs: Any) -> Any:
            if self.now not in skipping[1]:
                executor(x.clone(), *args, **kwargs)  # so that nothing may hang on how many calls there were
                return x.add_(kept[-1]) if skipping[0] == "diffusion_model" else x + kept[-1]
            before = x.clone()
            out = executor(x, *args, **kwargs)
            kept.append(out - before)
            return out

        model.add_wrapper_with_key("predict_noise", "steps", step)
        if skipping is not None:
            model.add_wrapper_with_key(skipping[0], "by hand", by_hand)
        return model

    def sample(self, model: Any) -> Any:
        self.now, self.ran = -1, []
        last = getattr(self.kind.model.model.diffusion_model, self.kind.last)
        handle = last.register_forward_hook(lambda *_: self.ran.append(self.now))
        try:
            return self.kind.sample(model)
        finally:
            handle.remove()


PLACE = {"EasyCache": "diffusion_model", "LazyCache": "predict_noise"}


@CACHES
@MODELS
@ORDERS
def test_a_cache_answers_with_what_merged_calls_gave(chosen, tome, caches, cache, tome_first):
    """Equal to the same calls merged and the same steps skipped; the calls that run have half the keys."""
    steps = Steps(chosen)
    options = {"ratio": 0.5, "own_token": False}
    model = steps.on(chosen.model)
    both = tome(cached(caches, cache, model, end_percent=0.7), **options)
    if tome_first:
        both = cached(caches, cache, tome(model, **options), end_percent=0.7)
    with dit_host.watch() as seen:
        made = steps.sample(both)
    ran = list(steps.ran)
    assert ran[:2] == [0, 1] and ran[-1] == STEPS - 1 and len(ran) < STEPS  # the cache's gain
    sizes = dit_host.lengths(seen)
    assert sizes.count(chosen.merged) == chosen.layers * len(ran) and chosen.whole not in sizes  # ToMe's
    by_hand = steps.sample(steps.on(tome(chosen.model, **options), (PLACE[cache], ran)))
    assert error(made, by_hand) < ROUNDING
    others = tome(steps.on(chosen.model), **options), cached(caches, cache, steps.on(chosen.model))
    assert all(error(made, steps.sample(other)) > 100 * ROUNDING for other in others)
    assert error(steps.sample(both), made) < ROUNDING


@MODELS
@CACHES
def test_the_report_counts_what_the_model_ran(chosen, tome, caches, cache, caplog):
    """No time is told of calls that a cache answers, and no layer is said to be missed in them."""
    steps = Steps(chosen)
    model, record = caches["ToMeRecord"].execute(model=tome(steps.on(chosen.model), own_token=False)).result
    host.forget_log()
    with caplog.at_level(logging.INFO, logger="ToMe"):
        steps.sample(cached(caches, cache, model))
    ran = len(steps.ran)
    text, data = caches["ToMeReport"].execute(record=record, after=None).result
    data = json.loads(data)
    assert (data["calls"], data["steps"], data["merged_steps"], data["of_steps"]) == (ran, ran, ran, STEPS)
    assert not [layer for layer in data["layers"] if layer["reason"]]
    assert (data["time"] is None) == (cache == "EasyCache")
    answered = f"another node answered {STEPS - ran} of {STEPS} calls without the model"
    assert (answered in text) == (cache == "EasyCache")  # LazyCache stands before: the model is not asked
    assert not [line for line in caplog.messages if "no attention of the model reached ToMe" in line]


@MODELS
@ORDERS
def test_where_a_cache_answers_each_call_from_the_start_on(chosen, tome, caches, caplog, tome_first):
    steps, options = Steps(chosen), {"start": 0.8}
    model = steps.on(chosen.model)
    both = tome(cached(caches, "EasyCache", model), **options)
    if tome_first:
        both = cached(caches, "EasyCache", tome(model, **options))
    host.forget_log()
    with caplog.at_level(logging.INFO, logger="ToMe"):
        made = steps.sample(both)
    said = NEVER + "another node answered from its cache each call that ToMe would have merged"
    assert [one.message for one in caplog.records if one.name == "ToMe"] == [said]
    assert error(made, steps.sample(cached(caches, "EasyCache", model))) < ROUNDING


@MODELS
def test_a_cache_that_answers_nothing_changes_nothing(chosen, tome, caches):
    steps = Steps(chosen)
    model = tome(steps.on(chosen.model))
    expected = steps.sample(model)
    assert error(steps.sample(cached(caches, "EasyCache", model, reuse_threshold=0.0)), expected) < ROUNDING
    assert steps.ran == list(range(STEPS))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "cache", "tome_first"),
    [("unet", "EasyCache", True), ("unet", "LazyCache", False), ("flux", "EasyCache", False)],
)
def test_a_compiled_model_behind_a_cache(chosen, tome, caches, cache, tome_first):
    """TorchCompileModel, a cache and ToMe: as without the compiler."""
    if chosen.last == "out":
        chosen = Kind(host.least_unet(), chosen.sample, "out", chosen.whole, chosen.merged, 2)
    torch._dynamo.reset()
    steps = Steps(chosen)

    def compiled(model):
        return run_node(caches["TorchCompileModel"], model=model, backend="eager")

    eager = steps.sample(cached(caches, cache, tome(steps.on(chosen.model))))
    ran, model = list(steps.ran), steps.on(chosen.model)
    both = cached(caches, cache, compiled(tome(model))) if tome_first else tome(compiled(cached(caches, cache, model)))
    made = steps.sample(both)
    torch._dynamo.reset()
    assert 0 < len(ran) < STEPS
    assert error(made, eager) < 1e-4
    plain = steps.sample(cached(caches, cache, steps.on(chosen.model)))
    assert error(made, plain) > 1e-3


@pytest.fixture
def sage(monkeypatch):
    """sage(way, model, *before): the model with another attention that drops `scale`, and (queries, keys) of its calls.

    way: "host", as `--use-sage-attention`; "node", as KJNodes' patch, which sets an override on a clone.
    """
    import comfy.ldm.flux.math
    import comfy.ldm.wan.model
    from comfy.ldm.modules import attention

    def start(way):
        calls, torchs = [], attention.attention_pytorch.__wrapped__

        def attention_sage(q, k, v, heads, mask=None, attn_precision=None, skip_reshape=False, **kwargs):
            place = 2 if skip_reshape else 1
            calls.append((q.shape[place], k.shape[place]))
            return torchs(q, k, v, heads, mask=mask, skip_reshape=skip_reshape)

        if way == "host":
            wrapped = attention.wrap_attn(attention_sage)
            for module in (attention, comfy.ldm.flux.math, comfy.ldm.wan.model):
                monkeypatch.setattr(module, "optimized_attention", wrapped)
            return calls, lambda model: model

        def node(model):
            model = model.clone()
            options = model.model_options["transformer_options"]
            options["optimized_attention_override"] = lambda func, *args, **kwargs: attention_sage(*args, **kwargs)
            return model

        return calls, node

    return start


@MODELS
@pytest.mark.parametrize("way", ["host", "node"])
@pytest.mark.parametrize("cache", [None, "EasyCache"])
@ORDERS
def test_another_attention_and_a_cache(chosen, tome, caches, sage, way, cache, tome_first):
    """`--use-sage-attention` and KJNodes' patch: the attention gets the drawn keys, of the calls that run."""
    steps = Steps(chosen)

    def behind(model):
        return model if cache is None else cached(caches, cache, model)

    expected = steps.sample(behind(tome(steps.on(chosen.model), own_token=False)))
    ran = len(steps.ran)
    calls, node = sage(way)
    model = steps.on(chosen.model)
    made = steps.sample(behind(node(tome(model)) if tome_first else tome(node(model))))
    assert len(steps.ran) == ran and (ran == STEPS) == (cache is None)
    assert calls.count(chosen.merged) == chosen.layers * ran and chosen.whole not in calls
    assert error(made, expected) < 1e-4


@pytest.mark.parametrize("options", [{}, {"method": "merge"}, {"method": "merge", "proportional": False}], ids=str)
@ORDERS
def test_sparse_attention_on_a_unet_gets_what_tome_leaves_alone(sd15, tome, caplog, options, tome_first):
    """It needs all tokens in their places. (Transformers: test_newer.py, test_dit_neighbours.py.)"""
    sparse, levels = Sparse(declines=False), {"levels": "0", "own_token": False, **options}
    alone = host.sample(sparse(sd15), steps=1)
    whole = sorted(sparse.computed)
    sparse.computed.clear()
    host.forget_log()
    with caplog.at_level(logging.INFO, logger="ToMe"):
        made = host.sample(sparse(tome(sd15, **levels)) if tome_first else tome(sparse(sd15), **levels), steps=1)
    finest = [shape for shape in whole if shape[1] == 1024]
    assert len(finest) == 3 and sorted(sparse.computed) == [shape for shape in whole if shape not in finest]
    assert "[ToMe] layers that ToMe merges are computed densely; another node's sparse attention" in caplog.text
    expected = host.sample(leaving(sd15, tome, levels), steps=1)
    assert error(made, expected) < 1e-4 and error(made, alone) > 1e-3


def leaving(model: Any, tome: Any, options: dict[str, Any]) -> Any:
    """Merged by ToMe at the finest level, and elsewhere each token attends to itself alone."""
    model = tome(model, **options).clone()

    def itself(q, k, v, extra_options):
        return v

    for part, blocks in (("input", (3, 5)), ("middle", (0,)), ("output", (0, 1, 2, 3))):
        for number in blocks:
            model.set_model_attn1_replace(itself, part, number)
    return model
