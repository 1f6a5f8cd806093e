"""levels "auto": a layer that was measured not to pay on this device is left alone, and it is said.

The CPU measures nothing; here verdicts are given as a GPU's would be. What is measured there: tests/core/test_auto.py.
"""

from __future__ import annotations

import json
import logging
import sys

import pytest
import torch

from . import dit_host
from .host import forget_log, least_unet, pack_module, run_node, sample, short_unet, tokens, watch

DRAWN = {"own_token": False}  # keys before their projections, where they are counted


@pytest.fixture
def decided(comfy_nodes, monkeypatch):
    """Level 0 (32x32) does not pay, level 1 does. Returns what was asked for."""
    decisions = sys.modules[pack_module("unet").Decisions.__module__]
    decision, asked = decisions.Decision, []

    def decision_on(grid, channels, heads, dtype, device, config, attention=None, kernels=(), block=None, about=""):
        asked.append((grid, channels, heads, dtype, attention.__name__))
        return decision(100.0, 99.0, 5.0) if grid == (32, 32) else decision(80.0, 30.0, 20.0)

    monkeypatch.setattr(decisions, "measures", lambda config, grid, device: config.levels == "auto")
    monkeypatch.setattr(decisions, "decision_on", decision_on)
    monkeypatch.setattr(decisions, "known_on", lambda *facts: None)
    return asked


def merged_grids(model, steps=2):
    """How many keys the layers of each level get."""
    with watch(model) as seen:
        made = sample(model, steps=steps)
    keys = tokens(seen, "attn1.to_k")
    return made, {block: next(iter(count)) for block, count in keys.items()}


def test_what_does_not_pay_is_left_alone(sd15, tome, decided, caplog):
    forget_log()
    with caplog.at_level(logging.INFO, "ToMe"):
        _, keys = merged_grids(tome(sd15, min_tokens=100, **DRAWN))
    assert keys["input_blocks.1.1"] == 1024 and keys["input_blocks.3.1"] == 128
    said = [line for line in caplog.messages if "does not pay here" in line]
    assert said == [
        "[ToMe] merging does not pay here: it saves 1 of 100 us and takes the processor 5 us longer "
        "(input block 1, 32x32 tokens)"
    ]
    assert {(grid, name) for grid, _, _, _, name in decided} == {
        ((32, 32), "attention_pytorch"), ((16, 16), "attention_pytorch")
    }  # fmt: skip


def test_named_levels_are_merged_whatever_they_cost(sd15, tome, decided):
    _, keys = merged_grids(tome(sd15, min_tokens=100, levels="0,1", **DRAWN))
    assert keys["input_blocks.1.1"] == 512 and not decided


def test_where_nothing_pays_the_picture_is_the_unmerged_one(sd15, tome, decided):
    plain = sample(sd15, steps=2)
    assert torch.equal(sample(tome(sd15, min_tokens=1000), steps=2), plain)
    assert not torch.equal(sample(tome(sd15, min_tokens=1000, levels="0"), steps=2), plain)


@pytest.mark.parametrize("own", [False, True])
def test_a_model_of_which_nothing_pays_is_not_patched_once_that_is_known(sd15, tome, monkeypatch, caplog, own):
    """ToMe's patches take a millisecond a step, which shows where the processor is what a step waits for."""
    forget_log()
    unet = pack_module("unet")
    decisions = sys.modules[unet.Decisions.__module__]
    pays = {(32, 32): False, (16, 16): False}
    kept, made = {}, []

    def decision_on(grid, *facts):
        assert facts[-1].startswith("weights float32")
        decision = decisions.Decision(100.0, 30.0 if pays[grid] else 99.0, 5.0)
        return kept.setdefault((grid, *facts[:3], bool(facts[6])), decision)

    def known_on(grid, *facts):
        return kept.get((grid, *facts[:3], bool(facts[6])))

    def measures(config, grid, device):
        return config.levels == "auto"

    class Counted(unet.UNetCall):
        def __init__(self, *given):
            made.append(1)
            super().__init__(*given)

    for name, value in (("measures", measures), ("decision_on", decision_on), ("known_on", known_on)):
        monkeypatch.setattr(decisions, name, value)
    monkeypatch.setattr(unet, "UNetCall", Counted)
    plain = sample(sd15, steps=3)
    merged = tome(sd15, min_tokens=100, own_token=own)
    assert torch.equal(sample(merged, steps=3), plain)
    assert len(made) == 1 and len(kept) == 2  # the first step has measured
    forget_log()
    caplog.clear()
    with caplog.at_level(logging.INFO, "ToMe"):
        assert torch.equal(sample(merged, steps=3), plain)
    assert len(made) == 1
    unpaid = "merging does not pay here: it saves 1 of 100 us and takes the processor 5 us longer"
    assert [line for line in caplog.messages if "does not pay here" in line] == [
        f"[ToMe] {unpaid} (layers of 32x32 tokens)",
        f"[ToMe] nothing was merged in this sampling: {unpaid} (layers of 32x32 tokens, layers of 16x16 tokens). "
        "To change that: make a larger picture; levels other than auto are always merged",
    ]
    pays[16, 16] = True  # a layer that pays is enough; so is one that nobody knows, and named levels
    kept.clear()
    assert not torch.equal(sample(merged, steps=2), plain) and len(made) == 3
    assert not torch.equal(sample(tome(sd15, min_tokens=100, levels="0"), steps=2), plain)
    assert len(made) == 5
    assert torch.equal(sample(tome(sd15, min_tokens=5000), steps=3), plain)  # nothing is large enough
    assert len(made) == 5


