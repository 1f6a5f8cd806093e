"""Help pages and interface texts in every language: complete, of today's English, and served by a real ComfyUI."""

from __future__ import annotations

import copy
import json
import os
import re
import shutil
import sys
from collections import Counter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
from installer.server import ComfyServer
from lab.pages import option_tables
from shared_tome import ToMeConfig
from shared_tome.methods import CUSTOM, PRESETS

from . import translations
from .translations import HELP, LANGUAGES, LOCALES, help_page, inputs, own_texts, prose, stale

NODES = sorted(page.stem for page in HELP.glob("*.md"))
EACH = pytest.mark.parametrize("language", LANGUAGES)
PAGES = pytest.mark.parametrize("node", NODES)
NUMBER = re.compile(r"(?<![\w.])-?\d+(?:\.\d+)?", re.ASCII)
NAME = re.compile(r"\b[A-Za-z]*[A-Z]\w*[A-Z0-9]", re.ASCII)  # up to the last capital: SDXL, H200, LoRA of LoRAs
CHOICES = {choice for option in ToMeConfig.options().values() for choice in option.choices or ()} | {*PRESETS, CUSTOM}
IDS = {*CHOICES, *(widget.name for widget in ToMeConfig.widgets())}
UNMISTAKABLE = {name for name in IDS if "_" in name} | {"sample", "downsample", "auto", *PRESETS, CUSTOM}
SCRIPT = {
    "ja": "[\u3040-\u30ff\u4e00-\u9fff]",
    "ko": "[\uac00-\ud7a3]",
    "zh": "[\u4e00-\u9fff]",
    "zh-TW": "[\u4e00-\u9fff]",
}
CHARSET = {"ja": "shift_jis", "zh": "gb2312", "zh-TW": "big5"}  # none has the others' own characters
ALIKE = {
    "MLP", "JSON", "PSNR", "SSIM", "CLIP Vision", "ToMe", "ToMe CLIP Vision", "ToMe Compare", "ToMe Map", "ToMe Record",
    "ToMe Report",
}  # fmt: skip


@pytest.fixture(scope="module")
def client(tmp_path_factory):
    named = os.environ.get("COMFYUI_DIR")
    if not named:
        pytest.skip("COMFYUI_DIR does not name a ComfyUI (`python install.py test` brings one)")
    with ComfyServer(Path(named), tmp_path_factory.mktemp("comfyui")) as client:
        yield client


@pytest.fixture(scope="module")
def known(client) -> dict:
    return client.get("/object_info")


@pytest.fixture
def copied(tmp_path, monkeypatch) -> Path:
    """locales/ to be changed."""
    folder = tmp_path / "locales"
    shutil.copytree(LOCALES, folder)
    monkeypatch.setattr(translations, "LOCALES", folder)
    monkeypatch.setattr(option_tables, "LOCALES", folder)
    return folder


def keeps(source: str, own: str) -> list[str]:
    """What a translation must have as its English has it, and has not."""
    ids = {name for name in UNMISTAKABLE if re.search(rf"\b{name}\b", source, re.ASCII)}
    ids |= {name for name in CHOICES if re.search(rf"^{re.escape(name)}:", source, re.MULTILINE)}
    code = set(re.findall(r"`[^`]+`", source))
    wanted, has = {*NAME.findall(source), *ids}, {*NAME.findall(own), *re.findall(r"\w+", own, re.ASCII)}
    missing = [part for part in wanted - has if part not in own.split("`")]
    missing += Counter(NUMBER.findall(source)) - Counter(NUMBER.findall(own))
    return sorted(missing) + sorted(code - set(re.findall(r"`[^`]+`", own)))


def test_there_are_the_promised_languages():
    assert {"ja", "ko", "zh", "zh-TW"} <= set(LANGUAGES) == set(SCRIPT)
    assert {"en", *LANGUAGES} == set(json.loads((LOCALES / "words.json").read_text(encoding="utf-8")))


@EACH
def test_every_text_has_one_in(language, known):
    source, own = translations.english_texts(known), own_texts(language)
    assert {node for node in known if node.startswith("ToMe")} == set(NODES)
    assert len(source) > 80
    assert set(own) == set(source)
    assert all(text.strip() == text and text for text in own.values())


@EACH
def test_names_have_no_character_that_the_page_takes_for_its_own_syntax(language):
    for key, text in own_texts(language).items():
        if not key.endswith(".tooltip"):
            assert not re.search(r"[|{}@\n]", text), key


@EACH
def test_numbers_and_names_of_options_stay_in(language, known):
    for key, (source, own) in translations.pairs(language, known).items():
        assert not keeps(source, own), key


@EACH
def test_quoted_controls_are_called_as_they_are_shown_in(language, known):
    own = own_texts(language)
    labels = {widget.option.label.lower(): own[f"ToMe.inputs.{widget.name}.name"] for widget in ToMeConfig.widgets()}
    quoted = 0
    for key, (source, text) in translations.pairs(language, known).items():
        for label in re.findall(r"'([a-z ]+)'", source):
            quoted += 1
            assert labels[label] in text, key
    assert quoted > 1


@EACH
def test_texts_are_written_in(language, known):
    for key, (_, own) in translations.pairs(language, known).items():
        words = re.sub(r"[`*#]", "", own).strip()
        assert words in ALIKE or re.search(SCRIPT[language], words), key
        if language in CHARSET:
            "".join(re.findall("[\u4e00-\u9fff]", own)).encode(CHARSET[language])


@EACH
def test_no_text_is_of_older_english_in(language, known):
    assert not stale(language, known)


