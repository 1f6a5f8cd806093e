"""What the registry of ComfyUI publishes: valid facts about the pack, all that ComfyUI loads, and little else."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

if sys.version_info < (3, 11):
    pytest.skip("tomllib came with Python 3.11", allow_module_level=True)
import tomllib

ROOT = Path(__file__).resolve().parents[2]
FACTS = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
LINES = (ROOT / ".comfyignore").read_text(encoding="utf-8").splitlines()
IGNORED = [line for line in LINES if line and not line.startswith("#")]


def published() -> list[Path]:
    """The files of the archive: all that git knows, without those that .comfyignore names (folders and files alone)."""
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=False)
    if listed.returncode:
        pytest.skip("this is no git checkout")
    names = [name for name in listed.stdout.split("\0") if name]
    return [Path(name) for name in names if not any(name == one or name.startswith(one) for one in IGNORED)]


def test_facts_are_those_that_the_registry_asks_for():
    project, comfy = FACTS["project"], FACTS["tool"]["comfy"]
    assert re.fullmatch(r"[a-z][a-z0-9-]{0,99}", project["name"])
    assert re.fullmatch(r"\d+\.\d+\.\d+", project["version"])
    assert project["license"] and project["description"] and comfy["PublisherId"] and comfy["DisplayName"]
    changes = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    assert re.search(r"^## (.*)$", changes, re.MULTILINE)[1] == project["version"]  # the newest


def test_archive_has_all_that_comfyui_loads_and_is_small():
    files = published()
    parts = {file.parts[0] for file in files}
    assert {"__init__.py", "comfy_tome", "shared_tome", "web", "locales", "example_workflows", "LICENSE"} <= parts
    assert not parts & {"tests", "demo", "lab"}
    size = sum((ROOT / file).stat().st_size for file in files)
    assert size < 8e6, f"{size / 1e6:.1f} MB"


def test_what_is_published_imports_nothing_that_is_not():
    left_out = {name.rstrip("/").removesuffix(".py") for name in IGNORED}
    for file in published():
        if file.suffix == ".py":
            text = (ROOT / file).read_text(encoding="utf-8")
            found = set(re.findall(r"^(?:from|import) (\w+)", text, re.MULTILINE))
            assert not found & left_out, file
