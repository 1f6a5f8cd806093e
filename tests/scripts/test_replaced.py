"""Attentions and feed-forwards that something else replaces, masks or feeds: left alone, with a line that says why."""

from __future__ import annotations

import copy
import dataclasses

import pytest
import torch
import torch.nn.functional as F

import shared_tome
from shared_tome.scripts.hooks import served_blocks
from shared_tome.scripts.trials import code_of

from . import models

SDPA = F.scaled_dot_product_attention


def config(**options):
    return shared_tome.ToMeConfig(**{"method": "merge", "ratio": 0.5, "min_tokens": 0, "levels": "0,1", **options})


def tokens_of(unet, name, **told):
    """How many tokens each block's part of a name gets in a call of the model."""
    seen = []
    handles = [
        getattr(block, name).register_forward_pre_hook(lambda m, args: seen.append(args[0].shape[1]))
        for block in served_blocks(unet)
    ]
    with torch.no_grad():
        x, context = models.noise(2, 4, 16, 20, seed=1), models.noise(2, 7, 16, seed=2)
        unet(x, 500, encoder_hidden_states=context, **told)
    for handle in handles:
        handle.remove()
    return set(seen)


class Regional:
    """Half of the picture gets half of the prompt: needs all tokens, in their places."""

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, **kwargs):
        assert hidden_states.shape[1] in (320, 80)
        return hidden_states


def replace_attn2(unet):
    own = {name: processor for name, processor in unet.attn_processors.items() if "attn1" in name}
    unet.set_attn_processor({name: own.get(name, Regional()) for name in unet.attn_processors})
    return {}


def mask_attn2(unet):
    return {"cross_attention_kwargs": {"ip_adapter_masks": [torch.ones(1, 1, 16, 20)]}}


def mask_prompt(unet):
    return {"encoder_attention_mask": torch.zeros(2, 320, 7)}


def replace_forward(unet):
    for block in served_blocks(unet):
        block.attn2.forward = lambda hidden_states, encoder_hidden_states=None, **kwargs: hidden_states
    return {}


@pytest.mark.parametrize(
    ("change", "words", "blocks"),
    [
        (replace_attn2, "attn2 is not merged: Regional replaces its attention", 2),
        (mask_attn2, "attn2 is not merged: an IP-Adapter masks parts of the picture", 2),
        (mask_prompt, "attn2 is not merged: it has a mask for each token", 1),
        (replace_forward, "ToMe skips a cross-attention that another node or extension replaces", 2),
    ],
)
def test_a_cross_attention_that_needs_every_token_gets_it(change, words, blocks, caplog):
    unet = models.sd15()
    if blocks == 1:  # a mask of one size goes with one grid
        unet = models.seeded(
            lambda: models.diffusers.UNet2DConditionModel(
                sample_size=16, block_out_channels=(16,), layers_per_block=1, norm_num_groups=8, attention_head_dim=2,
                down_block_types=("CrossAttnDownBlock2D",), up_block_types=("CrossAttnUpBlock2D",),
                cross_attention_dim=16,
            )
        )  # fmt: skip
    shared_tome.apply_patch(unet, config=config(cross_attention=True))
    merged = tokens_of(unet, "attn2")
    assert all(n not in (320, 80) for n in merged) and "attn2" not in caplog.text
    told = change(unet)
    assert tokens_of(unet, "attn2", **told) <= {320, 80}
    assert caplog.text.count(words) == 1
    tokens_of(unet, "attn2", **told)
    assert caplog.text.count(words) == 1, "said once"


def test_the_classs_own_forward_put_back_is_no_replacement(caplog):
    """accelerate leaves it on each module when its hooks are removed."""
    unet = models.sd15()
    shared_tome.apply_patch(unet, config=config(cross_attention=True, mlp=True))
    merged = models.run(unet)
    for block in served_blocks(unet):
        for layer in (block.attn1, block.attn2, block.ff):
            layer.forward = layer.forward
    shared_tome.apply_patch(unet, config=config(cross_attention=True, mlp=True))
    assert torch.equal(models.run(unet), merged) and not caplog.text


def test_a_feed_forward_in_chunks_is_left_alone(caplog):
    unet = models.sd15()
    shared_tome.apply_patch(unet, config=config(mlp=True))
    assert tokens_of(unet, "ff") == {160, 40}
    for block in served_blocks(unet):
        block.set_chunk_feed_forward(10, 1)
    assert tokens_of(unet, "ff") == {10}
    assert "ToMe skips a feed-forward layer whose rows or tokens are not those of its block" in caplog.text


