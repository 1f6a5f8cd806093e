"""diffusers' transformers by their rows, each through its real class: what test_joint_methods asks of Flux and SD3."""

from __future__ import annotations

import math
import re
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import shared_tome
from shared_tome import ModelCall, ToMeConfig
from shared_tome.core.schedule import config_at
from shared_tome.core.self_token import attend_drawn
from shared_tome.methods import METHODS
from shared_tome.scripts.joint import JointAttachment
from shared_tome.scripts.rows import REFUSED, ROWS, TRANSFORMERS, attentions_of
from shared_tome.scripts.steps import Steps

from . import dits, models
from .dits import DITS, TEXT
from .test_joint_methods import truth

ODD = (7, 9)
HARD = ["QwenImage", "HunyuanVideo"]  # whose masks hide tokens
FEW = ["sample", "multires", "merge"]


def config(**options):
    return ToMeConfig(**{"ratio": 0.5, "min_tokens": 0, "own_token": False, **options})


def patched(name, **options):
    model = DITS[name].model()
    return shared_tome.apply_patch(model, config=config(**options))


@pytest.fixture
def host_sees(monkeypatch):
    """Each attention's (mask, q, k, v, output) [B, H, L, d], as the host gives them and gets it."""
    seen, attend = [], JointAttachment._attend

    def spy(self, attention, q, k, v):
        given = [x.clone() for x in (q, k, v)]
        out = attend(self, attention, q, k, v)
        assert all(torch.equal(x, y) for x, y in zip(given, (q, k, v), strict=True))
        seen.append((attention.mask, *given, out))
        return out

    monkeypatch.setattr(JointAttachment, "_attend", spy)
    return seen


def grid_of(name, grid):
    return (3, *grid) if DITS[name].is_video else grid


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", DITS)
def test_every_attention_against_float64(name, method, host_sees):
    model, grid = patched(name, method=method), grid_of(name, ODD)
    DITS[name].run(model, ODD)
    assert len(host_sees) == DITS[name].layers
    for layer, (mask, q, k, v, out) in enumerate(host_sees):
        assert mask is None or mask.all()
        expected = truth(q, k, v, grid, DITS[name].head, config(method=method), layer)
        assert out.shape == q.shape and (out - expected).abs().max() < 5e-6
        full = F.scaled_dot_product_attention(q.double(), k.double(), v.double())
        assert (full - expected).abs().max() > 1e-3


@pytest.mark.parametrize("name", DITS)
def test_an_own_token_for_each_query(name, host_sees):
    """By the specification, which its own tests hold to float64 loops."""
    options, grid, start = config(ratio=2 / 3, own_token=True), grid_of(name, (6, 10)), DITS[name].head
    model = shared_tome.apply_patch(DITS[name].model(), config=options)
    DITS[name].run(model)
    call = ModelCall(options, grid, torch.device("cpu"))
    for _, q, k, v, out in host_sees:
        plan = call.plan(k[:, 0, : math.prod(grid)], grid)
        told = plan.head_draws, plan.runs, start, q.shape[-1] ** -0.5, math.log(3)
        expected = attend_drawn(q, k, v, *told)
        assert (out - expected).abs().max() < 5e-6


@pytest.mark.parametrize("method", FEW)
@pytest.mark.parametrize("name", DITS)
def test_ratio_0_and_remove_patch_are_bit_for_bit(name, method):
    dit = DITS[name]
    model = dit.model()
    before = dit.run(model)
    shared_tome.apply_patch(model, config=config(method=method, ratio=0.0))
    assert torch.equal(dit.run(model), before)
    shared_tome.apply_patch(model, config=config(method=method))
    merged = dit.run(model)
    assert (merged - before).norm() / before.norm() > 1e-4 and torch.equal(dit.run(model), merged)
    assert shared_tome.remove_patch(model) is model
    assert torch.equal(dit.run(model), before) and models.count_hooks(model) == 0
    assert torch._C._len_torch_function_stack() == 0


