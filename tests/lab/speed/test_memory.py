"""The memory benchmark: its count is exact on the CPU, and its short form has every method."""

from __future__ import annotations

import pytest
import torch

from lab.speed import memory
from shared_tome import METHODS


def test_the_peak_is_counted_to_the_byte():
    x = torch.ones(1000)

    def call():
        y = x + 1  # 4,000 bytes
        z = torch.cat((y, y))  # 8,000 more
        del y
        return z[:10].clone()

    assert memory.peak_bytes(call, "cpu") == 12000
    assert memory.peak_bytes(lambda: x[:5], "cpu") == 0


def test_every_method_and_tomesd(run, tmp_path):
    pytest.importorskip("tomesd")
    out = tmp_path / "memory.csv"
    arguments = ("--sides", 16, "--channels", 320, "--batch", 1, "--out", out)
    rows = run(memory, *arguments)
    assert {row["method"] for row in rows} == {*METHODS, "tomesd"}
    for row in rows:
        tensor = row["token_tensor_mb"]
        assert tensor == pytest.approx(256 * 320 * 4 / 2**20, abs=1e-4)
        assert row["merged_mb"] >= row["alone_mb"] > 0 and row["layer_mb"] > 4 * tensor  # q, k, v and the output
        assert row["added_mb"] == pytest.approx(row["merged_mb"] - row["layer_mb"], abs=0.02)
        assert row["added_tensors"] == pytest.approx(row["added_mb"] / tensor, abs=0.1)
    by = {(row["method"], row["ratio"]): row["alone_tensors"] for row in rows}
    assert by["sample", 0.75] < by["merge", 0.5]  # a quarter of the tokens, and nothing matched
    before = out.read_text()
    run(memory, *arguments)
    assert out.read_text() == before
