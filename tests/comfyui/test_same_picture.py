"""One seed, one picture: on repeat, whatever the host does around it."""

from __future__ import annotations

import sys

import pytest
import torch

from . import dit_host
from .host import conditioning, pack_module, run_node, sample

METHODS = ("sample", "merge", "merge_queries", "merge_keys", "downsample", "prune")
DRAWING = ("sample", "merge", "merge_queries", "merge_keys", "prune")


@pytest.mark.parametrize("method", METHODS)
def test_repeat_is_bit_equal_whatever_the_global_generator(short, tome, method):
    model = tome(short, method=method)
    torch.manual_seed(5)
    first = sample(model)
    torch.manual_seed(6)
    assert torch.equal(sample(model), first)
    assert torch.equal(sample(tome(short, method=method)), first)


@pytest.mark.parametrize("method", METHODS)
def test_global_generator_is_untouched(short, tome, method):
    sample(short)
    after_plain = torch.random.get_rng_state()
    sample(tome(short, method=method))
    assert torch.equal(torch.random.get_rng_state(), after_plain)


@pytest.mark.parametrize("method", DRAWING)
def test_the_seed_decides(short, tome, method):
    first, *others = (sample(tome(short, method=method, seed=seed)) for seed in (1, 2, 1 + 2**32))
    assert not any(torch.equal(first, other) for other in others)


@pytest.mark.parametrize("method", METHODS)
def test_prompt_and_negative_in_one_batch_or_two(short, tome, method, monkeypatch):
    model = tome(short, method=method)
    plain, merged = sample(short), sample(model)
    calls = []
    monkeypatch.setattr(short.model, "memory_required", lambda *_a, **_k: calls.append(1) or 1e30)  # nothing fits
    plain_split, merged_split = sample(short), sample(model)
    assert calls
    own = (plain - plain_split).norm() / plain.norm()  # what the batch size does to the unmerged model
    assert (merged - merged_split).norm() / merged.norm() <= max(1e-5, 10 * own)


def test_share_match_only_where_both_halves_are_the_same_images(sd15, tome):
    """With guidance; without it the halves of a batch of two are different images, and each has its own match."""
    shared = tome(sd15, method="merge", share_match=True)
    assert not torch.equal(sample(shared), sample(tome(sd15, method="merge")))
    rows = matched_rows(lambda: sample(shared, batch=1))
    assert rows and set(rows) == {1}
    rows = matched_rows(lambda: sample(shared, batch=2, cfg=1.0))
    assert rows and set(rows) == {2}


@pytest.mark.parametrize(("batch", "cfg", "rows"), [(1, 3.0, 1), (2, 3.0, 2), (2, 1.0, 2)])
def test_share_match_in_a_transformer(tome, batch, cfg, rows):
    """Two images without a prompt apart are two halves of a batch too."""
    model = tome(dit_host.small("flux"), method="merge", share_match=True)
    found = matched_rows(lambda: dit_host.sample(model, "flux", steps=1, batch=batch, cfg=cfg))
    assert found and set(found) == {rows}


def matched_rows(run):
    """For how many rows each match of a run was made: one match a level and step."""
    call = sys.modules[pack_module("unet").ModelCall.__module__]
    found, match_tokens = [], call.match_tokens

    def spy(*args, **kwargs):
        plan = match_tokens(*args, **kwargs)
        found.append(plan.choice.shape[0])
        return plan

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(call, "match_tokens", spy)
        run()
    return found


def test_steps_and_layers_choose_anew(sd15, tome):
    """One noise level twice gives one choice; another noise level another."""
    chosen = []
    model = tome(sd15, method="sample", own_token=False)  # whose keys are drawn before their projections

    def spy(q, k, v, extra_options):
        chosen.append((extra_options["block"], float(extra_options["sigmas"][0])))
        return q, k, v

    model.set_model_attn1_patch(spy)
    block = sd15.model.diffusion_model.input_blocks[1][1].transformer_blocks[0].attn1
    keys = []
    handle = block.to_k.register_forward_pre_hook(lambda _m, args: keys.append(args[0].clone()))
    other = []
    second = sd15.model.diffusion_model.output_blocks[-1][1].transformer_blocks[0].attn1
    other_handle = second.to_k.register_forward_pre_hook(lambda _m, args: other.append(args[0].clone()))
    try:
        sample(model, sampler="heun", steps=2)  # evaluates the second noise level twice
    finally:
        handle.remove()
        other_handle.remove()
    sigmas = [sigma for where, sigma in chosen if where == ("input", 1)]
    assert len(sigmas) == 3 and sigmas[1] == sigmas[2]
    assert len(keys) == len(other) == 3


