"""No page tells what is no longer so: tables equal their CSVs and options, links lead somewhere."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from benchmarks import tables

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("**/*.md")), *sorted((ROOT / "web").glob("**/*.md"))]


@pytest.mark.parametrize("page", tables.PAGES)
def test_tables_are_up_to_date(page):
    text = (ROOT / page).read_text(encoding="utf-8")
    assert tables.filled(text) == text, "run `python -m benchmarks.tables`"


@pytest.mark.parametrize("maker", tables.MAKERS)
def test_every_table_stands_on_a_page(maker):
    assert any(f"<!-- {maker} -->" in (ROOT / page).read_text(encoding="utf-8") for page in tables.PAGES)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)#]+)[^)]*\)", page.read_text(encoding="utf-8")):
        if not target.startswith("http"):
            assert (page.parent / target).exists(), f"{page.name} links to {target}"


def test_readme_names_what_there_is():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    for folder in re.findall(r"python -m ([\w.]+)", text):
        assert (ROOT / (folder.replace(".", "/") + ".py")).exists(), folder
    for command in re.findall(r"python install\.py (\w+)", text):
        assert command in ("demo", "test", "comfyui", "a1111")


def test_every_node_has_a_help_page():
    nodes = set()
    for file in (ROOT / "comfy_tome").glob("*.py"):
        nodes |= set(re.findall(r'node_id="(\w+)"', file.read_text(encoding="utf-8")))
    assert nodes == {page.stem for page in (ROOT / "web" / "docs").glob("*.md")}
