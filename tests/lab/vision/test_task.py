"""The task's pictures: exact for a seed, the subject is where it should be, classes are the subjects'."""

from __future__ import annotations

import torch

from lab.models.data import CLASS_NAMES
from lab.vit import model as module
from lab.vit.model import Task


def test_exact_for_a_seed_and_the_global_generator_is_left_alone(task):
    before = torch.random.get_rng_state()
    one, classes = task.draw(5, torch.Generator().manual_seed(1))
    again, same = task.draw(5, torch.Generator().manual_seed(1))
    other, _ = task.draw(5, torch.Generator().manual_seed(2))
    assert torch.equal(one, again) and torch.equal(classes, same) and not torch.equal(one, other)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert one.shape == (5, 3, 64, 64) and one.isfinite().all() and one.abs().max() < 5


def test_every_drawing_is_a_subject_once(task):
    pictures, classes = task.every()
    assert len(pictures) == len(task) == 3 * len(CLASS_NAMES)
    assert classes.tolist() == [number for number in range(len(CLASS_NAMES)) for _ in range(3)], (
        "as drawings are stored"
    )
    assert torch.equal(pictures, task.every()[0])


def test_held_out_drawings_are_others(task):
    assert module.TRAIN_SEED != module.HELD_OUT_SEED
    other = Task(3, 12, workers=0)
    assert not any((other.bank == drawing).all(dim=(1, 2, 3)).any() for drawing in task.bank)


def test_the_subject_makes_a_small_square_of_the_picture(task, monkeypatch):
    """Without noise two pictures that differ in their subject alone differ in one square of the told size."""
    monkeypatch.setattr(module, "NOISE", (0.0, 0.0))
    sides = []
    for seed in range(20):
        subjects = torch.tensor([0]), torch.tensor([len(task) - 1])
        one, two = (task.compose(subject, torch.Generator().manual_seed(seed))[0] for subject in subjects)
        differs = (one - two).abs().amax(dim=0) > 1e-6
        rows, columns = differs.any(dim=1).nonzero(), differs.any(dim=0).nonzero()
        height, width = int(rows.max() - rows.min()) + 1, int(columns.max() - columns.min()) + 1
        assert max(height, width) <= module.LARGEST * 64 + 1
        sides.append(max(height, width))
    assert min(sides) < 20 < max(sides), "subjects of many sizes"


def test_part_of_the_subject_is_covered(task, monkeypatch):
    monkeypatch.setattr(module, "NOISE", (0.0, 0.0))
    monkeypatch.setattr(module, "GREY", 0.0)
    covered = task.compose(torch.arange(len(task)), torch.Generator().manual_seed(0))
    monkeypatch.setattr(module, "COVERED", (0.0, 0.0))
    whole = task.compose(torch.arange(len(task)), torch.Generator().manual_seed(0))
    others = task.compose(torch.arange(len(task)).flip(0), torch.Generator().manual_seed(0))
    changed, subject = (covered != whole).any(dim=1), (others != whole).any(dim=1)
    assert changed.any(dim=2).any(dim=1).all()
    rows, columns = subject.any(dim=2), subject.any(dim=1)  # two subjects may share a colour
    assert not (changed & ~(rows[:, :, None] & columns[:, None])).any(), "the background is not covered"
    assert ((changed & subject).sum(dim=(1, 2)) < subject.sum(dim=(1, 2))).all(), "something can be seen"
