"""`install.py compare` in a real ComfyUI server, in short: stopped, taken up, and what it writes."""

from __future__ import annotations

import json
import sys

import numpy as np
import pytest
from PIL import Image

from .host import REPO

sys.path.insert(0, str(REPO))
from installer import server as installed
from installer.client import PromptError
from installer.compare import __main__ as compare
from installer.compare import plan, results, schema
from installer.compare.graph import TAKE, Graph
from installer.compare.journal import Journal
from installer.console import SetupError
from installer.paths import COMPARED

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]  # the fixture makes 17 pictures
SHORT = plan.Request((plan.Picture("astronaut", 7),), ("48x48",), steps=3)
NAMES = ["unmerged", "Quality", "Balanced", "Fast", "fewer steps", "EasyCache", "EasyCache + Balanced"]


@pytest.fixture(scope="module")
def started(server) -> list[list[str]]:
    """In place of each server that the command would start, the tests' own; the arguments of each start."""
    comfy, client = server
    starts: list[list[str]] = []

    class Shared:
        log = comfy.log

        def __init__(self, *_, arguments, environment):
            starts.append([*arguments])
            assert environment["TOME_DEMO"] == "1" and environment["TOME_CACHE"].endswith("tuning")

        def __enter__(self):
            return client

        def __exit__(self, *_):
            pass

        log_end = staticmethod(comfy.log_end)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(installed, "ComfyServer", Shared)
        yield starts


@pytest.fixture(scope="module")
def folder(started, tmp_path_factory):
    """What a comparison wrote that was stopped by Ctrl-C in its sixth generation, taken up, and started once more."""
    out = tmp_path_factory.mktemp("compared") / "out"
    with pytest.MonkeyPatch.context() as patch:
        add = Journal.add

        def stopped(self, key, record):
            if len(self.records) == 5:
                raise KeyboardInterrupt
            add(self, key, record)

        patch.setattr(Journal, "add", stopped)
        with pytest.raises(KeyboardInterrupt):
            compare.run(REPO, out, SHORT)
    assert len(Journal(out, SHORT.settings()).records) == 5 and not (out / COMPARED[1]).exists()
    before = (out / COMPARED[0]).read_bytes()
    compare.run(REPO, out, SHORT)
    assert (out / COMPARED[0]).read_bytes().startswith(before)
    return out


@pytest.fixture(scope="module")
def found(folder):
    return json.loads((folder / COMPARED[1]).read_text(encoding="utf-8"))


def test_the_json_is_one_that_the_lab_takes(found):
    assert schema.problems(found) == []
    assert found["model"]["family"] == "DemoConfig" and found["prompts"] == ["astronaut"]
    assert str(REPO) not in json.dumps(found)


def test_every_variant_was_timed(found):
    rows = {row["variant"]: row for row in found["results"]}
    assert list(rows) == [*NAMES, plan.FLOOR_NAME]
    for name in NAMES:
        assert rows[name]["seconds"] > 0 and rows[name]["first_seconds"] > 0 and len(rows[name]["all_seconds"]) == 1
        if sys.platform == "linux":
            assert 0.1 < rows[name]["peak_gib"] < 8
    assert rows["unmerged"]["speedup"] == 1 and rows["unmerged"]["psnr"] is None
    assert (rows["unmerged"]["steps"], rows["fewer steps"]["steps"]) == (3, 2)


def test_the_presets_merged_and_the_noise_floor_is_far_above(found):
    psnr = {row["variant"]: row["psnr"] for row in found["results"]}
    assert 10 < psnr["fewer steps"] < psnr["Balanced"] < psnr["Quality"] < 90 and psnr["Fast"] < psnr["Quality"]
    assert psnr["EasyCache + Balanced"] == pytest.approx(psnr["Balanced"], abs=0.1), "three steps: none is skipped"
    assert psnr[plan.FLOOR_NAME] > psnr["Quality"] + 10


