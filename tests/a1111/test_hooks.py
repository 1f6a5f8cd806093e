"""The hooks on genuine ldm attention: what they compute, what they leave alone, what they leave behind."""

from __future__ import annotations

import pytest
import torch
from torch.overrides import _get_current_function_mode_stack

from . import models, variants

CELL = 8  # channels a head


def _attach(tome, model, seeds=(1,), **options):
    config = tome.core.ToMeConfig(**{"ratio": 0.5, "min_tokens": 0, "own_token": False, **options})
    sampling = tome.sampling.Sampling(config, seeds, tome.notes.Notes())
    return tome.hooks.PassAttachment(model, sampling)


def _unet(seed=0, **more):
    return models.small_model(seed, **more).model.diffusion_model


def _inputs(height=16, width=16, batch=2, seed=3):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(batch, 4, height, width, generator=generator)
    return x, torch.full((batch,), 5.0), torch.randn(batch, 7, 16, generator=generator)


def _run(unet, inputs):
    with torch.no_grad():
        x, t, context = inputs
        return unet(x, t, context=context)


@pytest.mark.parametrize("method", ["sample", "merge", "merge_queries", "merge_keys", "downsample", "prune"])
def test_every_method_changes_the_output_and_leaves_the_model_as_it_was(tome, method):
    unet, inputs = _unet(), _inputs()
    before = _run(unet, inputs)
    attachment = _attach(tome, unet, method=method)
    merged = _run(unet, inputs)
    attachment.detach()
    assert merged.shape == before.shape and merged.isfinite().all()
    assert not torch.equal(merged, before)
    assert torch.equal(_run(unet, inputs), before)
    assert models.count_hooks(unet) == 0


def _reference(tome, attn1, x, grid, config, seed):
    """Merged attention in float64, straight from the core's parts."""
    call = tome.core.ModelCall(config, grid, x.device, seed=torch.tensor([seed]))
    layer = call.attention(x, x, x, grid)
    q, k, v = (
        (t.double() @ w.weight.double().T).unflatten(-1, (attn1.heads, -1)).transpose(1, 2)
        for t, w in ((layer.q, attn1.to_q), (layer.k, attn1.to_k), (layer.v, attn1.to_v))
    )
    logits = q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5
    if layer.bias is not None:
        logits = logits + layer.bias.double()[:, None, None]
    out = (logits.softmax(-1) @ v).transpose(1, 2).flatten(2)
    out = out @ attn1.to_out[0].weight.double().T + attn1.to_out[0].bias.double()
    return layer.unmerge(out), layer.bias


@pytest.mark.parametrize("name", variants.SERVED)
@pytest.mark.parametrize("method", ["merge", "merge_keys", "sample"])
def test_each_attention_code_gives_weighted_attention(tome, monkeypatch, name, method):
    """Against float64. 15x17 makes the runs of `sample` unequal, so that its keys have weights too."""
    from ldm.modules.attention import CrossAttention

    monkeypatch.setattr(CrossAttention, "forward", variants.SERVED[name])
    unet, (x, t, context) = _unet(mult=(1,)), _inputs(15, 17)
    attachment = _attach(tome, unet, method=method)
    block = next(tome.hooks.served_blocks(unet))
    seen = {}
    block.attn1.register_forward_pre_hook(lambda m, args: seen.setdefault("x", args[0].clone()), prepend=True)
    block.attn1.register_forward_hook(lambda m, args, out: seen.setdefault("out", out.clone()))
    _run(unet, (x, t, context))
    attachment.detach()
    expected, bias = _reference(tome, block.attn1, seen["x"], (15, 17), attachment.sampling.config, 1)
    assert bias is not None and float(bias.max()) > 0
    error = (seen["out"].double() - expected).abs().max()
    assert error < 2e-5 * expected.abs().max().clamp_min(1)


