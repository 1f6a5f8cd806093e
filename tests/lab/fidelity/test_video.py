"""Videos in the lab: what is drawn, the DiT's third axis, how flicker is measured, the way from training to a row."""

from __future__ import annotations

import csv
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from lab.fidelity import measure
from lab.fidelity.hooks import Run
from lab.fidelity.methods import CATALOGUE, Variant
from lab.fidelity.metrics import flicker, motion, psnr
from lab.models.data import make_bank
from lab.models.data_moving import FRAMES, MOVING
from lab.models.dit import DiT, DiTConfig, rope_rotations, rotate
from lab.models.train import CONFIGS, main
from shared_tome import ToMeConfig


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def test_every_class_moves_evenly_and_depends_on_its_seed():
    bank = make_bank(2, seed=3, workers=0, pictures=MOVING)
    assert bank.shape == (9, 2, FRAMES * 64, 64, 3)
    assert np.array_equal(bank[:, :1], make_bank(1, seed=3, workers=0, pictures=MOVING))
    assert not np.array_equal(bank, make_bank(2, seed=4, workers=0, pictures=MOVING))
    frames = torch.from_numpy(bank).float().flatten(0, 1).unflatten(1, (FRAMES, 64))  # (18, T, 64, 64, 3)
    steps = frames.diff(dim=1).square().mean((2, 3, 4))  # (18, T - 1)
    assert (steps > 1).all()  # nothing stands still
    far = (frames[:, -1] - frames[:, 0]).square().mean((1, 2, 3))
    assert (steps.mean(1)[:14] < far[:14]).all()  # what glides or flies goes farther in seven steps than in one


def test_a_videos_places_turn_by_frame_row_and_column():
    """The product of a query and a key of equal content depends on the difference of their places alone."""
    grid = (3, 4, 5)
    rotations = rope_rotations(2, grid, 32, torch.device("cpu"))
    q, k = (
        rotate(normal(1, 1, 1, 32, seed=s).expand(1, 2 + math.prod(grid), 1, 32), rotations)[0, 2:, 0] for s in (0, 1)
    )
    scores = (q @ k.T).view(*grid, *grid)
    torch.testing.assert_close(scores[0, 1, 2, 1, 2, 4], scores[1, 2, 0, 2, 3, 2], atol=1e-4, rtol=0)
    there = [scores[0, 0, 0, t, r, c].item() for t, r, c in ((0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1))]
    assert len({round(value, 3) for value in there}) == 4


def test_a_network_of_one_frame_is_as_it_was_and_refuses_what_does_not_divide():
    assert DiT(DiTConfig(frames=2, patch=4, width=64, heads=2)).grid(32, 16) == (2, 4, 4)
    assert DiT(DiTConfig(patch=4, width=64, heads=2)).grid(32, 16) == (8, 4)
    with pytest.raises(ValueError, match="multiples of the patch, 4, got 10x16"):
        DiT(DiTConfig(frames=2, patch=4, width=64, heads=2)).grid(20, 16)
    with pytest.raises(ValueError, match="a multiple of 16 channels"):
        DiTConfig(frames=2, width=24, heads=3)


def test_motion_and_flicker_against_errors_that_are_known():
    video = 100 + 20 * normal(1, 3, 16, 16).expand(2, FRAMES, 3, 16, 16)  # stands still
    alike = video + 5 * normal(2, 1, 3, 16, 16, seed=1)
    fresh = video + 5 * normal(2, FRAMES, 3, 16, 16, seed=2)
    assert torch.isinf(motion(alike, video)).all() and (flicker(alike, video).abs() < 1e-3).all()
    whole = psnr(fresh.flatten(1, 2), video.flatten(1, 2))
    torch.testing.assert_close(motion(fresh, video), whole - 10 * math.log10(2), atol=0.3, rtol=0)
    # A second difference of independent errors has 1 + 4 + 1 times their energy, and a still video's none but rounding.
    expected = 10 * math.log10(25 * 12 + 1)
    torch.testing.assert_close(flicker(fresh, video), torch.full((2,), expected).double(), atol=0.5, rtol=0)


def test_one_draw_is_that_of_the_first_step():
    def drawn(one_draw: bool, step: int) -> torch.Tensor:
        config = ToMeConfig(method="sample", ratio=0.75, min_tokens=0, levels="0")
        run = Run(Variant("x", "", config, one_draw=one_draw))
        run.begin((8, 8), torch.device("cpu"), torch.tensor([3]), step, 4)
        return run.call.plan(normal(1, 64, 8), (8, 8)).index

    assert torch.equal(drawn(True, 0), drawn(True, 3)) and torch.equal(drawn(True, 0), drawn(False, 0))
    assert not torch.equal(drawn(False, 0), drawn(False, 3))


def test_from_training_to_a_row(tmp_path: Path):
    main(["--config", "tiny-video", "--steps", "2", "--out", str(tmp_path), "--workers", "0", "--device", "cpu",
          "--columns", "1", "--sample-steps", "2"])  # fmt: skip
    assert CONFIGS["tiny-video"].network.frames == FRAMES
    out = tmp_path / "video.csv"
    plan = tmp_path / "plan.txt"
    plan.write_text("unmerged\nmultires 0.77\nmultires 0.77, one draw\n")
    measure.main(["--model", str(tmp_path / "model.safetensors"), "--out", str(out), "--plan", str(plan),
                  "--samplers", "flow8", "--images", "2", "--seeds", "1", "--time-repeats", "0", "--device", "cpu",
                  "--strips", str(tmp_path / "strips")])  # fmt: skip
    rows = list(csv.DictReader(out.open()))
    assert [row["variant"] for row in rows] == plan.read_text().splitlines()
    assert rows[0]["motion"] == "inf" and rows[0]["flicker"] == "0.000"
    assert all(float(row["motion"]) > 5 and math.isfinite(float(row["flicker"])) for row in rows[1:])
    assert "multires-video" in CATALOGUE.sets
