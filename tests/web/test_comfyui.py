"""ComfyUI's own web page in a real browser, against a real server: what a person sees and does with the nodes.

`TOME_SCREENSHOTS=docs/images` makes the documentation's pictures anew.
"""

from __future__ import annotations

import io
import json
import re
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

REPO = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(REPO))
from installer import workflow
from installer.client import ComfyClient

from .comfy_page import ComfyPage
from .conftest import SIZE

pytestmark = pytest.mark.slow

SUBJECT = workflow.Subject("astronaut", "astronaut", seed=7)
PLACES = {
    "ToMeDemoModel": (0, 0), "ToMe": (320, 0), "KSampler": (640, 0), "VAEDecode": (640, 320), "SaveImage": (960, 0)
}  # fmt: skip
TYPES = list(PLACES)
VIEW = {"scale": 1.0, "offset": [100.0, 140.0]}  # all nodes in sight
# Other than the defaults, and fit to run: what is saved and loaded again.
OTHER = {
    "ratio": 0.6, "stride_x": 4, "stride_y": 3, "method": "merge", "seed": 11, "partition": "fixed_2d", "levels": "0",
    "start": 0.1, "end": 0.9, "ratio_end": 0.3, "mlp": True, "proportional": False, "reduce": "pick",
    "min_tokens": 1024,
}  # fmt: skip
HELP, LOCALES = REPO / "web" / "docs", REPO / "locales"
# Those with a page or texts of their own, and one without, which gets the English page.
LANGUAGES = sorted(
    {"en", "tr"} | {page.stem for page in HELP.glob("*/*.md")} | {folder.name for folder in LOCALES.glob("*/")}
)


@pytest.fixture(scope="module", params=LANGUAGES)
def language(request) -> str:
    """Each in turn, so that its tests share a page."""
    return request.param


def defaults(known: dict[str, Any]) -> dict[str, Any]:
    """A node's widgets that a person sees, at their defaults."""
    hidden = {name for name, (_, *rest) in known["input"].get("optional", {}).items() if rest and rest[0].get("hidden")}
    return {name: value for name, value in workflow.defaults(known).items() if name not in hidden}


def prompt(client: ComfyClient, **tome: Any) -> workflow.Workflow:
    """The demo's workflow in API format, its picture saved; values of ToMe that are not named are the defaults."""
    settings = workflow.Settings(steps=2, cfg=3.0, sampler="euler", scheduler="simple")
    values = {**workflow.defaults(client.node("ToMe")), **tome}
    made = workflow.demo_workflow(client.node("ToMeDemoModel"), SUBJECT, settings, values)
    made["show"] = {"class_type": "SaveImage", "inputs": {**made["show"]["inputs"], "filename_prefix": "tome"}}
    return made


def load(page: ComfyPage, folder: Path, **tome: Any) -> None:
    """Bring `prompt` into the page by dropping a file, put its nodes in sight and hold the seeds."""
    numbers = {name: str(number) for number, name in enumerate(prompt(page.client), 1)}
    nodes = {}
    for name, node in prompt(page.client, **tome).items():
        inputs = {key: [numbers[v[0]], v[1]] if isinstance(v, list) else v for key, v in node["inputs"].items()}
        nodes[numbers[name]] = {**node, "inputs": inputs}
    file = folder / "api.json"
    file.write_text(json.dumps(nodes), encoding="utf-8")
    page.load(file, TYPES)
    made = page.page.evaluate("app.graph.serialize()")
    for node in made["nodes"]:
        node["pos"] = PLACES[node["type"]]
        if node["type"] == "SaveImage":
            node["size"] = [270, 350]
        values = node.get("widgets_values") or []
        node["widgets_values"] = ["fixed" if value == "randomize" else value for value in values]
    made.setdefault("extra", {})["ds"] = VIEW
    page.clear()
    file = folder / "tome.json"
    file.write_text(json.dumps(made), encoding="utf-8")
    page.load(file, TYPES)


