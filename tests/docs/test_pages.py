"""No page tells what is no longer so: tables equal their CSVs and options, links lead somewhere."""

from __future__ import annotations

import ast
import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from lab.pages import fill

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("**/*.md")), *sorted((ROOT / "web").glob("**/*.md"))]


@pytest.mark.parametrize("page", fill.PAGES)
def test_tables_are_up_to_date(page):
    text = (ROOT / page).read_text(encoding="utf-8")
    assert fill.filled(text) == text, "run `python -m lab.pages`"


@pytest.mark.parametrize("maker", fill.MAKERS)
def test_every_table_stands_on_a_page(maker):
    marker = re.compile(rf"<!-- {maker}( [\w-]+)? -->")
    assert any(marker.search((ROOT / page).read_text(encoding="utf-8")) for page in fill.PAGES)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)#]+)[^)]*\)", page.read_text(encoding="utf-8")):
        if not target.startswith("http"):
            assert (page.parent / target).exists(), f"{page.name} links to {target}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_files_that_a_page_names_are_there(page):
    """By their path in the repository, or in the core. Other programs' files lie in folders that we do not have."""
    for name in re.findall(r"[\w./]+/\w+\.py\b", page.read_text(encoding="utf-8")):
        ours = (ROOT / name.split("/")[0]).is_dir()
        assert not ours or any((ROOT / core / name).is_file() for core in ("", "shared_tome")), f"{page.name}: {name}"


def test_readme_fits_two_screens_and_names_what_there_is():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert len(text) <= 9000
    for folder in re.findall(r"python -m ([\w.]+)", text):
        assert (ROOT / (folder.replace(".", "/") + ".py")).exists(), folder
    for command in re.findall(r"python install\.py (\w+)", text):
        assert command in ("demo", "compare", "test", "comfyui", "a1111")


def messages() -> list[re.Pattern]:
    """All texts of the code, with anything where a value is put in."""
    found = []
    for folder in ("shared_tome", "comfy_tome", "a1111_extension", "installer"):
        for file in (ROOT / folder).rglob("*.py"):
            for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
                if isinstance(node, ast.JoinedStr):
                    parts = [re.escape(p.value) if isinstance(p, ast.Constant) else ".+" for p in node.values]
                elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                    parts = [re.sub("%[a-z]", ".+", re.escape(node.value))]
                else:
                    continue
                if len("".join(part for part in parts if part != ".+")) > 20:  # and not a value alone
                    found.append(re.compile("".join(parts)))
    return found


def test_troubleshooting_quotes_what_the_code_says():
    """A quoted line of five words or more is one that the code writes, or the beginning of one."""
    text = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
    quoted = [" ".join(line.split()) for line in re.findall(r"`([^`]+)`", text)]
    quoted = [line for line in quoted if len(line.split()) >= 5]
    assert len(quoted) > 10
    known = messages()
    for line in quoted:
        assert any(m.fullmatch(line) or m.pattern.startswith(re.escape(line)) for m in known), line


def test_rows_of_the_hosts_page_are_checks_that_can_be_run():
    """A row's name is the first line of what a check of tests/hosts/a1111.py says of itself."""
    tree = ast.parse((ROOT / "tests" / "hosts" / "a1111.py").read_text(encoding="utf-8"))
    found = (node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef) and node.name.startswith("check_"))
    names = {ast.get_docstring(check).splitlines()[0] for check in found}
    page = (ROOT / "docs" / "hosts.md").read_text(encoding="utf-8")
    tables = re.findall(r"\| check \|.*\n.*\n((?:\|.*\n)+)", page)
    rows = {line.split(" | ")[0].removeprefix("| ") for table in tables for line in table.splitlines()}
    assert len(rows) > 20 and rows <= names


def test_every_node_has_a_help_page():
    nodes = set()
    for file in (ROOT / "comfy_tome").glob("*.py"):
        nodes |= set(re.findall(r'node_id="(\w+)"', file.read_text(encoding="utf-8")))
    assert nodes == {page.stem for page in (ROOT / "web" / "docs").glob("*.md")}