@pytest.mark.parametrize("name", ["sdp", "fixed_size", "own_scale"])
def test_keys_weighed_where_they_meet(tome, monkeypatch, name):
    """As on a GPU whose kernel takes the heads as they are: nothing is widened. Against float64."""
    from ldm.modules.attention import CrossAttention

    monkeypatch.setattr(CrossAttention, "forward", variants.SERVED.get(name, variants.fixed_size))
    monkeypatch.setattr(tome.engine, "is_met", lambda config, d, x, meets: meets())
    monkeypatch.setattr(tome.parts, "widen_query", lambda *_: 1 / 0 if name != "own_scale" else widened(*_))
    widened = tome.heads.widen_query
    unet, (x, t, context) = _unet(mult=(1,)), _inputs(15, 17)
    attachment = _attach(tome, unet, method="merge")
    attn1, seen = next(tome.hooks.served_blocks(unet)).attn1, {}
    attn1.register_forward_pre_hook(lambda m, args: seen.setdefault("x", args[0].clone()), prepend=True)
    attn1.register_forward_hook(lambda m, args, out: seen.setdefault("out", out.clone()))
    _run(unet, (x, t, context))
    attachment.detach()
    assert not _get_current_function_mode_stack()
    expected, bias = _reference(tome, attn1, seen["x"], (15, 17), attachment.sampling.config, 1)
    assert float(bias.max()) > 0
    assert (seen["out"].double() - expected).abs().max() < 2e-5 * expected.abs().max().clamp_min(1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("d", [8, 40, 64, 80, 160])
def test_the_scale_is_found_for_each_head_size_and_precision(tome, d, dtype):
    expected = {"own_scale": "own", "scaled_keys": "own", "sdp": "given", "given_size": "given"}
    for name, forward in variants.SERVED.items():
        assert tome.heads.find_rule(forward, d, torch.device("cpu"), dtype) == expected[name], name


def test_an_attention_that_takes_no_weights_gets_none(tome, monkeypatch):
    from ldm.modules.attention import CrossAttention

    monkeypatch.setattr(CrossAttention, "forward", variants.fixed_size)
    assert tome.heads.find_rule(variants.fixed_size, 16, torch.device("cpu"), torch.float32) is None
    unet, inputs = _unet(), _inputs()
    attachment = _attach(tome, unet, method="merge")
    weighted = _run(unet, inputs)
    attachment.detach()
    attachment = _attach(tome, unet, method="merge", proportional=False)
    plain = _run(unet, inputs)
    attachment.detach()
    assert torch.equal(weighted, plain)


def test_finding_the_scale_draws_no_random_numbers(tome):
    torch.manual_seed(0)
    state = torch.get_rng_state()
    tome.heads.find_rule(variants.sdp, 16, torch.device("cpu"), torch.float32)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize(("height", "width"), [(33, 41), (25, 33), (7, 41)])
@pytest.mark.parametrize("method", ["sample", "merge"])
def test_odd_sizes_are_merged_at_every_level(tome, height, width, method):
    """264x328 pixels and others: each level halves with (n + 1) // 2."""
    unet, inputs = _unet(mult=(1, 2, 2)), _inputs(height, width)
    attachment = _attach(tome, unet, method=method)
    sizes = []
    for block in tome.hooks.served_blocks(unet):
        block.attn1.to_k.register_forward_hook(lambda m, args, out: sizes.append(args[0].shape[1]))
    assert _run(unet, inputs).isfinite().all()
    attachment.detach()
    levels = [tome.core.core.grid.grid_at((height, width), level) for level in range(3)]
    full = {h * w for h, w in levels}
    assert not full & set(sizes), "a level was left alone"


def test_levels_choose_layers(tome):
    unet, inputs = _unet(), _inputs()
    attachment = _attach(tome, unet, levels="1")
    sizes = set()
    for block in tome.hooks.served_blocks(unet):
        block.attn1.to_k.register_forward_hook(lambda m, args, out: sizes.add(args[0].shape[1]))
    _run(unet, inputs)
    attachment.detach()
    assert sizes == {256, 32}


@pytest.mark.parametrize("option", ["cross_attention", "mlp"])
def test_cross_attention_and_mlp_are_merged_too(tome, option):
    unet, inputs = _unet(), _inputs()
    sizes = {"attn2": set(), "ff": set()}
    for block in tome.hooks.served_blocks(unet):
        for name in sizes:
            part = getattr(block, name)
            part.register_forward_pre_hook(lambda m, args, name=name: sizes[name].add(args[0].shape[1]))
    attachment = _attach(tome, unet, method="merge", **{option: True})
    # The counting hooks were there first and so see full tokens; what runs inside sees merged ones.
    inner = {"attn2": set(), "ff": set()}
    for block in tome.hooks.served_blocks(unet):
        block.attn2.to_q.register_forward_pre_hook(lambda m, args: inner["attn2"].add(args[0].shape[1]))
        block.ff.net[2].register_forward_pre_hook(lambda m, args: inner["ff"].add(args[0].shape[1]))
    _run(unet, inputs)
    attachment.detach()
    merged, other = ("attn2", "ff") if option == "cross_attention" else ("ff", "attn2")
    assert inner[merged] == {128, 32} and inner[other] == {256, 64}
    assert sizes == {"attn2": {256, 64}, "ff": {256, 64}}


def test_foreign_contexts_rows_and_counts_are_left_alone(tome):
    """ControlNet's reference-only: keys of its own, a part of the batch, or all rows as one."""
    unet, inputs = _unet(), _inputs()
    block = next(tome.hooks.served_blocks(unet))
    x = torch.randn(2, 256, 32)
    foreign = torch.randn(2, 512, 32)
    cases = [(x, foreign), (x[:1], None), (x.reshape(1, 512, 32), None), (x[:, :100], None)]
    with torch.no_grad():
        plain = [block.attn1(q, context=context) for q, context in cases]
        attachment = _attach(tome, unet)
        found = []
        # In the middle of a call of the model, where such extensions make these calls.
        block.attn1.register_forward_pre_hook(lambda m, args: None)
        unet.time_embed.register_forward_hook(
            lambda m, args, out: found.extend(block.attn1(q, context=context) for q, context in cases)
        )
        _run(unet, inputs)
    attachment.detach()
    assert len(found) == len(cases)
    for a, b in zip(plain, found, strict=True):
        assert torch.equal(a, b)


def test_the_same_context_given_by_name_is_no_foreign_one(tome):
    unet, inputs = _unet(), _inputs()
    block = next(tome.hooks.served_blocks(unet))
    x, out = torch.randn(2, 256, 32), []
    attachment = _attach(tome, unet)
    unet.time_embed.register_forward_hook(lambda m, args, _: out.append(block.attn1(x, context=x)))
    _run(unet, inputs)
    attachment.detach()
    with torch.no_grad():
        assert not torch.equal(out[0], block.attn1(x))


def test_an_exception_leaves_a_state_that_the_next_call_and_detach_clear(tome):
    unet, inputs = _unet(), _inputs()
    before = _run(unet, inputs)
    attachment = _attach(tome, unet, method="merge", cross_attention=True, mlp=True)
    merged = _run(unet, inputs)
    block = list(tome.hooks.served_blocks(unet))[1]

    def fail(*_):
        raise RuntimeError("out of memory")

    for part in (block.attn1.to_k, block.attn1.to_out, block.attn2.to_q, block.ff.net[2]):
        handle = part.register_forward_pre_hook(fail)
        with pytest.raises(RuntimeError, match="out of memory"):
            _run(unet, inputs)
        handle.remove()
        assert torch.equal(_run(unet, inputs), merged)
        with pytest.raises(RuntimeError):
            handle = part.register_forward_pre_hook(fail)
            _run(unet, inputs)
        handle.remove()
    attachment.detach()
    attachment.detach()
    assert torch.equal(_run(unet, inputs), before) and models.count_hooks(unet) == 0


def test_outside_a_call_of_the_model_nothing_is_merged(tome):
    unet = _unet()
    block, x = next(tome.hooks.served_blocks(unet)), torch.randn(2, 256, 32)
    with torch.no_grad():
        plain = block.attn1(x)
        attachment = _attach(tome, unet)
        _run(unet, _inputs())
        assert torch.equal(block.attn1(x), plain)
    attachment.detach()


def test_a_model_without_self_attention_says_so(tome):
    with pytest.raises(tome.hooks.NotServed, match="Linear"):
        _attach(tome, torch.nn.Linear(2, 2))
    with pytest.raises(tome.hooks.NotServed):
        _attach(tome, None)


def test_detach_all_finds_hooks_whose_owner_is_gone(tome):
    unet, inputs = _unet(), _inputs()
    before = _run(unet, inputs)
    _attach(tome, unet)
    assert models.count_hooks(unet) > 0
    tome.hooks.detach_all()
    assert models.count_hooks(unet) == 0 and torch.equal(_run(unet, inputs), before)


def test_the_global_generator_is_not_touched(tome):
    unet, inputs = _unet(), _inputs()
    attachment = _attach(tome, unet, method="merge")
    state = torch.get_rng_state()
    _run(unet, inputs)
    attachment.detach()
    assert torch.equal(torch.get_rng_state(), state)


def test_other_hooks_see_the_tokens_that_they_would_see_without(tome):
    """Those put on before ours, as other extensions do."""
    unet, inputs = _unet(), _inputs()
    seen = []
    for block in tome.hooks.served_blocks(unet):
        block.attn1.register_forward_pre_hook(lambda m, args: seen.append(args[0].shape))
        block.attn1.register_forward_hook(lambda m, args, out: seen.append(out.shape))
    _run(unet, inputs)
    plain, seen[:] = list(seen), []
    attachment = _attach(tome, unet, method="merge")
    _run(unet, inputs)
    attachment.detach()
    assert seen == plain


# --- layers that another extension has replaced -----------------------------------------------------------------------


class _Notes(list):
    """What is told, each line once, as Notes does."""

    def say(self, message, shown=True):
        if message not in self:
            self.append(message)


def _attach_told(tome, model, **options):
    config = tome.core.ToMeConfig(**{"ratio": 0.5, "min_tokens": 0, "own_token": False, **options})
    notes = _Notes()
    return tome.hooks.PassAttachment(model, tome.sampling.Sampling(config, (1,), notes)), notes


def _replace(module, seen):
    def forward(x, *args, **kwargs):
        seen.add(x.shape[1])
        return type(module).forward(module, x, *args, **kwargs)

    module.forward = forward


OPTIONS = {"attn2": "cross_attention", "ff": "mlp"}


@pytest.mark.parametrize("method", ["merge", "merge_keys", "prune"])
@pytest.mark.parametrize(("name", "word"), [("attn2", "cross-attention"), ("ff", "feed-forward layer")])
def test_a_layer_that_another_extension_replaced_sees_all_tokens(tome, name, word, method):
    """Regional Prompter's kind goes by the number of tokens."""
    unet, inputs, seen = _unet(), _inputs(), set()
    attachment = _attach(tome, unet, method=method)
    expected = _run(unet, inputs)
    attachment.detach()
    for block in tome.hooks.served_blocks(unet):
        _replace(getattr(block, name), seen)
    attachment, notes = _attach_told(tome, unet, method=method, **{OPTIONS[name]: True})
    found = [_run(unet, inputs) for _ in range(2)]
    attachment.detach()
    assert seen == {256, 64} and all(torch.equal(one, expected) for one in found)
    assert notes == [f"ToMe skips a {word} that another node or extension replaces"]


def test_the_classs_own_forward_put_back_is_no_replacement(tome):
    """IP-Adapter's kind leaves it on the layer when it is done."""
    unet, inputs = _unet(), _inputs()
    options = {"method": "merge", "cross_attention": True, "mlp": True}
    attachment = _attach(tome, unet, **options)
    expected = _run(unet, inputs)
    attachment.detach()
    for block in tome.hooks.served_blocks(unet):
        for layer in (block.attn1, block.attn2, block.ff):
            layer.forward = layer.forward
    attachment, notes = _attach_told(tome, unet, **options)
    found = _run(unet, inputs)
    attachment.detach()
    assert torch.equal(found, expected) and not notes


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("by_name", [False, True])
def test_rows_or_tokens_that_are_not_the_matchs_are_left_alone(tome, name, by_name):
    """Attention Couple's kind gives a layer more rows than the self-attention had."""
    unet, inputs, seen = _unet(), _inputs(), []
    attachment = _attach(tome, unet, method="merge")
    expected = _run(unet, inputs)
    attachment.detach()

    def double(module, args, kwargs):
        x, *rest = args
        kwargs = {key: torch.cat([value] * 2) for key, value in kwargs.items() if isinstance(value, torch.Tensor)}
        seen.append(x.shape)
        x = torch.cat([x, x])
        return ((), {**kwargs, "x": x}) if by_name else ((x, *rest), kwargs)

    for block in tome.hooks.served_blocks(unet):
        layer = getattr(block, name)
        layer.register_forward_pre_hook(double, with_kwargs=True)
        layer.register_forward_hook(lambda module, args, out: out.chunk(2)[0])
    attachment, notes = _attach_told(tome, unet, method="merge", **{OPTIONS[name]: True})
    found = _run(unet, inputs)
    attachment.detach()
    assert {shape[1] for shape in seen} == {256, 64} and torch.allclose(found, expected, atol=1e-5)
    assert len(notes) == 1 and "whose rows or tokens are not those of its block" in notes[0]


@pytest.mark.parametrize("name", OPTIONS)
def test_a_match_serves_its_own_call_of_the_model_alone(tome, name):
    """An extension may run a block's other layers without its self-attention."""
    unet = _unet()
    block, x = next(tome.hooks.served_blocks(unet)), torch.randn(2, 256, 32)
    layer, more = getattr(block, name), {"context": torch.randn(2, 7, 16)} if name == "attn2" else {}
    with torch.no_grad():
        plain, found = layer(x, **more), []
        attachment = _attach(tome, unet, method="merge", cross_attention=True, mlp=True)
        _run(unet, _inputs())
        found.append(layer(x, **more))
        handle = unet.time_embed.register_forward_hook(lambda m, args, out: found.append(layer(x, **more)))
        _run(unet, _inputs())
        handle.remove()
    attachment.detach()
    assert len(found) == 2 and all(torch.equal(one, plain) for one in found)