def pixels(data: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB"), dtype=np.int16)


def saved(base: Path) -> list[Path]:
    return sorted((base / "output").glob("tome_*.png"))


def test_node_is_found_by_search_and_added(visit, shoot):
    page = visit()
    found = page.search("token merging", "ToMe")
    found.hover()
    shoot(page.page, "search")
    found.click()
    page.page.get_by_role("search").wait_for(state="hidden")  # it fades, and takes clicks until it is gone
    page.page.mouse.move(600, 300)  # a found node hangs on the mouse until it is put down
    page.page.mouse.click(600, 300)
    page.wait("!app.graph.nodes[0].flags.ghost")
    assert page.types() == ["ToMe"]
    known = page.client.node("ToMe")
    shown = page.values("ToMe")
    assert {name: shown[name] for name in defaults(known)} == defaults(known)


def test_words_that_find_the_node(visit):
    page = visit()
    for words in ("tome", "tomesd", "token merging", "faster"):
        page.search(words, "ToMe").wait_for()
        page.close_search()


def test_slider_follows_the_mouse(visit, tmp_path):
    page = visit()
    load(page, tmp_path)
    page.drag(page.on_slider("ToMe", "ratio", 0.75), page.on_slider("ToMe", "ratio", 0.3))
    assert page.values("ToMe")["ratio"] == pytest.approx(0.3, abs=0.011)
    page.drag(page.on_slider("ToMe", "ratio", 0.3), page.on_slider("ToMe", "ratio", 1.2))
    assert page.values("ToMe")["ratio"] == 1.0


def test_slider_follows_the_mouse_in_nodes_2(visit, tmp_path):
    page = visit({"Comfy.VueNodes.Enabled": True})
    load(page, tmp_path)
    thumb = page.page.get_by_role("slider").first
    rail = page.page.get_by_label("ratio", exact=True).first.bounding_box()
    middle = rail["y"] + rail["height"] / 2
    box = thumb.bounding_box()
    page.drag([box["x"] + box["width"] / 2, middle], [rail["x"] + 0.3 * rail["width"], middle])
    assert page.values("ToMe")["ratio"] == pytest.approx(0.3, abs=0.06)


def test_run_button_makes_the_picture_of_the_shown_values(visit, client, base, tmp_path, shoot):
    page = visit()
    load(page, tmp_path)
    page.drag(page.on_slider("ToMe", "ratio", 0.75), page.on_slider("ToMe", "ratio", 0.5))
    ratio = page.values("ToMe")["ratio"]
    assert ratio == pytest.approx(0.5, abs=0.011)
    before = saved(base)
    page.run("SaveImage")
    (file,) = set(saved(base)) - set(before)
    page.page.get_by_text("Job completed").wait_for(state="hidden")
    shoot(page.page, "graph", clip={"x": 59, "y": 38, "width": SIZE[0] - 59, "height": 600})
    shown = page.ask("return [node.imgs[0].naturalWidth, node.imgs[0].naturalHeight]", "SaveImage")
    assert shown == [64, 64]
    asked, plain = prompt(client, ratio=ratio), prompt(client, ratio=0.0)
    made = [client.images(client.wait(client.post_prompt(one)))[0] for one in (asked, plain)]
    assert (pixels(file.read_bytes()) == pixels(made[0])).all()
    assert (pixels(file.read_bytes()) != pixels(made[1])).any()


def test_exported_workflow_loads_with_the_same_values(visit, tmp_path):
    page = visit()
    load(page, tmp_path, **OTHER)
    values, links = page.all_values(), page.links()
    assert {name: values["ToMe"][name] for name in OTHER} == OTHER and len(links) == 8
    file = tmp_path / "exported.json"
    page.export(file)
    assert "ToMe" in {node["type"] for node in json.loads(file.read_text(encoding="utf-8"))["nodes"]}
    page.clear()
    page.open_by_menu(file, TYPES)
    assert page.all_values() == values and page.links() == links
    page.clear()
    page.load(file, TYPES)
    assert page.all_values() == values and page.links() == links


def test_dropped_picture_brings_the_workflow_back(visit, base, tmp_path):
    page = visit()
    load(page, tmp_path, **OTHER)
    values, links = page.all_values(), page.links()
    before = saved(base)
    page.run("SaveImage")
    (file,) = set(saved(base)) - set(before)
    other = visit()
    other.load(file, TYPES)
    assert other.all_values() == values and other.links() == links


def plain(markdown: str) -> str:
    """A line of a page as it is read."""
    return " ".join(re.sub(r"[`*_]|\]\([^)]*\)|\[", "", markdown).split())


def first_lines(page: Path) -> tuple[str, str]:
    """The heading and the first paragraph."""
    heading, paragraph = page.read_text(encoding="utf-8").split("\n\n")[:2]
    return plain(heading.removeprefix("#")), plain(paragraph)


def test_help_and_texts_in(language, visit, shoot):
    page = visit(locale={"en": "en-US"}.get(language, language))  # the page of the other tests
    nodes = [file.stem for file in sorted(HELP.glob("*.md"))]
    assert "ToMe" in nodes
    texts = own_texts(language)
    assert page.page.evaluate("app.extensionManager.setting.get('Comfy.Locale')") == language
    for node in nodes:
        page.clear()
        page.add(node, 100, 100)
        file = HELP / node / f"{language}.md"
        heading, paragraph = first_lines(file if file.exists() else HELP / f"{node}.md")
        shown = page.help(node)
        shown.get_by_role("heading", level=1).get_by_text(heading, exact=True).wait_for()
        assert plain(shown.locator("p").first.inner_text()) == paragraph
        if (node, language) == ("ToMe", "en"):
            shoot(page.page, "help")
        wanted = wanted_labels(page.client.node(node), texts.get(node, {}))
        assert {name: labels(page, node)[name] for name in wanted} == wanted
        if node == "ToMe":  # its texts come with web/tome.js
            known = texts.get(node, {}).get("inputs", {}).get("preset", {})
            assert labels(page, node)["preset"] == known.get("name", "Preset")


def test_tooltip_in(language, visit):
    page = visit(locale={"en": "en-US"}.get(language, language))  # the page of the other tests
    page.add("ToMe", 100, 100)
    page.page.mouse.move(*page.on_slider("ToMe", "ratio", 0.4))
    page.page.mouse.move(*page.on_slider("ToMe", "ratio", 0.5))
    texts = own_texts(language).get("ToMe", {}).get("inputs", {}).get("ratio", {})
    wanted = texts.get("tooltip", page.client.node("ToMe")["input"]["required"]["ratio"][1]["tooltip"])
    tooltip = page.page.locator(".node-tooltip")
    tooltip.wait_for()
    assert tooltip.inner_text() == wanted


def own_texts(language: str) -> dict[str, Any]:
    """What locales/ has for the nodes, by their names."""
    file = LOCALES / language / "nodeDefs.json"
    return json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}


