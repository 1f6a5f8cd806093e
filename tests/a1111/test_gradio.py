"""The panel and the settings page with the real gradio of A1111 and reForge (3.41.2) and of Forge (4.40.0)."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
# Gradio 4.40 imports a name that newer versions of huggingface-hub have dropped.
NEEDS = {"3.41.2": ["huggingface-hub==0.25.2"], "4.40.0": ["huggingface-hub==0.25.2"]}


@pytest.fixture(scope="module", params=sorted(NEEDS))
def python(request) -> Path:
    """The Python of an environment with that gradio, made once under .cache/."""
    folder = ROOT / ".cache" / f"gradio-{request.param}-py{sys.version_info[0]}{sys.version_info[1]}"
    found = folder / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    ready = folder / "ready"
    if not ready.exists():
        venv.create(folder, with_pip=True, clear=True)
        command = [found, "-m", "pip", "install", "-q", "--disable-pip-version-check", f"gradio=={request.param}"]
        try:
            done = subprocess.run([*command, *NEEDS[request.param]], capture_output=True, text=True, timeout=280)
        except subprocess.TimeoutExpired:
            pytest.skip(f"installing gradio {request.param} took too long")
        if done.returncode:
            pytest.skip(f"gradio {request.param} could not be installed: {done.stderr.strip()[-200:]}")
        ready.write_text(request.param)
    return found


@pytest.mark.slow
@pytest.mark.network
@pytest.mark.timeout(330)
def test_the_panel_and_the_settings_are_what_gradio_takes(python):
    """Built on a page and, as the API does it, asked for the defaults; the page's own description shows both."""
    done = subprocess.run(
        [python, Path(__file__).with_name("build_panel.py"), sysconfig.get_paths()["purelib"]],
        capture_output=True, text=True, timeout=120, env={**os.environ, "GRADIO_ANALYTICS_ENABLED": "False"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    assert "Warning" not in done.stderr, done.stderr[-2000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["values"][:3] == [False, 0.75, -1.0] and found["values"] == found["again"]
    assert {"slider", "dropdown", "checkbox", "number"} <= set(found["kinds"])
    assert len(found["ids"]) == len(set(found["ids"])) == len(found["values"])
    assert found["settings"] == len(found["values"]) + 2
    assert "similar tokens become one" in found["texts"]
    assert found["pasted"] == 0.35
    options = ["method", "ratio", "start", "own_token"]
    assert ["preset", "input", ["preset", *options], False] in found["preset"]
    shows = [[option, "change", ["preset"], False] for option in options]
    assert all(event in found["preset"] for event in shows) and len(found["preset"]) == 5