@pytest.mark.parametrize("method", FEW)
@pytest.mark.parametrize("name", DITS)
def test_rows_in_one_batch_or_two(name, method):
    model = patched(name, method=method)
    both = DITS[name].run(model)
    alone = torch.cat([DITS[name].run(model, rows=slice(row, row + 1)) for row in (0, 1)])
    assert (both - alone).norm() / both.norm() < 1e-5


@pytest.mark.parametrize("method", ["sample", "merge"])
@pytest.mark.parametrize("name", DITS)
def test_the_seed_decides_and_the_global_generator_is_untouched(name, method):
    dit, made = DITS[name], []
    model = dit.model()
    for seed in (1, 2, 1):
        shared_tome.apply_patch(model, config=config(method=method, seed=seed))
        state = torch.random.get_rng_state()
        made.append(dit.run(model))
        assert torch.equal(torch.random.get_rng_state(), state)
    assert torch.equal(made[0], made[2]) and not torch.equal(made[0], made[1])


@pytest.mark.parametrize("name", DITS)
def test_all_keys_at_three_resolutions_are_the_attention(name):
    dit = DITS[name]
    model = dit.model()
    before = dit.run(model)
    shared_tome.apply_patch(model, config=config(method="multires", ratio=0.02))
    torch.testing.assert_close(dit.run(model), before, rtol=1e-3, atol=2e-4)


# --- Padding ----------------------------------------------------------------------------------------------------------

ALIKE = torch.tensor([[1, 1, 1, 0, 0]] * 2)
APART = torch.tensor([[1, 1, 1, 1, 0], [1, 1, 0, 0, 0]])


def kept_of(mask, row):
    return mask[row, 0, 0].nonzero()[:, 0]


@pytest.mark.parametrize("mask", [ALIKE, APART], ids=["alike", "apart"])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", HARD)
def test_padding_is_hidden_from_all(name, method, mask, host_sees, caplog):
    model, grid, options = patched(name, method=method), grid_of(name, ODD), config(method=method)
    DITS[name].run(model, ODD, mask=mask)
    head = int(mask[0].sum()) if DITS[name].head else 0
    assert len(host_sees) == DITS[name].layers and not caplog.text
    for layer, (seen, q, k, v, out) in enumerate(host_sees):
        for row in (0, 1):
            kept = kept_of(seen, row)
            assert len(kept) == q.shape[2] - int((mask[row] == 0).sum())
            head = int(mask[row].sum()) if DITS[name].head else 0
            given = [x[row : row + 1, :, kept] for x in (q, k, v)]
            expected = truth(*given, grid, head, options, layer)
            assert (out[row : row + 1, :, kept] - expected).abs().max() < 5e-6


@pytest.mark.parametrize("method", FEW)
@pytest.mark.parametrize("name", HARD)
def test_what_is_hidden_decides_nothing(name, method, monkeypatch):
    """Other padding, the same picture; without merging as with it."""
    model = patched(name, method=method)
    for mask in (ALIKE, APART):
        one = DITS[name].run(model, mask=mask)
        with monkeypatch.context() as patch:
            told = dits.text(models.ALL) + (mask == 0)[..., None] * models.noise(2, TEXT, 16, seed=9)
            patch.setattr(dits, "text", lambda rows, told=told: told[rows])
            other = DITS[name].run(model, mask=mask)
        assert (one - other).abs().max() < 1e-5 * one.abs().max()
        assert (one - DITS[name].run(model)).norm() / one.norm() > 1e-4


