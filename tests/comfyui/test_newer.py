"""ToMe on a newer ComfyUI (newer.py): containers, a model's own backend, what weights prefer, sparse attention."""

from __future__ import annotations

import functools
import itertools
import logging

import pytest
import torch

from . import dit_host, host
from .dit_host import call
from .newer import INSIDE, OVERRIDE, Newer, Sparse, asked, backend, eight_bits, with_override
from .test_clip_vision import encoder, outputs
from .test_dit import log
from .test_dit_neighbours import NOT_KEPT, SPARSE

TORCHS = "attention_pytorch"


@pytest.fixture(scope="module")
def dit(comfy_nodes):
    return functools.lru_cache(dit_host.small)


@pytest.fixture
def newer(comfy_nodes, monkeypatch):
    host.forget_log()
    return Newer(monkeypatch)


@pytest.fixture
def torchs(comfy_nodes):
    from comfy.ldm.modules import attention

    return getattr(attention, TORCHS).__wrapped__


def flux_of_wide_heads():
    """Of 128 channels, as Flux has them: with weights they are too wide for other attentions than ComfyUI's own."""
    return dit_host.small("flux", hidden_size=256, axes_dim=[32, 48, 48])


@pytest.mark.parametrize("method", ["sample", "merge", "merge_keys", "downsample"])
@pytest.mark.parametrize("name", ["flux", "wan"])
def test_containers_change_nothing_in_a_transformer(dit, tome, monkeypatch, name, method):
    expected, plain = (call(model, name) for model in (tome(dit(name), method=method), dit(name)))
    newer = Newer(monkeypatch)
    assert torch.equal(call(dit(name), name), plain)
    assert torch.equal(call(tome(dit(name), method=method), name), expected) and not torch.equal(expected, plain)
    assert newer.brought >= 4


@pytest.mark.parametrize("method", ["sample", "merge", "merge_queries"])
def test_containers_change_nothing_in_a_unet(sd15, tome, monkeypatch, method):
    expected = host.sample(tome(sd15, method=method), steps=1)
    newer = Newer(monkeypatch)
    assert torch.equal(host.sample(tome(sd15, method=method), steps=1), expected) and newer.brought


@pytest.mark.parametrize("tome_first", [True, False], ids=["tome first", "backend first"])
@pytest.mark.parametrize("method", ["sample", "merge", "merge_keys"])
@pytest.mark.parametrize("name", ["flux", "wan"])
def test_pytorchs_attention_as_a_models_backend(newer, tome, torchs, caplog, name, method, tome_first):
    """It is what runs anyway: own tokens, kernels and weights in heads of any size stay."""
    small = flux_of_wide_heads() if name == "flux" else dit_host.small(name)
    expected = call(tome(small, method=method), name)
    with caplog.at_level(logging.INFO, logger="ToMe"):
        model = newer.backend(tome(small, method=method), torchs) if tome_first else newer.backend(small, torchs)
        assert torch.equal(call(model if tome_first else tome(model, method=method), name), expected)
    assert log(caplog) == []


@pytest.mark.parametrize("tome_first", [True, False], ids=["tome first", "backend first"])
@pytest.mark.parametrize("method", ["sample", "merge", "merge_queries"])
def test_pytorchs_attention_as_a_unets_backend(newer, sd15, tome, torchs, caplog, method, tome_first):
    expected = host.sample(tome(sd15, method=method), steps=1)
    with caplog.at_level(logging.INFO, logger="ToMe"):
        model = newer.backend(tome(sd15, method=method), torchs) if tome_first else newer.backend(sd15, torchs)
        assert torch.equal(host.sample(model if tome_first else tome(model, method=method), steps=1), expected)
    assert log(caplog) == []


@pytest.mark.parametrize("tome_first", [True, False], ids=["tome first", "backend first"])
@pytest.mark.parametrize("way", ["backend", "preferred"])
def test_an_attention_of_eight_bits_gets_the_drawn_keys(newer, tome, caplog, way, tome_first):
    """Whether a node has chosen it or the weights prefer it; the text's attention is its too."""
    calls, model = [], dit_host.small("wan")
    chosen = eight_bits(calls)
    use = newer.backend if way == "backend" else newer.prefer
    plain = call(use(dit_host.small("wan"), chosen), "wan")
    assert calls == 2 * [(72, 72, 32), (72, 7, 32)]
    calls.clear()
    with caplog.at_level(logging.INFO, logger="ToMe"):
        model = use(tome(model, ratio=0.75), chosen) if tome_first else tome(use(model, chosen), ratio=0.75)
        merged = call(model, "wan")
    assert calls == 2 * [(72, 18, 32), (72, 7, 32)] and not torch.equal(merged, plain)
    assert log(caplog) == [NOT_KEPT]