@pytest.mark.parametrize("method", ("sample", "merge"))
def test_batch_of_three(short, tome, method):
    merged = sample(tome(short, method=method), batch=3)
    assert merged.shape[0] == 3 and merged.isfinite().all()
    assert torch.equal(sample(tome(short, method=method), batch=3), merged)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(("height", "width"), [(264, 328), (200, 136)])
def test_odd_sizes(sd15, tome, method, height, width):
    model = tome(sd15, method=method)
    merged = sample(model, height=height, width=width, steps=1)
    assert merged.shape == (1, 4, height // 8, width // 8) and merged.isfinite().all()
    assert not torch.equal(merged, sample(sd15, height=height, width=width, steps=1))


@pytest.mark.parametrize("method", ("sample", "merge"))
def test_area_conditioning(short, tome, method):
    """Prompts for parts of the picture run on smaller grids; each is merged on its own."""
    positive = conditioning(1, area=(16, 32, 0, 0), strength=1.0) + conditioning(3, area=(24, 32, 8, 0), strength=1.0)
    model = tome(short, method=method)
    merged = sample(model, positive=positive)
    assert torch.equal(sample(model, positive=positive), merged)
    assert not torch.equal(merged, sample(short, positive=positive))


def test_prompts_of_different_length(sd15, tome):
    model = tome(sd15)
    positive, negative = conditioning(1, tokens=7), conditioning(2, tokens=9)
    merged = sample(model, positive=positive, negative=negative)
    assert torch.equal(sample(model, positive=positive, negative=negative), merged)


def test_added_noise_off(sd15, tome, comfy_nodes):
    """ComfyUI core's node gives another picture each time here."""
    import nodes

    model = tome(sd15, method="merge")
    latent = {"samples": torch.randn(1, 4, 32, 32, generator=torch.Generator().manual_seed(0))}
    made = [
        nodes.KSamplerAdvanced().sample(
            model, "disable", 1, 2, 5.0, "euler", "normal", conditioning(1), conditioning(2), latent, 0, 2, "disable"
        )[0]["samples"]
        for _ in range(2)
    ]
    assert torch.equal(*made)


def test_image_to_image(sd15, tome):
    latent = torch.randn(1, 4, 32, 32, generator=torch.Generator().manual_seed(0))
    model = tome(sd15)
    merged = sample(model, latent=latent, denoise=0.5, steps=4)
    assert torch.equal(sample(model, latent=latent, denoise=0.5, steps=4), merged)


def test_two_samplers_of_one_graph_do_not_mix(short, tome, comfy_nodes):
    """Clones share objects: a second sampler with other options, between two runs of the first."""
    first, second = tome(short, method="merge", ratio=0.5), tome(short, method="sample", ratio=0.75, seed=3)
    alone = sample(first)
    sample(second, height=264, width=328)
    assert torch.equal(sample(first.clone()), alone)


def test_threads_do_not_mix(comfy_nodes, tome):
    """Several GPUs run one thread each with the same patches: here two threads with a model each, on the CPU."""
    from concurrent.futures import ThreadPoolExecutor

    from .host import small_unet

    models = [small_unet("SD15"), small_unet("SD15")]
    patched = [tome(models[0], method="merge")]
    patched.append(models[1].clone())
    # As ComfyUI does for further GPUs: the same options, hence the same objects, on another copy of the model.
    patched[1].wrappers = {kind: dict(keyed) for kind, keyed in patched[0].wrappers.items()}
    x = [torch.randn(2, 4, 32, 32, generator=torch.Generator().manual_seed(seed)) for seed in (0, 1)]

    def call(i):
        options = {
            "wrappers": {
                "apply_model": {key: list(found) for key, found in patched[0].wrappers["apply_model"].items()}
            },
            "cond_or_uncond": [1, 0],
            "sigmas": torch.tensor([3.0]),
            "sample_sigmas": torch.tensor([14.0, 3.0, 0.0]),
        }
        context = torch.cat([conditioning(1)[0][0], conditioning(2)[0][0]])
        with torch.no_grad():
            return models[i].model.apply_model(
                x[i], torch.full((2,), 3.0), c_crossattn=context, transformer_options=options
            )

    alone = [call(0), call(1)]
    for _ in range(3):
        with ThreadPoolExecutor(2) as pool:
            together = list(pool.map(call, (0, 1)))
        assert torch.equal(together[0], alone[0]) and torch.equal(together[1], alone[1])


def test_run_node_is_the_real_one(comfy_nodes):
    assert comfy_nodes["ToMe"].__module__.endswith("comfy_tome.nodes") and run_node
