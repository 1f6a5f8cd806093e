"""What the rows say is so: errors, paired differences, rates; and every command runs in its short form."""

from __future__ import annotations

import csv
import json
import runpy
import sys

import pytest
import torch
from PIL import Image

from lab.pages import speed_tables as tables
from lab.store import read
from lab.vit.run import COMPARED, SCHEDULES, Variant, accuracy, images_per_second, right, throughput, variants


@pytest.fixture
def command(monkeypatch, capsys):
    """command(module, *words) -> what `python -m` says on stdout, in this process, which has torch imported."""

    def run(module, *words):
        monkeypatch.setattr(sys, "argv", [module, *map(str, words)])
        monkeypatch.delitem(sys.modules, module, raising=False)  # as main it is another one
        capsys.readouterr()
        runpy.run_module(module, run_name="__main__", alter_sys=True)
        return capsys.readouterr().out

    return run


def test_paired_errors():
    """Against a bootstrap over pictures, drawn as pairs."""
    generator = torch.Generator().manual_seed(0)
    base = (torch.rand(4000, generator=generator) < 0.9).double()
    found = torch.where(torch.rand(4000, generator=generator) < 0.05, 1 - base, base)
    row = accuracy(found, base)
    assert row["accuracy"] == pytest.approx(100 * float(found.mean()))
    assert row["lost"] == pytest.approx(100 * float(base.mean() - found.mean()))
    picks = torch.randint(4000, (2000, 4000), generator=generator)
    assert row["lost_se"] == pytest.approx(100 * float((base - found)[picks].mean(1).std()), rel=0.08)
    assert row["accuracy_se"] == pytest.approx(100 * float(found[picks].mean(1).std()), rel=0.08)
    assert row["lost_se"] < row["accuracy_se"], "pairs are what makes small differences visible"


def test_rates():
    rates = images_per_second([10.0, 20.0, 40.0], 4)
    assert rates["images_s"] == pytest.approx(200.0)
    assert rates["images_s_p20"] == pytest.approx(140.0) and rates["images_s_p80"] == pytest.approx(320.0)
    assert set(images_per_second([10.0], 4).values()) == {400.0}


def test_all_that_is_measured_is_measured_once():
    found = variants()
    assert len(set(found)) == len(found)
    assert {kind.schedule for kind in found} == set(SCHEDULES) and {kind.method for kind in found} >= set(COMPARED)
    left = [Variant("bipartite", "constant", r).spread(12, 256)[-1] for r in (0, 11, 20)]
    assert left == [257, 125, 19], "unmerged, half of the patches, and beyond"


def test_right_counts_what_the_model_names(model, pictures):
    expected = model(pictures).argmax(-1)
    wrong = torch.stack((expected[0], (expected[1] + 1) % 12, expected[2]))
    assert right(model, pictures, wrong, 2).tolist() == [1.0, 0.0, 1.0]


def test_each_variant_is_timed_in_turn_and_the_model_is_left_unmerged(model, pictures):
    tokens = []
    handle = model.blocks[-1].mlp.register_forward_hook(lambda module, args, out: tokens.append(out.shape[1]))
    kinds = [Variant("bipartite", "constant", r) for r in (0, 6)]
    found = throughput(model, pictures, kinds, rounds=2)
    handle.remove()
    assert tokens == [65, 41] + [65, 41] + [41, 65]  # warm, then every second round the other way round
    assert set(found) == set(kinds)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_the_whole_command_in_short(command, tmp_path):
    """Two trainings of two steps, all columns, a row for each variant; then nothing is trained again."""
    out, models = tmp_path / "vit.csv", tmp_path / "models"
    short = [
        "--device", "cpu", "--workers", 0, "--steps", 2, "--batch", 3, "--per-class", 1, "--held-out", 1, "--depth", 3,
        "--channels", 24, "--heads", 2, "--timed-batch", 4, "--rounds", 1, "--rs", 0, 20, "--compared-rs", 20,
        "--models", models,
    ]  # fmt: skip
    command("lab.vit.run", *short, "--train-only")
    stamps = {path.name: path.stat().st_mtime_ns for path in models.glob("*.safetensors")}
    assert set(stamps) == {"unmerged.safetensors", "merged.safetensors"} and not out.exists()
    command("lab.vit.run", *short, "--out", out)
    assert {path.name: path.stat().st_mtime_ns for path in models.glob("*.safetensors")} == stamps
    rows = list(csv.DictReader(out.open(encoding="utf-8")))
    kinds = 1 + len(SCHEDULES)
    assert len(rows) == 2 * kinds + len(COMPARED)
    for row in rows:
        assert row["pictures"] == "12" and float(row["images_s"]) > 0 and row["torch"] and row["date"] and row["commit"]
        assert (row["accuracy"] == "") is (row["method"] == "limit")
        assert int(row["tokens_left"]) == (
            257 if row["r"] == "0" else Variant("", row["schedule"], 20).spread(3, 256)[-1]
        )
    first = rows[0]
    assert (first["r"], first["lost"], first["speedup"]) == ("0", "0.0", "1.0")
    for name in ("vit_accuracy", "vit_schedules", "vit_methods"):
        text = tables.MAKERS[name][2](rows)
        assert text.startswith("| ") and len({line.count("|") for line in text.split("\n\n")[0].splitlines()}) == 1


def test_the_benchmark_in_short(command, tmp_path):
    said = command("lab.speed.vit", "--device", "cpu", "--rounds", 1, "--json", "--out", tmp_path / "vit.csv")
    rows = json.loads(said)
    assert {row["method"] for row in rows} == {"unmerged", "bipartite", "bipartite, unweighted", "limit"}
    for row in rows:
        assert row["tokens"] == 65 and row["images_s"] > 0 and row["dtype"] == "float32" and row["timm"]
        assert (row["tokens_left"] == 65) is (row["method"] == "unmerged")
    text = tables.vit_large(read(tmp_path / "vit.csv"))
    assert len(text.split("\n\n")[0].splitlines()) == 2 + 4 and "| small |" in text


def test_the_picture_is_drawn(command, tmp_path):
    out = tmp_path / "merged.png"
    command("lab.vit.picture", "--out", out, "--blocks", 1, 12)
    with Image.open(out) as image:
        assert image.size == (3 * 256 + 2 * 8, 4 * 256 + 3 * 8)