def labels(page: ComfyPage, node: str) -> dict[str, str]:
    """What the page calls the node (""), and its widgets by name."""
    code = "return {'': node.title, ...Object.fromEntries((node.widgets ?? []).map((w) => [w.name, w.label]))}"
    return page.ask(code, node)


def wanted_labels(known: dict[str, Any], texts: dict[str, Any]) -> dict[str, str]:
    wanted = {"": texts.get("display_name", known["display_name"])}
    for part in ("required", "optional"):
        for name, (_, *rest) in (known["input"].get(part) or {}).items():
            if name in defaults(known):
                label = (rest[0] if rest else {}).get("display_name", name)
                wanted[name] = texts.get("inputs", {}).get(name, {}).get("name", label)
    return wanted


def test_seed_of_merging_stays_the_same_when_run(visit):
    """The page gives every input named "seed" a control that rolls a new number after each run, unless told not to."""
    page = visit()
    page.add("ToMe", 100, 100)
    assert "control_after_generate" not in page.values("ToMe")


@pytest.mark.parametrize("nodes_2", [False, True], ids=["classic", "nodes 2"])
def test_a_preset_sets_the_options_and_follows_them(nodes_2, visit, tmp_path):
    """The control is worked out from the options: choosing one sets them, moving one shows it, and it is not saved."""
    page = visit({"Comfy.VueNodes.Enabled": nodes_2})
    page.add("ToMe", 100, 100)
    told = page.client.node("ToMe")["input"]["required"]["ratio"][1]["tome_presets"]
    shown = page.values("ToMe")
    assert list(shown)[0] == "preset" and shown["preset"] == "Balanced"
    for name, options in told["presets"].items():
        page.set_value("ToMe", "preset", name)
        now = page.values("ToMe")
        assert {option: now[option] for option in options} == options and now["preset"] == name
    page.set_value("ToMe", "ratio", 0.4)
    assert page.values("ToMe")["preset"] == told["custom"]
    for option, value in told["presets"]["Quality"].items():
        page.set_value("ToMe", option, value)
    assert page.values("ToMe")["preset"] == "Quality"
    # What is saved is what a page without this control would save.
    options = {name: value for name, value in page.values("ToMe").items() if name != "preset"}
    made = page.page.evaluate("app.graph.serialize()")
    assert made["nodes"][0]["widgets_values"] == list(options.values())
    page.clear()
    file = tmp_path / "preset.json"
    file.write_text(json.dumps(made), encoding="utf-8")
    page.load(file, ["ToMe"])
    assert page.values("ToMe") == {"preset": "Quality", **options}
    asked = page.page.evaluate("app.graphToPrompt()")["output"]
    assert "preset" not in next(iter(asked.values()))["inputs"]


