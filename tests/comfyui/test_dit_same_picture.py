"""Transformers: one seed, one picture, whatever the host does around it; and nothing is left behind."""

from __future__ import annotations

import functools
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from . import dit_host
from .dit_host import call, sample, watch

METHODS = ("sample", "merge", "merge_queries", "merge_keys", "downsample", "prune")
DRAWING = ("sample", "merge")


@pytest.fixture(scope="session")
def dit(comfy_nodes):
    return functools.lru_cache(dit_host.small)


@pytest.mark.parametrize("method", METHODS)
def test_repeat_and_the_global_generator(dit, tome, method):
    model = tome(dit("flux"), method=method)
    torch.manual_seed(5)
    first = sample(model, "flux")
    after = torch.random.get_rng_state()
    torch.manual_seed(5)
    sample(dit("flux"), "flux")
    assert torch.equal(torch.random.get_rng_state(), after)
    torch.manual_seed(6)
    assert torch.equal(sample(model, "flux"), first)
    assert torch.equal(sample(tome(dit("flux"), method=method), "flux"), first)


@pytest.mark.parametrize("name", ["flux", "sd3", "wan"])
@pytest.mark.parametrize("method", DRAWING)
def test_the_seed_decides(dit, tome, name, method):
    made = [sample(tome(dit(name), method=method, seed=seed), name) for seed in (1, 2, 1 + 2**32, 1)]
    assert not torch.equal(made[0], made[1]) and not torch.equal(made[0], made[2])
    assert torch.equal(made[0], made[3])


@pytest.mark.parametrize("name", ["flux", "sd3", "wan", "hunyuan"])
@pytest.mark.parametrize("method", METHODS)
def test_prompt_and_negative_in_one_batch_or_two(dit, tome, name, method, monkeypatch):
    model = tome(dit(name), method=method)
    plain, merged = sample(dit(name), name), sample(model, name)
    monkeypatch.setattr(dit(name).model, "memory_required", lambda *_a, **_k: 1e30)  # nothing fits
    plain_split, merged_split = sample(dit(name), name), sample(model, name)
    with watch() as seen:  # apart: in the place of torch's attention it leaves queries without their own tokens
        sample(dit(name), name), sample(model, name)
    assert all(len(one.q) == 1 for one in seen)
    own = (plain - plain_split).norm() / plain.norm()
    assert (merged - merged_split).norm() / merged.norm() <= max(1e-5, 10 * own)
    assert (merged - plain).norm() / plain.norm() > 1e-3


def test_each_layer_chooses_anew(comfy_nodes):
    """The same keys in four layers of one call: each run of four gives each of its tokens once."""
    q, k, v = (torch.randn(1, 5 + 96, 64, generator=torch.Generator().manual_seed(seed)) for seed in (0, 1, 2))
    with watch() as seen:
        run = dit_host.attention_alone((8, 12), 5, 0, method="sample", ratio=0.75)
        for _ in range(4):
            run(q, k, v, 4)
    chosen = [one.k[0, 0, 5:, 0].tolist() for one in seen]
    assert sorted(sum(chosen, [])) == sorted(k[0, 5:, 0].tolist())


def test_each_step_chooses_anew(dit, tome):
    """The same latent at three noise levels: the first layer sees the same tokens, and takes others."""
    model = tome(dit("flux"), ratio=0.75)
    with watch() as seen:
        for sigma in (1.0, 0.7, 0.3, 0.7):
            call(model, "flux", sigma=sigma)
    first = [{*one.k[0, 0, 7:, 0].tolist()} for one in seen[::2]]
    assert first[1] == first[3]
    assert first[0].isdisjoint(first[1]) and first[1].isdisjoint(first[2]) and first[0].isdisjoint(first[2])


def test_a_schedule(dit, tome):
    with watch() as seen:
        sample(tome(dit("wan"), start=0.5), "wan", steps=4, cfg=1.0)
    assert [one.k.shape[-2] for one in seen[::4]] == [72, 72, 36, 36]
    with watch() as seen:
        sample(tome(dit("wan"), ratio=0.75, ratio_end=0.0, end=0.75), "wan", steps=4, cfg=1.0)
    assert [one.k.shape[-2] for one in seen[::4]] == [18, 40, 62, 72]


@pytest.mark.parametrize("method", DRAWING)
def test_threads_do_not_mix(comfy_nodes, tome, method):
    """Several GPUs run one thread each with the same wrapper; here two models on the CPU, of different kinds."""
    names = ("flux", "wan")
    patched = [tome(dit_host.small(name), method=method) for name in names]
    patched[1].wrappers = {kind: dict(keyed) for kind, keyed in patched[0].wrappers.items()}

    def run(i):
        return call(patched[i], names[i])

    alone = [run(0), run(1)]
    for _ in range(5):
        with ThreadPoolExecutor(2) as pool:
            together = list(pool.map(run, (0, 1, 0, 1)))
        assert all(torch.equal(made, alone[i % 2]) for i, made in enumerate(together))


@pytest.mark.parametrize("method", DRAWING)
def test_an_exception_leaves_nothing_behind(dit, tome, method):
    before, model = sample(dit("flux"), "flux"), tome(dit("flux"), method=method)
    merged, options = sample(model, "flux"), repr(model.model_options)

    def explode(args):
        raise RuntimeError("in mid-run")

    broken = model.clone()
    broken.set_model_patch(explode, "post_input")
    with pytest.raises(RuntimeError, match="in mid-run"):
        sample(broken, "flux")
    assert torch.equal(sample(dit("flux"), "flux"), before) and torch.equal(sample(model, "flux"), merged)
    assert repr(model.model_options) == options
    hooks = [m for m in dit("flux").model.diffusion_model.modules() if m._forward_hooks or m._forward_pre_hooks]
    assert not hooks


def test_two_of_ours_are_an_error(dit, tome):
    with pytest.raises(ValueError, match="already merged by another ToMe node"):
        tome(tome(dit("flux")))
    tome(tome(dit("flux"), ratio=0.0))


def test_batch_of_three(dit, tome):
    model = tome(dit("sd3"))
    merged = sample(model, "sd3", batch=3)
    assert merged.shape[0] == 3 and merged.isfinite().all() and torch.equal(sample(model, "sd3", batch=3), merged)
