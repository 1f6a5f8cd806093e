"""Outputs used again: the caches' rule beside ComfyUI's own code, and what is skipped, held and counted."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from lab.fidelity.hooks import Run, check
from lab.fidelity.methods import BASE, Variant
from lab.fidelity.reuse import Hold, Reuse, behind
from lab.models import samplers
from shared_tome import ToMeConfig

OFF = ToMeConfig(**BASE, ratio=0.0)
DRAWN = ToMeConfig(**{**BASE, "method": "sample", "ratio": 0.75, "own_token": True})


@pytest.fixture(scope="module")
def beside_comfyui(run_in_comfyui) -> dict:
    if not Path(os.environ["COMFYUI_DIR"], "comfy_extras", "nodes_easycache.py").is_file():
        pytest.skip("COMFYUI_DIR names a ComfyUI without EasyCache (`python install.py test` brings one with it)")
    return json.loads(run_in_comfyui(str(Path(__file__).with_name("caches_in_comfyui.py"))).splitlines()[-1])


@pytest.mark.slow
def test_the_rule_is_comfyuis_own(beside_comfyui):
    assert len(beside_comfyui) == 6
    for name, found in beside_comfyui.items():
        assert found["ours"] == found["theirs"], name
        assert found["difference"] < 1e-4, name
        assert any(len(ran) < 10 for ran in found["ours"]), f"{name} skipped nothing, so it says nothing"
    assert any(ran != found["ours"][0] for found in beside_comfyui.values() for ran in found["ours"])


@pytest.fixture
def flow10(monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setitem(samplers.SAMPLERS, "flow10", samplers.Sampler(samplers.ddim, 10, "Euler, 10 steps"))
    return "flow10"


@pytest.fixture
def bench(dit_file: Path, flow10: str):
    from lab.fidelity.bench import Bench

    return Bench(dit_file, "cpu", images=3, seeds=1, batch=3)


def variant(config: ToMeConfig = OFF, **more: object) -> Variant:
    return Variant("this", "", config, timed=False, **more)


@pytest.mark.parametrize("kind", ["EasyCache", "LazyCache"])
@pytest.mark.parametrize("config", [OFF, DRAWN], ids=["unmerged", "sample"])
def test_each_picture_decides_for_itself(bench, flow10, kind, config):
    """Pictures made together are those made alone, with merging too, and only those that run are counted."""
    this = variant(config, reuse=Reuse(kind, 0.3 if kind == "EasyCache" else 0.05))
    together, run = bench.pictures(this, flow10)
    assert 0 < sum(run.calls.values()) < 30 and len(set(run.ran.values())) > 1
    bench.batch = 1
    alone, apart = bench.pictures(this, flow10)
    assert torch.allclose(together, alone, atol=1e-5)
    assert (run.calls, run.ran) == (apart.calls, apart.ran)


def test_a_cache_that_may_skip_nothing_changes_nothing(bench, flow10):
    expected, _ = bench.pictures(variant(), flow10)
    for reuse in (Reuse("EasyCache", 0.0), Reuse("LazyCache", 0.0), Reuse("EasyCache", 1e9, start=1.0, end=2.0)):
        made, run = bench.pictures(variant(reuse=reuse), flow10)
        assert torch.equal(made, expected) and run.calls["whole"] == sum(run.calls.values()) == 30
    made, run = bench.pictures(variant(reuse=Reuse("EasyCache", 1e9, end=2.0)), flow10)
    assert run.ran == {0: 3, 1: 3, 2: 3, 3: 3}  # two to learn from after the start, then never again
    assert not torch.allclose(made, expected, atol=1e-3)


def test_every_second_output_is_the_one_before(bench, flow10):
    """By hand: Euler with the prediction of the step before."""
    made, run = bench.pictures(variant(reuse=Reuse("output", start=0.2)), flow10)
    assert [step for step in range(10) if step in run.ran] == [0, 1, 2, 4, 6, 8]
    order, sigmas = samplers.step_sigmas(bench.table, 10)
    noise = torch.randn((3, *bench.painted), generator=torch.Generator().manual_seed(1000))
    context, x, out = bench.context(torch.arange(3) % 2), noise * (1 + sigmas[0] ** 2) ** 0.5, None
    for step in range(10):
        seen = x / (1 + sigmas[step])
        if step in run.ran:
            out, free = bench.network(torch.cat((seen, seen)), torch.full((6,), float(order[step])), context).chunk(2)
            out = free + 3.0 * (out - free)
        x0 = seen - sigmas[step] / (1 + sigmas[step]) * out
        x = x0 + (x - x0) * (sigmas[step + 1] / sigmas[step])
    assert torch.allclose(made, x, atol=1e-4)
    other, _ = bench.pictures(variant(reuse=Reuse("difference", start=0.2)), flow10)
    assert not torch.allclose(made, other, atol=1e-3)


def test_fewer_steps_are_the_samplers_own(bench, flow10, monkeypatch):
    monkeypatch.setitem(samplers.SAMPLERS, "flow4", samplers.Sampler(samplers.ddim, 4, "Euler, 4 steps"))
    expected, _ = bench.pictures(variant(), "flow4")
    made, run = bench.pictures(variant(steps=4), flow10)
    assert torch.equal(made, expected) and run.calls["whole"] == 12


@pytest.mark.parametrize("between", ["held", "residual"])
def test_holding_is_exact_before_the_start_and_close_after(bench, flow10, between):
    expected, whole = bench.pictures(variant(), flow10)
    config = DRAWN if between == "residual" else OFF
    never, run = bench.pictures(variant(config, hold=Hold(20, between, start=1.0)), flow10)
    assert torch.equal(never, expected) and run.work["all_left"] == whole.work["all"] == run.work["all"]
    made, run = bench.pictures(variant(config, hold=Hold(2, between, start=0.2)), flow10)
    error = (made - expected).square().mean()
    assert 0 < error < 0.05 * expected.var()
    # Six of ten steps are exact; between, nothing or a quarter, which "residual" draws in four of those too.
    drawn = {"held": 0.0, "residual": (4 + 4) / 10 * (5 + 16 + 1) / (5 + 64)}[between]
    assert run.cost_all == pytest.approx(0.6 + drawn, abs=0.01)


def test_the_residual_makes_drawn_attention_nearer(bench, flow10):
    expected, _ = bench.pictures(variant(), flow10)
    errors = {}
    for between in ("drawn", "residual"):
        made, run = bench.pictures(variant(DRAWN, hold=Hold(3, between)), flow10)
        # The first two steps, then one of three: those are drawn too where the residual is wanted.
        both = 9 if between == "residual" else 0
        assert run.calls == {"whole": 15 - both, "merged": 15, "both": both, "held": 0}
        errors[between] = (made - expected).square().mean()
    assert errors["residual"] < errors["drawn"] / 2


def test_steps_behind_a_share():
    assert [behind(step, 10, 0.2) for step in range(5)] == [0, 0, 0, 1, 2]
    assert [behind(step, 28, 0.2) for step in (5, 6, 7)] == [0, 0, 1]
    assert [Hold(3, "held").since(step, 10) for step in range(8)] == [0, 0, 0, 1, 2, 0, 1, 2]


def test_bad_choices_are_named(bench):
    for make, named in (
        (lambda: Reuse("TeaCache"), "TeaCache"),
        (lambda: Reuse("output", every=1), "got 1"),
        (lambda: Hold(1, "held"), "got 1"),
        (lambda: Hold(2, "thrown"), "thrown"),
        (lambda: check(bench.network, replace(variant(hold=Hold(2, "held")), reuse=Reuse("EasyCache"))), "held alone"),
    ):
        with pytest.raises(ValueError, match=named):
            make()


def test_what_is_held_ends_with_the_run(bench, flow10):
    from lab.fidelity.hooks import merged

    before = [type(module) for module in bench.network.modules()]
    with merged(bench.network, variant(hold=Hold(2, "held"))) as run:
        assert isinstance(run, Run) and [type(m) for m in bench.network.modules()] != before
    assert [type(module) for module in bench.network.modules()] == before
