"""The trainer on the CPU: the pictures it learns from, a few steps, going on from a checkpoint."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from lab.models import data
from lab.models.data import SIZE
from lab.models.model import load_model
from lab.models.train import CONFIGS, main
from lab.models.unet import UNet, UNetConfig

pytest.importorskip("skimage", reason="the photographs come with scikit-image")


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("trained")
    train(out)
    return out


def train(out: Path, *more: str) -> None:
    main(
        ["--out", str(out), "--config", "tiny", "--device", "cpu", "--steps", "2", "--log-every", "1", "--workers", "0"]
        + ["--columns", "1", "--sample-steps", "2", *more]
    )


def test_pictures_depend_on_the_seed_alone() -> None:
    bank = data.make_bank(3, seed=5, workers=0)
    assert bank.shape == (len(data.CLASS_NAMES), 3, SIZE, SIZE, 3) and bank.dtype == np.uint8
    assert np.array_equal(bank[:, :2], data.make_bank(2, seed=5, workers=0))
    assert not np.array_equal(bank, data.make_bank(3, seed=6, workers=0))


def test_worker_processes_draw_the_same() -> None:
    assert np.array_equal(data.make_bank(1, workers=2), data.make_bank(1, workers=0))


def test_every_class_varies_and_shows_something() -> None:
    assert 8 <= len(data.CLASS_NAMES) <= 12
    for pictures in data.make_bank(4, workers=0).astype(np.float32):
        assert pictures.std(axis=(1, 2, 3)).min() > 10  # no blank picture
        assert np.abs(pictures[0] - pictures[1:]).mean(axis=(1, 2, 3)).min() > 3


def test_writes_a_model_pictures_and_a_log(trained: Path) -> None:
    model, sigmas, metadata = load_model(trained / "model.safetensors")
    assert model.network.config == CONFIGS["tiny"].network
    assert json.loads(metadata["training"])["steps"] == 2
    assert sigmas.shape == (1000,) and sigmas.dtype == torch.float32
    with Image.open(trained / "samples.png") as picture:
        assert picture.size == (SIZE + 2, len(data.CLASS_NAMES) * (SIZE + 2))
    with (trained / "log.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["step"] for row in rows] == ["1", "2"]
    assert all(0 < float(row["loss"]) < 5 for row in rows)


def test_one_seed_gives_one_model(trained: Path, tmp_path: Path) -> None:
    train(tmp_path)
    one, two = (load_model(folder / "model.safetensors")[0].state_dict() for folder in (trained, tmp_path))
    assert all(one[key].equal(two[key]) for key in one)


def test_goes_on_from_a_checkpoint(trained: Path, tmp_path: Path) -> None:
    train(tmp_path, "--resume", str(trained / "model.safetensors"))
    before, after = (load_model(folder / "model.safetensors") for folder in (trained, tmp_path))
    assert json.loads(after[2]["training"])["resumed"] is True
    old, new = (found[0].network.out[-1].weight for found in (before, after))
    assert not old.equal(new) and (old - new).abs().max() < 0.01


@pytest.mark.parametrize(
    ("sizes", "said"),
    [
        ({"channel_mult": (2, 2, 2)}, "needs"),
        ({"channel_mult": (1, 2)}, "2 levels"),
        ({"model_channels": 48}, "48"),
    ],
)
def test_sizes_that_no_host_runs_are_refused(sizes: dict, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        UNetConfig(**sizes)


def test_a_fresh_network_predicts_zero() -> None:
    config = CONFIGS["tiny"].network
    out = UNet(config)(torch.randn(1, 3, 8, 8), torch.zeros(1), torch.randn(1, 4, config.context_dim))
    assert out.shape == (1, 3, 8, 8) and not out.any()
