"""A real ComfyUI server over HTTP: the demo workflow, and what a person gets for bad input."""

from __future__ import annotations

import io
import sys

import numpy as np
import pytest
from PIL import Image

from .host import REPO

sys.path.insert(0, str(REPO))
from installer import report, workflow
from installer.client import PromptError

pytestmark = pytest.mark.slow
SETTINGS = workflow.Settings(steps=2, cfg=3.0, sampler="euler", scheduler="simple")
SUBJECT = workflow.Subject("astronaut", "astronaut", seed=7)


def graph(client, tome):
    return workflow.demo_workflow(client.node("ToMeDemoModel"), SUBJECT, SETTINGS, tome)


def picture(client, tome=None) -> np.ndarray:
    result = client.run(graph(client, tome))
    (data,) = client.images(result)
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB"), dtype=np.int16)


def tome_values(client, **changes):
    return {**workflow.defaults(client.node("ToMe")), **changes}


def test_demo_workflow_makes_a_picture_near_the_unmerged_one(client):
    plain = picture(client)
    assert plain.shape == (64, 64, 3) and plain.std() > 20
    merged = picture(client, tome_values(client))
    assert (merged != plain).any()
    assert np.abs(merged - plain).mean() < 8  # of 255; another seed is some 60 away
    groups, kept = report.one_layer(merged.astype(np.uint8), tome_values(client), 64)  # the demo's map
    assert groups.shape == (64, 64) and kept.sum() == 64 * 64 // 4
    again = picture(client, tome_values(client, ratio=0.5))
    assert (again != merged).any()
    assert (picture(client, tome_values(client, ratio=0.0)) == plain).all()


def test_required_inputs_alone_are_enough(client):
    """Advanced widgets are optional: workflows saved before one existed keep running."""
    values = {name: tome_values(client)[name] for name in client.node("ToMe")["input"]["required"] if name != "model"}
    assert set(values) == {"ratio", "stride_x", "stride_y", "method", "seed"}
    assert (picture(client, values) == picture(client, tome_values(client))).all()


@pytest.mark.parametrize(
    ("change", "kind"),
    [
        ({"ratio": 1.5}, "value_bigger_than_max"),
        ({"ratio": -0.1}, "value_smaller_than_min"),
        ({"ratio": "much"}, "invalid_input_type"),
        ({"stride_x": 0}, "value_smaller_than_min"),
        ({"method": "magic"}, "value_not_in_list"),
        ({"min_tokens": -1}, "value_smaller_than_min"),
    ],
)
def test_bad_value_is_http_400(client, change, kind):
    with pytest.raises(PromptError) as refused:
        client.post_prompt(graph(client, tome_values(client, **change)))
    assert refused.value.status == 400
    (error,) = refused.value.body["node_errors"]["tome"]["errors"]
    assert error["type"] == kind and error["extra_info"]["input_name"] == next(iter(change))


def test_missing_input_is_http_400(client):
    prompt = graph(client, tome_values(client))
    del prompt["tome"]["inputs"]["model"]
    with pytest.raises(PromptError) as refused:
        client.post_prompt(prompt)
    assert refused.value.status == 400
    assert refused.value.body["node_errors"]["tome"]["errors"][0]["type"] == "required_input_missing"


def test_values_that_do_not_go_together_are_told_before_sampling(client):
    with pytest.raises(PromptError, match="mlp needs a method that matches tokens .* got method 'auto'"):
        client.run(graph(client, tome_values(client, mlp=True)))


def test_two_nodes_are_told_before_sampling(client):
    prompt = graph(client, tome_values(client))
    prompt["second"] = {"class_type": "ToMe", "inputs": {**tome_values(client), "model": ["tome", 0]}}
    prompt[workflow.SAMPLER]["inputs"]["model"] = ["second", 0]
    with pytest.raises(PromptError, match="already merged by another ToMe node"):
        client.run(prompt)


@pytest.mark.parametrize("node", ["ToMe", "ToMeCLIPVision"])
def test_help_page_is_served(client, node):
    """Where the page looks for it when a person opens a node's help."""
    pack = client.node(node)["python_module"].removeprefix("custom_nodes.")
    assert client.request(f"/extensions/{pack}/docs/{node}.md").decode().startswith("# ToMe")


def test_demo_node_is_for_the_demo_alone(client, comfy_nodes):
    """The server was started as the demo starts it; this process was not."""
    assert "ToMeDemoModel" in client.get("/object_info")
    assert "ToMe" in comfy_nodes and "ToMeDemoModel" not in comfy_nodes
