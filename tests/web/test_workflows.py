"""Each example workflow opened in ComfyUI's own page."""

from __future__ import annotations

import json
from typing import Any

import pytest
from workflows.build import FOLDER, graphs
from workflows.convert import to_prompt

pytestmark = pytest.mark.slow
OPEN = """async (workflow) => {
    await app.loadGraphData(workflow, true, true, "example");
    const least = app.graph.nodes.map((node) => [...node.computeSize()]);
    return {least, saved: app.graph.serialize(), prompt: (await app.graphToPrompt()).output};
}"""


@pytest.fixture(scope="module")
def info(client) -> dict[str, Any]:
    """What the server tells of its nodes."""
    return client.get("/object_info")


@pytest.mark.parametrize("name", [graph.name for graph in graphs()])
def test_page_opens_and_queues_what_the_file_says(visit, info, name):
    workflow = json.loads((FOLDER / f"{name}.json").read_text(encoding="utf-8"))
    opened = visit().page.evaluate(OPEN, workflow)
    for node, least in zip(workflow["nodes"], opened["least"], strict=True):
        assert all(a >= b for a, b in zip(node["size"], least, strict=True)), f"{node['type']} needs {least}"
    for node, saved in zip(workflow["nodes"], opened["saved"]["nodes"], strict=True):
        values = saved.get("widgets_values", [])
        assert values[: len(node["widgets_values"])] == node["widgets_values"], node["type"]
    assert opened["prompt"].keys() == to_prompt(workflow, info).keys()
    for id, node in to_prompt(workflow, info).items():
        assert opened["prompt"][id]["class_type"] == node["class_type"]
        assert opened["prompt"][id]["inputs"] == node["inputs"]
