"""Each workflow opened in ComfyUI's own page, in a headless Chromium."""

from __future__ import annotations

import importlib.util
import json
from typing import Any

import pytest

from web import chromium

from .build import FOLDER, graphs
from .convert import to_prompt

pytestmark = pytest.mark.slow
READY = "window.app?.vueAppReady && app.extensionManager && !app.extensionManager.spinner"
OPEN = """async (workflow) => {
    await app.loadGraphData(workflow, true, true, "example");
    const least = app.graph.nodes.map((node) => [...node.computeSize()]);
    return {least, saved: app.graph.serialize(), prompt: (await app.graphToPrompt()).output};
}"""


@pytest.fixture(scope="module")
def page(client) -> Any:
    if importlib.util.find_spec("playwright") is None:
        pytest.skip("no playwright (`python install.py test` brings it, else `pip install playwright`)")
    executable = chromium.find()
    if executable is None:
        pytest.skip("no Chromium: install it (Debian: apt install chromium) or name one in TOME_CHROMIUM")
    client.request("/settings", {"Comfy.TutorialCompleted": True, "Comfy.VueNodes.Enabled": False})
    with chromium.started(executable) as browser:
        page = chromium.new_page(browser)
        page.goto(client.url)
        page.wait_for_function(READY)
        yield page


@pytest.mark.parametrize("name", [graph.name for graph in graphs()])
def test_page_opens_and_queues_what_the_file_says(page, info, name):
    workflow = json.loads((FOLDER / f"{name}.json").read_text(encoding="utf-8"))
    opened = page.evaluate(OPEN, workflow)
    for node, least in zip(workflow["nodes"], opened["least"], strict=True):
        assert all(a >= b for a, b in zip(node["size"], least, strict=True)), f"{node['type']} needs {least}"
    for node, saved in zip(workflow["nodes"], opened["saved"]["nodes"], strict=True):
        values = saved.get("widgets_values", [])
        assert values[: len(node["widgets_values"])] == node["widgets_values"], node["type"]
    assert opened["prompt"].keys() == to_prompt(workflow, info).keys()
    for id, node in to_prompt(workflow, info).items():
        assert opened["prompt"][id]["class_type"] == node["class_type"]
        assert opened["prompt"][id]["inputs"] == node["inputs"]