def test_easycache_is_the_real_node(found, folder):
    skipped = {row["variant"]: row["skipped"] for row in found["results"]}
    assert skipped["EasyCache"] is not None and skipped["EasyCache + Balanced"] is not None and skipped["Fast"] is None


def test_the_table_chart_and_sheet_are_written(folder, found):
    text = (folder / COMPARED[2]).read_text(encoding="utf-8")
    assert all(f"| {name} " in text for name in NAMES) and "LPIPS was not measured" in text
    with Image.open(folder / COMPARED[3]) as chart, Image.open(folder / "pictures-48x48.jpg") as sheet:
        assert np.asarray(chart).std() > 5 and sheet.width > 7 * 320 and sheet.height > 2 * 320


def test_a_finished_comparison_starts_no_server(folder, started):
    starts = len(started)
    compare.run(REPO, folder, SHORT)
    assert len(started) == starts


def test_other_settings_are_refused(folder):
    with pytest.raises(SetupError, match=r"other settings: steps 3, now 4"):
        compare.run(REPO, folder, plan.Request(SHORT.pictures, SHORT.sizes, steps=4))


def test_another_batch_split_runs_each_row_alone(folder, server):
    """The model's calls have one row in place of two; the picture is the same but for rounding."""
    names = {name: results.read(folder, f"48x48-0-{name}-0.png").astype(int) for name in
             ("unmerged", "unmerged-another-batch-split", "Fast")}  # fmt: skip
    assert abs(names["unmerged"] - names["unmerged-another-batch-split"]).max() <= 2
    assert abs(names["unmerged"] - names["Fast"]).max() > 2


def test_what_comfyui_says_of_a_bad_workflow_is_told(server, started, tmp_path):
    flow = {
        "model": {"class_type": "CheckpointLoaderSimple", "inputs": {"ckpt_name": "absent.safetensors"}},
        "text": {"class_type": "CLIPTextEncode", "inputs": {"text": "x", "clip": ["model", 1]}},
        "latent": {"class_type": "EmptyLatentImage", "inputs": {"width": 64, "height": 64, "batch_size": 1}},
        "sampler": {"class_type": "KSampler", "inputs": {
            "model": ["model", 0], "positive": ["text", 0], "negative": ["text", 0], "latent_image": ["latent", 0],
            "seed": 1, "steps": 2, "cfg": 1.0, "sampler_name": "euler", "scheduler": "normal", "denoise": 1.0}},
        "vae": {"class_type": "VAEDecode", "inputs": {"samples": ["sampler", 0], "vae": ["model", 2]}},
        "save": {"class_type": "SaveImage", "inputs": {"images": ["vae", 0], "filename_prefix": "x"}},
    }  # fmt: skip
    file = tmp_path / "flow.json"
    file.write_text(json.dumps(flow), encoding="utf-8")
    request = plan.make_request(None, file, None, None)
    with pytest.raises(SetupError, match="absent.safetensors") as told:
        compare.run(REPO, tmp_path / "out", request)
    assert "whitelist" in " ".join(started[-1]) and "Traceback" not in str(told.value).partition("\n")[0]
    assert isinstance(told.value.__cause__, PromptError)


def test_the_graph_of_the_demo_is_what_it_would_be_by_hand(server):
    _, client = server
    known = client.get("/object_info")
    base = compare.Session(client, SHORT, Journal(REPO / "nowhere", {}), REPO, server[0].log).base
    assert isinstance(base, Graph)
    made = base.with_variant(plan.Variant("x", tome={"ratio": 0.5}, cache=True), 1)
    chain, id = [], made["sampler"]["inputs"]["model"][0]
    while id != "model":
        chain.append(made[id]["class_type"])
        id = made[id]["inputs"]["model"][0]
    assert chain == ["ToMeCompareModel", "EasyCache", "ToMe"] and "show" not in made
    assert made[TAKE]["inputs"]["images"] == ["picture", 0] and base.timed() == {"sampler", "picture"}
    assert set(known) >= {node["class_type"] for node in made.values()}
