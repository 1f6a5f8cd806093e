"""Strips of pictures one below the other."""

from __future__ import annotations

import sys

import pytest
from PIL import Image

from lab.fidelity import side_by_side


@pytest.fixture
def folder(tmp_path):
    for name, colour in (("unmerged", "red"), ("sample 0.75, own token kept", "blue")):
        Image.new("RGB", (60, 20), colour).save(tmp_path / f"ddim30 {name}.png")
    return tmp_path


def test_each_strip_in_its_row_beside_its_name(folder, monkeypatch):
    out = folder / "made.png"
    names = ["unmerged", "sample 0.75, own token kept"]
    monkeypatch.setattr(sys, "argv", ["side_by_side", str(folder), str(out), *names, "--height", "40"])
    side_by_side.main()
    made = Image.open(out)
    assert made.size == (side_by_side.LABEL + 120, 80 + side_by_side.GAP)
    assert made.getpixel((side_by_side.LABEL + 60, 20)) == (255, 0, 0)
    assert made.getpixel((side_by_side.LABEL + 60, 60)) == (0, 0, 255)
    labels = made.crop((0, 0, side_by_side.LABEL, 40)).convert("L")
    assert labels.getextrema()[0] < 80  # something is written there


def test_what_was_not_measured_is_named(folder):
    with pytest.raises(FileNotFoundError, match=r"ddim30 prune 0\.5\.png"):
        side_by_side.side_by_side(folder, ["prune 0.5"])
