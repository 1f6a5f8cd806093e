"""The panel and the settings page with the real gradio of A1111 and reForge (3.41.2) and of Forge (4.40.0)."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SHARED = ROOT / "requirements" / "gradio.txt"
# Of each gradio: what the other must not have.
ITS_OWN = {"3.41.2": ["gradio-client==0.5.0"], "4.40.0": ["gradio-client==1.2.0", "tomlkit==0.12.0"]}


def installed(folder: Path, *packages: str) -> str:
    """The folder, with these packages in it, which it takes once under .cache/: without their dependencies."""
    ready, wanted = folder / "ready", SHARED.read_text("utf-8") + " ".join(packages)
    if not ready.exists() or ready.read_text("utf-8") != wanted:
        # Not compiled: most of it is never imported.
        command = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--no-compile", "--upgrade"]
        command += ["--only-binary", ":all:", "--disable-pip-version-check", "--target", str(folder)]
        try:
            done = subprocess.run([*command, *packages], capture_output=True, text=True, timeout=280)
        except subprocess.TimeoutExpired:
            pytest.skip(f"installing {folder.name} took too long")
        if done.returncode:
            pytest.skip(f"{folder.name} could not be installed: {done.stderr.strip()[-200:]}")
        ready.write_text(wanted, "utf-8")
    return str(folder)


@pytest.fixture(scope="module", params=sorted(ITS_OWN))
def path(request) -> str:
    """PYTHONPATH with that gradio; what it shares with the other lies in one folder, the rest is the tests' own."""
    cache, version = ROOT / ".cache" / f"gradio-py{sys.version_info[0]}{sys.version_info[1]}", request.param
    gradio = installed(cache / f"gradio-{version}", f"gradio=={version}", *ITS_OWN[version])
    return os.pathsep.join((gradio, installed(cache / "shared", "-r", str(SHARED))))


@pytest.mark.slow
@pytest.mark.network
@pytest.mark.timeout(330)
def test_the_panel_and_the_settings_are_what_gradio_takes(path):
    """Built on a page and, as the API does it, asked for the defaults; the page's own description shows both."""
    done = subprocess.run(
        [sys.executable, Path(__file__).with_name("build_panel.py")], capture_output=True, text=True, timeout=120,
        env={**os.environ, "GRADIO_ANALYTICS_ENABLED": "False", "PYTHONPATH": path},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    assert "Warning" not in done.stderr, done.stderr[-2000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["values"][:3] == [False, 0.75, -1.0] and found["values"] == found["again"]
    assert {"slider", "dropdown", "checkbox", "number", "textbox", "html"} <= set(found["kinds"])
    assert len(found["ids"]) == len(set(found["ids"])) == len(found["values"])
    assert found["settings"] == len(found["values"]) + 2
    assert "Share of the tokens that attention does without" in found["texts"]
    assert 'href=\\"file=docs/settings.md?1\\"' in found["texts"]
    assert found["pasted"] == 0.35
    assert "<p>The pasted text was saved with ToMe 0.1.0" in found["older"] and found["newer"] == ""
    options = ["method", "ratio", "start", "own_token"]
    assert ["preset", "input", ["preset", *options], False] in found["preset"]
    shows = [[option, "change", ["preset"], False] for option in options]
    assert all(event in found["preset"] for event in shows) and len(found["preset"]) == 5
    marks = found["marks"]
    assert {"stride_x", "reduce", "mlp"} <= set(marks["grey"]) and "own_token" not in marks["grey"]
    assert set(marks["grey"]) == set(marks["with"]["auto"]) and "preset" not in marks["sets"]
    assert set(marks["grey"]) < set(marks["sets"]) and "whole" in marks["with"]["sample"]
    assert "stride_x" not in marks["with"]["merge"] and "own_token" in marks["with"]["merge"]