def test_two_levels_of_one_width_are_both_looked_at(sd15):
    """SD 1.x: levels 2 and 3 have 1,280 channels; named level 3 alone is not nothing."""
    found = pack_module("unet_model").layers_of(sd15.model.diffusion_model)
    mult, first = (getattr(sd15.model.diffusion_model, name) for name in ("channel_mult", "model_channels"))
    assert {(level, width) for level, width, _ in found} == {(level, first * x) for level, x in enumerate(mult)}
    assert len({width for _, width, _ in found}) < len({level for level, *_ in found})


def test_the_report_says_what_each_layer_saves(sd15, tome, decided, comfy_nodes):
    model, kept = comfy_nodes["ToMeRecord"].execute(model=tome(sd15, min_tokens=100)).result
    sample(model, steps=2)
    out = comfy_nodes["ToMeReport"].execute(record=kept, after=None, measure_time=False)
    text, data = out.result[0], json.loads(out.result[1])
    assert (
        "- level 1 (16x16): 256 to 128 tokens (-50%), 3 layers, each saves 50 us: input block 3, output block 2, 3"
    ) in text
    assert (
        "- level 0 (32x32), 1024 tokens, 3 layers: merging does not pay here: it saves 1 of 100 us and takes the "
        "processor 5 us longer (input block 1, output block 4, 5)"
    ) in text
    assert {layer["saves_us"] for layer in data["layers"]} == {50.0, None}


def test_a_compiled_model_is_measured_before_its_graph_runs(comfy_nodes, tome, decided):
    torch._dynamo.reset()
    model = short_unet()
    compiled = run_node(comfy_nodes["TorchCompileModel"], model=tome(model, min_tokens=100, **DRAWN), backend="eager")
    made, keys = merged_grids(compiled, steps=1)
    assert keys["input_blocks.1.1"] == 1024 and keys["input_blocks.3.1"] == 128
    torch._dynamo.reset()
    levels = tome(model, min_tokens=100, levels="1", **DRAWN)
    assert (made - sample(levels, steps=1)).norm() / made.norm() < 1e-4
    assert sorted({(grid, heads > 0) for grid, _, heads, _, _ in decided}) == [((16, 16), True), ((32, 32), True)]


def test_a_compiled_model_of_which_nothing_pays_says_so(comfy_nodes, tome, decided, caplog):
    """Its layers tell nothing themselves: what was measured ahead is what the line goes by."""
    torch._dynamo.reset()
    compiled = run_node(comfy_nodes["TorchCompileModel"], model=tome(least_unet(), min_tokens=1000), backend="eager")
    with caplog.at_level(logging.INFO, "ToMe"):
        sample(compiled, steps=1)
    last = caplog.messages[-1]
    assert last.startswith("[ToMe] nothing was merged in this sampling: ")
    assert "it saves 1 of 100 us and takes the processor 5 us longer (32x32 tokens)" in last


