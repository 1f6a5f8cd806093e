"""Whole generations: the callbacks in the host's order, through the panel's arguments."""

from __future__ import annotations

import copy
import functools
import sys
import types

import pytest
import torch

from . import models, variants

ON = [{"ratio": 0.5, "min_tokens": 0}]


def _on(**options):
    return [{**ON[0], **options}]


def _unet(host):
    return host.shared.sd_model.model.diffusion_model


def _equal(one, two):
    return all(torch.equal(a, b) for a, b in zip(one, two, strict=True))


def test_the_order_of_callbacks_is_the_hosts(host):
    host.generate(ON)
    assert host.order == [
        "before_process", "process", "before_process_batch", "process_batch", "process_before_every_sampling",
        "post_sample", "postprocess_batch", "postprocess_image", "postprocess",
    ]  # fmt: skip


@pytest.mark.parametrize("method", ["sample", "merge", "merge_queries", "merge_keys", "downsample", "prune"])
def test_merging_changes_the_picture_repeats_and_is_gone_after(host, method):
    before, _ = host.generate()
    merged, p = host.generate(_on(method=method))
    again, _ = host.generate(_on(method=method))
    after, _ = host.generate()
    assert not _equal(before, merged) and _equal(merged, again) and _equal(before, after)
    assert models.count_hooks(_unet(host)) == 0 and p.closed == 1


@pytest.mark.parametrize("args", [[False, 0.9], [True, 0.0], _on(ratio=0.0), [{"enabled": False, "ratio": 0.9}]])
def test_off_and_ratio_zero_are_bit_equal_to_no_extension(host, args):
    before, _ = host.generate()
    found, p = host.generate(args)
    assert _equal(before, found) and not p.extra_generation_params and not p.troubles


def test_hooks_are_on_while_sampling_only(host, monkeypatch):
    counts = {}

    def counting(name):
        original = getattr(type(host.tabs["txt2img"].scripts[0]), name)

        def method(self, p, *args, **kwargs):
            result = original(self, p, *args, **kwargs)
            counts[name] = models.count_hooks(_unet(host))
            return result

        monkeypatch.setattr(type(host.tabs["txt2img"].scripts[0]), name, method)

    for name in ("before_process", "process", "process_before_every_sampling", "post_sample"):
        counting(name)
    host.generate(ON)
    assert counts.pop("process_before_every_sampling") > 0
    assert set(counts.values()) == {0}


def test_an_exception_in_the_model_leaves_no_hook(host):
    before, _ = host.generate()
    handle = _unet(host).middle_block.register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        host.generate(ON)
    handle.remove()
    assert models.count_hooks(_unet(host)) == 0
    assert _equal(host.generate()[0], before)


def test_without_close_the_next_generation_takes_the_hooks_off(host, monkeypatch):
    """A script that makes its own processing object and never closes it."""
    before, _ = host.generate()
    monkeypatch.setattr(f"{type(host).__module__}.closing", _no_closing)
    handle = _unet(host).middle_block.register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        host.generate(ON)
    handle.remove()
    assert models.count_hooks(_unet(host)) > 0, "the case is not what it should be"
    assert _equal(host.generate()[0], before)
    assert models.count_hooks(_unet(host)) == 0


class _no_closing:
    def __init__(self, thing):
        pass

    def __enter__(self):
        pass

    def __exit__(self, *exc):
        return None


def test_an_interrupt_leaves_no_hook(host):
    before, _ = host.generate()
    host.interrupt_at = 1
    host.generate(ON)
    host.interrupt_at = None
    assert models.count_hooks(_unet(host)) == 0 and _equal(host.generate()[0], before)


def test_p_close_is_the_hosts_own_again(host):
    _, p = host.generate(ON)
    assert "close" not in vars(p)
    p.close()
    assert p.closed == 2


def test_a_copy_of_a_request_closes_itself(host):
    """The X/Y/Z plot copies p for each picture."""
    runner = host.tabs["txt2img"]
    _, p = host.generate(ON)
    runner.call("before_process", p)
    twin = copy.copy(p)
    runner.call("before_process", twin)
    twin.close()
    assert (p.closed, twin.closed) == (1, 2) and "close" not in vars(twin)
    p.close()
    assert p.closed == 2


