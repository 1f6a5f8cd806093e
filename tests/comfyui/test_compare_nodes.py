"""The nodes that `install.py compare` gives its own server: another batch split, and the peak of the memory."""

from __future__ import annotations

import importlib.util
import sys

import pytest
import torch

from .host import REPO, run_node, sample


@pytest.fixture(scope="module")
def nodes(comfy_nodes):
    file = REPO / "installer" / "compare" / "nodes" / "__init__.py"
    spec = importlib.util.spec_from_file_location("tome_compare_nodes", file)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def rows(model, **options):
    """(rows of each call of the model, the latent) of a sampling."""
    seen = []

    def count(apply, args):
        seen.append(len(args["input"]))
        return apply(args["input"], args["timestep"], **args["c"])

    clone = model.clone()
    clone.set_model_unet_function_wrapper(count)
    return seen, sample(clone, steps=2, **options)


def test_with_guidance_each_row_runs_alone(nodes, sd15):
    together, plain = rows(sd15)
    alone, split = rows(run_node(nodes.ToMeCompareModel, model=sd15, nonce=1, split=True))
    assert together == [2, 2] and alone == [1, 1, 1, 1]
    assert (plain - split).abs().max() < 1e-4 * plain.abs().max()


def test_without_guidance_a_row_runs_twice(nodes, sd15):
    together, plain = rows(sd15, cfg=1.0)
    twice, split = rows(run_node(nodes.ToMeCompareModel, model=sd15, nonce=1, split=True), cfg=1.0)
    assert together == [1, 1] and twice == [2, 2]
    assert split.shape == plain.shape and (plain - split).abs().max() < 1e-4 * plain.abs().max()


def test_unsplit_it_only_passes_a_clone_on(nodes, sd15):
    seen, out = rows(run_node(nodes.ToMeCompareModel, model=sd15, nonce=2, split=False))
    assert seen == [2, 2] and torch.equal(out, rows(sd15)[1])


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells and sets back the peak of a process")
def test_the_peak_is_that_since_the_last_time(nodes):
    cpu = torch.device("cpu")
    if nodes.take_peak(cpu) is None:
        pytest.skip("this system does not let a process set its peak back")
    base = nodes.take_peak(cpu)
    torch.ones(2**26, dtype=torch.uint8).sum()
    assert nodes.take_peak(cpu) > base + 2**25
    assert nodes.take_peak(cpu) < base + 2**25


def test_a_video_gives_frames_spread_over_it(nodes, sd15, monkeypatch):
    kept = []

    class Preview:
        def __init__(self, images, cls):
            kept.append(images)

        def as_dict(self):
            return {"images": []}

    monkeypatch.setattr(nodes.ui, "PreviewImage", Preview)
    frames = torch.arange(50.0)[:, None, None, None].expand(50, 2, 2, 3)
    told = nodes.ToMeCompareTake.execute(images=frames, model=sd15).ui
    assert kept[0][:, 0, 0, 0].tolist() == [0, 7, 14, 21, 28, 35, 42, 49]
    assert told["family"] == ["SD15"] and told["dtype"] == ["float32"]
