"""Every method on diffusers' Flux and SD3: each attention against float64, and what must stay as it is."""

from __future__ import annotations

import math
import threading

import pytest
import torch
import torch.nn.functional as F

import shared_tome
from shared_tome import ToMeConfig, match_tokens
from shared_tome.core import multires
from shared_tome.methods import METHODS
from shared_tome.scripts.joint import JointAttachment

from . import models
from .test_joint import MODELS, TEXT, Record

QUERIES = ("merge", "merge_queries", "prune")
MEANS = ("merge", "merge_queries", "merge_keys")
GRIDS = [(6, 10), (7, 9)]
CASES = [("flux", 0), ("flux", 9), ("sd3", 0)]  # and reference tokens


def config(**options):
    return ToMeConfig(**{"ratio": 0.5, "min_tokens": 0, "own_token": False, **options})


def run(name, model, grid=(6, 10), reference=0, **told):
    return MODELS[name][1](model, *grid, **({"reference": reference} if reference else {}), **told)


@pytest.fixture
def host_sees(monkeypatch):
    """Each attention's (q, k, v, output) [B, H, L, d], as the host gives them and gets it."""
    seen, attend = [], JointAttachment._attend

    def spy(self, attention, q, k, v):
        given = [x.clone() for x in (q, k, v)]
        out = attend(self, attention, q, k, v)
        assert all(torch.equal(x, y) for x, y in zip(given, (q, k, v), strict=True))
        seen.append((*given, out))
        return out

    monkeypatch.setattr(JointAttachment, "_attend", spy)
    return seen


def truth(q, k, v, grid, start, options, layer, mask=0.0):
    """One attention in float64, said by matrices: [B, H, L, d] each. mask: what is added to the logits."""
    image, length, method = math.prod(grid), q.shape[2], options.method
    plan = match_tokens(k[:, :, start : start + image].mean(1), grid, options, layer=layer)
    belongs = F.one_hot(plan.groups, plan.kept).double()  # (B, N, M)
    sizes = belongs.sum(1)  # (B, M)
    stands = F.one_hot(plan.index, image).double()  # (B, M, N)
    is_mean = method in MEANS and options.reduce == "mean"
    to_merged = belongs.transpose(1, 2) / sizes[..., None] if is_mean else stands
    back = belongs if method != "prune" else stands.transpose(1, 2)  # what was pruned comes back as zero

    def beside(matrix):
        """Block diagonal with the tokens before and behind the image, for all heads."""
        rows, columns = matrix.shape[1:]
        out = torch.zeros(len(matrix), rows + length - image, columns + length - image, dtype=torch.float64)
        out[:, :start, :start] = torch.eye(start)
        out[:, start : start + rows, start : start + columns] = matrix
        out[:, start + rows :, start + columns :] = torch.eye(length - image - start)
        return out[:, None]

    if method == "multires":
        return at_three_resolutions(q, k, v, grid, start, options, layer)
    q, k, v = q.double(), k.double(), v.double()
    if method in QUERIES:
        q = beside(to_merged) @ q
    logs = torch.zeros(len(q), length, dtype=torch.float64)
    if method != "merge_queries":
        k, v = beside(to_merged) @ k, beside(to_merged) @ v
        logs = torch.zeros(len(q), k.shape[2], dtype=torch.float64)
        if options.proportional and method != "prune":
            logs[:, start : start + plan.kept] = sizes.log()
    out = (q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5 + logs[:, None, None] + mask).softmax(-1) @ v
    return beside(back) @ out if method in QUERIES else out


def at_three_resolutions(q, k, v, grid, start, options, layer):
    """The keys and weights that core/multires.py says, in one softmax in float64; step 0 of the seed."""
    length, d = q.shape[2:]
    tiles = multires.cut_tiles(grid, q.device, start, length, 16, 16)
    drawn = multires.draw_keys(tiles, torch.tensor(options.seed), 0)
    counts = multires.tile_counts(tiles, *multires.shares(options.ratio))
    lists = multires.choose(multires.scores(q, k, tiles, d**-0.5), tiles, counts)
    out = torch.empty_like(q, dtype=torch.float64)
    for number, rows in enumerate(tiles.rows.long().split(16)):
        whole, half = counts[:2] if number < tiles.image_query_tiles else counts[2:]
        place = multires.key_places(tiles, drawn, lists[:, :, number], whole, half, layer)[..., None]
        keys, values = (x.double().gather(2, place.expand(-1, -1, -1, d)) for x in (k, v))
        logs = multires.key_weights(tiles, whole, half, q.device).double().log()
        logits = q[:, :, rows].double() @ keys.transpose(-1, -2) * d**-0.5 + logs
        out[:, :, rows] = logits.softmax(-1) @ values
    return out


def start_of(name, length, image):
    return TEXT if MODELS[name][2] and length > image else 0


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize(("name", "reference"), CASES)
def test_every_attention_against_float64(name, reference, grid, method, host_sees):
    model, options = MODELS[name][0](), config(method=method)
    shared_tome.apply_patch(model, config=options)
    run(name, model, grid, reference)
    assert len(host_sees) == 3
    for layer, (q, k, v, out) in enumerate(host_sees):
        start = start_of(name, k.shape[2], math.prod(grid))
        expected = truth(q, k, v, grid, start, options, layer)
        assert out.shape == q.shape and (out - expected).abs().max() < 5e-6
        full = F.scaled_dot_product_attention(q.double(), k.double(), v.double())
        assert (full - expected).abs().max() > 1e-2