FIRST = ["preset", "ratio", "stride_x", "stride_y", "method", "seed"]


def folded(page: ComfyPage) -> list[str]:
    """The advanced options, as the server tells them."""
    return [name for name, spec in page.client.node("ToMe")["input"]["optional"].items() if spec[1].get("advanced")]


def press_more(page: ComfyPage) -> None:
    label = more_label(page)  # drawn, so the button has its place
    y = page.ask("return node.widgets.find((w) => w.name === 'more').y + 10", "ToMe")
    page.page.mouse.click(*page.place("ToMe", 100, y))
    node = "app.graph.nodes.find((n) => n.type === 'ToMe')"
    page.wait(f"(label) => {node}.widgets.find((w) => w.name === 'more').label !== label", label)


def more_label(page: ComfyPage) -> str:
    page.page.evaluate("new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(done)))")
    return page.ask("return node.widgets.find((w) => w.name === 'more').label", "ToMe")


def test_the_classic_canvas_shows_the_first_options_until_more_are_asked_for(visit):
    page = visit()
    page.add("ToMe", 100, 40)
    assert page.in_sight("ToMe") == [*FIRST, "more"] and more_label(page) == "More options"
    small = page.ask("return [...node.size]", "ToMe")
    assert small == page.ask("return [node.size[0], node.computeSize()[1]]", "ToMe")
    press_more(page)
    assert page.in_sight("ToMe") == [*FIRST, "more", *folded(page)] and more_label(page) == "Fewer options"
    assert page.ask("return node.size[1]", "ToMe") > small[1] + 20 * len(folded(page))
    press_more(page)
    assert page.in_sight("ToMe") == [*FIRST, "more"] and page.ask("return [...node.size]", "ToMe") == small
    page.set_value("ToMe", "preset", "Quality")  # start 0.2
    page.set_value("ToMe", "min_tokens", 1024)
    assert more_label(page) == "More options (2)"


def test_a_workflow_from_before_the_fold_opens_with_its_values(visit, tmp_path):
    page = visit()
    load(page, tmp_path, **OTHER)
    made = page.page.evaluate("app.graph.serialize()")
    (node,) = (node for node in made["nodes"] if node["type"] == "ToMe")
    values = page.values("ToMe")
    options = [value for name, value in values.items() if name != "preset"]
    assert node["widgets_values"] == options
    node.pop("showAdvanced", None)  # as older pages and versions of ToMe saved it: with all options in sight
    node["size"] = [node["size"][0], 600]
    page.clear()
    file = tmp_path / "older.json"
    file.write_text(json.dumps(made), encoding="utf-8")
    page.load(file, TYPES)
    assert page.values("ToMe") == values and {name: values[name] for name in OTHER} == OTHER
    assert page.ask("return node.size[1] === node.computeSize()[1]", "ToMe")
    asked = page.page.evaluate("app.graphToPrompt()")["output"]
    (inputs,) = (node["inputs"] for node in asked.values() if node["class_type"] == "ToMe")
    assert set(inputs) == {"model", "version", *values} - {"preset"}


def test_an_open_node_is_saved_open(visit, tmp_path):
    page = visit()
    page.add("ToMe", 100, 40)
    press_more(page)
    file = tmp_path / "open.json"
    file.write_text(json.dumps(page.page.evaluate("app.graph.serialize()")), encoding="utf-8")
    page.clear()
    page.load(file, ["ToMe"])
    assert page.in_sight("ToMe") == [*FIRST, "more", *folded(page)]