# --- one image, one seed ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["sample", "merge"])
@pytest.mark.parametrize("together", [True, False], ids=["one call", "split calls"])
def test_an_image_of_four_is_the_same_made_alone(host, monkeypatch, method, together):
    """In float64: in float32 a batch of another size rounds otherwise, which a match between equals can show."""
    from ldm.modules.attention import CrossAttention

    monkeypatch.setattr(CrossAttention, "forward", variants.own_scale)
    host.opts.data["batch_cond_uncond"] = together
    host.dtype = torch.float64
    _unet(host).double().dtype = torch.float64
    _unet(host).time_embed.register_forward_pre_hook(lambda module, args: (args[0].double(),))
    for module in _unet(host).modules():
        if type(module).__name__ == "GroupNorm32":  # casts to float32
            module.float()
            module.register_forward_hook(lambda module, args, out: out.double())
    args = _on(method=method, partition="random_2d")
    four, _ = host.generate(args, seeds=(5, 6, 7, 8), batch_size=4)
    for seed, image in zip((5, 6, 7, 8), four, strict=True):
        alone, _ = host.generate(args, seeds=(seed,))
        assert (alone[0] - image).abs().max() < 1e-3, seed
    other, _ = host.generate(args, seeds=(6,))
    assert (other[0] - four[0]).abs().max() > 0.1


@pytest.mark.parametrize(
    "prompts",
    [
        ["a", "b"],
        ["a AND b", "c"],
        ["a", "b AND c AND d"],
        ["long:a", "b"],
        ["long:a AND b", "c AND d"],
    ],
)
@pytest.mark.parametrize("together", [True, False], ids=["one call", "split calls"])
@pytest.mark.parametrize("skip_uncond", [False, True])
def test_rows_calls_and_prompts_do_not_move_the_choices(host, tome, monkeypatch, prompts, together, skip_uncond):
    """Every row takes the tokens that its image's seed chooses, however the host splits the rows."""
    host.opts.data["batch_cond_uncond"] = together
    seen = []
    original = tome.sampling.Sampling.call

    def call(self, x, *arguments, **more):
        made = original(self, x, *arguments, **more)
        seeds = made.seed.tolist()
        seen.append([seeds[row % len(seeds)] for row in range(len(x))])
        return made

    monkeypatch.setattr(tome.sampling.Sampling, "call", call)
    host.generate(ON, seeds=(11, 22), batch_size=2, prompts=prompts, steps=2, skip_uncond=skip_uncond)
    counts = [len(prompt.split(" AND ")) for prompt in prompts]
    positive = [11] * counts[0] + [22] * counts[1]
    rows = sum(seen, [])
    assert rows == positive + [11, 22] + positive + ([] if skip_uncond else [11, 22])
    if not together:
        assert len(seen) > 2


def test_a_prompt_and_its_negative_take_the_same_tokens_in_one_call_or_two(host):
    together, _ = host.generate(ON)
    host.opts.data["batch_cond_uncond"] = False
    apart, _ = host.generate(ON)
    assert host.calls[-6:] == [1] * 6 and (together[0] - apart[0]).abs().max() < 1e-3


def test_batches_after_each_other_take_their_own_seeds(host):
    both, _ = host.generate(ON, seeds=(1, 2), batch_size=1)
    alone, _ = host.generate(ON, seeds=(2,))
    assert _equal([both[1]], alone)


def test_the_fixed_seed_rule(host):
    """The same tokens whatever the image's seed: then the picture follows the number in `seed`."""
    one, _ = host.generate(_on(seed_rule="fixed", seed=9))
    two, _ = host.generate(_on(seed_rule="fixed", seed=10))
    image, _ = host.generate(_on(seed=10))
    assert not _equal(one, two)
    assert _equal(image, host.generate(ON)[0]), "by the image's seed, the number does not count"
    nine, _ = host.generate(ON, seeds=(9,))
    assert _equal(host.generate(_on(seed_rule="fixed", seed=9), seeds=(9,))[0], nine)