@pytest.mark.parametrize("options", [
    {"proportional": False}, {"reduce": "pick"}, {"partition": "alternate"}, {"partition": "fixed_2d"}, {"seed": 5},
    {"stride": (1, 4), "ratio": 0.7}, {"share_match": True},
])  # fmt: skip
@pytest.mark.parametrize("name", MODELS)
def test_options_of_merging_against_float64(name, options, host_sees):
    model, options = MODELS[name][0](), config(method="merge", **options)
    shared_tome.apply_patch(model, config=options)
    run(name, model)
    for layer, (q, k, v, out) in enumerate(host_sees):
        own = options.replace(share_match=False)  # the rows are different images
        expected = truth(q, k, v, (6, 10), start_of(name, k.shape[2], 60), own, layer)
        assert (out - expected).abs().max() < 5e-6


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(("name", "reference"), CASES)
def test_text_and_references_are_untouched(name, reference, method, host_sees):
    """They reach torch's attention bit for bit, before and behind what is left of the image."""
    model = MODELS[name][0]()
    shared_tome.apply_patch(model, config=config(method=method))
    with Record() as mode:
        run(name, model, reference=reference)
    for seen, (*given, _) in zip(mode.calls, host_sees, strict=True):
        length = given[1].shape[2]
        start = start_of(name, length, 60)
        for side, x, own in zip("qkv", seen[:3], given, strict=True):
            goes = 30 if (method in QUERIES if side == "q" else method != "merge_queries") else 0
            assert x.shape[2] == length - goes
            behind = length - start - 60
            found = torch.cat((x[:, :, :start], x[:, :, x.shape[2] - behind :]), dim=2)[..., : own.shape[-1]]
            assert torch.equal(found, torch.cat((own[:, :, :start], own[:, :, length - behind :]), dim=2))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", MODELS)
def test_ratio_0_and_remove_patch_are_bit_for_bit(name, method):
    model = MODELS[name][0]()
    before = run(name, model)
    shared_tome.apply_patch(model, config=config(method=method, ratio=0.0))
    assert torch.equal(run(name, model), before)
    shared_tome.apply_patch(model, config=config(method=method))
    merged = run(name, model)
    assert not torch.equal(merged, before) and torch.equal(run(name, model), merged)
    assert shared_tome.remove_patch(model) is model
    assert torch.equal(run(name, model), before) and models.count_hooks(model) == 0
    assert torch._C._len_torch_function_stack() == 0


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", MODELS)
def test_prompted_and_unprompted_rows_in_one_batch_or_two(name, method):
    model = MODELS[name][0]()
    plain = run(name, model)
    shared_tome.apply_patch(model, config=config(method=method))
    both = run(name, model)
    alone = torch.cat([run(name, model, rows=slice(row, row + 1)) for row in (0, 1)])
    assert (both - plain).norm() / plain.norm() > 1e-3
    assert (both - alone).norm() / both.norm() < 1e-5


@pytest.mark.parametrize("name", MODELS)
def test_the_seed_decides_and_the_global_generator_is_untouched(name):
    model = MODELS[name][0]()
    made = []
    for seed in (1, 2, 1):
        shared_tome.apply_patch(model, config=config(method="merge", seed=seed))
        state = torch.random.get_rng_state()
        made.append(run(name, model))
        assert torch.equal(torch.random.get_rng_state(), state)
    assert torch.equal(made[0], made[2]) and not torch.equal(made[0], made[1])


@pytest.mark.parametrize("name", MODELS)
def test_tomesds_arguments_alone(name, host_sees):
    """Method merge with plain means, as on a U-Net."""
    model = MODELS[name][0]()
    shared_tome.apply_patch(model, 0.5, use_rand=False)
    run(name, model)
    options = config(method="merge", partition="fixed_2d", proportional=False)
    for layer, (q, k, v, out) in enumerate(host_sees):
        expected = truth(q, k, v, (6, 10), start_of(name, k.shape[2], 60), options, layer)
        assert (out - expected).abs().max() < 5e-6


def test_what_only_a_unet_has():
    model = models.flux()
    before = run("flux", model)
    shared_tome.apply_patch(model, config=config())
    merged = run("flux", model)
    for options in ({"cross_attention": True}, {"mlp": True}):
        with pytest.raises(ValueError, match="needs a model with a U-Net; FluxTransformer2DModel is served at its att"):
            shared_tome.apply_patch(model, config=config(method="merge", **options))
    assert torch.equal(run("flux", model), merged)  # the patch that was there stays
    shared_tome.apply_patch(model, merge_attn=False)
    assert torch.equal(run("flux", model), before)
    shared_tome.remove_patch(model)


