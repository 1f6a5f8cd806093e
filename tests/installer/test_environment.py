"""The environment's stamp: when something is installed, and when nothing is."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from installer import environment
from installer.console import SetupError

GROUP = environment.Group("demo", "things", (("demo.txt", ()),))


@pytest.fixture
def requirements(tmp_path: Path) -> Path:
    folder = tmp_path / "requirements"
    folder.mkdir()
    (folder / "constraints.txt").write_text("c==1\n")
    (folder / "base.txt").write_text("b==1\n")
    (folder / "demo.txt").write_text("-r base.txt\na==1\n")
    return folder


@pytest.mark.parametrize("name", ["constraints.txt", "base.txt", "demo.txt"])
def test_fingerprint_follows_every_file(requirements, name):
    before = environment.fingerprint(GROUP, requirements)
    assert environment.fingerprint(GROUP, requirements) == before
    (requirements / name).write_text((requirements / name).read_text() + "d==1\n")
    assert environment.fingerprint(GROUP, requirements) != before


def test_fingerprint_follows_python_and_options(requirements, monkeypatch):
    before = environment.fingerprint(GROUP, requirements)
    with_option = environment.Group("demo", "things", (("demo.txt", ("--no-deps",)),))
    assert environment.fingerprint(with_option, requirements) != before
    monkeypatch.setattr(environment, "_minor", lambda: "3.99")
    assert environment.fingerprint(GROUP, requirements) != before


@pytest.fixture
def ready(tmp_path, requirements, monkeypatch):
    """An environment folder whose making and installing only count."""
    folder = tmp_path / "venv"
    calls: list[str] = []
    monkeypatch.setattr(environment, "REQUIREMENTS", requirements)
    monkeypatch.setattr(environment.fingerprint, "__defaults__", (requirements,))

    def make(place: Path) -> None:
        calls.append("make")
        environment.python_in(place).parent.mkdir(parents=True, exist_ok=True)
        environment.python_in(place).write_text("")

    monkeypatch.setattr(environment, "_make", make)
    monkeypatch.setattr(environment, "_install", lambda python, name, options, title: calls.append(name))
    return folder, calls


def test_a_second_run_does_nothing(ready):
    folder, calls = ready
    environment.ensure([GROUP], folder)
    assert calls == ["make", "demo.txt"]
    assert environment.ensure([GROUP], folder) == environment.python_in(folder)
    assert calls == ["make", "demo.txt"]


def test_changed_requirements_are_installed(ready, requirements):
    folder, calls = ready
    environment.ensure([GROUP], folder)
    (requirements / "demo.txt").write_text("a==2\n")
    environment.ensure([GROUP], folder)
    assert calls == ["make", "demo.txt"] * 2


def test_a_failed_installation_is_tried_again(ready, monkeypatch):
    folder, calls = ready

    def fail(*_):
        raise SetupError("no network")

    with monkeypatch.context() as patch:
        patch.setattr(environment, "_install", fail)
        with pytest.raises(SetupError):
            environment.ensure([GROUP], folder)
    assert environment.read_stamp(folder) == {}
    environment.ensure([GROUP], folder)
    assert "demo.txt" in calls


def test_an_unreadable_stamp_means_nothing_is_installed(tmp_path):
    (tmp_path / environment.STAMP).write_text("[oops")
    assert environment.read_stamp(tmp_path) == {}


def test_pip_failures_say_which_package_and_what_to_do(tmp_path):
    lines = ["ERROR: Could not find a version", "ERROR: No matching distribution found for torch==2.13.0"]
    what, todo = environment.explain_pip(lines, tmp_path / "pip.log")
    assert "torch==2.13.0" in what and "torch==2.13.0" in todo and "pip.log" in todo
    unreachable = ["WARNING: Retrying ... NewConnectionError(...)", *lines]
    assert "network" in environment.explain_pip(unreachable, tmp_path)[1]
    assert "disk" in environment.explain_pip(["OSError: [Errno 28] No space left on device"], tmp_path)[1].lower()


def test_pip_is_run_and_its_failure_raised(tmp_path, monkeypatch):
    monkeypatch.setattr(environment, "CACHE", tmp_path)
    python = Path(sys.executable)
    current = environment.Stage("pip")
    environment.pip(python, ["install", "--help"], current)
    with pytest.raises(SetupError, match="pip could not"):
        environment.pip(python, ["install", "-r", str(tmp_path / "none.txt")], current)
    assert "none.txt" in (tmp_path / "pip.log").read_text()


def test_every_requirement_is_pinned():
    for file in environment.REQUIREMENTS.glob("*.txt"):
        for line in file.read_text(encoding="utf-8").splitlines():
            if line and not line.startswith(("#", "-r ")):
                assert "==" in line.partition(";")[0], f"{file.name}: {line}"
