"""install.py itself: the check that hosts run, and its manners on the command line."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from importlib import metadata
from pathlib import Path

import pytest
import stand_ins

from installer import check, link
from installer.console import complain
from installer.paths import ROOT


def install(*arguments: str, python: tuple[str, ...] = (), cwd: Path | None = None) -> subprocess.CompletedProcess:
    command = [sys.executable, *python, str(ROOT / "install.py"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=cwd)


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


def test_damaged_metadata_of_torch_do_not_stop_a_host(monkeypatch):
    monkeypatch.setattr(check.metadata, "version", lambda name: (_ for _ in ()).throw(KeyError("Version")))
    assert check.problem() == ""


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


WRONG = {
    "a home of nobody": ("~nosuchuser/x", "home folder"),
    "a name that is too long": ("x" * 300, "too long"),
    "a file": ("file", "is a file"),
    "a circle of links": ("circle", "circle"),
}


@pytest.mark.parametrize("command", ["comfyui", "a1111"])
@pytest.mark.parametrize("case", WRONG)
def test_a_path_that_cannot_be_read_is_told_without_a_traceback(case, command, tmp_path):
    (tmp_path / "file").write_text("")
    (tmp_path / "circle").symlink_to("circle")
    name, words = WRONG[case]
    for how in ("--copy", "--remove"):
        done = install(command, name, how, cwd=tmp_path)
        assert done.returncode == 1 and words in done.stderr
        assert "Traceback" not in done.stderr and len(done.stderr.strip().splitlines()) == 2


def test_a_path_that_the_console_cannot_show_is_escaped(tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONIOENCODING", "ascii")
    folder = stand_ins.host_folder(tmp_path / "絵", link.COMFYUI)
    done = install("comfyui", str(folder))
    assert done.returncode == 0 and r"\u7d75" in done.stdout, done.stderr


def test_what_nobody_foresaw_is_a_line_too(capsys):
    complain(OSError(5, "Input/output error", "/a"))
    said = capsys.readouterr().err
    assert "Input/output error: /a" in said and len(said.strip().splitlines()) == 2


@pytest.mark.skipif(not hasattr(signal, "SIGHUP"), reason="Windows sends no such signals")
@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGHUP"])
def test_a_copy_ended_by_a_signal_leaves_nothing(name, tmp_path):
    folder = stand_ins.host_folder(tmp_path / "ui", link.COMFYUI)
    code = """if True:
        import os, runpy, sys, time
        sys.path.insert(0, sys.argv[1])
        from installer import files
        def digest(*_, **__):
            print("copying", flush=True)
            time.sleep(60)
        files.digest = digest
        sys.argv[:] = [sys.argv[1] + "/install.py", "comfyui", sys.argv[2], "--copy"]
        runpy.run_path(sys.argv[0], run_name="__main__")
    """
    command = [sys.executable, "-c", code, str(ROOT), str(folder)]
    hears = stand_ins.hear_signals
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, preexec_fn=hears)
    assert process.stdout.readline() == "copying\n"
    (bench,) = (folder / "custom_nodes").iterdir()
    assert bench.name.endswith(".disabled")
    process.send_signal(getattr(signal, name))
    process.communicate(timeout=60)
    assert process.returncode in (130, 128 + getattr(signal, name))
    assert list((folder / "custom_nodes").iterdir()) == []


def test_unknown_arguments_are_refused(tmp_path):
    assert install("demo", "--fast").returncode == 2
    assert install("comfyui", str(tmp_path), "--copy", "--remove").returncode == 2