@pytest.mark.parametrize("method", ["sample", "merge"])
def test_other_attentions_of_a_processor_are_left_alone(method, caplog):
    """Flux' IP-Adapter attends to a picture's tokens too, as many of them as may be."""
    from diffusers.models.transformers.transformer_flux import FluxAttnProcessor

    class WithMore(FluxAttnProcessor):
        def __call__(self, attn, hidden_states, *args, **kwargs):
            out = super().__call__(attn, hidden_states, *args, **kwargs)
            q = hidden_states.unflatten(-1, (2, -1)).transpose(1, 2)
            k = models.noise(2, 2, TEXT + 60, 16, seed=8)
            self.more = F.scaled_dot_product_attention(q, k, k), (q, k)
            return out

    model, processor = models.flux(), WithMore()
    model.transformer_blocks[0].attn.set_processor(processor)
    shared_tome.apply_patch(model, config=config(method=method))
    run("flux", model)
    out, (q, k) = processor.more
    assert torch.equal(out, F.scaled_dot_product_attention(q, k, k))
    assert "with other tokens than the text's and the image's" in caplog.text


@pytest.mark.parametrize("method", ["sample", "merge"])
def test_a_mask_is_left_alone(method, caplog):
    model, mask = models.flux(), torch.zeros(2, 1, 1, TEXT + 60)
    mask[:, :, :, 3:TEXT] = -torch.inf
    told = {"joint_attention_kwargs": {"attention_mask": mask}}
    before = run("flux", model, **told)
    shared_tome.apply_patch(model, config=config(method=method))
    assert torch.equal(run("flux", model, **told), before)
    assert "ToMe skips an attention with a mask" in caplog.text


@pytest.mark.parametrize("method", METHODS)
def test_fused_projections(method):
    model = models.flux()
    shared_tome.apply_patch(model, config=config(method=method))
    apart = run("flux", model)
    model.fuse_qkv_projections()
    fused = run("flux", model)
    assert (fused - apart).norm() / apart.norm() < 1e-4


@pytest.mark.parametrize("method", ["sample", "merge"])
def test_threads_do_not_mix(method):
    """Two sizes through one patched model at once."""
    model = models.flux()
    shared_tome.apply_patch(model, config=config(method=method))
    grids = [(6, 10), (12, 15)]
    alone, together = [run("flux", model, grid) for grid in grids], {}
    barrier = threading.Barrier(2, timeout=20)

    def work(i):
        made = []
        for _ in range(8):
            barrier.wait()
            made.append(run("flux", model, grids[i]))
        together[i] = made

    threads = [threading.Thread(target=work, args=(i,)) for i in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(made, alone[i]) for i in (0, 1) for made in together[i])


def test_threads_do_not_take_each_others_grid(monkeypatch):
    """The grid that was read last is kept for the next call; another thread may put its own there at any time."""
    model = models.flux()
    shared_tome.apply_patch(model, config=config())
    attachment, grids = model._shared_tome, [(3, 4), (5, 2)]
    ids = [torch.cartesian_prod(*(torch.arange(float(n)) for n in (1, *grid))) for grid in grids]
    monkeypatch.setattr(type(attachment), "_grid", property(lambda self: kept[-1], lambda self, new: put(new)), False)
    kept = [None]

    def put(new):
        kept.append(new)
        if len(kept) == 2:
            assert attachment._grid_of(ids[1]) == (grids[1], 0)  # right behind it, the other thread's

    assert attachment._grid_of(ids[0]) == (grids[0], 0)
    assert len(kept) == 3


@pytest.mark.parametrize("method", ["sample", "merge"])
def test_a_whole_pipeline_with_guidance(method, host_sees):
    """SD3's: two rows, as many tokens as its own latent has, another choice in each step."""
    import diffusers

    vae = models.seeded(lambda: diffusers.AutoencoderKL(block_out_channels=(8,), latent_channels=4, norm_num_groups=8))
    pipe = diffusers.StableDiffusion3Pipeline(
        transformer=models.sd3(), scheduler=diffusers.FlowMatchEulerDiscreteScheduler(), vae=vae,
        text_encoder=None, tokenizer=None, text_encoder_2=None, tokenizer_2=None, text_encoder_3=None,
        tokenizer_3=None,
    )  # fmt: skip
    pipe.set_progress_bar_config(disable=True)

    def generate():
        return pipe(
            prompt_embeds=models.noise(1, TEXT, 16, seed=2), negative_prompt_embeds=models.noise(1, TEXT, 16, seed=3),
            pooled_prompt_embeds=models.noise(1, 8, seed=4), negative_pooled_prompt_embeds=models.noise(1, 8, seed=5),
            latents=models.noise(1, 4, 14, 18), height=14, width=18, num_inference_steps=4, guidance_scale=4.0,
            output_type="latent",
        ).images  # fmt: skip

    before = generate()
    shared_tome.apply_patch(pipe, config=config(method=method, start=0.5))
    merged = generate()
    assert len(host_sees) == 2 * 3 and host_sees[0][0].shape[0] == 2  # the last two steps
    assert not torch.equal(merged, before) and torch.equal(generate(), merged)
    shared_tome.remove_patch(pipe)
    assert torch.equal(generate(), before)
