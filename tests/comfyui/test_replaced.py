"""A layer that another node replaces, or whose rows or tokens it changes, is left alone, which is said once."""

from __future__ import annotations

import logging

import pytest
import torch

from . import host
from .host import sample, watch

BLOCK = ("input", 1)
PATH = "diffusion_model.input_blocks.1.1.transformer_blocks.0"
CHANGED = "whose rows or tokens are not those of its block: another node or extension changes them"
EVERY = {"method": "merge", "cross_attention": True, "mlp": True}


@pytest.fixture
def said(comfy_nodes, caplog):
    host.forget_log()
    with caplog.at_level(logging.INFO, logger="ToMe"):
        yield lambda: [record.message for record in caplog.records if record.name == "ToMe"]


def seen(model, merged, part):
    """The tokens that a part of the first block got."""
    with watch(model) as counts:
        sample(merged, steps=1)
    return set(counts[f"{PATH.removeprefix('diffusion_model.')}.{part}"])


def test_every_part_is_merged_where_nobody_else_works(sd15, tome, said):
    merged = tome(sd15, **EVERY)
    assert seen(sd15, merged, "attn1.to_q") == seen(sd15, merged, "attn2.to_q") == seen(sd15, merged, "ff") == {512}
    assert said() == []


def test_a_replaced_cross_attention_sees_the_pictures_own_tokens(sd15, tome, said):
    """IPAdapter with a mask, Attention Couple: a mask over the picture, made for as many tokens as there are."""
    from comfy.ldm.modules.attention import optimized_attention

    counts = []

    def replace(q, k, v, extra_options):
        counts.append(q.shape[1])
        return optimized_attention(q, k, v, extra_options["n_heads"])

    other = sd15.clone()
    other.set_model_attn2_replace(replace, *BLOCK)
    merged = tome(other, **EVERY)
    assert seen(sd15, merged, "attn1.to_q") == {512} and set(counts) == {1024}
    assert said() == ["[ToMe] ToMe skips a cross-attention that another node or extension replaces (input block 1)"]


@pytest.mark.parametrize("change", ["rows", "tokens"])
def test_a_patch_that_changes_rows_or_tokens_of_the_cross_attention(sd15, tome, said, change):
    """Attention Couple repeats the rows for each region and adds the outcomes up behind."""

    def before(q, k, v, extra_options):
        if change == "tokens":
            return q[:, ::2], k, v
        return q.repeat(2, 1, 1), k.repeat(2, 1, 1), v.repeat(2, 1, 1)

    def after(out, extra_options):
        return out.repeat_interleave(2, dim=1) if change == "tokens" else sum(out.chunk(2)) / 2

    other = sd15.clone()
    other.set_model_attn2_patch(before)
    other.set_model_attn2_output_patch(after)
    alone = sample(tome(other, **{**EVERY, "cross_attention": False}), steps=1)
    assert torch.equal(sample(tome(other, **EVERY), steps=1), alone)
    assert said() == [f"[ToMe] ToMe skips a cross-attention {CHANGED} (input block 1)"]


@pytest.mark.parametrize(
    ("part", "name", "watched"),
    [
        ("attn1", "self-attention", "attn1.to_q"),
        ("attn2", "cross-attention", "attn2.to_q"),
        ("ff", "feed-forward layer", "ff"),
    ],
)
def test_a_layer_with_another_forward(sd15, tome, said, part, name, watched):
    other = sd15.clone()
    forward = other.get_model_object(f"{PATH}.{part}").forward
    other.add_object_patch(f"{PATH}.{part}.forward", lambda *args, **kwargs: forward(*args, **kwargs))
    assert seen(sd15, tome(other, **EVERY), watched) == {1024}
    assert said() == [f"[ToMe] ToMe skips a {name} that another node or extension replaces (input block 1)"]
    # ComfyUI puts the layer's own forward back in the place of the other one.
    assert seen(sd15, tome(sd15, **EVERY), watched) == {512}
    assert len(said()) == 1