def test_share_match_joins_rows_only_where_halves_are_the_same_images(host, tome, monkeypatch):
    call = sys.modules[tome.core.ModelCall.__module__]
    rows, match_tokens = set(), call.match_tokens

    def spy(metric, *args, **kwargs):
        plan = match_tokens(metric, *args, **kwargs)
        rows.add((metric.shape[0], plan.choice.shape[0]))
        return plan

    monkeypatch.setattr(call, "match_tokens", spy)
    shared, two = _on(method="merge", share_match=True), {"seeds": (1, 2), "batch_size": 2}
    host.generate(shared, **two)
    assert rows == {(4, 2)}
    rows.clear()
    host.generate(shared, prompts=["a AND b", "c AND d"], **two)  # rows 0 0 1 | 1 0 1
    assert rows == {(6, 6)}
    rows.clear()
    host.opts.data["batch_cond_uncond"] = False  # rows 0 | 1
    host.generate(shared, **two)
    assert rows == {(2, 2)}


# --- steps ------------------------------------------------------------------------------------------------------------


def _merged_calls(host, tome, monkeypatch, args, **request):
    """The ratio of each call of the model."""
    ratios = []
    original = tome.sampling.Sampling.call

    def call(self, *arguments, **kwargs):
        made = original(self, *arguments, **kwargs)
        ratios.append(0.0 if made is None else round(made.config.ratio, 3))
        return made

    monkeypatch.setattr(tome.sampling.Sampling, "call", call)
    host.generate(args, **request)
    return ratios


def test_the_schedule_goes_by_the_noise_level(host, tome, monkeypatch):
    assert _merged_calls(host, tome, monkeypatch, _on(start=0.5), steps=4) == [0.0, 0.0, 0.5, 0.5]


def test_calls_at_one_noise_level_have_one_ratio_where_the_sampler_makes_two_a_step(host, tome, monkeypatch):
    found = _merged_calls(host, tome, monkeypatch, _on(end=0.5), steps=4, calls_twice=True)
    assert found == [0.5] * 3 + [0.0] * 4  # at 0, 1/4, 1/4, 1/2, 1/2, 3/4, 3/4


def test_the_hires_pass_goes_on_where_its_noise_level_is(host, tome, monkeypatch):
    found = _merged_calls(host, tome, monkeypatch, _on(start=0.5), steps=4, enable_hr=True)
    assert found == [0.0, 0.0, 0.5, 0.5] + [0.0, 0.5, 0.5]  # which begins a step later


def test_a_falling_ratio(host, tome, monkeypatch):
    assert _merged_calls(host, tome, monkeypatch, _on(ratio_end=0.0), steps=4) == [0.5, 0.4, 0.2, 0.1]


def test_each_step_chooses_anew(host, tome, monkeypatch):
    steps = []
    original = tome.sampling.Sampling.call

    def call(self, *arguments, **kwargs):
        steps.append(self.step)
        return original(self, *arguments, **kwargs)

    monkeypatch.setattr(tome.sampling.Sampling, "call", call)
    host.generate(ON, steps=4)
    assert steps == [0, 1, 2, 3]


# --- passes and models ------------------------------------------------------------------------------------------------


def test_the_hires_pass_has_a_ratio_of_its_own(host, tome, monkeypatch):
    found = _merged_calls(host, tome, monkeypatch, _on(hires_ratio=0.25), enable_hr=True)
    assert found == [0.5] * 3 + [0.25] * 2
    found = _merged_calls(host, tome, monkeypatch, ON, enable_hr=True)
    assert found == [0.5] * 5
    found = _merged_calls(host, tome, monkeypatch, _on(hires_ratio=0.0), enable_hr=True)
    assert found == [0.5] * 3
    assert models.count_hooks(_unet(host)) == 0


def test_a_hires_pass_alone(host, tome, monkeypatch):
    assert _merged_calls(host, tome, monkeypatch, _on(ratio=0.0, hires_ratio=0.5), enable_hr=True) == [0.5] * 2


def test_a_refiner_of_another_configuration_is_hooked_and_both_come_out_clean(host):
    base, refiner = host.shared.sd_model, models.small_model(7, mult=(1, 1, 2))

    def make(args):
        host.shared.sd_model = base
        return host.generate(args, steps=4, refiner=refiner)[0]

    plain = make(None)
    merged = make(ON)
    assert not _equal(plain, merged)
    assert _equal(make(None), plain)
    assert models.count_hooks(base) == models.count_hooks(refiner) == 0
    # That the refiner's part is merged too: merging from the swap on alone changes the picture.
    assert not _equal(make(_on(start=0.5)), plain)


