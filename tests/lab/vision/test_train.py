"""Training with merging learns as training without does, for as many steps, and leaves no hook."""

from __future__ import annotations

import pytest
import torch

import shared_tome.vit as vit
from lab.models import optimize
from lab.vit import train as module
from lab.vit.model import build, load, save
from lab.vit.train import MODELS, PATIENCE, Recipe, rate_at, train, train_missing

from .conftest import SMALL


class Fixed:
    """Always the same few pictures."""

    per_class = 1

    def __init__(self, task):
        self.pictures, self.classes = task.every()
        self.pictures, self.classes = self.pictures[::6], self.classes[::6]

    def draw(self, count, generator):
        return self.pictures, self.classes


@pytest.mark.parametrize("r", [0, 9])
def test_loss_falls(task, r, tmp_path):
    recipe = Recipe(steps=100, seconds=1e6, rate=3e-3, drop_path=0.0, smoothing=0.0)
    model, steps, _ = train(Fixed(task), r, recipe, SMALL, "cpu", tmp_path / "log.csv")
    assert steps == 100 and not model.training
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    fixed = Fixed(task)
    if r:
        vit.apply_patch(model, r, restore="none")
    with torch.no_grad():
        right = (model(fixed.pictures).argmax(-1) == fixed.classes).float().mean()
    assert right == 1.0, "six pictures are learnt by heart, with merging too"
    head, row = (tmp_path / "log.csv").read_text().splitlines()
    assert head == "step,seconds,loss,right" and row.startswith("100,")


def test_merging_is_on_while_training(task, monkeypatch):
    seen = []
    monkeypatch.setattr(module, "_train", lambda model, *rest: (seen.append(vit.trace), 3, 0.0)[1:])
    monkeypatch.setattr(module.vit, "apply_patch", lambda model, r, **options: seen.append((r, options)))
    train(task, 7, Recipe(steps=3), SMALL, "cpu")
    assert seen[0] == (7, {"restore": "none"})


def test_exact_for_its_seed_and_the_global_generator_is_left_alone(task):
    state = torch.random.get_rng_state()
    recipe = Recipe(steps=2, seconds=1e6, batch=3)
    one, two = (train(task, 9, recipe, SMALL, "cpu")[0] for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters(), strict=True))
    assert torch.equal(torch.random.get_rng_state(), state)


def test_the_rate_rises_and_falls_to_zero():
    recipe = Recipe()
    rates = [rate_at(i / 100, recipe) for i in range(101)]
    peak = rates.index(max(rates))
    assert max(rates) == pytest.approx(recipe.rate) and peak == 5 and rates[-1] == pytest.approx(0.0, abs=1e-12)
    assert rates[:6] == sorted(rates[:6]) and rates[5:] == sorted(rates[5:], reverse=True) and min(rates[:100]) > 0


def test_training_ends_with_its_time(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(optimize.time, "monotonic", lambda: now[0])
    done = []
    for step, share in optimize.budgeted(10.0, 1000, "training"):
        done.append((step, share))
        now[0] += 100.0 if step == 0 else 1.0  # the first step compiles and is not counted
    assert [step for step, _ in done] == list(range(11)) and done[-1][1] == pytest.approx(0.9)


def test_the_second_model_gets_the_first_ones_steps_and_none_is_trained_twice(task, tmp_path, monkeypatch):
    seen = []

    def stand_in(task, r, recipe, shape, device, log):
        seen.append((r, recipe.steps, recipe.seconds))
        return build(shape), 17, 1.0

    monkeypatch.setattr(module, "train", stand_in)
    recipe = Recipe(steps=1000, seconds=10.0)
    train_missing(tmp_path, task, recipe, SMALL, "cpu")
    assert seen == [(0, 1000, 10.0), (MODELS["merged"], 17, 10.0 * PATIENCE)]
    train_missing(tmp_path, task, recipe, SMALL, "cpu")
    assert len(seen) == 2 and load(tmp_path / "merged.safetensors")[2]["steps"] == 17


def test_a_saved_model_comes_back(tmp_path):
    with torch.random.fork_rng(devices=[]):
        model = build(SMALL).eval()
    save(tmp_path / "model.safetensors", model, SMALL, {"r": 3})
    again, shape, training = load(tmp_path / "model.safetensors")
    assert shape == SMALL and training == {"r": 3}
    for name, weight in again.state_dict().items():
        assert torch.equal(weight, model.state_dict()[name].half().float())
