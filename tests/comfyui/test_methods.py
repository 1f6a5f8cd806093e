"""Each method merges what it says, where it says, and nothing else: counted at the projections."""

from __future__ import annotations

import logging

import pytest
import torch

from .host import REPO, run_node, sample, tokens, watch

FULL = {"input_blocks.1.1": 1024, "input_blocks.3.1": 256, "input_blocks.5.1": 64, "middle_block.1": 64}
METHODS = {  # method: (queries merged, keys merged)
    "sample": (False, True),
    "merge": (True, True),
    "merge_queries": (True, False),
    "merge_keys": (False, True),
    "downsample": (False, True),
    "prune": (True, True),
}
DRAWN = {"own_token": False}  # keys before their projections, where they are counted


def seen_by(model, watched, **kwargs):
    with watch(watched) as seen:
        sample(model, **kwargs)
    return lambda part: tokens(seen, part)


@pytest.mark.parametrize("method", METHODS)
def test_method_merges_what_it_says(sd15, tome, method):
    part = seen_by(tome(sd15, method=method, **DRAWN), sd15, steps=1)
    queries, keys = METHODS[method]
    for block, full in FULL.items():
        assert part("attn1.to_q")[block] == {full // 2 if queries else full}
        assert part("attn1.to_k")[block] == part("attn1.to_v")[block] == {full // 2 if keys else full}
        assert part("attn2.to_q")[block] == {full}
        assert part("attn2.to_k")[block] == {7}
        assert part("ff")[block] == {full}


@pytest.mark.parametrize("method", METHODS)
def test_method_changes_the_picture(sd15, tome, method):
    assert not torch.equal(sample(tome(sd15, method=method)), sample(sd15))


@pytest.mark.parametrize("method", METHODS)
def test_ratio_zero_is_bit_equal(sd15, tome, method):
    assert torch.equal(sample(tome(sd15, method=method, ratio=0.0)), sample(sd15))


def test_the_original_model_is_untouched(sd15, tome):
    before = sample(sd15)
    sample(tome(sd15, method="merge", cross_attention=True, mlp=True))
    assert torch.equal(sample(sd15), before)


@pytest.mark.parametrize(("option", "where"), [("cross_attention", "attn2.to_q"), ("mlp", "ff")])
def test_cross_attention_and_mlp(sd15, tome, option, where):
    part = seen_by(tome(sd15, method="merge", **{option: True}), sd15, steps=1)
    other = {"attn2.to_q", "ff"} - {where}
    for block, full in FULL.items():
        assert part(where)[block] == {full // 2}
        assert part(other.copy().pop())[block] == {full}


def test_mlp_and_cross_attention_keep_the_picture_at_a_tiny_ratio(sd15, tome):
    """Merging and unmerging must meet: one token in a thousand cannot change the picture much."""
    plain = sample(sd15, steps=1)
    merged = sample(tome(sd15, method="merge", ratio=0.001, mlp=True, cross_attention=True), steps=1)
    assert 0 < (merged - plain).norm() / plain.norm() < 0.1


def test_sdxl_is_merged(sdxl, tome):
    """Its first attention is at level 1, where ComfyUI's own node and tomesd's default do nothing."""
    part = seen_by(tome(sdxl, levels="auto", min_tokens=256, **DRAWN), sdxl, steps=1)
    assert part("attn1.to_k")["input_blocks.3.1"] == {128}
    assert part("attn1.to_k")["input_blocks.5.1"] == {64}
    assert not torch.equal(sample(tome(sdxl)), sample(sdxl))


@pytest.mark.parametrize(("levels", "merged"), [("0", {1024}), ("1", {256}), ("0,1", {1024, 256}), ("2,3", {64})])
def test_levels(sd15, tome, levels, merged):
    part = seen_by(tome(sd15, levels=levels, **DRAWN), sd15, steps=1)
    for block, full in FULL.items():
        assert part("attn1.to_k")[block] == {full // 2 if full in merged else full}


def test_min_tokens(sd15, tome):
    part = seen_by(tome(sd15, min_tokens=257, **DRAWN), sd15, steps=1)
    assert [part("attn1.to_k")[block] for block in FULL] == [{512}, {256}, {64}, {64}]


def test_start_end_and_a_falling_ratio(sd15, tome):
    def keys(**options):
        with watch(sd15) as seen:
            sample(tome(sd15, **DRAWN, **options), steps=4)
        return seen["input_blocks.1.1.transformer_blocks.0.attn1.to_k"]

    assert keys(start=0.5) == [1024, 1024, 512, 512]
    assert keys(end=0.5) == [512, 512, 1024, 1024]
    assert keys(start=0.25, end=0.75) == [1024, 512, 512, 1024]
    # Four steps of "normal" are at 0, 1/3, 2/3 and all of the way from noise to the picture.
    assert keys(ratio=0.5, ratio_end=0.0) == [512, 615, 922, 1024]


def test_a_ratio_over_the_cap_is_said(sd15, tome, caplog):
    with caplog.at_level(logging.INFO, logger="ToMe"):
        part = seen_by(tome(sd15, method="merge", ratio=0.9), sd15, steps=1)
    assert part("attn1.to_k")["input_blocks.1.1"] == {256}
    assert "ratio 0.9 is more than method merge can take at stride 2x2: 0.75" in caplog.text


@pytest.mark.parametrize("stride", [(1, 2), (4, 2), (3, 3)])
def test_stride(sd15, tome, stride):
    part = seen_by(tome(sd15, method="merge", ratio=1.0, stride_x=stride[0], stride_y=stride[1]), sd15, steps=1)
    assert part("attn1.to_q")["input_blocks.1.1"] == {(32 // stride[0]) * (32 // stride[1])}


def test_half_precision(comfy_nodes, tome):
    from .host import small_unet

    model = small_unet("SD15", dtype=torch.bfloat16)
    model.model.diffusion_model.to(torch.bfloat16)
    for method in METHODS:
        assert sample(tome(model, method=method), steps=1).isfinite().all()


def test_node_comes_with_tooltips_and_defaults(comfy_nodes):
    from shared_tome import ToMeConfig

    schema = comfy_nodes["ToMe"].GET_SCHEMA()
    by_name = {entry.id: entry for entry in schema.inputs}
    assert list(by_name) == ["model", *(widget.name for widget in ToMeConfig.widgets()), "version"]
    facts = (REPO / "pyproject.toml").read_text(encoding="utf-8")
    assert f'\nversion = "{by_name["version"].default}"\n' in facts
    for widget in ToMeConfig.widgets():
        shown = by_name[widget.name]
        assert shown.default == widget.default
        assert shown.tooltip == widget.option.help
        if widget.option.choices:
            assert shown.options == list(widget.option.choices)
    assert run_node  # the fixtures go through the node itself