def test_changed_english_is_named_until_it_is_translated_anew(copied, known):
    changed = copy.deepcopy(known)
    changed["ToMe"]["input"]["required"]["ratio"][1]["tooltip"] += " And more."
    (line,) = {*stale("ko", changed)} - {*stale("ko", known)}
    assert line.startswith("ko: ToMe.inputs.ratio.tooltip: translate anew") and "And more." in line
    file = copied / "ko" / "nodeDefs.json"
    texts = json.loads(file.read_text(encoding="utf-8"))
    texts["ToMe"]["inputs"]["ratio"]["tooltip"] += " 그리고 더."
    file.write_text(json.dumps(texts), encoding="utf-8")
    assert "ko: ToMe.inputs.ratio.tooltip: its translation was changed" in "".join(stale("ko", changed))
    translations.write_down("ko", changed)
    assert not stale("ko", changed) and stale("ko", known)


def test_a_text_that_went_is_named(copied, known):
    changed = copy.deepcopy(known)
    changed["ToMeMap"]["input"]["optional"].pop("legend")
    lines = sorted({*stale("ja", changed)} - {*stale("ja", known)})
    assert [line.split(": ")[1] for line in lines] == [
        f"ToMeMap.inputs.legend.{part} is no more" for part in ("name", "tooltip")
    ]


def test_changed_help_page_is_named(tmp_path, monkeypatch, known):
    folder = tmp_path / "docs"
    shutil.copytree(HELP, folder)
    monkeypatch.setattr(translations, "HELP", folder)
    before = stale("zh", known)
    page = folder / "ToMeRecord.md"
    page.write_text(page.read_text(encoding="utf-8").replace("bit for bit", "nearly"), encoding="utf-8")
    (line,) = {*stale("zh", known)} - {*before}
    assert line.startswith("zh: web/docs/ToMeRecord, paragraph 4: translate anew")


def test_there_is_no_page_of_an_unknown_node_or_language():
    pages = {page.relative_to(HELP).as_posix() for page in HELP.glob("*/*")}
    assert pages == {f"{node}/{language}.md" for node in NODES for language in LANGUAGES}


def shape(node: str, language: str) -> list[str]:
    """What each paragraph of a page is: a heading of some level, a list of so many, a list that is made, or words."""
    page = help_page(node, language).read_text(encoding="utf-8")
    page = re.sub(r"(<!-- \w+)[^\n]*( -->\n).*?<!-- end -->", r"\1\2", page, flags=re.DOTALL)
    kinds = []
    for block in page.strip().split("\n\n"):
        mark = re.match(r"#+|<!-- \w+|\*\*|- ", block)
        items = re.findall(r"^- ", block, re.MULTILINE)
        kinds.append((mark[0] if mark else "words") + (f"{len(items)} of them" if items else ""))
    return kinds


@EACH
@PAGES
def test_pages_are_built_alike_in(language, node):
    assert shape(node, language) == shape(node, "en")
    assert prose(node, language).keys() == prose(node, "en").keys()
    title = help_page(node, "en").read_text(encoding="utf-8").split("\n")[0]
    page = help_page(node, language).read_text(encoding="utf-8")
    assert page.startswith(f"{title}\n\n")
    # A line that ends within a paragraph would be seen as a space between two characters.
    assert not [
        block for block in page.strip().split("\n\n") if "\n" in block and not re.search("\n- |^- |<!--", block)
    ]
    assert set(re.findall(r"<!-- controls( \S+)? -->", page)) <= {f" {language}"}


@pytest.mark.parametrize("language", ["en", *LANGUAGES])
@PAGES
def test_no_page_has_what_the_narrow_panel_cannot_show(language, node):
    page = help_page(node, language).read_text(encoding="utf-8")
    assert not re.search(r"^\|", page, re.MULTILINE), "a table"
    assert not re.search(r"\]\((?!https?://)", page), "a link that leads nowhere from within ComfyUI"


@pytest.mark.parametrize("language", ["en", *LANGUAGES])
@PAGES
def test_pages_give_the_ranges_and_defaults_of_all_controls(language, node, known):
    """As the server has them: for ToMe they are made from ToMeConfig, for the other nodes written."""
    page = help_page(node, language).read_text(encoding="utf-8")
    labels = translations.english_texts(known) if language == "en" else own_texts(language)
    for name, options in inputs(known[node]).items():
        if "default" not in options or name.startswith("stride_"):
            continue
        listed = all(f"- `{choice}`" in page for choice in options["choices"])  # below, with what each does
        choices = [] if listed else options["choices"]
        begin = option_tables.head(
            language, [labels[f"{node}.inputs.{name}.name"]], options["default"], options.get("min"),
            options.get("max"), choices, bool(options.get("advanced")),
        )  # fmt: skip
        assert f"\n\n{begin.rstrip()}" in page or f" -->\n{begin.rstrip()}" in page, begin


def test_presets_are_as_the_node_has_them(known):
    """The list of controls has them from PRESETS, the node's control from the server."""
    presets = known["ToMe"]["input"]["required"]["ratio"][1]["tome_presets"]
    page = help_page("ToMe", "en").read_text(encoding="utf-8")
    for line in presets["help"].split("\n"):
        assert line.split(": ")[-1] in page
    assert f"**{presets['label']}** (" in page and set(presets["presets"]) == set(PRESETS)


@EACH
def test_comfyui_serves_the_texts_in(language, client):
    assert client.get("/i18n")[language]["nodeDefs"] == option_tables.texts(language)


@EACH
@PAGES
def test_comfyui_serves_the_page_in(language, node, client, known):
    pack = known[node]["python_module"].removeprefix("custom_nodes.")
    served = client.request(f"/extensions/{pack}/docs/{node}/{language}.md")
    assert served == help_page(node, language).read_bytes()
