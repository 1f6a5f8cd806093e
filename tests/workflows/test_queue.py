"""Each workflow opened and queued in a real ComfyUI, with small models under the official file names."""

from __future__ import annotations

import copy
import io
import json
from typing import Any

import numpy as np
import pytest
from PIL import Image

from installer.client import Result
from installer.compare.__main__ import Session
from installer.compare.graph import TAKE, Graph
from installer.compare.journal import Journal
from installer.compare.plan import TIMED, Job, Picture, Request, all_variants

from .build import FOLDER, graphs
from .convert import Mismatch, specs, to_prompt, widget_names
from .graph import KINDS

pytestmark = pytest.mark.slow
NAMES = [graph.name for graph in graphs()]
EACH = pytest.mark.parametrize("name", NAMES)
SIZES = {"width": 128, "height": 128, "length": 5, "steps": 2}
FRAMES = {"06_wan_video": 5, "07_wan22_video": 5, "08_ltx2_video": 9}  # others make a picture
SIZES_OF = {
    "EmptyLTXVLatentVideo": {"length": 9, "width": 256, "height": 256},
    "LTXVEmptyLatentAudio": {"frames_number": 9},
    "ToMe": {"min_tokens": 0, "start": 0.0},
}


def workflow(name: str) -> dict[str, Any]:
    return json.loads((FOLDER / f"{name}.json").read_text(encoding="utf-8"))


def small(prompt: dict[str, Any]) -> dict[str, Any]:
    """The prompt at a size for a CPU; merged however few the tokens are."""
    prompt = copy.deepcopy(prompt)
    for node in prompt.values():
        for name, value in SIZES.items():
            if name in node["inputs"]:
                node["inputs"][name] = value
        node["inputs"].update(SIZES_OF.get(node["class_type"], {}))
        for name in ("start_at_step", "end_at_step"):  # samplers change in the middle
            if 0 < node["inputs"].get(name, 0) < 10000:
                node["inputs"][name] = SIZES["steps"] // 2
    return prompt


def without_tome(prompt: dict[str, Any]) -> dict[str, Any]:
    """The prompt with its ToMe nodes bypassed."""
    models = {id: node["inputs"]["model"] for id, node in prompt.items() if node["class_type"] == "ToMe"}
    prompt = {id: copy.deepcopy(node) for id, node in prompt.items() if id not in models}
    for node in prompt.values():
        for name, value in node["inputs"].items():
            if isinstance(value, list) and value[0] in models:
                node["inputs"][name] = models[value[0]]
    return prompt


def saved(client: Any, prompt: dict[str, Any]) -> list[bytes]:
    """Every file that the nodes for it save, once it is done; previews are left out."""
    result = client.run(prompt)
    result.outputs = {
        id: out for id, out in result.outputs.items() if prompt[id]["class_type"] in ("SaveImage", "SaveVideo")
    }
    return client.images(result)


def frames(data: bytes) -> np.ndarray:
    """[frames, height, width, 3], 0 to 255, of a picture or a video."""
    if data[:4] == b"\x89PNG":
        return np.asarray(Image.open(io.BytesIO(data)).convert("RGB"), dtype=np.int16)[None]
    import av

    with av.open(io.BytesIO(data)) as video:
        return np.stack([frame.to_ndarray(format="rgb24").astype(np.int16) for frame in video.decode(video=0)])


@EACH
def test_server_offers_workflow_and_picture(client, name):
    (pack,) = client.get("/workflow_templates")
    assert name in client.get("/workflow_templates")[pack]
    assert json.loads(client.request(f"/api/workflow_templates/{pack}/{name}.json")) == workflow(name)
    assert client.request(f"/api/workflow_templates/{pack}/{name}.jpg")[:3] == b"\xff\xd8\xff"


@EACH
def test_values_and_links_are_those_of_the_nodes(info, name):
    prompt = to_prompt(workflow(name), info)
    config = {node["class_type"]: node["inputs"] for node in prompt.values()}["ToMe"]
    assert set(config) == set(specs(info["ToMe"]))


@EACH
def test_queued_it_makes_a_picture_that_merging_changed(client, info, name):
    prompt = small(to_prompt(workflow(name), info))
    (merged,) = map(frames, saved(client, prompt))
    assert merged.std() > 5, "one flat colour"
    (plain,) = map(frames, saved(client, without_tome(prompt)))
    assert merged.shape == plain.shape and len(merged) == FRAMES.get(name, 1)
    assert (merged != plain).any()