def test_a_refiner_without_self_attention_is_told(host):
    refiner = models.Loaded(_Flat())
    _, p = host.generate(ON, steps=4, refiner=refiner)
    assert any("_Flat" in text for text in p.comments)
    assert models.count_hooks(refiner) == 0


class _Flat(torch.nn.Module):
    def forward(self, x, t, context=None):
        return x * 0.1


def test_a_model_without_self_attention_says_so_and_claims_nothing(host):
    """SD3 and others."""
    host.shared.sd_model = models.Loaded(_Flat())
    plain, _ = host.generate()
    found, p = host.generate(ON)
    assert _equal(plain, found)
    assert any("_Flat" in text and "nothing is merged" in text for text in p.comments)
    assert not p.extra_generation_params


def test_odd_sizes(host):
    """264x328."""
    found, p = host.generate(ON, width=328, height=264, steps=2)
    plain, _ = host.generate(width=328, height=264, steps=2)
    assert found[0].shape == (4, 33, 41) and found[0].isfinite().all() and not _equal(found, plain)
    assert not p.troubles


@pytest.mark.parametrize("name", variants.SERVED)
def test_every_attention_optimization_is_served(host, monkeypatch, name):
    """They replace CrossAttention.forward at class level. Each gives nearly the same picture."""
    from ldm.modules.attention import CrossAttention

    expected, _ = host.generate(_on(method="merge"))
    monkeypatch.setattr(CrossAttention, "forward", variants.SERVED[name])
    plain, _ = host.generate()
    found, p = host.generate(_on(method="merge"))
    assert (found[0] - expected[0]).abs().max() < 1e-3 and not _equal(found, plain) and not p.troubles


# --- those who do the same --------------------------------------------------------------------------------------------


def test_built_in_token_merging_goes_first(host):
    plain, _ = host.generate()
    found, p = host.generate(ON, token_merging_ratio=0.4)
    assert _equal(plain, found)
    assert any("built-in token merging" in text for text in p.comments) and not p.extra_generation_params
    host.shared.sd_model.applied_token_merged_ratio = 0.4
    found, p = host.generate(ON)
    assert _equal(plain, found) and p.comments


def test_built_in_token_merging_in_the_hires_pass_alone(host, monkeypatch):
    from . import host as program

    monkeypatch.setattr(program.Processing, "get_token_merging_ratio", lambda self, for_hr=False: 0.4 * for_hr)
    _, p = host.generate(ON, enable_hr=True)
    assert p.extra_generation_params["ToMe ratio"] == 0.5
    assert p.extra_generation_params["ToMe hires ratio"] == 0.0


def _use_hypertile(unet, enabled):
    """What HyperTile leaves on attn1: a wrapper of the forward that it found, guessing the grid."""
    for module in unet.modules():
        if hasattr(module, "attn1"):
            attn1 = module.attn1
            if hasattr(attn1, "__webui_hypertile_params"):  # once put there it stays
                getattr(attn1, "__webui_hypertile_params").enabled = enabled
                continue
            params = types.SimpleNamespace(forward=attn1.forward, enabled=enabled, seen=[])

            @functools.wraps(params.forward)
            def forward(x, *args, params=params, **kwargs):
                if params.enabled:
                    params.seen.append(x.shape[1])
                    assert int(x.shape[1] ** 0.5) ** 2 == x.shape[1], "Invalid aspect ratio"
                return params.forward(x, *args, **kwargs)

            setattr(attn1, "__webui_hypertile_params", params)
            attn1.forward = forward


@pytest.mark.parametrize("method", ["sample", "merge"])
def test_hypertile_is_left_alone_while_on_and_served_around_when_off(host, caplog, method):
    plain, _ = host.generate()
    merged, _ = host.generate(_on(method=method))
    _use_hypertile(_unet(host), True)
    found, _ = host.generate(_on(method=method, ratio=0.3))
    assert _equal(found, plain)
    _use_hypertile(_unet(host), False)
    found, _ = host.generate(_on(method=method))
    assert _equal(found, merged)