@pytest.mark.parametrize("method", METHODS)
def test_captions_of_two_lengths(method, host_sees, caplog):
    """Z-Image fills its longest caption up; 7 * 9 image tokens and one that fills them up."""
    model, options = patched("ZImage", method=method), config(method=method)
    DITS["ZImage"].run(model, ODD, lengths=(TEXT, 40))
    assert len(host_sees) == 2 and not caplog.text
    for layer, (seen, q, k, v, out) in enumerate(host_sees):
        assert q.shape[2] == 64 + 64
        for row, length in ((0, 64 + 32), (1, 64 + 64)):
            kept = kept_of(seen, row)
            assert len(kept) == length
            expected = truth(*(x[row : row + 1, :, kept] for x in (q, k, v)), ODD, 0, options, layer)
            assert (out[row : row + 1, :, kept] - expected).abs().max() < 5e-6


def mask_of_image(mask, options):
    """Chroma's mask for the tokens that are left, [B, 1, L', K']: it says the same of all of the image's."""
    method, goes = options.method, 63 - 32
    cut = mask[..., : mask.shape[-1] - goes] if method != "merge_queries" else mask
    return cut[:, :, : mask.shape[-2] - goes] if method in ("merge", "merge_queries", "prune") else cut


@pytest.mark.parametrize("method", METHODS)
def test_chromas_mask_weighs(method, host_sees, caplog):
    """Its pipeline makes the mask of ones and zeros, and torch adds these to the logits: padding weighs 1/e."""
    model, mask = patched("Chroma", method=method), APART.float()
    DITS["Chroma"].run(model, ODD, mask=mask)
    options = config(method="sample" if method == "multires" else method)
    assert len(host_sees) == 2
    assert ("sample takes its place (a mask)" in caplog.text) == (method == "multires")
    for layer, (seen, q, k, v, out) in enumerate(host_sees):
        assert seen.dtype == torch.float32 and seen.shape[-2:] == (TEXT + 63, TEXT + 63)
        added = mask_of_image(seen, options)
        expected = truth(q, k, v, ODD, TEXT, options, layer, added.double())
        assert (out - expected).abs().max() < 5e-6
        assert (truth(q, k, v, ODD, TEXT, options, layer) - expected).abs().max() > 1e-3


@pytest.mark.parametrize("own", [True, False])
def test_under_chromas_mask_queries_have_no_own_tokens(own, caplog):
    model = patched("Chroma", own_token=own)
    made = [DITS["Chroma"].run(model, mask=mask) for mask in (APART, APART)]
    plain = DITS["Chroma"].run(patched("Chroma"), mask=APART)
    assert torch.equal(made[0], plain) and torch.equal(made[1], plain)
    said = [record.message for record in caplog.records]
    assert said == ["[ToMe] own token has no effect under a mask"] * own


@pytest.mark.parametrize("method", FEW)
def test_a_mask_without_padding_costs_nothing(method, caplog):
    model = patched("Chroma", method=method)
    assert (DITS["Chroma"].run(model, mask=torch.ones(2, TEXT)) - DITS["Chroma"].run(model)).abs().max() < 1e-4
    assert not caplog.text


def test_a_mask_over_the_image_is_left_alone(caplog):
    model = DITS["Chroma"].model()

    @torch.no_grad()
    def run(mask):
        x, text, time = models.noise(2, 60, 8, seed=1), dits.text(models.ALL), dits.times(models.ALL, 0.5)
        return model(x, text, time, dits.flux_ids(6, 10), torch.zeros(TEXT, 3), mask).sample

    mask = torch.ones(2, TEXT + 60)
    mask[:, 20] = 0
    before = run(mask)
    shared_tome.apply_patch(model, config=config())
    assert torch.equal(run(mask), before)
    assert "ToMe skips an attention with a mask" in caplog.text


# --- What single models have ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
def test_qwens_references_stay(method, host_sees):
    model = patched("QwenImage", method=method)
    DITS["QwenImage"].run(model, ODD, reference=(3, 4))
    for layer, (_, q, k, v, out) in enumerate(host_sees):
        assert q.shape[2] == TEXT + 63 + 12
        assert (out - truth(q, k, v, ODD, TEXT, config(method=method), layer)).abs().max() < 5e-6