def test_what_some_layers_prefer_is_theirs_alone(newer, tome, caplog):
    """The others keep own tokens, by PyTorch's attention."""
    calls, model = [], dit_host.small("wan")
    newer.prefer(model, eight_bits(calls), lambda name: name == "blocks.0.self_attn")
    call(model, "wan")
    assert calls == [(72, 72, 32)]
    calls.clear()
    hooks = number_of_hooks(model)
    with dit_host.watch() as seen, caplog.at_level(logging.INFO, logger="ToMe"):
        merged = call(tome(model, ratio=0.75), "wan")
    assert calls == [(72, 18, 32)]
    assert number_of_hooks(model) == hooks
    assert log(caplog) == [NOT_KEPT] and (72, 72) not in dit_host.lengths(seen)
    seldom = dit_host.small("wan")
    newer.prefer(seldom, eight_bits([]), lambda name: False)
    assert not torch.equal(merged, call(tome(seldom, ratio=0.75), "wan"))


def test_no_hook_is_left_where_the_call_fails(newer, tome):
    calls, model = [], dit_host.small("wan")
    newer.prefer(model, eight_bits(calls), lambda name: name == "blocks.0.self_attn")
    merged, blocks = tome(model, ratio=0.75), model.model.diffusion_model.blocks
    expected, hooks = call(merged, "wan"), number_of_hooks(model)
    handle = blocks[1].ffn.register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        call(merged, "wan")
    handle.remove()
    assert number_of_hooks(model) == hooks and torch.equal(call(merged, "wan"), expected)


def number_of_hooks(model):
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.model.diffusion_model.modules())


def test_a_compiled_model_cannot_tell_its_layers_apart(newer, caplog):
    """torch.compile asks no hooks. What all layers prefer is known without."""
    module, calls = host.pack_module("chosen"), []
    for which in (lambda name: name == "blocks.0.self_attn", lambda name: True):
        model = newer.prefer(dit_host.small("wan"), eight_bits(calls), which).model.diffusion_model
        before = len(model.blocks[0].self_attn._forward_hooks)
        with caplog.at_level(logging.INFO, logger="ToMe"):
            chosen = module.Chosen({}, model, compiled=True)
        assert log(caplog) == [f"[ToMe] {module._LOST}"]
        with chosen.followed():
            assert len(model.blocks[0].self_attn._forward_hooks) == before
    assert chosen.func(max).__name__ == "attention_comfy_kitchen_int8" == chosen.host.__name__
    assert chosen.kernels(torch.device("cpu")) == ()


@pytest.mark.parametrize("method", ["sample", "merge"])
def test_a_unet_whose_weights_prefer_eight_bits(newer, tome, method):
    calls, model = [], host.small_unet("SD15")
    newer.prefer(model, eight_bits(calls))
    host.sample(model, steps=1)
    before = list(calls)
    calls.clear()
    host.sample(tome(model, method=method, ratio=0.75), steps=1)
    assert len(calls) == len(before) and calls != before


ORDERS = list(itertools.permutations(["tome", "sparse", "backend"]))


def in_order(order, model, steps):
    for name in order:
        model = steps[name](model)
    return model


@pytest.mark.parametrize("method", ["sample", "merge"])
@pytest.mark.parametrize("order", ORDERS, ids=", ".join)
def test_what_sparse_attention_hands_on_to_a_backend_is_merged(newer, dit, tome, torchs, caplog, order, method):
    """Below its number of tokens ComfyUI's node hands a call on to the model's backend, past ToMe's function."""
    expected = dit_host.sample(tome(dit("flux"), method=method), "flux")
    sparse, own = Sparse(declines=True), {"method": method}
    steps = {"tome": lambda m: tome(m, **own), "sparse": sparse, "backend": lambda m: newer.backend(m, torchs)}
    host.forget_log()
    with caplog.at_level(logging.INFO, logger="ToMe"):
        assert torch.equal(dit_host.sample(in_order(order, dit("flux"), steps), "flux"), expected)
    assert sparse.declined == 2 * 2 and log(caplog) == [f"[ToMe] {SPARSE} (Flux)"]


