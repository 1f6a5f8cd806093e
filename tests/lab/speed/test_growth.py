"""The benchmark of growth: grids, exponents, and its short form."""

from __future__ import annotations

import math

import pytest

from lab.speed import growth


@pytest.mark.parametrize("power", [0.0, 1.0, 1.5, 2.0])
def test_the_exponent_of_a_power_is_found(power):
    tokens = [2**octave for octave in range(10, 16)]
    times = [3.0 * n**power for n in tokens]
    assert growth.exponent(tokens[::-1], times[::-1]) == pytest.approx(power)


def test_the_exponent_is_that_of_the_last_octaves():
    tokens = [1024, 2048, 4096, 8192, 16384, 32768]
    assert growth.exponent(tokens, [7, 7, 7, 14, 28, 56]) == pytest.approx(1.0)
    with pytest.raises(ValueError, match="two points"):
        growth.exponent([1024], [1.0])


def test_grids_have_all_tokens():
    for tokens in growth.SIZES:
        height, width = growth.grid_of_octave(tokens)
        assert height * width == tokens and width in (height, 2 * height) and math.log2(height).is_integer()


def test_the_short_form(run, tmp_path):
    pytest.importorskip("tomesd")
    out = tmp_path / "growth.csv"
    rows = run(growth, "--tokens", 1024, "--seconds", 0, "--batch", 1, "--out", out)
    assert {(row["who"], row["what"]) for row in rows} == {
        *(("torch", what) for what in ("draw", "gather", "match", "merge", "unmerge")),
        *(("tomesd", what) for what in ("match", "merge", "unmerge")),
        ("attention", "attention"),
    }
    assert all(row["us"] > 0 and row["p20"] <= row["us"] <= row["p80"] for row in rows)
    before = out.read_text()
    run(growth, "--tokens", 1024, "--seconds", 0, "--batch", 1, "--out", out)
    assert out.read_text() == before
