"""Transformers on several GPUs: a thread and a copy of the model for each, with the same objects in their options.

ComfyUI does so with its MultiGPU nodes; here both copies are on the CPU and go through their blocks in step.
"""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from . import dit_host
from .dit_host import call

METHODS = ("sample", "merge", "merge_queries", "merge_keys", "downsample", "prune")
BLOCKS = {"flux": ("double_blocks", "single_blocks"), "wan": ("blocks",)}
# Sizes and noise levels of the two threads' calls; a plan, grid or step of the other one would not fit or show.
CALLS = {
    "flux": ({"latent": (2, 16, 16, 24), "sigma": 0.7}, {"latent": (1, 16, 12, 20), "sigma": 0.3, "seed": 1}),
    "wan": ({"latent": (2, 16, 3, 8, 12), "sigma": 0.7}, {"latent": (1, 16, 2, 9, 11), "sigma": 0.3, "seed": 1}),
}
SAME = ({"seed": 0}, {"seed": 1})  # of one size: another's plan would fit


def clones(tome, name, **options):
    """Two patched models of equal weights; the second has the first one's wrappers."""
    first, second = tome(dit_host.small(name), **options), dit_host.small(name).clone()
    weights = first.model.diffusion_model.state_dict()
    second.model.diffusion_model.load_state_dict(weights)
    second.wrappers = {
        kind: {key: list(found) for key, found in keyed.items()} for kind, keyed in first.wrappers.items()
    }
    return first, second


def in_step(patched, name):
    """Have both models wait for each other before each block. Returns how often they met, and how to take it off."""
    met = []
    barrier = threading.Barrier(2, action=lambda: met.append(1), timeout=20)

    def wait(*_):
        barrier.wait()

    handles = [
        block.register_forward_pre_hook(wait)
        for model in patched
        for blocks in BLOCKS[name]
        for block in getattr(model.model.diffusion_model, blocks)
    ]
    return met, handles


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("sizes", ["different", "same"])
@pytest.mark.parametrize("name", BLOCKS)
def test_two_clones_at_once(comfy_nodes, tome, name, sizes, method):
    patched = clones(tome, name, method=method, ratio=0.5)
    told = CALLS[name] if sizes == "different" else SAME

    def work(i):
        return call(patched[i], name, **told[i])

    alone = [work(0), work(1)]
    plain = [call(dit_host.small(name), name, **one) for one in told]
    met, handles = in_step(patched, name)
    with ThreadPoolExecutor(2) as pool:
        together = list(pool.map(work, (0, 1)))
    for handle in handles:
        handle.remove()
    assert len(met) == 2
    for made, one, whole in zip(together, alone, plain, strict=True):
        assert torch.equal(made, one) and not torch.equal(made, whole)


@pytest.mark.parametrize("name", BLOCKS)
def test_two_configs_at_once(comfy_nodes, tome, name):
    """Clones of one model with options of their own, as two samplers have them."""
    model = dit_host.small(name)
    patched = [tome(model, method="sample", ratio=0.75), tome(model, method="merge", ratio=0.5, seed=3)]
    alone = [call(one, name) for one in patched]
    met, handles = in_step(patched[:1], name)  # they share their blocks
    with ThreadPoolExecutor(2) as pool:
        together = list(pool.map(lambda i: call(patched[i], name), (0, 1)))
    for handle in handles:
        handle.remove()
    assert len(met) == 2 and not torch.equal(*alone)
    assert all(torch.equal(made, one) for made, one in zip(together, alone, strict=True))
