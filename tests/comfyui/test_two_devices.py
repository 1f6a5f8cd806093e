"""Several GPUs: ComfyUI's MultiGPU CFG Split, its copies of the model and its threads, give the picture of one.

Here on the CPU, under the two names that torch has for it. A row that runs alone is rounded alike on both, so there
pictures are compared bit for bit; a batch of two rows is rounded otherwise, as it is without ToMe.
"""

from __future__ import annotations

import json
import threading

import pytest
import torch

from . import dit_host, host
from .host import conditioning, run_node, sample, tokens, watch

CASES = {
    "sample": {"ratio": 0.75},
    "sample, uneven": {"ratio": 0.6},
    "sample, from 20%": {"ratio": 0.75, "start": 0.2},
    "sample, exact every 2": {"ratio": 0.75, "exact_every": 2},
    "sample, falling": {"ratio": 0.75, "ratio_end": 0.0, "end": 0.8},
    "merge": {"method": "merge"},
    "merge, from 20%": {"method": "merge", "start": 0.2},
    "merge, in cross-attention and mlp too": {"method": "merge", "cross_attention": True, "mlp": True},
    "merge, one match for both rows": {"method": "merge", "share_match": True},
}
STEPS = 5


@pytest.fixture(scope="module")
def split(comfy_nodes):
    """split(model, factory) -> its clone on two devices, through ComfyUI's own node. factory: loads it once more."""
    import comfy.model_management as management
    from comfy_extras.nodes_multigpu import MultiGPUCFGSplitNode

    devices = [torch.device("cpu"), torch.device("cpu", 0)]

    def apply(model, factory=host.short_unet):
        model.cached_patcher_init = (factory, ())
        # The node takes offence at a loaded model whose patcher is gone, which an earlier test may have left.
        management.current_loaded_models[:] = [one for one in management.current_loaded_models if one.model is not None]
        made = run_node(MultiGPUCFGSplitNode, model=model, max_gpus=2)
        assert [patcher.load_device for patcher in (made, copy_of(made))] == devices
        assert copy_of(made).model is not made.model
        return made

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(management, "get_all_torch_devices", lambda exclude_current=False: list(devices))
        yield apply


@pytest.fixture(scope="module")
def unmerged(comfy_nodes, split):
    """The model's picture on one device, and how far from it the one on two is."""
    model = host.short_unet()
    one = picture(model)
    two = picture(split(model))
    with pytest.MonkeyPatch.context() as patch:
        one_row_a_call(model, patch)
        assert torch.equal(picture(model), two)
    return one, distance(one, two)


def copy_of(model):
    """The second device's patcher."""
    (copy,) = model.get_additional_models_with_key("multigpu")
    return copy


def one_row_a_call(model, monkeypatch):
    """On one device prompt and negative prompt run one after the other, as where memory is short."""
    monkeypatch.setattr(model.model, "memory_required", lambda *_args, **_more: 1e30)


@torch.inference_mode()  # as ComfyUI's executor runs nodes; its threads do not inherit it
def picture(model, **more):
    return sample(model, **{"height": 128, "width": 128, "steps": STEPS, **more})


def distance(one, other):
    return float((one - other).abs().max() / one.abs().max())


@pytest.mark.parametrize("case", CASES)
def test_the_picture_of_one_device(tome, split, unmerged, monkeypatch, case):
    model = host.short_unet()
    merged = tome(model, **CASES[case])
    plain, own = unmerged
    one, halves = picture(merged), split(merged)
    two = picture(halves)
    assert own < 1e-5 < 1e-3 < distance(plain, one)  # merging shows
    if "share_match" not in CASES[case]:  # there rows apart have a match each, as the option's help says
        assert distance(one, two) <= max(10 * own, 1e-5)
    assert torch.equal(picture(halves), two)
    assert torch.equal(picture(tome(split(model), **CASES[case])), two)  # in whatever order the nodes stand
    one_row_a_call(model, monkeypatch)
    assert torch.equal(picture(merged), two)


