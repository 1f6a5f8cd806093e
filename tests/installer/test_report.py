"""The demo's numbers, picture and workflow, from made-up outcomes."""

from __future__ import annotations

import json
import math
import struct

import numpy as np
import pytest
from PIL import Image

from installer import likeness, report, sheet, workflow
from installer.workflow import Settings, Subject

TOME = {"ratio": 0.75, "method": "sample", "stride_x": 2, "stride_y": 2, "seed": 0}
NODE = {
    "input": {
        "required": {
            "model": ["MODEL", {"tooltip": "x"}],
            "ratio": ["FLOAT", {"default": 0.75}],
            "method": ["COMBO", {"options": ["sample", "merge"]}],
            "old": [["first", "second"]],
        },
        "optional": {"mlp": ["BOOLEAN", {"default": False}]},
    }
}


def outcome(seed: int, slow: float = 1.0, fast: float = 0.5) -> report.Outcome:
    draw = np.random.default_rng(seed)
    picture = draw.integers(0, 200, (64, 64, 3)).astype(np.uint8)
    subject = Subject(f"subject {seed}", "x", seed)
    return report.Outcome(subject, {"unmerged": picture, "ToMe": picture + 4}, {"unmerged": slow, "ToMe": fast})


def test_psnr_by_hand():
    one = np.zeros((2, 2, 3), np.uint8)
    assert likeness.psnr(one, one) == math.inf
    assert likeness.psnr(one, one + 255) == pytest.approx(0.0)
    assert likeness.psnr(one + 9, one + 10) == pytest.approx(10 * math.log10(255**2))
    assert likeness.psnr(one, one + 255) == likeness.psnr(one + 255, one)


def test_the_tokens_of_a_layer():
    groups, kept = report.one_layer(outcome(0).pictures["unmerged"], TOME, 64)
    assert kept.sum() == 1024 and groups.shape == (64, 64)
    assert sorted(groups[kept]) == list(range(1024)), "each group has one token that stays"


def test_summary_and_table():
    outcomes = [outcome(1), outcome(2, 3.0, 1.0), outcome(3)]
    summary = report.summarise(outcomes, TOME, Settings(10, 3.0), "demo model", 1)
    assert (summary.unmerged, summary.merged, summary.speed_up) == (1.0, 0.5, 2.0)
    assert summary.psnr == pytest.approx(10 * math.log10(255**2 / 16))
    text = report.table(summary)
    assert "2.00 x" in text and "1,024 (25 %)" in text and "36.1 dB" in text
    assert "not faster" not in text


def test_says_so_when_it_is_not_faster():
    summary = report.summarise([outcome(1, 1.0, 1.2)], TOME, Settings(10, 3.0), "demo model", 1)
    assert "not faster" in report.table(summary) and "0.83 x" in report.table(summary)


def test_writes_a_sheet_with_four_panels_a_subject(tmp_path):
    outcomes = [outcome(1), outcome(2)]
    summary = report.summarise(outcomes, TOME, Settings(10, 3.0), "demo model", 1)
    picture, text = report.write(summary, outcomes, tmp_path / "out")
    with Image.open(picture) as image:
        assert image.width >= 4 * sheet.PANEL and image.height >= 2 * sheet.PANEL
    assert "| ToMe" in text.read_text(encoding="utf-8")


def test_amplification_fills_the_range_and_no_more():
    picture = outcome(1).pictures["unmerged"]
    near, far = sheet.gap(picture, picture + 4), sheet.gap(picture, picture + 55)
    assert sheet.amplification([near]) == 32
    assert sheet.amplification([near, far]) == 4


def test_defaults_of_a_node():
    assert workflow.defaults(NODE) == {"ratio": 0.75, "method": "sample", "old": "first", "mlp": False}
    assert workflow.choices(NODE, "method") == ["sample", "merge"]


@pytest.mark.parametrize("tome", [None, TOME])
def test_workflows_are_whole(tome):
    known = {"input": {"required": {"subject": ["COMBO", {"options": ["cat", "planet", "astronaut"]}]}}}
    subjects = workflow.demo_subjects(known, 3)
    assert [subject.name for subject in subjects] == ["astronaut", "cat", "planet"]
    assert len({subject.seed for subject in subjects}) == 3
    for built in (
        workflow.demo_workflow(known, subjects[0], Settings(10, 3.0), tome),
        workflow.checkpoint_workflow("model.safetensors", subjects[0], Settings(10, 3.0, size=512), tome),
    ):
        links = [value for node in built.values() for value in node["inputs"].values() if isinstance(value, list)]
        assert all(name in built for name, _ in links)
        assert ("tome" in built) is (tome is not None)
        assert built[workflow.SAMPLER]["inputs"]["model"][0] == ("model" if tome is None else "tome")


def test_native_size_by_the_names_in_a_file(tmp_path):
    for name, size in (("conditioner.embedders.1.x", 1024), ("cond_stage_model.x", 512)):
        header = json.dumps({name: {}}).encode()
        file = tmp_path / "model.safetensors"
        file.write_bytes(struct.pack("<Q", len(header)) + header)
        assert workflow.native_size(file) == size
    file.write_bytes(b"PK old checkpoint")
    assert workflow.native_size(file) == 512