def test_a_page_that_shows_all_advanced_widgets_has_no_button(visit):
    page = visit({"Comfy.Node.AlwaysShowAdvancedWidgets": True})
    page.add("ToMe", 100, 40)
    assert page.in_sight("ToMe") == [*FIRST, *folded(page)]


def test_nodes_2_has_its_own_button_alone(visit):
    page = visit({"Comfy.VueNodes.Enabled": True})
    page.add("ToMe", 100, 40)
    page.page.get_by_test_id("advanced-inputs-button").wait_for()
    node = page.page.locator("[data-node-id]").first
    assert node.get_by_text("More options").count() == 0
    assert node.get_by_label("Min tokens").count() == 0
    page.page.get_by_test_id("advanced-inputs-button").click()
    node.get_by_text("Min tokens").first.wait_for()


@pytest.mark.parametrize("nodes_2", [False, True], ids=["classic", "nodes 2"])
def test_what_the_method_does_not_look_at_is_greyed(nodes_2, visit):
    page = visit({"Comfy.VueNodes.Enabled": nodes_2})
    page.add("ToMe", 100, 40)
    told = page.client.node("ToMe")["input"]["required"]["ratio"][1]["tome_folded"]["idle"]
    greyed = "return node.widgets.filter((w) => w.disabled).map((w) => w.name).sort()"
    assert page.ask(greyed, "ToMe") == sorted(told["auto"])
    for method, idle in told.items():
        page.set_value("ToMe", "method", method)
        assert page.ask(greyed, "ToMe") == sorted(idle)
    page.set_value("ToMe", "method", "merge")
    page.set_value("ToMe", "mlp", True)
    page.set_value("ToMe", "method", "sample")  # refuses mlp
    assert page.ask(greyed, "ToMe") == sorted(set(told["sample"]) - {"mlp"})


@pytest.mark.parametrize("nodes_2", [False, True], ids=["classic", "nodes 2"])
def test_the_node_tells_what_happened(nodes_2, visit, tmp_path):
    page = visit({"Comfy.VueNodes.Enabled": nodes_2})
    load(page, tmp_path, min_tokens=0, ratio=0.4 if nodes_2 else 0.45)
    before = page.page.evaluate("app.graph.serialize()")["nodes"]
    page.run("SaveImage")
    told = "return node.widgets.find((w) => w.name === '$$node-text-preview')?.value"
    line = page.ask(told, "ToMe")
    told_at_the_end = "Decisions: sample +64x64 +64x64/"
    assert line.startswith("3 of 3 sizes merged (64x64, 32x32, 16x16 tokens). More: ToMe Report. " + told_at_the_end)
    page.page.get_by_text(line[:20]).first.wait_for()
    idle = page.client.node("ToMe")["input"]["required"]["ratio"][1]["tome_folded"]["idle"]
    greyed = "return node.widgets.filter((w) => w.disabled).map((w) => w.name).sort()"
    assert page.ask(greyed, "ToMe") == sorted(idle["sample"]) != sorted(idle["auto"]), "what auto means on a U-Net"
    after = page.page.evaluate("app.graph.serialize()")["nodes"]
    assert [node.get("widgets_values") for node in after] == [node.get("widgets_values") for node in before]
    asked = page.page.evaluate("app.graphToPrompt()")["output"]
    assert not any("text-preview" in name for node in asked.values() for name in node["inputs"])
    page.set_value("ToMe", "min_tokens", 8192)
    page.page.get_by_test_id("queue-button").click()
    page.wait("app.graph.nodes.find((n) => n.type === 'ToMe').widgets.at(-1).value.startsWith('nothing was merged')")
    assert "make a larger picture, or lower min tokens" in page.ask(told, "ToMe")
    if not nodes_2:  # all of the line has room
        page.wait("app.graph.nodes.find((n) => n.type === 'ToMe').size[1] > 300")