@EACH
def test_install_py_compares_with_it(client, info, name):
    """Unmerged and with ToMe and EasyCache: put where they belong, run, and nothing else is saved."""
    base = Graph(small(to_prompt(workflow(name), info)), info)
    base.set_prompt("a boat")
    base.set_seed(3)
    variants = all_variants({"Balanced": {"ratio": 0.75}})
    models, taken = 2 if name == "07_wan22_video" else 1, []
    for number, variant in enumerate((variants[0], variants[-1])):
        prompt = base.with_variant(variant, number)
        kinds = [node["class_type"] for node in prompt.values()]
        assert (kinds.count("ToMe"), kinds.count("EasyCache")) == ((0, 0), (models, models))[number]
        result = client.run(prompt)
        assert base.timed() <= result.seconds.keys() and result.outputs.keys() == {TAKE}
        taken.append(np.stack([frames(data)[0] for data in client.images(result)]))
    assert taken[0].shape == taken[1].shape and len(taken[0]) == min(8, FRAMES.get(name, 1))
    assert (taken[0] != taken[1]).any()


@pytest.mark.parametrize(
    ("name", "family"),
    [("v1-5-pruned-emaonly-fp16.safetensors", "SmallSD15"), ("sd_xl_base_1.0.safetensors", "SmallSDXL")],
)
def test_install_py_compares_on_a_checkpoint(client, name, family, tmp_path):
    (tmp_path / "log").write_text("")
    request = Request((Picture("a boat", 7),), ("128x192",), checkpoint=tmp_path / name, steps=3)
    session = Session(client, request, Journal(tmp_path, {}), tmp_path, tmp_path / "log")
    assert len(session.variants) == 7 and not session.notes and session.base.loaded() == [name]
    record = session.generate(Job("128x192", session.variants[-1], 0, TIMED), None)
    assert record["family"] == family
    with Image.open(tmp_path / "pictures" / record["pictures"][0]) as picture:
        assert picture.size == (128, 192) and record["seconds"] > 0


def test_comparison_shows_both_pictures(client, info):
    """Left without ToMe, right with it, from the same noise."""
    prompt = small(to_prompt(workflow("02_compare_with_and_without"), info))
    (both,) = map(frames, saved(client, prompt))
    (same,) = map(frames, saved(client, without_tome(prompt)))
    assert both.shape == (1, 128, 128 + 8 + 128, 3)
    assert (same[:, :, :128] == same[:, :, 136:]).all()
    assert (both[:, :, :128] == same[:, :, :128]).all() and (both[:, :, 136:] != same[:, :, 136:]).any()


def test_comparison_reports_and_maps_what_was_merged(client, info):
    prompt = small(to_prompt(workflow("02_compare_with_and_without"), info))
    ids = {node["class_type"]: id for id, node in prompt.items()}
    outputs = client.run(prompt).outputs
    (text,) = outputs[ids["ToMeReport"]]["text"]
    ratio = prompt[ids["ToMe"]]["inputs"]["ratio"]
    assert f"256 to {256 - int(256 * ratio)} tokens" in text  # 16 x 16
    assert outputs[ids["PreviewImage"]]["images"]


def test_comparison_tells_and_draws_the_difference(client, info):
    prompt = small(to_prompt(workflow("02_compare_with_and_without"), info))
    ids = {node["class_type"]: id for id, node in prompt.items()}
    outputs = client.run(prompt).outputs
    assert outputs[ids["ToMeCompare"]]["text"][0].startswith("PSNR ")
    plain = client.run(without_tome(prompt)).outputs
    assert plain[ids["ToMeCompare"]]["text"] == ["the same"]
    drawn = [id for id, node in prompt.items() if node["inputs"].get("images") == [ids["ToMeCompare"], 0]]
    shown = [frames(*client.images(Result("", {drawn[0]: out[drawn[0]]}))) for out in (outputs, plain)]
    assert shown[0].max() > 0 == shown[1].max()


def test_hires_first_pass_is_unmerged(info):
    prompt = to_prompt(workflow("03_sdxl_hires"), info)
    samplers = [node["inputs"] for node in prompt.values() if node["class_type"] == "KSampler"]
    assert [prompt[sampler["model"][0]]["class_type"] for sampler in samplers] == ["CheckpointLoaderSimple", "ToMe"]


