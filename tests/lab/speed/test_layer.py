"""The layer benchmark in a short form: one JSON list on stdout, progress on stderr, every method and column."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from shared_tome import METHODS

ROOT = Path(__file__).resolve().parents[3]
COLUMNS = {
    "tokens", "channels", "batch", "dtype", "device", "method", "ratio", "full_us", "total_us", "match_us", "merge_us",
    "unmerge_us", "tomesd_total_us", "machine", "torch", "date", "commit",
}  # fmt: skip


def test_layer_on_the_cpu(tmp_path):
    command = ["-m", "lab.speed.layer", "--device", "cpu", "--json", "--shapes", "sd15-512-level2", "--batch", "1"]
    out = tmp_path / "layer.csv"
    done = subprocess.run(
        [sys.executable, *command, "--seconds", "0.001", "--out", str(out)],
        cwd=ROOT, capture_output=True, text=True, check=True, timeout=240,
    )  # fmt: skip
    rows = json.loads(done.stdout)
    assert {row["method"] for row in rows} == set(METHODS)
    for row in rows:
        assert set(row) >= COLUMNS
        assert row["tokens"] == 256 and row["device"] == "cpu" and row["dtype"] == "float32"
        assert row["full_us"] > 0 and row["total_us"] > row["merge_us"] >= 0
        assert (row["tomesd_total_us"] != "") is (row["method"] == "merge")
    assert len(out.read_text().splitlines()) == len(rows) + 1
    assert "it/s" in done.stderr or "s/it" in done.stderr