def test_both_devices_merge_each_in_a_thread(comfy_nodes, tome, split):
    # Keys are drawn before they are projected.
    model = split(tome(host.small_unet(), ratio=0.75, own_token=False), host.small_unet)
    seen: dict[str, set] = {"cpu": set(), "cpu:0": set()}

    def note(executor, *args, **kwargs):
        options = args[-1] if isinstance(args[-1], dict) else kwargs["transformer_options"]
        seen[str(options["multigpu_thread_device"])].add((threading.get_ident(), *options["cond_or_uncond"]))
        return executor(*args, **kwargs)

    model.add_wrapper_with_key("diffusion_model", "test", note)
    with watch(model) as first, watch(copy_of(model)) as second:
        picture(model)
    assert tokens(first, "attn1.to_k") == tokens(second, "attn1.to_k")
    assert {64, 16, 4} == set.union(*tokens(first, "attn1.to_k").values())
    assert tokens(first, "attn1.to_q") == tokens(second, "attn1.to_q")
    assert {len(calls) for calls in first.values()} == {len(calls) for calls in second.values()} == {STEPS}
    runs = [run for device in seen.values() for run in device]
    assert len(runs) == 2 and len({thread for thread, _ in runs} - {threading.get_ident()}) == 2
    assert {row for _, row in runs} == {0, 1}


@pytest.mark.parametrize("case", ["sample, from 20%", "merge"])
def test_several_images_and_prompts(comfy_nodes, tome, split, case):
    """Three prompts over two devices, two of them in one batch; two images in each."""
    model = host.short_unet()
    prompts = {"batch": 2, "positive": conditioning(1) + conditioning(3), "negative": conditioning(2)}
    prompts |= {"height": 256, "width": 256}  # here no two similarities are so near that rounding decides the match
    merged = tome(model, **CASES[case])
    own = distance(picture(model, **prompts), picture(split(model), **prompts))
    assert distance(picture(merged, **prompts), picture(split(merged), **prompts)) <= max(10 * own, 1e-5)


def test_a_failure_on_one_device_leaves_nothing_behind(comfy_nodes, tome, split):
    model = split(tome(host.short_unet(), method="merge", mlp=True))
    before, options = picture(model), repr(model.model_options)

    def explode(executor, *args, **kwargs):
        options = args[-1] if isinstance(args[-1], dict) else kwargs["transformer_options"]
        if str(options["multigpu_thread_device"]) == "cpu:0":
            raise RuntimeError("in mid-run")
        return executor(*args, **kwargs)

    broken = model.clone()
    broken.add_wrapper_with_key("diffusion_model", "test", explode)
    with pytest.raises(RuntimeError, match="in mid-run"):
        picture(broken)
    assert torch.equal(picture(model), before) and repr(model.model_options) == options
    for patcher in (model, copy_of(model)):
        modules = list(patcher.model.diffusion_model.modules())
        assert not [module for module in modules if module._forward_hooks or module._forward_pre_hooks]


@pytest.mark.parametrize("method", ["sample", "merge"])
def test_a_record_counts_both(comfy_nodes, tome, split, method):
    model, kept = comfy_nodes["ToMeRecord"].execute(model=tome(host.small_unet(), method=method, ratio=0.5)).result
    two = split(model, host.small_unet)
    for _ in range(2):  # two runs, each a record of its own
        picture(two)
        data = json.loads(comfy_nodes["ToMeReport"].execute(record=kept, after=None, measure_time=False).result[1])
        assert (data["steps"], data["of_steps"], data["calls"]) == (STEPS, STEPS, 2 * STEPS)
        assert {layer["calls"] for layer in data["layers"]} == {2 * STEPS}
        assert {tuple(layer["after"]) for layer in data["layers"]} == {(128, 128), (32, 32), (8, 8)}


def test_the_report_times_calls_side_by_side_once(comfy_nodes, tome, split):
    """A step of two GPUs, a call each, takes as long as one of these calls."""
    model, kept = comfy_nodes["ToMeRecord"].execute(model=tome(host.short_unet(), ratio=0.5)).result
    picture(split(model))
    data = json.loads(comfy_nodes["ToMeReport"].execute(record=kept, after=None, measure_time=True).result[1])
    assert data["time"]["calls"] == 1


@pytest.mark.parametrize("name", ["flux", "wan"])
@pytest.mark.parametrize("method", ["sample", "merge"])
def test_transformers(comfy_nodes, tome, split, monkeypatch, name, method):
    def factory():
        return dit_host.small(name)

    model = factory()
    merged = tome(model, method=method, start=0.2)
    two = dit_host.sample(split(merged, factory), name, steps=STEPS)
    assert distance(dit_host.sample(model, name, steps=STEPS), two) > 1e-3
    one_row_a_call(model, monkeypatch)
    assert torch.equal(dit_host.sample(merged, name, steps=STEPS), two)