def test_the_models_own_block_is_timed(sd15, tome, comfy_nodes, monkeypatch):
    """On its own tokens and a prompt, without patches: how long a block keeps the GPU, and how long the processor."""
    unet = pack_module("unet")
    decisions = sys.modules[unet.Decisions.__module__]
    runs = []

    def decision_on(grid, channels, heads, dtype, device, config, attention=None, kernels=(), block=None, about=""):
        x = torch.randn(2, grid[0] * grid[1], channels, dtype=dtype)
        before, run = x.clone(), block(x)
        runs.append((grid, run().shape == before.shape))
        assert block(torch.randn(2, 4, channels + 8)) is None
        return decisions.Decision(100.0, 50.0, 10.0, 900.0, 895.0)

    monkeypatch.setattr(decisions, "measures", lambda config, grid, device: True)
    monkeypatch.setattr(decisions, "decision_on", decision_on)
    monkeypatch.setattr(decisions, "known_on", lambda *facts: None)
    plain = sample(sd15, steps=1)
    assert torch.equal(sample(tome(sd15, min_tokens=100), steps=1), plain)
    assert runs == [((32, 32), True), ((16, 16), True)]
    assert not [module for module in sd15.model.diffusion_model.modules() if module._forward_pre_hooks]


@pytest.fixture
def decided_dit(comfy_nodes, monkeypatch):
    """decided_dit(pays): transformers are measured, with this outcome. Returns the names that were asked for."""
    dit = pack_module("dit_call")
    asked = []

    def give(pays):
        def known_or_measured(key, device, measure):
            asked.append(key)
            return dit.Decision(100.0, 40.0 if pays else 99.0, 5.0)

        monkeypatch.setattr(pack_module("dit_auto"), "measures", lambda config, grid, device: config.levels == "auto")
        monkeypatch.setattr(dit, "known_or_measured", known_or_measured)
        return asked

    return give


@pytest.mark.parametrize("name", ["flux", "wan"])
def test_transformers_are_measured_too(tome, decided_dit, name, caplog):
    forget_log()
    model = dit_host.small(name)
    plain, merged = (dit_host.sample(one, name, steps=2) for one in (model, tome(model, levels="0")))
    asked = decided_dit(pays=False)
    with caplog.at_level(logging.INFO, "ToMe"):
        assert torch.equal(dit_host.sample(tome(model), name, steps=2), plain)
    assert "merging does not pay here: it saves 1 of 100 us" in caplog.text
    assert torch.equal(dit_host.sample(tome(model, levels="0"), name, steps=2), merged)
    decided_dit(pays=True)
    assert torch.equal(dit_host.sample(tome(model), name, steps=2), merged)
    assert not torch.equal(merged, plain)
    assert all(key.startswith(tuple("FWf")) and "sample, 0.5000" in key for key in asked)


def test_a_measurement_does_not_change_the_draws(tome, comfy_nodes, monkeypatch):
    """The picture of the call that measures is that of the calls after it."""
    dit = pack_module("dit_call")
    given = {"method": "multires", "ratio": 0.75, "seed": 3, "min_tokens": 0}
    expected = dit_host.call(tome(dit_host.small("flux"), **given, levels="0"), "flux")
    monkeypatch.setattr(pack_module("dit_auto"), "measures", lambda config, grid, device: True)
    monkeypatch.setattr(dit, "known_or_measured", lambda key, device, measure: measure())
    timed = []

    def compared(full, merged, device):
        timed.append(merged())
        return dit.Decision(100.0, 40.0, 5.0)

    monkeypatch.setattr(dit, "compared", compared)
    assert torch.equal(dit_host.call(tome(dit_host.small("flux"), **given), "flux"), expected) and timed


def test_what_a_transformers_layer_is_measured_on(tome, comfy_nodes, monkeypatch):
    """One row of its own tokens, both ways, with everything that the real call has."""
    dit = pack_module("dit_call")
    seen = []

    def compared(full, merged, device):
        seen.append((full(), merged()))
        return dit.Decision(100.0, 40.0, 5.0)

    monkeypatch.setattr(pack_module("dit_auto"), "measures", lambda config, grid, device: True)
    monkeypatch.setattr(dit, "known_or_measured", lambda key, device, measure: measure())
    monkeypatch.setattr(dit, "compared", compared)
    model = dit_host.small("flux")
    for own in (False, True):
        dit_host.sample(tome(model, own_token=own), "flux", steps=1)
    assert seen
    for full, merged in seen:
        assert full.shape == merged.shape and full.shape[0] == 1
        assert 0 < (full - merged).norm() / full.norm() < 1