def test_qwens_layers_are_frames(host_sees):
    model = DITS["QwenImage"].model(use_layer3d_rope=True, use_additional_t_cond=True)
    shared_tome.apply_patch(model, config=config(method="merge"))
    told = {"shapes": [(1, 4, 6)] * 3 + [(1, 2, 5)], "additional_t_cond": torch.zeros(2, dtype=torch.long)}
    DITS["QwenImage"].run(model, **told)
    for layer, (_, q, k, v, out) in enumerate(host_sees):
        assert (out - truth(q, k, v, (3, 4, 6), TEXT, config(method="merge"), layer)).abs().max() < 5e-6


@pytest.mark.parametrize(
    ("name", "made", "told", "grid"),
    [
        ("HunyuanVideo", {"image_condition_type": "token_replace"}, {}, (3, 6, 10)),
        ("CogVideoX", {"patch_size_t": 2, "sample_frames": 17, "patch_bias": False}, {}, (3, 6, 10)),
        ("Wan", {"added_kv_proj_dim": 32, "image_dim": 16},
         {"encoder_hidden_states_image": models.noise(2, 4, 16, seed=6), "tokens": 512}, (3, 6, 10)),
    ],
)  # fmt: skip
def test_relatives(name, made, told, grid, host_sees):
    """From pictures: frames that are given, other patches, a picture's own keys in the attention to the text."""
    model = DITS[name].model(**made)
    shared_tome.apply_patch(model, config=config(method="merge"))
    DITS[name].run(model, **told)
    assert len(host_sees) == 2
    for layer, (_, q, k, v, out) in enumerate(host_sees):
        assert (out - truth(q, k, v, grid, DITS[name].head, config(method="merge"), layer)).abs().max() < 5e-6


@pytest.mark.parametrize("name", ["LTXVideo", "ZImage", "QwenImage"])
def test_tokens_on_no_grid_are_left_alone(name, caplog):
    """Frames among the video's, told by coordinates; images of two sizes; layers of two sizes."""
    layered = {"use_layer3d_rope": True, "use_additional_t_cond": True} if name == "QwenImage" else {}
    model = DITS[name].model(**layered)

    def run():
        if name == "LTXVideo":
            coords = models.noise(2, 3, 180, seed=7)
            return DITS[name].run(model, num_frames=None, height=None, width=None, video_coords=coords)
        if layered:
            told = {"additional_t_cond": torch.zeros(2, dtype=torch.long)}
            return DITS[name].run(model, shapes=[(1, 4, 6), (1, 3, 6), (1, 2, 5)], **told)
        images = [models.noise(4, 1, 12, 2 * width, seed=1) for width in (10, 12)]
        captions = [models.noise(TEXT, 16, seed=2)] * 2
        with torch.no_grad():
            return torch.cat([x.flatten() for x in model(images, torch.full((2,), 0.5), captions).sample])

    before = run()
    shared_tome.apply_patch(model, config=config())
    assert torch.equal(run(), before)
    assert "ToMe skips image tokens that are not rows of one image" in caplog.text


# --- Steps ------------------------------------------------------------------------------------------------------------

GIVEN = {  # as the pipelines write it
    "AuraFlow": lambda t, dtype: torch.tensor([t / 1000]).expand(2).to(dtype),
    "Chroma": lambda t, dtype: t.expand(2).to(dtype) / 1000,
    "CogVideoX": lambda t, dtype: t.expand(2),
    "Flux": lambda t, dtype: t.expand(2).to(dtype) / 1000,
    "HunyuanDiT": lambda t, dtype: torch.tensor([t] * 2).to(dtype),
    "HunyuanVideo": lambda t, dtype: t.expand(2).to(dtype),
    "LTXVideo": lambda t, dtype: t.expand(2),
    "PixArt": lambda t, dtype: t[None].expand(2),
    "QwenImage": lambda t, dtype: t.expand(2).to(dtype) / 1000,
    "SD3": lambda t, dtype: t.expand(2),
    "Wan": lambda t, dtype: t.expand(2),
    "ZImage": lambda t, dtype: (1000 - t.expand(2)) / 1000,
}