class Itself:
    """Makes its keys from the tokens themselves, whatever it is given, as diffusers' PAG processors do."""

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, **kwargs):
        q, k, v = (
            project(hidden_states).unflatten(-1, (attn.heads, -1)).transpose(1, 2)
            for project in (attn.to_q, attn.to_k, attn.to_v)
        )
        return attn.to_out[0](F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


def test_a_processor_without_keys_of_their_own_is_left_alone(caplog):
    """Nothing is merged then, and unequal weights would not fit its keys."""
    unet = models.sd15()
    processors = {n: Itself() if "attn1" in n else p for n, p in unet.attn_processors.items()}
    unet.set_attn_processor(processors)
    before = models.run(unet, 15, 17)
    shared_tome.apply_patch(unet, config=config(method="sample", ratio=0.6, own_token=False))
    for _ in range(2):
        torch.testing.assert_close(models.run(unet, 15, 17), before, rtol=1e-5, atol=1e-5)
    assert "ToMe skips the self-attention of Itself" in caplog.text
    shared_tome.remove_patch(unet)
    assert torch.equal(models.run(unet, 15, 17), before) and models.count_hooks(unet) == 0


def test_a_layer_that_failed_says_nothing_of_the_next_call(caplog):
    """What watches its keys waits for a merged layer: a small picture's are made of all tokens."""
    unet = models.sd15()
    shared_tome.apply_patch(unet, config=config(method="sample", own_token=False, min_tokens=300))
    block = next(served_blocks(unet))
    fails = block.attn1.to_q.register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        models.run(unet)
    fails.remove()
    keys = keys_of(block)
    models.run(unet, 8, 8)
    models.run(unet)
    assert keys == [64, 160] and "which makes its keys itself" not in caplog.text


class RowByRow(torch.nn.Module):
    """Runs a layer again for each row where it failed for all, as packages do where memory ends."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, hidden_states, **told):
        try:
            return self.layer(hidden_states, **told)
        except ZeroDivisionError:
            return torch.cat([self.layer(row[None], **told) for row in hidden_states])


@pytest.mark.parametrize("options", [{"proportional": True}, {"proportional": False}], ids=["weights", "none"])
def test_a_layer_that_runs_again_in_a_call_is_whole_there(options, caplog):
    """Its rows are not the block's: nothing of what failed is taken for it."""
    unet, keys = models.one_level(), []
    shared_tome.apply_patch(unet, config=config(**options))
    models.run(unet)
    block = next(served_blocks(unet))
    layer = block.attn1
    block.attn1 = RowByRow(layer)
    layer.to_v.register_forward_pre_hook(lambda m, args: None if 1 / (len(args[0]) - 2) else None)
    layer.to_k.register_forward_pre_hook(lambda m, args: keys.append(tuple(args[0].shape[:2])))
    models.run(unet)
    assert keys == [(2, 160), (1, 320), (1, 320)]
    assert [record.message for record in caplog.records] == [
        "[ToMe] ToMe skips a self-attention that is given other tokens than its block"
    ]


class FirstRow:
    """Every row attends to the first one's tokens, unless what keys are made of is given, as in an attention to the
    prompt: so do diffusers' CrossFrameAttnProcessor and many packages' processors.

    minds: whether it tells the two apart by that.
    """

    def __init__(self, minds):
        self.minds, self.kinds = minds, []

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, **kwargs):
        is_cross = encoder_hidden_states is not None
        self.kinds.append(is_cross)
        context = encoder_hidden_states if is_cross else hidden_states
        q, k, v = (
            project(x).unflatten(-1, (attn.heads, -1)).transpose(1, 2)
            for project, x in ((attn.to_q, hidden_states), (attn.to_k, context), (attn.to_v, context))
        )
        if not (is_cross and self.minds):
            k, v = k[:1].expand_as(k), v[:1].expand_as(v)
        return attn.to_out[0](F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


@pytest.mark.parametrize("proportional", [False, True])
@pytest.mark.parametrize("method", ["sample", "downsample", "merge", "merge_keys", "merge_queries", "prune"])
def test_a_processor_that_asks_whether_it_has_keys_takes_merged_ones_for_its_own(method, proportional):
    made = []
    for minds in (False, True):
        unet, processor = models.sd15(), FirstRow(minds)
        unet.set_attn_processor({n: processor if "attn1" in n else p for n, p in unet.attn_processors.items()})
        before = models.run(unet)
        shared_tome.apply_patch(unet, config=config(method=method, proportional=proportional, own_token=False))
        models.run(unet)  # the trials are over
        processor.kinds.clear()
        made.append(models.run(unet))
        assert len(processor.kinds) == 7 and not any(processor.kinds) and not torch.equal(made[-1], before)
        shared_tome.remove_patch(unet)
        assert torch.equal(models.run(unet), before) and models.count_hooks(unet) == 0
    torch.testing.assert_close(*made, rtol=1e-4, atol=1e-5)


def test_diffusers_own_processors_are_given_their_keys():
    """Under fused projections no hook of ours would see them."""
    unet, given = models.sd15(), []
    shared_tome.apply_patch(unet, config=config(method="merge_keys"))
    for block in served_blocks(unet):
        block.attn1.register_forward_pre_hook(
            lambda m, args, kwargs: given.append(kwargs["encoder_hidden_states"].shape[1]), with_kwargs=True
        )
    models.run(unet)
    assert set(given) == {160, 40}


class OfChannels:
    """Takes the size of a head from the channels of the tokens, as diffusers' own did before 0.15."""

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, **kwargs):
        context = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        batch, size = hidden_states.shape[0], hidden_states.shape[-1] // attn.heads
        q, k, v = (
            project(x).view(batch, -1, attn.heads, size).transpose(1, 2)
            for project, x in ((attn.to_q, hidden_states), (attn.to_k, context), (attn.to_v, context))
        )
        out = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(batch, -1, attn.heads * size)
        return attn.to_out[0](out)


