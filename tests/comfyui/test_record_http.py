"""ToMe Record, Map and Report in a real ComfyUI server: the order of nodes, its cache, its messages."""

from __future__ import annotations

import io
import json
import struct
import sys

import numpy as np
import pytest
from PIL import Image

from .host import REPO

sys.path.insert(0, str(REPO))
from installer import workflow

pytestmark = pytest.mark.slow
SETTINGS = workflow.Settings(size=32, steps=3, cfg=3.0, sampler="euler", scheduler="simple")
MAP = {"show": "groups", "level": -1, "layer": 0, "step": -1, "opacity": 0.6}


def graph(client, *, seed=7, method="merge", measure_time=False, **drawn):
    """The demo with Record behind ToMe, a map of the enlarged picture and a report."""
    tome = {**workflow.defaults(client.node("ToMe")), "method": method, "ratio": 0.5, "min_tokens": 0}
    subject = workflow.Subject("astronaut", "astronaut", seed=seed)
    made = workflow.demo_workflow(client.node("ToMeDemoModel"), subject, SETTINGS, tome)
    made["record"] = {"class_type": "ToMeRecord", "inputs": {"model": ["tome", 0]}}
    made[workflow.SAMPLER]["inputs"]["model"] = ["record", 0]
    size = {"image": ["picture", 0], "upscale_method": "bilinear", "width": 512, "height": 512, "crop": "disabled"}
    made["large"] = {"class_type": "ImageScale", "inputs": size}
    made["map"] = {"class_type": "ToMeMap", "inputs": {**MAP, **drawn, "record": ["record", 1], "image": ["large", 0]}}
    made["shown"] = {"class_type": "PreviewImage", "inputs": {"images": ["map", 0]}}
    made["report"] = {
        "class_type": "ToMeReport",
        "inputs": {"record": ["record", 1], "after": ["picture", 0], "measure_time": measure_time},
    }
    made["json"] = {"class_type": "PreviewAny", "inputs": {"source": ["report", 1]}}
    return made


def picture(client, result, node):
    (data,) = client.images(type(result)(result.prompt_id, {node: result.outputs[node]}))
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB"), dtype=np.int16)


def test_one_prompt_gives_picture_map_and_report(client):
    result = client.run(graph(client, measure_time=True))
    plain, drawn = picture(client, result, "show"), picture(client, result, "shown")
    assert plain.shape == (32, 32, 3) and drawn.shape == (512, 512, 3)
    (text,), (told,) = result.outputs["report"]["text"], result.outputs["json"]["text"]
    assert "- level 0 (32x32): 1024 to 512 tokens (-50%), 5 layers: input block 1, 2, output block 4, 5, 6" in text
    data = json.loads(told)
    assert (data["steps"], data["calls"]) == (3, 3) and data["time"]["without_ms"] > 0


def test_another_map_needs_no_new_sampling_and_another_seed_a_new_record(client):
    first = client.run(graph(client, layer=0))
    again = client.run(graph(client, layer=3))
    assert "map" in again.seconds and workflow.SAMPLER not in again.seconds and "record" not in again.seconds
    assert (picture(client, again, "shown") != picture(client, first, "shown")).any()
    other = client.run(graph(client, seed=8, layer=3))
    assert workflow.SAMPLER in other.seconds and "record" not in other.seconds
    assert json.loads(other.outputs["json"]["text"][0])["calls"] == 3, "the report is of the new sampling alone"
    assert (picture(client, other, "shown") != picture(client, again, "shown")).any()


def test_the_picture_is_the_one_without_the_nodes(client):
    recorded = graph(client, seed=9)
    plain = {name: node for name, node in recorded.items() if name not in ("record", "map", "shown", "report", "json")}
    plain[workflow.SAMPLER] = {**plain[workflow.SAMPLER]}
    plain[workflow.SAMPLER]["inputs"] = {**plain[workflow.SAMPLER]["inputs"], "model": ["tome", 0]}
    assert (picture(client, client.run(plain), "show") == picture(client, client.run(recorded), "show")).all()


def test_the_text_is_shown_on_the_node(client):
    """The page's own text under a node comes as a message of its own: ToMe's line, then the report."""
    import websocket

    client.run(graph(client))
    channel = websocket.create_connection(f"ws{client.url.removeprefix('http')}/ws?clientId={client.client_id}")
    try:
        client.post_prompt(graph(client, seed=11))
        texts = {}
        while "report" not in texts:
            raw = channel.recv()
            if isinstance(raw, bytes) and struct.unpack(">I", raw[:4])[0] == 3:  # BinaryEventTypes.TEXT
                (length,) = struct.unpack(">I", raw[4:8])
                texts[raw[8 : 8 + length].decode()] = raw[8 + length :].decode()
            if isinstance(raw, str) and json.loads(raw).get("type") == "execution_success":
                pytest.fail(f"no text of the report came, only {texts}")
    finally:
        channel.close()
    assert texts["report"].startswith("ToMe: method merge, ratio 0.5")
    assert "merged" in texts["tome"]


def test_a_value_out_of_range_is_told_before_sampling(client):
    """ComfyUI leaves out the map alone: the picture is made all the same."""
    body = {"prompt": graph(client, opacity=1.5), "client_id": client.client_id}
    (error,) = json.loads(client.request("/prompt", body))["node_errors"]["map"]["errors"]
    assert error["type"] == "value_bigger_than_max" and error["extra_info"]["input_name"] == "opacity"


@pytest.mark.parametrize("node", ["ToMeRecord", "ToMeMap", "ToMeReport", "ToMeCompare"])
def test_help_page_is_served(client, node):
    pack = client.node(node)["python_module"].removeprefix("custom_nodes.")
    page = client.request(f"/extensions/{pack}/docs/{node}.md").decode()
    known = client.node(node)
    assert page.startswith(f"# {known['display_name']}\n")
    for name in {**known["input"]["required"], **known["input"].get("optional", {})}:
        label = {**known["input"]["required"], **known["input"].get("optional", {})}[name][1].get("display_name", name)
        assert f"`{name}`" in page or f"**{label}**" in page or name == "model", name