def short(name):
    return name.replace("Transformer2DModel", "").replace("Transformer3DModel", "").replace("2DModel", "")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ROWS)
def test_the_step_that_each_pipeline_tells(name, dtype):
    scheduler = models.diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    scheduler.set_timesteps(17)

    class Pipe:
        pass

    pipe = Pipe()
    pipe.scheduler = scheduler
    steps = Steps(pipe, *ROWS[name].clock)
    given = [GIVEN[short(name)](t, dtype) for t in scheduler.timesteps]
    assert [int(steps.step(t, torch.device("cpu"))) for t in given] == list(range(17))
    assert [steps.is_last(t) for t in given] == [False] * 16 + [True]
    told = [steps.progress(t) for t in given]
    assert told == sorted(told) and 0.0 <= told[0] < 0.01 and 0.9 < told[-1] < 1.0
    exact = Steps(pipe)
    assert told == [exact.progress(t) for t in scheduler.timesteps]
    alone = Steps(None, *ROWS[name].clock)  # without a pipeline, steps are counted
    assert [int(alone.step(t, torch.device("cpu"))) for t in given] == list(range(17))
    assert config_at(config(start=0.5), lambda: alone.progress(given[0])).ratio == 0.0
    assert config_at(config(start=0.5), lambda: alone.progress(given[-1])).ratio == 0.5


def test_tokens_with_timesteps_of_their_own():
    """Wan 2.2's 5B and LTX from a picture: given frames have 0."""
    times = torch.tensor([0.0] * 60 + [700.0] * 120).expand(2, -1)
    assert int(Steps().progress(times) * 1000) == int(Steps().progress(700.0) * 1000)
    model = patched("Wan")
    with torch.no_grad():
        made = [dits.run_wan(model, (3, 6, 10), models.ALL, times * share) for share in (1, 0.5)]
    assert int(model._shared_tome.steps._count) == 1 and not torch.equal(*made)


# --- Pipelines, names -------------------------------------------------------------------------------------------------


def wan_pipeline():
    vae = models.seeded(
        lambda: models.diffusers.AutoencoderKLWan(
            base_dim=8, z_dim=4, dim_mult=[1, 1, 1, 1], num_res_blocks=1, temperal_downsample=[False, True, True],
            latents_mean=[0.0] * 4, latents_std=[1.0] * 4,
        )
    )  # fmt: skip
    pipe = models.diffusers.WanPipeline(
        tokenizer=None, text_encoder=None, vae=vae,
        scheduler=models.diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
        transformer=DITS["Wan"].model(), transformer_2=DITS["Wan"].model(), boundary_ratio=0.875,
    )  # fmt: skip
    pipe.set_progress_bar_config(disable=True)
    return pipe


def generate(pipe):
    return pipe(
        prompt_embeds=models.noise(1, TEXT, 16, seed=2), negative_prompt_embeds=models.noise(1, TEXT, 16, seed=3),
        latents=models.noise(1, 4, 3, 12, 20), height=96, width=160, num_frames=9, num_inference_steps=6,
        guidance_scale=4.0, output_type="latent",
    ).frames  # fmt: skip


def test_both_of_wan_22s_transformers_are_merged(host_sees, caplog):
    pipe = wan_pipeline()
    before = generate(pipe)
    for start, end, seen in ((0.0, 1.0, 6), (0.0, 0.5, 3), (0.5, 1.0, 3)):
        assert shared_tome.apply_patch(pipe, config=config(method="merge", start=start, end=end)) is pipe
        host_sees.clear()
        merged = generate(pipe)
        assert not torch.equal(merged, before) and torch.equal(generate(pipe), merged)
        assert len(host_sees) == 2 * seen * 2 * 2  # runs, steps, guidance, layers
        assert not caplog.text
    shared_tome.remove_patch(pipe)
    assert torch.equal(generate(pipe), before)
    assert models.count_hooks(pipe.transformer) + models.count_hooks(pipe.transformer_2) == 0