def test_both_models_of_wan22_are_merged_and_reported(client, info):
    """Each sampler has a ToMe node of its own, with the other one's values, and a report of its own part."""
    prompt = small(to_prompt(workflow("07_wan22_video"), info))
    tomes = [{**node["inputs"], "model": None} for node in prompt.values() if node["class_type"] == "ToMe"]
    assert len(tomes) == 2 and tomes[0] == tomes[1]
    outputs = client.run(prompt).outputs
    reports = [id for id, node in prompt.items() if node["class_type"] == "ToMeReport"]
    assert [source(prompt, id, "UNETLoader")["unet_name"].split("_")[2] for id in reports] == ["high", "low"]
    kept = 2 * 8 * 8 - int(2 * 8 * 8 * tomes[0]["ratio"])
    for id in reports:
        (text,) = outputs[id]["text"]
        assert f"128 to {kept} tokens" in text and "1 step, merged in 1" in text, text


def source(prompt: dict[str, Any], id: str, kind: str) -> dict[str, Any]:
    """Values of the loader that a report's model comes from."""
    while prompt[id]["class_type"] != kind:
        id = (prompt[id]["inputs"].get("record") or prompt[id]["inputs"]["model"])[0]
    return prompt[id]["inputs"]


def test_video_of_ltx2_has_its_sound(client, info):
    import av

    prompt = small(to_prompt(workflow("08_ltx2_video"), info))
    (data,) = saved(client, prompt)
    with av.open(io.BytesIO(data)) as video:
        sound = np.concatenate([frame.to_ndarray() for frame in video.decode(audio=0)], axis=1)
        assert sound.std() > 1e-3  # of 1, and 0 for silence
        assert abs(sound.shape[1] / video.streams.audio[0].rate - 9 / 25) < 0.1


def test_reference_reaches_qwen_image_edit(client, info):
    """Merged, it still decides the picture: without it another one comes out."""
    prompt = small(to_prompt(workflow("09_qwen_image_edit"), info))
    (edited,) = map(frames, saved(client, prompt))
    for node in prompt.values():
        if node["class_type"] == "ReferenceLatent":
            node["inputs"].pop("latent", None)
    (other,) = map(frames, saved(client, prompt))
    assert (edited != other).any()


def test_mask_decides_what_is_painted(client, info):
    prompt = small(to_prompt(workflow("04_inpaint"), info))
    (painted,) = map(frames, saved(client, prompt))
    for node in prompt.values():
        if node["class_type"] == "KSampler":
            node["inputs"]["seed"] += 1
    (other,) = map(frames, saved(client, prompt))
    changed = np.abs(painted - other)[0].mean(axis=-1)
    assert changed[64:96, 64:96].mean() > 4 * changed[:16].mean()


def test_table_of_nodes_is_what_comfyui_tells(info):
    """A file's sockets, widgets and outputs, in the page's order."""
    for type, kind in KINDS.items():
        if type == "MarkdownNote":
            continue
        names = [name for name, _ in widget_names(info[type])]
        assert list(kind.widgets) == names[: len(kind.widgets)], type
        order = [name for name in specs(info[type]) if name not in names]
        sockets = [socket.split(":")[0] for socket in kind.sockets]
        assert sockets == [name for name in order if name in sockets], type


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w: w["nodes"][3].update(type="TokenMerger"), "there is no node TokenMerger"),
        (lambda w: w["nodes"][3]["widgets_values"].__setitem__(0, 1.5), "ToMe.ratio: 1.5 is not in"),
        (lambda w: w["nodes"][3]["widgets_values"].__setitem__(3, "magic"), "ToMe.method: 'magic' is none of"),
        (lambda w: w["nodes"][3]["widgets_values"].insert(5, 7), "ToMe has widgets"),
        (lambda w: w["nodes"][1]["widgets_values"].__setitem__(0, "absent.ckpt"), "ckpt_name: 'absent.ckpt' is none"),
        (lambda w: w["links"][0].__setitem__(2, 1), "link 1 of MODEL goes from CLIP"),
        (lambda w: w["nodes"][3]["inputs"][0].update(link=None), "link 1 is not known at both"),
    ],
)
def test_converter_finds_what_is_wrong(info, change, message):
    broken = workflow("01_sd15_text_to_image")
    change(broken)
    with pytest.raises(Mismatch, match=message):
        to_prompt(broken, info)
