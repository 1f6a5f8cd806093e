"""Results from people's own models: what is taken into the CSV, and what is refused with its reason."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parents[3]
sys.path.insert(0, str(REPO))
from installer.compare import schema
from lab import store
from lab.fidelity import real_models
from lab.pages.fidelity_tables import NOBODY
from lab.pages.fidelity_tables import real_models as table

ROW = {
    "size": "1024x1024", "variant": "unmerged", "tome": None, "steps": 20, "seconds": 4.0, "speedup": 1.0,
    "all_seconds": [4.0, 3.9, 4.1, 4.0], "first_seconds": 9.0, "peak_gib": 7.5, "skipped": None, "psnr": None,
    "ssim": None, "lpips": None,
}  # fmt: skip
FOUND = {
    "format": "tome-compare", "version": 1, "tome": "0.2.0+8d7c7a1f51af", "date": "2026-12-01",
    "machine": {"device": "NVIDIA GeForce RTX 4090", "kind": "cuda", "memory_gib": 23.6, "torch": "2.11.0+cu130",
                "comfyui": "0.30.0", "system": "linux"},
    "model": {"name": "sd_xl_base_1.0.safetensors", "sha256": "31e35c80fc", "family": "SDXL", "dtype": "float16",
              "workflow": False},
    "seeds": [7, 8], "prompts": ["a cat on a windowsill in the morning sun, photograph"], "pictures": 4, "notes": [],
    "results": [
        ROW,
        ROW | {"variant": "Balanced", "tome": {"method": "auto", "ratio": 0.75}, "seconds": 3.2, "speedup": 1.25,
               "all_seconds": [3.2, 3.12, 3.28, 3.2], "psnr": 31.25, "ssim": 0.912},
        ROW | {"variant": "unmerged, another batch split", "seconds": None, "all_seconds": None, "speedup": None,
               "first_seconds": None, "peak_gib": None, "psnr": 62.5, "ssim": 0.999},
    ],
}  # fmt: skip


@pytest.fixture
def given(tmp_path):
    """given(result) -> its file."""

    def write(found):
        file = tmp_path / "compare.json"
        file.write_text(json.dumps(found), encoding="utf-8")
        return file

    return write


def changed(change) -> dict:
    found = copy.deepcopy(FOUND)
    change(found)
    return found


def test_a_result_becomes_rows_and_a_line_on_the_page(given, tmp_path):
    into = tmp_path / "real.csv"
    into.write_text(",".join(real_models.COLUMNS) + "\n", encoding="utf-8")
    assert table(into) == NOBODY
    assert real_models.add_result(given(FOUND), into) == 2
    unmerged, balanced = store.read(into)
    assert tuple(unmerged) == real_models.COLUMNS
    assert (balanced["psnr"], balanced["speedup"], balanced["floor_psnr"]) == ("31.25", "1.25", "62.5")
    assert balanced["options"] == "method auto, ratio 0.75" and unmerged["psnr"] == ""
    (line,) = table(into).splitlines()[2:]
    assert "sd_xl_base_1.0.safetensors (SDXL, 31e35c80fc)" in line and "| 1.25x | 31.2 | 0.912 |  | 62.5 |" in line
    other = changed(lambda f: f["machine"].update(device="NVIDIA H200"))
    assert real_models.add_result(given(other), into) == 2 and len(store.read(into)) == 4


def test_the_same_result_is_not_taken_twice(given, tmp_path):
    into = tmp_path / "real.csv"
    real_models.add_result(given(FOUND), into)
    before = into.read_bytes()
    with pytest.raises(ValueError, match="is in real.csv already"):
        real_models.add_result(given(FOUND), into)
    assert into.read_bytes() == before


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda f: f.update(format="x"), 'format is not "tome-compare"'),
        (lambda f: f.update(version=2), "version 2 is not 1"),
        (lambda f: f.pop("date"), "date is missing"),
        (lambda f: f.update(user="me"), "user is not known"),
        (lambda f: f["machine"].update(host="box"), "machine.host is not known"),
        (lambda f: f["results"][1].update(psnr="31"), r"results\[1\].psnr is '31'"),
        (lambda f: f["results"][1].update(psnr=True), r"results\[1\].psnr is True"),
        (lambda f: f["results"][1].update(psnr=130.0), "psnr is 130.0, not in 0 to 100"),
        (lambda f: f["results"][1].update(speedup=float("nan")), "speedup is nan, not in 0.01 to 100"),
        (lambda f: f["results"][1].update(seconds=0), "seconds is 0, not in 0.001"),
        (lambda f: f["results"][1].update(size="big"), "size is 'big', not WIDTHxHEIGHT"),
        (lambda f: f["results"][1].update(all_seconds=["fast"]), "all_seconds is not 4 times in 0.001 to 100000"),
        (lambda f: f["results"][1].update(all_seconds=[3.2] * 3), "all_seconds is not 4 times in 0.001 to 100000"),
        (lambda f: f["results"][1].update(all_seconds=[float("nan")] * 4), "all_seconds is not 4 times"),
        (lambda f: f["results"][1].update(all_seconds=None), "all_seconds is missing"),
        (lambda f: f["results"][1].update(speedup=12.5), r"\[1\].speedup is 12.5, but 1.25 by all_seconds"),
        (lambda f: f["results"][1].update(speedup=None), r"\[1\].speedup is None, but 1.25 by all_seconds"),
        (lambda f: f["results"][0].update(all_seconds=["fast"]), "all_seconds is not 4 times in 0.001 to 100000"),
        (lambda f: f["results"][0].update(seconds=8.0), r"\[0\].seconds is 8.0, but 4 by all_seconds"),
        (lambda f: f.update(seeds=[7, "8"]), r"seeds is \[7, '8'\], not whole numbers"),
        (lambda f: f.update(prompts=[{"a": 1}]), "prompts holds something that is no text"),
        (lambda f: f["model"].update(sha256="=1+1"), "model.sha256 is '=1\\+1', not a hash's digits"),
        (lambda f: f["machine"].update(device=" "), "machine.device is empty"),
        (lambda f: f["results"].append(ROW), "a variant twice"),
        (lambda f: f["results"].pop(0), "no unmerged row of 1024x1024"),
        (lambda f: f["results"].clear(), "results is empty"),
        (lambda f: f.update(results=[7]), r"results\[0\] is no object"),
        (lambda f: f.update(pictures=0), "pictures is 0"),
        (lambda f: f.update(tome="new"), "tome is 'new', not a version"),
        (lambda f: f["machine"].update(torch="nightly build"), "machine.torch is 'nightly build', not a version"),
        (lambda f: f.update(date="yesterday"), "date is 'yesterday'"),
        (lambda f: f.update(date="20261201"), "date is '20261201', not YYYY-MM-DD"),
        (lambda f: f["machine"].update(memory_gib=float("inf")), "machine.memory_gib is inf, not in 0 to 65536"),
        (lambda f: f["results"][1].update(size="0x0"), "size is '0x0', not WIDTHxHEIGHT"),
        (lambda f: f["model"].update(name=" "), "a file's name alone is wanted"),
        (lambda f: f["model"].update(name="sub/model.safetensors"), "a file's name alone is wanted"),
        (lambda f: f.update(notes=["failed: /home/ada/models/x"]), r"notes\[0\] holds a path or an address"),
        (lambda f: f.update(notes=["see C:\\Users\\ada"]), r"notes\[0\] holds a path"),
        (lambda f: f.update(notes=["by ada@example.org"]), r"notes\[0\] holds a path or an address"),
        (lambda f: f["results"][1]["tome"].update({"~/x": 1}), r"a name in results\[1\].tome holds a path"),
        (lambda f: f["model"].update(family="a | b"), "model.family cannot stand in a table"),
        (lambda f: f["machine"].update(device="x" * 301), "machine.device cannot stand in a table"),
        (lambda f: f["model"].update(name="demo"), "is no real one"),
    ],
)
def test_what_is_not_right_is_refused_with_the_reason(change, words, given, tmp_path):
    into = tmp_path / "real.csv"
    with pytest.raises(ValueError, match=words):
        real_models.add_result(given(changed(change)), into)
    assert not into.exists()


@pytest.mark.parametrize(
    ("text", "words"), [("[" * 100_000, "is no JSON"), ("", "is no JSON"), ("[]", "format is not")]
)
def test_a_file_that_is_no_result_is_told(text, words, tmp_path):
    file = tmp_path / "compare.json"
    file.write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match=words):
        real_models.add_result(file, tmp_path / "real.csv")


def test_a_file_that_a_windows_editor_saved_is_taken(given, tmp_path):
    file = given(FOUND)
    file.write_bytes(b"\xef\xbb\xbf" + file.read_bytes())
    assert real_models.add_result(file, tmp_path / "real.csv") == 2


def test_a_result_is_fine_as_the_command_writes_it():
    assert schema.problems(FOUND) == []
    assert schema.problems(changed(lambda f: f.update(prompts=None))) == []
    said = "EasyCache is left out: this ComfyUI has no such node. Mean 1/2, 3 and/or 4."
    assert schema.problems(changed(lambda f: f["notes"].append(said))) == []
    prompts = changed(lambda f: f.update(prompts=["a sign that says /home/ada | http://x"]))
    assert schema.problems(prompts) == [], "prompts are the person's own choice"


def test_the_command_says_what_is_wrong(given):
    file = given(changed(lambda f: f.update(tome="new")))
    command = [sys.executable, "-m", "lab.fidelity.real_models", "add-result", str(file)]
    done = subprocess.run(command, cwd=REPO, capture_output=True, text=True)
    assert done.returncode == 1 and "tome is 'new', not a version" in done.stderr and "Traceback" not in done.stderr


def test_every_row_that_is_kept_is_one_that_would_be_taken():
    """The committed file: its columns, and nothing of the demo's model."""
    head = real_models.FILE.read_text(encoding="utf-8").splitlines()[0]
    assert head == ",".join(real_models.COLUMNS)
    for row in store.read(real_models.FILE):
        assert row["model"] != "demo" and not list(schema._private("", row))
