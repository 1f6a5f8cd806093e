"""The files of example_workflows/ without a ComfyUI: up to date, laid out, with a picture each."""

from __future__ import annotations

import json

import pytest
from PIL import Image

from .build import FOLDER, REPO, graphs, text
from .graph import KINDS, PACK, TITLE

GRAPHS = {graph.name: graph for graph in graphs()}
NAMES = sorted(GRAPHS)
WORKFLOWS = {name: json.loads(text(graph)) for name, graph in GRAPHS.items()}
EACH = pytest.mark.parametrize("name", NAMES)


def boxes(workflow):
    """(left, top, right, bottom) of each node, its title bar included."""
    for node in workflow["nodes"]:
        (x, y), (width, height) = node["pos"], node["size"]
        yield node, (x, y - TITLE, x + width, y + height)


def test_folder_holds_these_workflows_and_their_pictures_alone():
    assert {path.name for path in FOLDER.iterdir()} == {f"{name}.{end}" for name in NAMES for end in ("json", "jpg")}
    assert not any(" " in name for name in NAMES)


@EACH
def test_file_is_what_the_script_builds(name):
    """After a default changed: `python tests/workflows/build.py`."""
    assert (FOLDER / f"{name}.json").read_text(encoding="utf-8") == text(GRAPHS[name])


@EACH
def test_nodes_do_not_overlap(name):
    laid = list(boxes(WORKFLOWS[name]))
    for place, (a, (left, top, right, bottom)) in enumerate(laid):
        for b, (left2, top2, right2, bottom2) in laid[:place]:
            apart = right <= left2 or right2 <= left or bottom <= top2 or bottom2 <= top
            assert apart, f"{a['type']} {a['id']} lies over {b['type']} {b['id']}"


@EACH
def test_each_node_lies_in_one_group(name):
    for node, (left, top, right, bottom) in boxes(WORKFLOWS[name]):
        around = []
        for group in WORKFLOWS[name]["groups"]:
            x, y, width, height = group["bounding"]
            if x <= left and right <= x + width and y <= top and bottom <= y + height:
                around.append(group["title"])
        assert len(around) == 1, f"{node['type']} {node['id']} lies in {around}"


@EACH
def test_links_go_from_left_to_right(name):
    """Or down, to a node of the same column."""
    nodes = {node["id"]: node for node in WORKFLOWS[name]["nodes"]}
    for _, source, _, target, _, _ in WORKFLOWS[name]["links"]:
        (x, y), (x2, y2) = nodes[source]["pos"], nodes[target]["pos"]
        assert x + nodes[source]["size"][0] < x2 or (x == x2 and y < y2), (nodes[source]["type"], nodes[target]["type"])


def tokens(name):
    """Of the finest layers that attend at the file's own size; None where a picture of the user's decides it."""
    nodes = {node["type"]: node["widgets_values"] for node in WORKFLOWS[name]["nodes"]}
    sizes = [(type, values) for type, values in nodes.items() if type.startswith("Empty")]
    if "ImageScale" in nodes:
        sizes = [("ImageScale", nodes["ImageScale"][1:])]
    if not sizes:
        return None
    ((empty, size),) = sizes
    pixels = 8 if "sd15" in name or "compare" in name else 16  # a token's side; SDXL's first level has no attention
    pixels, frames = {"EmptyHunyuanLatentVideo": (16, 4), "EmptyLTXVLatentVideo": (32, 8)}.get(empty, (pixels, None))
    scale = nodes["LatentUpscaleBy"][1] if "LatentUpscaleBy" in nodes else 1
    length = 1 if frames is None else (size[2] - 1) // frames + 1
    return int(size[0] * scale) // pixels * (int(size[1] * scale) // pixels) * length


@EACH
def test_size_is_one_at_which_layers_are_merged(name):
    nodes = WORKFLOWS[name]["nodes"]
    tomes = [node["widgets_values"] for node in nodes if node["type"] == "ToMe"]
    assert len(tomes) == sum(node["type"] in ("UNETLoader", "CheckpointLoaderSimple") for node in nodes)
    for tome in tomes:
        values = dict(zip(KINDS["ToMe"].widgets, tome, strict=True))
        assert values["ratio"] > 0
        assert name == "04_inpaint" or tokens(name) >= 2 * values["min_tokens"]


@pytest.mark.parametrize(
    ("name", "told"), [("07_wan22_video", 32760), ("08_ltx2_video", 14080), ("09_qwen_image_edit", 4096)]
)
def test_note_tells_the_tokens_of_its_size(name, told):
    (note,) = (node["widgets_values"][0] for node in WORKFLOWS[name]["nodes"] if node["type"] == "MarkdownNote")
    assert tokens(name) == told and f"{told:,} tokens" in note


def test_sound_is_as_long_as_its_video():
    nodes = {node["type"]: node["widgets_values"] for node in WORKFLOWS["08_ltx2_video"]["nodes"]}
    length = nodes["EmptyLTXVLatentVideo"][2]
    assert length % 8 == 1 and nodes["LTXVEmptyLatentAudio"][0] == length
    assert nodes["LTXVConditioning"][0] == nodes["LTXVEmptyLatentAudio"][1] == nodes["CreateVideo"][0]


def test_missing_nodes_are_found_by_the_name_in_the_registry():
    assert f'\nname = "{PACK}"\n' in (REPO / "pyproject.toml").read_text(encoding="utf-8")


@EACH
def test_note_tells_where_each_model_comes_from(name):
    (note,) = (node["widgets_values"][0] for node in WORKFLOWS[name]["nodes"] if node["type"] == "MarkdownNote")
    loaded = []
    for node in WORKFLOWS[name]["nodes"]:
        for model in node["properties"].get("models", ()):
            assert model["name"] in node["widgets_values"], "the page looks for a widget of that value"
            assert f"[{model['name']}]({model['url']}) into `models/{model['directory']}`" in note
            loaded.append(node["type"])
    loaders = [node["type"] for node in WORKFLOWS[name]["nodes"] if KINDS[node["type"]].widgets[:1]]
    assert loaded and loaded == [type for type in loaders if type.endswith(("Loader", "LoaderSimple"))]
    assert "## " in note and "### Try" in note


@EACH
def test_picture_is_small_and_of_the_size_that_the_page_shows(name):
    path = FOLDER / f"{name}.jpg"  # the page asks for .jpg alone
    assert path.stat().st_size < 100_000
    with Image.open(path) as picture:
        assert picture.format == "JPEG" and picture.size == (512, 512)