def test_a_processor_that_counts_channels_gets_no_wider_heads(caplog):
    unet = models.sd15()
    unet.set_attn_processor({n: OfChannels() if "attn1" in n else p for n, p in unet.attn_processors.items()})
    shared_tome.apply_patch(unet, config=config(proportional=False))
    plain = models.run(unet)
    shared_tome.apply_patch(unet, config=config())
    assert torch.equal(models.run(unet), plain)
    assert "takes no weights of keys" in caplog.text


def test_a_processor_of_one_layer_alone_says_nothing_of_the_others(caplog):
    """What is found of a layer holds for those of its kind: with its code, and not of its shape alone."""
    unet = models.sd15()
    first, *others = (name for name in unet.attn_processors if "attn1" in name)
    unet.set_attn_processor({n: Itself() if n == first else p for n, p in unet.attn_processors.items()})
    before = [keys_of(block) for block in served_blocks(unet)]
    shared_tome.apply_patch(unet, config=config(method="sample", own_token=False))
    for _ in range(2):
        models.run(unet)
    whole = [keys[-1] in (320, 80) for keys in before]
    assert whole == [True] + [False] * len(others)


def keys_of(block):
    """From how many tokens a block's self-attention makes its keys, call after call."""
    seen = []
    block.attn1.to_k.register_forward_pre_hook(lambda m, args: seen.append(args[0].shape[1]))
    return seen


@dataclasses.dataclass
class Sharp:
    """Has no hash: two of the same numbers are equal."""

    by: float = 1.0

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, **kwargs):
        context = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        q, k, v = (
            project(x).unflatten(-1, (attn.heads, -1)).transpose(1, 2)
            for project, x in ((attn.to_q, hidden_states), (attn.to_k, context), (attn.to_v, context))
        )
        out = F.scaled_dot_product_attention(q * self.by, k, v)
        return attn.to_out[0](out.transpose(1, 2).flatten(2))


