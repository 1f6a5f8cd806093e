"""Tables and pictures from CSVs that are made up here: every maker, with and without its file."""

from __future__ import annotations

import pytest

from lab import store
from lab.pages import fill, speed_tables
from lab.pages import speed_plots as plot

ABOUT = {"machine": "a GPU", "driver": "1", "torch": "2", "date": "2026-01-01", "commit": "abc", "versions": "x 1"}


def step(variant, ms, model="sd15", pixels=1024, backend="cudnn", **more):
    row = {"model": model, "pixels": pixels, "levels": "0 1", "backend": backend, "variant": variant, "step_ms": ms}
    speedup = f"{100 / ms:.3f}" if ms else ""
    speeds = dict.fromkeys(("speedup", "speedup_p20", "speedup_p80"), speedup)
    return {**row, "step_p20": ms, "step_p80": ms, **speeds, "remark": "", **more, **ABOUT}


@pytest.fixture
def results(tmp_path):
    times = {"unmerged": 100.0, "merge 0.5": 60.0, "half at no cost": 50.0, "limit": 20.0, "sample 0.75": 40.0}
    steps = [step(name, ms, mode=mode) for mode in ("graph", "eager") for name, ms in times.items()]
    steps.append(step("tomesd 0.5", "", mode="graph") | {"remark": "cannot be captured: why"})
    hosts = [step(name, ms, backend=backend) for backend in ("default", "flash") for name, ms in times.items()]
    shape = {"tokens": 4096, "channels": 320, "batch": 2, "dtype": "float16"}
    memory = {**shape, "method": "merge", "ratio": 0.5, "token_tensor_mb": 5.0, "merged_mb": 9.0, **ABOUT}
    memory |= {"added_tensors": 1.26, "alone_tensors": 2.0}
    growth = [
        {**shape, "tokens": n, "who": "kernels", "what": "match", "us": n**2 / 2**20, **ABOUT} for n in (2048, 4096)
    ]
    dit = [
        step(name, ms, "flux", size="1024²", tokens=4096, blocks="2 + 4", depth="19 + 38", attention_share="0.800")
        for name, ms in times.items() if not name.startswith(("merge", "half"))
    ]  # fmt: skip
    for name, rows in {
        "steps": steps, "hosts": hosts, "memory": [memory], "growth": growth, "dit": dit,
    }.items():  # fmt: skip
        store.save(rows, tmp_path / f"{name}.csv")
    return tmp_path


@pytest.mark.parametrize(
    ("maker", "line"),
    [
        ("speed", "| SD 1.5 1024² | 100 ms (100 to 100) | 1.67x | 2.00x | 5.00x | 2.50x |"),
        ("hosts", "| flash | SD 1.5 1024² | 100 ms (100 to 100) | 1.67x | 2.00x | 5.00x | 2.50x |"),
        ("steps_graph", "| cudnn | SD 1.5 1024² | 0, 1 | 100 ms (100 to 100) | 1.67x | 2.00x | 5.00x | 2.50x | - |"),
        ("steps_graph", "tomesd 0.5: cannot be captured: why."),
        ("steps_eager", "| cudnn | SD 1.5 1024² | 0, 1 | 100 ms (100 to 100) | 1.67x | 2.00x | 5.00x | 2.50x |"),
        ("bound", "| cudnn | SD 1.5 1024² | 50.0 ms | 80% | - | - |"),
        ("memory", "| merge 0.5 | +1.3 (2.0) |"),
        ("growth", "| match | kernels | 4.0 | 16.0 | 2.00 |"),
        ("dit", "| cudnn | Flux 1024² | 4,096 | 2 + 4 of 19 + 38 | 80% | 100 ms (100 to 100) | 5.00x | 2.50x |"),
    ],
)
def test_a_table_says_what_its_csv_says(results, maker, line):
    text = speed_tables.made(maker, results)
    assert line in text.splitlines()
    assert "a GPU, driver 1, torch 2, x 1, 2026-01-01" in text or maker == "bound"
    assert "abc" in text or maker == "bound"  # the commit


@pytest.mark.parametrize("maker", list(speed_tables.MAKERS))
def test_a_table_without_a_csv_says_so(tmp_path, maker):
    page = f"<!-- {maker} -->\n<!-- end -->"
    assert fill.NOTHING in fill.filled(page, fill.of_speed(tmp_path))


def test_every_picture_is_drawn(results, tmp_path):
    pytest.importorskip("matplotlib", reason="only the plots need it")
    made = plot.draw(tmp_path / "images", results)
    assert (
        set(made)
        == set((tmp_path / "images").iterdir())
        == {tmp_path / "images" / f"speed-{name}.png" for name in plot.PLOTS}
    )
    assert plot.draw(tmp_path / "none", tmp_path / "nothing") == [] and not (tmp_path / "none").exists()
