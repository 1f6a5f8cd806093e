"""The layer benchmark in a short form: one JSON list on stdout, progress on stderr, every method and column."""

from __future__ import annotations

from lab.speed import layer
from shared_tome import METHODS

COLUMNS = {
    "tokens", "channels", "batch", "dtype", "device", "method", "ratio", "full_us", "total_us", "match_us", "merge_us",
    "unmerge_us", "tomesd_total_us", "machine", "torch", "date", "commit",
}  # fmt: skip


def test_layer_on_the_cpu(run, tmp_path, monkeypatch):
    """With few channels: what is timed is as much as in a model's layer, but for its width."""
    monkeypatch.setitem(layer.SHAPES, "narrow", ((16, 16), 64, 2))
    out = tmp_path / "layer.csv"
    rows = run(layer, "--shapes", "narrow", "--batch", 1, "--seconds", 0.001, "--out", out)
    assert {row["method"] for row in rows} == set(METHODS)
    for row in rows:
        assert set(row) >= COLUMNS
        assert row["tokens"] == 256 and row["device"] == "cpu" and row["dtype"] == "float32"
        assert row["full_us"] > 0 and row["total_us"] > row["merge_us"] >= 0
        assert (row["tomesd_total_us"] != "") is (row["method"] == "merge")
    assert len(out.read_text().splitlines()) == len(rows) + 1
