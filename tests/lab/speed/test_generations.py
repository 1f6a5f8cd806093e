"""Whole generations: what is put on a model and skipped is what the row says, in a real ComfyUI with small models."""

from __future__ import annotations

import json
from argparse import Namespace

import pytest

from lab.speed import forced, generations

COMMAND = ("-m", "lab.speed.generations", "--device", "cpu", "--seconds", "0", "--least", "1", "--steps", "8")


def test_steps_are_skipped_where_the_rule_could():
    assert forced.skippable("EasyCache", 20) == list(range(6, 19))
    assert forced.skippable("LazyCache", 20) == list(range(5, 19))
    assert forced.skipped("EasyCache", 20, 0.4) == [6, 8, 10, 11, 13, 14, 16, 18]
    assert forced.skipped("EasyCache", 20, 0.0) == []
    with pytest.raises(forced.TooManyError, match="can skip 1 of 4 steps, so not a share of 0.5"):
        forced.skipped("EasyCache", 4, 0.5)


def test_the_share_that_is_skipped_is_the_labs(tmp_path):
    (tmp_path / "frontier-lab.csv").write_text(
        "variant,calls_whole,calls_merged\nEasyCache 0.2,0.6,0.0\nEasyCache 0.2 + Quality,0.2,0.5\n"
    )
    args, model = Namespace(skip={"EasyCache 0.1": 0.125}, frontier=tmp_path), generations.MODELS["sd15"]
    shares = [generations.share_skipped(f"EasyCache {one}", model, args) for one in ("0.1", "0.2", "0.2 + Quality")]
    assert shares == pytest.approx([0.125, 0.4, 0.3])
    with pytest.raises(ValueError, match="frontier-lab.csv has no row 'EasyCache 0.3'"):
        generations.share_skipped("EasyCache 0.3", model, args)


def test_every_choice_of_a_preset_exists():
    for model in generations.MODELS.values():
        for choices in model.sizes.values():
            assert choices[0] == "unmerged" and len(set(choices)) == len(choices)
            assert {"Balanced", "Fast", "EasyCache 0.2", "EasyCache 0.2 + Balanced"} <= set(choices)


@pytest.mark.slow
def test_the_short_form(run_in_comfyui, tmp_path):
    out = tmp_path / "generations.csv"
    choices = [
        *("unmerged", "Fast", "Quality exact every 3", "EasyCache 0.2", "LazyCache 0.2 + Balanced", "50% of the steps"),
        *(generations.TOMESD, "HyperTile 64", "tomesd 0.5", "sparse attention", "EasyCache 0.3"),
    ]
    command = (
        *COMMAND,
        *("--tiny", "--sizes", "128²", "--json", "--out", str(out), "--choices", *choices, "--skip"),
        *("EasyCache 0.2=0.25", "LazyCache 0.2 + Balanced=0.375", "EasyCache 0.3=0.9"),
    )
    rows = {row["choice"]: row for row in json.loads(run_in_comfyui(*command))}
    assert list(rows) == choices
    for choice, row in rows.items():
        if choice in ("tomesd 0.5", "sparse attention", "EasyCache 0.3"):
            assert row["seconds"] == row["speedup"] == "" and row["remark"]
        else:
            assert row["seconds"] > 0 and row["rounds"] == 1 and not row["remark"] and row["decode_s"] > 0
    assert rows["EasyCache 0.3"]["remark"] == "EasyCache can skip 4 of 8 steps, so not a share of 0.9"
    assert rows["EasyCache 0.2"]["skipped"] == "5 7" and rows["LazyCache 0.2 + Balanced"]["skipped"] == "3 5 7"
    assert rows["50% of the steps"]["steps"] == 4 and rows["unmerged"]["comfyui"]
    before = out.read_text()
    run_in_comfyui(*command)
    assert out.read_text() == before


@pytest.mark.slow
def test_the_short_form_of_transformers(run_in_comfyui):
    said = run_in_comfyui(
        *COMMAND,
        *("--models", "flux-tiny", "wan-tiny", "--json", "--choices", "EasyCache 0.2", "EasyCache 0.2 + Fast"),
        *("--skip", "EasyCache 0.2=0.25", "EasyCache 0.2 + Fast=0.125"),
    )
    rows = json.loads(said)
    assert [row["skipped"] for row in rows] == ["", "5 7", "6"] * 2
    assert all(row["seconds"] > 0 and (row["decode_s"] != "") == (row["model"] == "flux-tiny") for row in rows)
