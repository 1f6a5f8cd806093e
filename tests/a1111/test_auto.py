"""levels "auto": layers that were measured not to pay on this device are left alone, and it is said."""

from __future__ import annotations

import sys

import pytest
import torch

from . import models

ON = [{"ratio": 0.5, "min_tokens": 0}]


@pytest.fixture
def lines(tome, monkeypatch):
    """What the log gets; level 0 (16x16) does not pay on this made-up GPU."""
    decisions = tome.core.autotune.decisions
    decision = decisions.Decision

    def decision_on(grid, channels, heads, dtype, device, config, attention=None, kernels=(), block=None, about=""):
        return decision(100.0, 99.0, 5.0) if grid == (16, 16) else decision(80.0, 30.0, 20.0)

    monkeypatch.setattr(decisions, "measures", lambda config, grid, device: config.levels == "auto")
    monkeypatch.setattr(decisions, "decision_on", decision_on)
    found = []
    monkeypatch.setattr(tome.notes.logger, "info", lambda text, *args: found.append(text % args if args else text))
    return found


def test_what_does_not_pay_is_left_alone(host, lines):
    host.generate(ON)
    report = lines[-1]
    assert "level 1 (8x8): 64 to 32 tokens in 4 layers" in report
    assert "left alone: 3 layers at level 0 (merging does not pay here: it saves 1 of 100 us" in report
    assert any("ToMe skips layers of 256 tokens" in line for line in lines[:-1])


def test_named_levels_are_merged_whatever_they_cost(host, lines):
    host.generate([{**ON[0], "levels": "0"}])
    assert "level 0 (16x16): 256 to 128 tokens in 3 layers" in lines[-1]


def test_the_models_own_block_is_timed_by_itself(host, tome, monkeypatch):
    """Where a merged block would keep the processor longer than a whole one keeps the GPU, its steps wait for it."""
    decisions = tome.core.autotune.decisions
    ran, found = [], []

    def decision_on(grid, channels, heads, dtype, device, config, attention=None, kernels=(), block=None, about=""):
        x = torch.randn(2, grid[0] * grid[1], channels, dtype=dtype)
        count = len(ran)
        assert block(x)().shape == x.shape and len(ran) == count
        found.append(grid)
        return decisions.Decision(100.0, 50.0, 10.0, 900.0, 895.0)

    monkeypatch.setattr(decisions, "measures", lambda config, grid, device: True)
    monkeypatch.setattr(decisions, "decision_on", decision_on)
    plain, _ = host.generate()
    for module in host.shared.sd_model.model.diffusion_model.modules():
        if hasattr(module, "attn1") and hasattr(module, "ff"):
            module.ff.register_forward_pre_hook(lambda *_: ran.append(1))
    image, _ = host.generate(ON)
    assert found and ran and all(torch.equal(a, b) for a, b in zip(image, plain, strict=True))


@pytest.mark.parametrize("pays", [True, False])
def test_where_nothing_pays_the_blocks_hooks_go(host, tome, lines, monkeypatch, pays):
    """And the picture is the unmerged one."""
    decisions = tome.core.autotune.decisions
    hooks = []

    def decision_on(grid, *args, **kwargs):
        return decisions.Decision(80.0, 30.0 if pays else 79.0, 20.0)

    monkeypatch.setattr(decisions, "decision_on", decision_on)
    unet = host.shared.sd_model.model.diffusion_model
    plain = host.generate([])[0]
    handle = unet.register_forward_hook(lambda module, *_: hooks.append(models.count_hooks(module)))
    made = host.generate(ON)[0]
    handle.remove()
    assert _equal(made, plain) == (not pays)
    few = 1 + 2  # this one, and those that make the state of each call
    assert hooks[0] > few and hooks[-1] == (hooks[0] if pays else few)  # the first call is reported, the second judged
    assert models.count_hooks(unet) == 0


@pytest.mark.parametrize("report", ["no", "in the log"])
def test_where_nothing_pays_the_text_claims_nothing(host, lines, monkeypatch, report):
    decisions = sys.modules[
        next(name for name in sys.modules if name.endswith("sd_webui_tome.shared_tome.autotune.decisions"))
    ]
    monkeypatch.setattr(decisions, "decision_on", lambda *args, **kwargs: decisions.Decision(80.0, 79.0, 20.0))
    host.opts.data["tome_report"] = report
    _, p = host.generate(ON)
    assert not p.extra_generation_params
    found = [line for line in lines if "nothing was merged; left alone" in line and "does not pay here" in line]
    assert len(found) == (report != "no"), "the reasons are in the log already"
    assert sum("does not pay here" in line and "layers of" in line for line in lines) == 2  # one a level
    assert any("does not pay here" in comment for comment in p.comments)


def test_blocks_in_which_nothing_is_done_lose_their_hooks(host, lines):
    """Of the level that does not pay; a map wants to know of every layer, so they stay, and the picture is the same."""
    unet = host.shared.sd_model.model.diffusion_model
    hooks = []
    handle = unet.register_forward_hook(lambda module, *_: hooks.append(models.count_hooks(module)))
    made = host.generate(ON)[0]
    whole, left = hooks[0], hooks[-1]
    assert 3 < left < whole
    hooks.clear()
    mapped = host.generate([{**ON[0], "map": True}])[0]
    handle.remove()
    assert set(hooks) == {whole} and torch.equal(made[0], mapped[0])
    assert models.count_hooks(unet) == 0


def _equal(one, two):
    return all(torch.equal(a, b) for a, b in zip(one, two, strict=True))