@pytest.mark.parametrize("order", ORDERS, ids=", ".join)
def test_what_sparse_attention_computes_is_left_whole(newer, dit, tome, torchs, caplog, order):
    alone, sparse = Sparse(declines=False), Sparse(declines=False)
    expected = dit_host.sample(newer.backend(alone(dit("flux")), torchs), "flux")
    steps = {"tome": tome, "sparse": sparse, "backend": lambda m: newer.backend(m, torchs)}
    with caplog.at_level(logging.INFO, logger="ToMe"):
        assert torch.equal(dit_host.sample(in_order(order, dit("flux"), steps), "flux"), expected)
    assert sparse.computed == alone.computed and len(alone.computed) == 2 * 2
    said = f"{SPARSE} (Flux)"
    assert log(caplog) == [f"[ToMe] {said}", f"[ToMe] nothing was merged in this sampling: {said}"]


@pytest.mark.parametrize("order", [("tome", "sparse"), ("sparse", "tome")], ids=", ".join)
def test_sparse_attention_without_a_backend(newer, dit, tome, order):
    expected = dit_host.sample(tome(dit("wan")), "wan")
    sparse = Sparse(declines=True)
    made = dit_host.sample(in_order(order, dit("wan"), {"tome": tome, "sparse": sparse}), "wan")
    assert torch.equal(made, expected) and sparse.declined


def test_what_sparse_attention_gives_to_tomes_function_has_the_calls_options(newer, torchs, monkeypatch):
    """Some declined calls go to the model's backend, others to the function that ToMe gives."""
    from comfy.ldm.modules import attention

    seen, previous = [], backend(asked(torchs))

    def sparse(func, q, k, v, heads, **kwargs):
        return previous(func, q, k, v, heads, **kwargs) if heads == 1 else func(q, k, v, heads, **kwargs)

    def spy(q, k, v, heads, **kwargs):
        seen.append(kwargs)
        return torchs(q, k, v, heads, **kwargs)

    monkeypatch.setattr(attention, "optimized_attention", asked(spy))
    q, k, v = torch.randn(3, 2, 103, 64)
    dit_host.attention_alone((8, 12), 7, 0, override=sparse, method="merge_keys")(q, k, v, 2)
    (told,) = seen
    assert told[INSIDE] and told["transformer_options"][OVERRIDE].__name__ == "attention"


def test_which_overrides_stand_for_a_backend(comfy_nodes, torchs):
    chosen = host.pack_module("chosen")

    def another(func, *args, **kwargs):
        return torchs(*args, **kwargs)

    def sparse_attention(*args, **kwargs):
        return torchs(*args, **kwargs)

    assert chosen.backend_of(backend(asked(torchs))) is chosen.backend_of(backend(torchs)) is torchs
    assert (
        chosen.backend_of(another) is chosen.backend_of(None) is chosen.backend_of(functools.partial(another)) is None
    )
    assert chosen.backend_of(backend(sparse_attention)) is None  # it gets all tokens, as another node's
    later = backend(torchs)
    assert chosen.backend_behind(Sparse(True).override(later)) is torchs
    assert chosen.backend_behind(Sparse(True).override(None)) is chosen.backend_behind(max) is None


def test_a_sparse_backend_goes_first(newer, dit, tome, caplog):
    """What another node has put there by ComfyUI's own way (set_model_optimized_attention)."""
    seen = []

    def sparse_attention(q, k, v, heads, **kwargs):
        seen.append(k.shape[2])
        return v.transpose(1, 2).flatten(2)

    call(tome(with_override(dit("flux"), backend(sparse_attention)), ratio=0.75), "flux")
    assert len(seen) == 2


@pytest.mark.parametrize("proportional", [True, False])
def test_containers_change_nothing_in_an_image_encoder(comfy_nodes, monkeypatch, proportional):
    options = {"ratio": 0.6, "proportional": proportional}
    merged = host.run_node(comfy_nodes["ToMeCLIPVision"], clip_vision=encoder(), **options)
    expected, calls = outputs(merged), []
    newer = Newer(monkeypatch)
    newer.encoder(monkeypatch)
    made = outputs(merged)
    assert all(torch.equal(made[name], value) for name, value in expected.items())
    newer.encoder(monkeypatch, eight_bits(calls))
    outputs(merged)
    # Heads of 16 with weights would be of 24 channels, which it may not know; the first layer has no weights yet.
    assert [head for _, _, head in calls] == [16] * (1 if proportional else 5)