@pytest.mark.parametrize("nodes_2", [False, True], ids=["classic", "nodes 2"])
def test_what_the_model_does_not_look_at_is_greyed(nodes_2, visit, tmp_path):
    """A transformer, as the server tells it at a run; with another model nothing is known until the next run."""
    page = visit({"Comfy.VueNodes.Enabled": nodes_2})
    load(page, tmp_path)
    idle = page.client.node("ToMe")["input"]["required"]["ratio"][1]["tome_folded"]["idle"]
    greyed = "return node.widgets.filter((w) => w.disabled).map((w) => w.name).sort()"
    told = "{ node: String(node.id), idle: ['levels', 'cross_attention', 'mlp', 'exact_every'], means: {} }"
    page.ask(
        f"return import('/scripts/api.js').then(({{ api }}) => {{ api.dispatchEvent(new CustomEvent('tome.model', "
        f"{{ detail: {told} }})) }})",
        "ToMe",
    )
    assert page.ask(greyed, "ToMe") == sorted({*idle["auto"], "levels", "cross_attention", "mlp", "exact_every"})
    page.set_value("ToMe", "method", "merge")
    assert page.ask(greyed, "ToMe") == sorted({*idle["merge"], "levels", "cross_attention", "mlp", "exact_every"})
    if nodes_2:  # the control cannot be changed there
        page.page.get_by_test_id("advanced-inputs-button").first.click()
        label = page.page.locator("[data-node-id]").get_by_text("Levels", exact=True).first
        label.wait_for()
    page.ask("node.disconnectInput(0)", "ToMe")
    assert page.ask(greyed, "ToMe") == sorted(idle["merge"])


VERSION = re.search('^version = "(.+)"', (REPO / "pyproject.toml").read_text(encoding="utf-8"), re.MULTILINE)[1]


@pytest.mark.parametrize("nodes_2", [False, True], ids=["classic", "nodes 2"])
def test_a_workflow_keeps_the_version_that_it_was_saved_with(nodes_2, visit, tmp_path):
    """Until it is run: the picture of that run is this version's."""
    page = visit({"Comfy.VueNodes.Enabled": nodes_2})
    asked = (
        "app.graphToPrompt().then(({ output }) => Object.values(output).find((n) => n.class_type === 'ToMe').inputs)"
    )

    def saved() -> dict[str, Any]:
        made = page.page.evaluate("app.graph.serialize()")
        return next(node for node in made["nodes"] if node["type"] == "ToMe")

    def reopened(**properties: Any) -> None:
        made = page.page.evaluate("app.graph.serialize()")
        (node,) = (node for node in made["nodes"] if node["type"] == "ToMe")
        node["properties"] = {**{k: v for k, v in node["properties"].items() if k != "tome_version"}, **properties}
        page.clear()
        file = tmp_path / "older.json"
        file.write_text(json.dumps(made), encoding="utf-8")
        page.load(file, TYPES)

    load(page, tmp_path, min_tokens=0, ratio=0.41 if nodes_2 else 0.46)
    assert "version" not in page.in_sight("ToMe")
    reopened(tome_version=VERSION)
    assert page.page.evaluate(asked)["version"] == saved()["properties"]["tome_version"] == VERSION
    assert VERSION not in saved()["widgets_values"]
    for older, said in (({}, "saved without ToMe's version"), ({"tome_version": "0.1.0"}, "saved with ToMe 0.1.0")):
        reopened(**older)
        expected = older.get("tome_version", "")
        assert page.page.evaluate(asked)["version"] == expected == saved()["properties"]["tome_version"]
        page.run("SaveImage")
        line = page.ask("return node.widgets.find((w) => w.name === '$$node-text-preview')?.value", "ToMe")
        assert said in line and "go by noise levels" in line
        assert page.page.evaluate(asked)["version"] == expected and saved()["properties"]["tome_version"] == VERSION
    if nodes_2:
        page.page.get_by_test_id("advanced-inputs-button").first.click()
        page.page.get_by_text("Decisions", exact=True).first.wait_for()
        assert page.page.get_by_text("version", exact=True).count() == 0


def test_a_new_node_has_this_version(visit):
    page = visit()
    page.add("ToMe", 100, 40)
    saved = page.page.evaluate("app.graph.serialize()")["nodes"][0]
    assert saved["properties"]["tome_version"] == VERSION and "version" not in page.in_sight("ToMe")