def test_why_nothing_is_merged_is_said_once_for_both(caplog):
    pipe = wan_pipeline()
    shared_tome.apply_patch(pipe, config=config(start=0.999))
    generate(pipe)
    assert [record.message.split(":")[0] for record in caplog.records] == ["[ToMe] nothing is merged"]


@pytest.mark.parametrize("method", ["sample", "merge"])
def test_a_whole_pipeline_whose_timesteps_rise(method, host_sees, caplog):
    """Z-Image's: prompts of two lengths in one batch, and each step of the schedule."""
    stages = {"down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4}
    vae = models.seeded(
        lambda: models.diffusers.AutoencoderKL(
            block_out_channels=(8,) * 4, latent_channels=4, norm_num_groups=8, **stages
        )
    )
    pipe = models.diffusers.ZImagePipeline(
        scheduler=models.diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0), vae=vae, text_encoder=None,
        tokenizer=None, transformer=DITS["ZImage"].model(),
    )  # fmt: skip
    pipe.set_progress_bar_config(disable=True)

    def made():
        return pipe(
            prompt_embeds=[models.noise(TEXT, 16, seed=2)], negative_prompt_embeds=[models.noise(40, 16, seed=3)],
            latents=models.noise(1, 4, 12, 20), height=96, width=160, num_inference_steps=6, guidance_scale=4.0,
            output_type="latent",
        ).images  # fmt: skip

    before = made()
    for start, end, steps in ((0.0, 1.0, 6), (0.5, 1.0, 3), (0.0, 0.5, 3)):
        shared_tome.apply_patch(pipe, config=config(method=method, start=start, end=end))
        host_sees.clear()
        merged = made()
        assert len(host_sees) == 2 * steps and host_sees[0][1].shape[0] == 2
        assert not torch.equal(merged, before) and torch.equal(made(), merged)
    assert not caplog.text
    shared_tome.remove_patch(pipe)
    assert torch.equal(made(), before)


def test_a_second_transformer_of_another_kind_is_refused():
    pipe = wan_pipeline()
    pipe.transformer_2 = torch.nn.Linear(2, 2)
    with pytest.raises(ValueError, match="does not know WanPipeline with Linear"):
        shared_tome.apply_patch(pipe, config=config())
    assert models.count_hooks(pipe.transformer) == 0


def test_sana_is_refused_with_the_reason():
    model = models.diffusers.SanaTransformer2DModel(
        in_channels=4, out_channels=4, num_layers=1, num_attention_heads=2, attention_head_dim=16,
        num_cross_attention_heads=2, cross_attention_head_dim=16, cross_attention_dim=32, caption_channels=16,
        sample_size=8,
    )  # fmt: skip
    # It is as said: the self-attention never reaches torch's.
    with pytest.raises(ValueError, match="does not serve SanaTransformer2DModel: its self-attention is linear"):
        shared_tome.apply_patch(model, config=config())
    assert "Linear" in type(model.transformer_blocks[0].attn1.processor).__name__


def test_the_page_names_every_row_and_each_that_is_refused():
    page = (Path(__file__).parents[2] / "docs" / "scripts.md").read_text(encoding="utf-8")
    table = page.partition("| class | in one attention")[2].partition("\n\n")[0]
    assert re.findall(r"`(\w+)`", table) == [*ROWS, *REFUSED]
    assert set(re.findall(r"refused: (.*?) \|", table)) == set(REFUSED.values())


def test_every_row_is_run_here_and_named():
    assert {short(name) for name in ROWS} == set(DITS) | {"Flux", "SD3"}
    named = TRANSFORMERS.replace(" and ", ", ").replace("-", "").replace(" ", "").split(",")
    assert set(named) == {short(name) for name in ROWS}
    for dit in DITS.values():
        model = dit.model()
        assert len(attentions_of(model, ROWS[type(model).__name__])) == dit.layers
