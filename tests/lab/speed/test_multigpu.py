"""The benchmark of several GPUs, on the CPU under two names: a short run, and that its two devices do the work."""

from __future__ import annotations

import json

from lab import store
from lab.pages import speed_tables


def test_the_short_form(run_in_comfyui, tmp_path):
    out = tmp_path / "multigpu.csv"
    command = (
        "-m", "lab.speed.multigpu", "--device", "cpu", "--steps", "3", "--compared", "2", "--seconds", "0",
        "--least", "1", "--json", "--out", str(out),
    )  # fmt: skip
    rows = json.loads(run_in_comfyui(*command, "--variants", "unmerged", "sample 0.75"))
    assert [(row["variant"], row["gpus"]) for row in rows] == [
        ("unmerged", 1), ("unmerged", 2), ("sample 0.75", 1), ("sample 0.75", 2)
    ]  # fmt: skip
    for row in rows:
        assert row["step_ms"] > 0 and row["steps"] == 1 and float(row["speedup"]) > 0
        assert (row["differs"] == "") is (row["gpus"] == 1)
        assert row["gpus"] == 1 or float(row["differs"]) < 1e-4
    before = out.read_text()
    run_in_comfyui(*command, "--variants", "unmerged", "sample 0.75")
    assert out.read_text() == before
    run_in_comfyui(*command, "--variants", "sample 0.9375")  # with a base of its own, which is there already
    assert out.read_text().startswith(before) and len(out.read_text().splitlines()) == 7


DEVICES = """
import json, os, threading, torch
from pathlib import Path
from installer import inprocess
inprocess.start(Path(os.environ["COMFYUI_DIR"]), ["--cpu"], absent=["av"])
from lab.speed import hosts, multigpu
models = multigpu.build("tiny", torch.device("cpu"), torch.float32)
copy = models[2].get_additional_models_with_key("multigpu")[0]
seen = []
for number, patcher in enumerate((models[1], copy)):
    patcher.model.diffusion_model.register_forward_pre_hook(
        lambda _, args, number=number: seen.append((number, threading.get_ident(), args[0].shape[0])) and None
    )
latents, rows = {}, {}
for gpus, model in models.items():
    latents[gpus] = hosts.sample(model, "tiny", 128, 1)
    rows[gpus] = [(number, size) for number, _, size in seen]
    threads = len({thread for _, thread, _ in seen})
    seen.clear()
same = all(map(torch.equal, models[1].model.state_dict().values(), copy.model.state_dict().values()))
print(json.dumps([rows, threads, same, copy.model is models[1].model, multigpu.difference(latents[2], latents[1])]))
"""


def test_each_device_has_one_row_a_copy_and_a_thread(run_in_comfyui):
    rows, threads, same, shared, difference = json.loads(run_in_comfyui("-c", DEVICES))
    assert rows["1"] == [[0, 2]] and sorted(rows["2"]) == [[0, 1], [1, 1]]
    assert threads == 2 and same and not shared
    assert difference < 1e-5


def test_the_table_has_a_line_for_each_number_of_gpus(tmp_path):
    about = {"machine": "2 x a GPU", "driver": "1", "torch": "2", "date": "2026-01-01", "commit": "abc", "versions": ""}
    rows = []
    for name, gpus, ms, differs in (
        ("unmerged", 1, 400, ""), ("unmerged", 2, 250, "4.24e-03"),
        ("sample 0.75", 1, 200, ""), ("sample 0.75", 2, 100, "1e-3"),
    ):  # fmt: skip
        row = {"model": "sd15", "pixels": 2048, "images": 1, "gpus": gpus, "variant": name, "step_ms": ms}
        rows.append({**row, "step_p20": ms, "step_p80": ms, "speedup": f"{400 / ms:.3f}", "differs": differs, **about})
    store.save(rows, tmp_path / "multigpu.csv")
    lines = speed_tables.made("multigpu", tmp_path).splitlines()
    assert lines[2:4] == [
        "| SD 1.5 2048² | 1 | 1 | 400 ms (400 to 400) | 1.00x | 2.00x |",
        "| SD 1.5 2048² | 1 | 2 | 250 ms (250 to 250) | 1.60x (4e-03) | 4.00x (1e-03) |",
    ]
    assert lines[-1] == "2 x a GPU, driver 1, torch 2, 2026-01-01, commit abc."
