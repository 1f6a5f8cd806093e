"""install.py itself: the check that hosts run, and its manners on the command line."""

from __future__ import annotations

import subprocess
import sys
import time
from importlib import metadata

import pytest

from installer import check
from installer.paths import ROOT


def install(*arguments: str, python: tuple[str, ...] = ()) -> subprocess.CompletedProcess:
    command = [sys.executable, *python, str(ROOT / "install.py"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


def test_without_arguments_it_is_silent_and_quick():
    begun = time.monotonic()
    done = install()
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert time.monotonic() - begun < 5.0


def test_without_arguments_it_never_imports_torch():
    done = install(python=("-X", "importtime"))
    assert done.returncode == 0
    assert "torch" not in done.stderr and "numpy" not in done.stderr


def test_says_in_one_line_that_torch_is_missing(monkeypatch):
    def missing(name):
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(check.metadata, "version", missing)
    assert "no PyTorch" in check.problem() and "\n" not in check.problem()


@pytest.mark.parametrize(
    ("version", "fine"), [("1.13.1+cu117", False), ("2.0.1", False), ("2.1.2", True), ("2.13.0+cpu", True)]
)
def test_says_that_torch_is_too_old(monkeypatch, version, fine):
    monkeypatch.setattr(check.metadata, "version", lambda name: version)
    assert (check.problem() == "") is fine
    assert fine or version in check.problem()


def test_says_that_the_repository_is_incomplete(monkeypatch, tmp_path):
    monkeypatch.setattr(check, "ROOT", tmp_path)
    assert "shared_tome" in check.problem()


def test_a_wrong_folder_is_told_without_a_traceback(tmp_path):
    for command in ("comfyui", "a1111"):
        done = install(command, str(tmp_path))
        assert done.returncode == 1
        assert "missing" in done.stderr and "Traceback" not in done.stderr


def test_a_wrong_checkpoint_is_told_before_anything_is_installed(tmp_path):
    done = install("demo", "--checkpoint", str(tmp_path / "none.safetensors"))
    assert done.returncode == 1
    assert "none.safetensors" in done.stderr and "Traceback" not in done.stderr


def test_a_wrong_comfyui_is_told_before_anything_is_installed(tmp_path):
    done = install("demo", "--comfyui", str(tmp_path))
    assert done.returncode == 1
    assert "main.py" in done.stderr and "Traceback" not in done.stderr


def test_unknown_arguments_are_refused(tmp_path):
    assert install("demo", "--fast").returncode == 2
    assert install("comfyui", str(tmp_path), "--copy", "--remove").returncode == 2
