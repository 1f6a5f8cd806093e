"""The benchmark of one picture on two GPUs, on the CPU by gloo: a short run, and what is sent."""

from __future__ import annotations

import threading

import pytest
import torch

from lab import store
from lab.pages import speed_tables
from lab.speed import parallel

pytest.importorskip("diffusers", reason="diffusers is not installed, see requirements/test.txt")
pytestmark = pytest.mark.skipif(
    not torch.distributed.is_gloo_available(), reason="two processes talk by torch.distributed's gloo"
)
NAMES = ["unmerged", "Balanced", "merge 0.5"]


@pytest.mark.slow
def test_the_short_form(run, tmp_path):
    out = tmp_path / "parallel.csv"
    made = run(parallel, "--seconds", 0, "--least", 2, "--variants", *NAMES, "--out", out)
    rows = {(row["variant"], row["gpus"]): row for row in made}
    assert list(rows) == [(name, gpus) for name in NAMES for gpus in (1, 2)]
    tokens, channels, layers = 256 + 6, 32, 2
    exchanged = 4 * tokens // 2 * channels * 4 / 2  # half of q, k, v and the output of half of the tokens, float32
    gathered = 256 // 2 * 64 * 4
    averaged = 256 * 16 * 4  # the keys' mean
    for (name, gpus), row in rows.items():
        assert row["step_ms"] > 0 and row["steps"] == 2 and float(row["speedup"]) > 0
        if gpus == 1:
            assert row["sent"] == 0 and row["differs"] == ""
            continue
        matches = name == "merge 0.5"
        sent = layers * (exchanged + matches * averaged) + gathered
        assert row["sent_mb"] == pytest.approx(sent / 1e6, abs=1e-4)
        assert row["sent"] == layers * (4 + matches) + 1
        assert float(row["differs"]) < 1e-5
    assert len(out.read_text().splitlines()) == 7


def fail(rank):
    if rank == 1:
        raise ValueError("the second one fails")
    threading.Event().wait(60)  # ended by the other one's failure; a barrier might fail before that is seen


@pytest.mark.slow
def test_a_process_that_fails_is_told():
    with pytest.raises(torch.multiprocessing.ProcessRaisedException, match="the second one fails"):
        parallel.in_processes(fail, (), "cpu")


def test_the_table_has_a_line_for_each_number_of_gpus(tmp_path):
    about = {"machine": "2 x a GPU", "driver": "1", "torch": "2", "date": "2026-01-01", "commit": "abc", "versions": ""}
    rows = []
    for name, gpus, ms, differs, sent in (
        ("unmerged", 1, 400, "", 0), ("unmerged", 2, 250, "4.24e-03", 229),
        ("Balanced", 1, 200, "", 0), ("Balanced", 2, 100, "1e-3", 229),
    ):  # fmt: skip
        row = {"model": "flux", "pixels": 2048, "gpus": gpus, "variant": name, "step_ms": ms, "sent": sent}
        row |= {"step_p20": ms, "step_p80": ms, "sent_mb": 11.0 * sent}
        rows.append({**row, "speedup": f"{400 / ms:.3f}", "differs": differs, **about})
    store.save(rows, tmp_path / "parallel.csv")
    lines = speed_tables.made("parallel", tmp_path).splitlines()
    assert lines[2:4] == [
        "| Flux 2048² | 1 | - | 400 ms (400 to 400) | 1.00x | 2.00x |",
        "| Flux 2048² | 2 | 2,519 MB in 229 | 250 ms (250 to 250) | 1.60x (4e-03) | 4.00x (1e-03) |",
    ]
    assert lines[-1] == "2 x a GPU, driver 1, torch 2, 2026-01-01, commit abc."