@pytest.mark.parametrize("method", ["merge", "merge_keys", "sample"])
def test_a_processor_without_a_hash_is_served(method):
    unet = models.sd15()
    shared_tome.apply_patch(unet, config=config(method=method, own_token=False))
    expected = models.run(unet)
    unet.set_attn_processor({n: Sharp() if "attn1" in n else p for n, p in unet.attn_processors.items()})
    torch.testing.assert_close(models.run(unet), expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(models.run(copy.deepcopy(unet)), expected, rtol=1e-4, atol=1e-5)
    one, other = (block.attn1 for block in list(served_blocks(unet))[:2])
    assert code_of(one) == code_of(one) and code_of(one) != code_of(other)


class WithReference:
    """Attends to the first row's tokens, too, as reference and style processors do."""

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, **kwargs):
        context = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        context = torch.cat((context, context[:1].expand_as(context)), dim=1)
        q, k, v = (
            project(x).unflatten(-1, (attn.heads, -1)).transpose(1, 2)
            for project, x in ((attn.to_q, hidden_states), (attn.to_k, context), (attn.to_v, context))
        )
        return attn.to_out[0](F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


def test_keys_that_a_processor_adds_have_no_weights(caplog):
    unet = models.sd15()
    unet.set_attn_processor({n: WithReference() if "attn1" in n else p for n, p in unet.attn_processors.items()})
    shared_tome.apply_patch(unet, config=config(proportional=False))
    plain = models.run(unet)
    shared_tome.apply_patch(unet, config=config())
    torch.testing.assert_close(models.run(unet), plain, rtol=1e-4, atol=1e-5)
    assert "makes keys from other tokens than ToMe gave it; these keys have no weights" in caplog.text


def test_keys_in_fewer_heads_have_no_weights(caplog):
    """DreamLite's U-Net inherits its forward and shares keys between heads."""
    from diffusers.models.unets.unet_dreamlite import DreamLiteUNetModel

    unet = models.seeded(
        lambda: DreamLiteUNetModel(
            sample_size=16, block_out_channels=(16, 32), layers_per_block=1, norm_num_groups=8, cross_attention_dim=16,
            down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), attention_head_dim=2, num_kv_heads=1,
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        )
    )  # fmt: skip
    before = models.run(unet)
    shared_tome.apply_patch(unet, config=config(proportional=False))
    plain = models.run(unet)
    shared_tome.apply_patch(unet, config=config())
    assert torch.equal(models.run(unet), plain) and not torch.equal(plain, before)
    assert "takes no weights of keys" in caplog.text


def test_an_attention_function_that_is_swapped_in_later_is_tried_again(monkeypatch, caplog):
    """Attention packages take torch's place by name; this one knows what the heads' size was."""
    unet = models.sd15()
    shared_tome.apply_patch(unet, config=config())
    expected = models.run(unet)

    def package(q, k, v, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None):
        size = q.shape[-1] if k.shape[2] == 7 else {16: 8, 24: 16}[q.shape[-1]]  # 7: the prompt's
        return SDPA(q, k, v, attn_mask=attn_mask, scale=size**-0.5)

    monkeypatch.setattr(F, "scaled_dot_product_attention", package)
    torch.testing.assert_close(models.run(unet), expected, rtol=1e-4, atol=1e-5)


def attend_sharply(attn, hidden_states, encoder_hidden_states=None, **kwargs):
    q, k, v = (
        project(hidden_states).unflatten(-1, (attn.heads, -1)).transpose(1, 2)
        for project in (attn.to_q, attn.to_k, attn.to_v)
    )
    out = SDPA(q, k, v, scale=1.5 * q.shape[-1] ** -0.5)
    return attn.to_out[0](out.transpose(1, 2).flatten(2))


def test_a_forward_of_its_own_is_not_taken_for_the_classs(caplog):
    """A trial of the class's code says nothing about it."""
    unet = models.sd15()
    for block in served_blocks(unet):
        block.attn1.forward = attend_sharply.__get__(block.attn1)
    shared_tome.apply_patch(unet, config=config(proportional=False))
    plain = models.run(unet)
    shared_tome.apply_patch(unet, config=config())
    assert torch.equal(models.run(unet), plain)
    assert "takes no weights of keys" in caplog.text


@pytest.mark.parametrize("which", [0, 1])
def test_a_forward_of_one_layer_alone_says_nothing_of_the_others(which):
    """All three have one shape."""
    unet, wide = models.one_level(), {}
    blocks = list(served_blocks(unet))
    blocks[which].attn1.forward = attend_sharply.__get__(blocks[which].attn1)
    shared_tome.apply_patch(unet, config=config())
    models.run(unet)  # puts the hooks on the projections
    for number, block in enumerate(blocks):
        block.attn1.to_out[0].register_forward_pre_hook(
            lambda m, args, n=number: wide.update({n: args[0].shape[-1] > m.in_features}), prepend=True
        )
    models.run(unet)
    assert wide == {number: number != which for number in range(len(blocks))}