@pytest.mark.parametrize("first", ["hypertile", "the other"])
def test_another_extension_beside_what_hypertile_left_sees_all_tokens(host, first):
    """It may go by the picture's own tokens, above HyperTile's wrapper or below it."""
    seen = set()

    def replace(attn1):
        inner = attn1.forward

        def forward(self, x, *args, **kwargs):
            seen.add(x.shape[1])
            return inner(x, *args, **kwargs)

        attn1.forward = types.MethodType(forward, attn1)

    def other(unet, enabled):
        for module in unet.modules():
            if hasattr(module, "attn1"):
                replace(module.attn1)

    both = [_use_hypertile, other] if first == "hypertile" else [other, _use_hypertile]
    plain, _ = host.generate()
    for put in both:
        put(_unet(host), False)
    found, p = host.generate(ON)
    assert _equal(found, plain) and seen == {256, 64} and p.extra_generation_params == {}


@pytest.mark.parametrize("map_", [False, True], ids=["", "map"])
def test_layers_behind_a_replaced_one_keep_their_choices(host, tome, monkeypatch, map_):
    """The first block is another extension's: the others on its grid draw what they draw without it."""
    drawn, real = [], tome.core.merging.call.ModelCall._draw

    def draw(call, grid, kept, layer):
        drawn.append((grid, layer))
        return real(call, grid, kept, layer)

    monkeypatch.setattr(tome.core.merging.call.ModelCall, "_draw", draw)
    told = []
    for replaced in (False, True):
        if replaced:
            attn1 = next(module for module in _unet(host).modules() if hasattr(module, "attn1")).attn1
            attn1.forward = types.MethodType(lambda self, *args, **more: type(self).forward(self, *args, **more), attn1)
        _, p = host.generate(_on(map=map_), steps=1)
        layers = p.tome_state.runs[False].tally.layers()
        told.append({layer.where: layer.number for layer in layers if layer.grid == (16, 16) and not layer.reason})
    whole, left = told
    first = min(whole, key=whole.get)
    assert left == {name: number for name, number in whole.items() if name != first} and len(left) > 1
    once = [layer for grid, layer in drawn if grid == (16, 16)]
    assert once == [*range(len(whole)), *range(1, len(whole))]


def test_an_attention_chosen_before_stays_served_where_hypertile_was(host, monkeypatch):
    """HyperTile's wrapper goes on with the code that the class had; a setting gives the class another."""
    from ldm.modules.attention import CrossAttention

    _use_hypertile(_unet(host), False)
    merged, _ = host.generate(ON)
    monkeypatch.setattr(CrossAttention, "forward", variants.own_scale)
    assert _equal(host.generate(ON)[0], merged)


def test_standing_aside_is_one_line(host, tome, monkeypatch):
    lines, host.opts.data["tome_report"] = [], "no"
    monkeypatch.setattr(tome.notes.logger, "info", lambda text, *args: lines.append(text % args))
    _use_hypertile(_unet(host), True)
    _, p = host.generate(ON)
    said = "ToMe skips a self-attention that another node or extension replaces"
    assert lines == [f"[ToMe] {said}"] and any(said in comment for comment in p.comments)


def test_a_model_that_tomesd_patched_is_left_alone(host):
    """Its merged tokens, 64 of 256, would be taken for those of level 1. (Another extension calls it.)"""
    tomesd = pytest.importorskip("tomesd", reason="needs tomesd 0.1.3, see requirements")
    merged, _ = host.generate(ON)
    tomesd.apply_patch(host.shared.sd_model, ratio=0.75, use_rand=False)
    theirs, _ = host.generate()
    found, p = host.generate(ON)
    assert _equal(found, theirs) and not p.extra_generation_params
    assert any("tomesd" in text for text in p.comments)
    tomesd.remove_patch(host.shared.sd_model)
    assert _equal(host.generate(ON)[0], merged)


def test_another_u_net_is_told(host):
    host.modules["modules.sd_unet"].current_unet = object()
    plain, _ = host.generate()
    found, p = host.generate(ON)
    assert _equal(plain, found) and any("U-Net" in text for text in p.comments)


def test_a_ratio_above_the_cap_is_said(host):
    _, p = host.generate(_on(method="merge", ratio=0.9))
    assert any("0.75" in text for text in p.comments)


def test_loading_the_scripts_again_keeps_one_callback_of_each(host):
    host.start()
    assert [len(callbacks) for callbacks in host.callbacks.values()] == [1, 1, 1]
    merged, _ = host.generate(_on(start=0.5), steps=4)
    full, _ = host.generate(ON, steps=4)
    assert not _equal(merged, full), "the step is not known: the callback is gone"
