"""Merging beside what people would use in its place: which variants there are, and the rows that come out."""

from __future__ import annotations

from pathlib import Path

import pytest

from lab.fidelity import frontier, methods
from lab.models import samplers
from lab.store import read
from shared_tome.methods import AUTO_MOST, PRESETS


@pytest.fixture
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(methods, "THRESHOLDS", (0.3,))
    monkeypatch.setattr(methods, "SHARES", (0.5,))
    monkeypatch.setitem(samplers.SAMPLERS, "flow8", samplers.Sampler(samplers.ddim, 8, "Euler, 8 steps"))


def command(dit_file: Path, out: Path, *more: str) -> list[str]:
    fixed = "--name x --sampler flow8 --pictures 3 --batch 3 --device cpu --commit abc"
    return ["--model", str(dit_file), "--out", str(out), *fixed.split(), *more]


@pytest.mark.parametrize("transformer", [False, True])
def test_every_choice_stands_alone_and_with_each_preset(transformer):
    found = methods.rivals(28, transformer)
    for name in PRESETS:
        assert found[name].config.method == ("multires" if transformer else "sample")
        for other in ("EasyCache 0.2", "EasyCache 0.05", "LazyCache 0.2", "21 steps", "7 steps"):
            both = found[f"{other} + {name}"]
            assert (both.config, both.reuse, both.steps) == (
                found[name].config,
                found[other].reuse,
                found[other].steps,
            )
    assert not found["EasyCache 0.2"].is_merged and found["EasyCache 0.2"].reuse.start == 0.15
    assert any(variant.tail for variant in found.values()) == transformer
    assert found["Fast"].config.ratio == (AUTO_MOST if transformer else PRESETS["Fast"].options["ratio"])
    assert [name for name in methods.rivals(28, transformer, [20, 28, 40], ["steps"])] == [
        "unmerged",
        "unmerged again",
        "20 steps",
    ]


def test_a_run_writes_all_rows_and_goes_on(dit_file, tmp_path, few, capsys):
    out = tmp_path / "frontier-x.csv"
    frontier.main(command(dit_file, out, "--sets", "presets", "caches", "steps"))
    rows = {row["variant"]: row for row in read(out)}
    assert list(rows) == [
        *("unmerged", "unmerged again", "Quality", "Balanced", "Fast", "4 steps", "EasyCache 0.3", "LazyCache 0.3"),
    ]
    whole, again, merged, cached = (rows[name] for name in ("unmerged", "unmerged again", "Quality", "EasyCache 0.3"))
    assert whole["psnr"] == "inf" and float(again["psnr"]) > 80
    assert (whole["calls_whole"], whole["attention"], whole["ran"]) == ("1.00000", "1.00000", " ".join(["100"] * 8))
    assert float(merged["calls_whole"]) == 0.25 and float(merged["calls_merged"]) == 0.75
    assert 0.25 < float(merged["attention"]) < 1 and merged["commit"] == "abc"
    assert float(rows["4 steps"]["calls_whole"]) == float(rows["4 steps"]["attention"]) == 0.5
    shares = [int(share) for share in cached["ran"].split()]
    assert float(cached["calls_whole"]) == pytest.approx(sum(shares) / 800, abs=0.01)
    assert float(cached["attention"]) == pytest.approx(float(cached["calls_whole"]), abs=1e-4)
    assert 10 < float(cached["psnr"]) < 100
    before = out.read_text()
    capsys.readouterr()
    frontier.main(command(dit_file, out, "--sets", "presets", "tails", "--minutes", "0"))
    assert out.read_text() == before
    assert "stopped by --minutes" in capsys.readouterr().err
    with pytest.raises(ValueError, match="pictures 3, this is 4"):
        frontier.main(command(dit_file, out, "--pictures", "4"))


def test_held_attention_and_tails_have_rows(dit_file, tmp_path, few):
    out = tmp_path / "frontier-x.csv"
    frontier.main(command(dit_file, out, "--sets", "hold", "tails"))
    rows = {row["variant"]: row for row in read(out)}
    held, drawn, residual = (
        rows[f"attention 1 of 2{rest}"] for rest in ("", ", multires 0.84 between", ", multires 0.84 + residual")
    )
    assert (float(held["calls_whole"]), float(held["calls_held"]), float(held["attention"])) == (5 / 8, 3 / 8, 5 / 8)
    assert (drawn["method"], drawn["ratio"]) == ("multires", "0.84")
    assert float(drawn["calls_merged"]) == float(residual["calls_merged"]) == float(residual["calls_both"]) == 3 / 8
    assert 5 / 8 < float(drawn["attention"]) < float(residual["attention"]) < 1
    tail = rows["EasyCache 0.2 + mean tail 0.84"]
    assert float(tail["calls_merged"]) < 1 and tail["method"] == "mean tail"
