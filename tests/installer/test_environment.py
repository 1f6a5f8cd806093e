"""The environment's stamp: when something is installed, and when nothing is."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import stand_ins

from installer import environment, files
from installer.console import SetupError
from installer.paths import ROOT

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
    monkeypatch.setattr(environment, "CACHE", tmp_path / "cache")
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


def unstamped(folder: Path) -> Path:
    python = environment.python_in(folder)
    python.parent.mkdir(parents=True)
    python.write_text("mine")
    return folder


@pytest.fixture
def making(tmp_path, requirements, monkeypatch):
    """An environment folder that is made as ever, but for venv and pip, which write a line each."""
    monkeypatch.setattr(environment, "REQUIREMENTS", requirements)
    monkeypatch.setattr(environment, "CACHE", tmp_path / "cache")
    monkeypatch.setattr(environment.fingerprint, "__defaults__", (requirements,))
    monkeypatch.setattr(environment, "_version_of", lambda python: python.read_text())

    def create(folder, **_options):
        python = environment.python_in(Path(folder))
        python.parent.mkdir()  # fails where something is left of an earlier one
        python.write_text(environment._minor())

    monkeypatch.setattr(environment.venv, "create", create)
    monkeypatch.setattr(environment, "_install", lambda *_: None)
    return tmp_path / "venv"


def test_a_users_environment_is_left_alone(making):
    unstamped(making)
    before = stand_ins.tree(making)
    with pytest.raises(SetupError, match="no stamp") as told:
        environment.ensure([GROUP], making)
    assert "Move it away" in told.value.hint
    assert stand_ins.tree(making) == before and not environment.CACHE.exists()


def test_a_users_environment_behind_a_link_is_left_alone(making, tmp_path):
    theirs = unstamped(tmp_path / "theirs")
    before = stand_ins.tree(theirs)
    making.symlink_to(theirs, target_is_directory=True)
    with pytest.raises(SetupError, match="no stamp"):
        environment.ensure([GROUP], making)
    assert stand_ins.tree(theirs) == before


@pytest.mark.parametrize("key", [environment.MADE, environment.UNFINISHED, "demo"])
def test_nothing_is_cleared_through_a_link(making, tmp_path, monkeypatch, key):
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    making.symlink_to(elsewhere, target_is_directory=True)
    environment.ensure([GROUP], making)  # an empty folder on another disk may be used
    environment.write_stamp(elsewhere, {key: "x"})
    before = stand_ins.tree(elsewhere)
    monkeypatch.setattr(environment, "_minor", lambda: "3.99")
    with pytest.raises(SetupError, match="is a link to"):
        environment.ensure([GROUP], making)
    assert stand_ins.tree(elsewhere) == before


def test_an_empty_folder_is_used(making):
    making.mkdir()
    assert environment.ensure([GROUP], making).exists()


@pytest.mark.parametrize("stage", ["venv", "pip", "stamp"])
@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit, OSError(28, "No space left on device")], ids=repr)
def test_whatever_ends_it_the_next_run_finishes(making, monkeypatch, stage, error):
    def fail(*_, **__):
        raise error

    real = environment.venv.create
    with monkeypatch.context() as patch:
        if stage == "venv":
            patch.setattr(environment.venv, "create", lambda folder, **_: (real(folder), fail()))
        elif stage == "pip":
            patch.setattr(environment, "_install", fail)
        else:
            patch.setattr(Path, "replace", fail)
        with pytest.raises(BaseException) as raised:
            environment.ensure([GROUP], making)
    if isinstance(error, OSError) and stage != "pip":
        assert isinstance(raised.value, SetupError) and "disk is full" in raised.value.hint
    python = environment.ensure([GROUP], making)
    stamp = environment.read_stamp(making)
    assert python.read_text() == environment._minor() == stamp[environment.MADE] and "demo" in stamp
    assert environment.UNFINISHED not in stamp


def test_an_environment_of_ours_is_made_anew_for_another_python(making, monkeypatch):
    environment.ensure([GROUP], making)
    (making / "old.txt").write_text("")
    monkeypatch.setattr(environment, "_minor", lambda: "3.99")
    assert environment.ensure([GROUP], making).read_text() == "3.99"
    assert not (making / "old.txt").exists()


def test_an_earlier_versions_environment_is_kept_aside(making, monkeypatch, capsys):
    """Earlier versions stamped a user's own .venv as well."""
    environment.write_stamp(unstamped(making), {"demo": "x"})
    (making / "theirs.txt").write_text("theirs")
    environment.ensure([GROUP], making)
    kept = environment.CACHE / "venv-kept-1"
    assert (kept / "theirs.txt").read_text() == "theirs" and str(kept) in capsys.readouterr().out
    assert environment.python_in(making).read_text() == environment._minor()


def test_a_python_that_is_gone_is_made_anew(making):
    python = environment.ensure([GROUP], making)
    python.unlink()
    python.symlink_to(making / "gone")
    assert environment.ensure([GROUP], making).read_text() == environment._minor()


def test_an_environment_is_not_made_anew_below_its_own_python(making, monkeypatch):
    environment.ensure([GROUP], making)
    environment.write_stamp(making, {environment.UNFINISHED: "3.11"})
    monkeypatch.setattr(sys, "prefix", str(making))
    with pytest.raises(SetupError, match="runs from it"):
        environment.ensure([GROUP], making)


def test_a_set_of_packages_is_forgotten_before_it_is_replaced(making, requirements, monkeypatch):
    environment.ensure([GROUP], making)
    first = (requirements / "demo.txt").read_text()
    (requirements / "demo.txt").write_text("a==2\n")
    installed = []
    with monkeypatch.context() as patch:
        patch.setattr(environment, "_install", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            environment.ensure([GROUP], making)
    (requirements / "demo.txt").write_text(first)
    monkeypatch.setattr(environment, "_install", lambda *_: installed.append(1))
    environment.ensure([GROUP], making)
    assert installed


def test_two_at_once_do_not_meet(making):
    with files.alone(environment.CACHE / environment.LOCK), pytest.raises(SetupError, match="another install.py"):
        environment.ensure([GROUP], making)
    assert not making.exists()


def test_what_is_no_folder_is_told(making):
    making.write_text("")
    with pytest.raises(SetupError, match="is a file"):
        environment.ensure([GROUP], making)
    making.unlink()
    environment.CACHE.write_text("")
    with pytest.raises(SetupError, match="is a file"):
        environment.ensure([GROUP], making)
    assert not making.exists()


@pytest.mark.parametrize(
    ("output", "hint"),
    [
        (b"No module named ensurepip", "python3-venv"),
        (b"OSError: [Errno 28] No space left on device", "disk is full"),
        (b"Segmentation fault\n\n", "another Python"),
        (None, "another Python"),
    ],
)
def test_a_failed_venv_is_explained(making, monkeypatch, output, hint):
    error = subprocess.CalledProcessError(1, ["python"], output)
    monkeypatch.setattr(environment.venv, "create", lambda *_, **__: (_ for _ in ()).throw(error))
    with pytest.raises(SetupError, match="could not be made") as told:
        environment.ensure([GROUP], making)
    assert hint in told.value.hint and "\n" not in str(told.value)


def test_a_python_without_ensurepip_is_told_before_anything_is_made(making, monkeypatch):
    monkeypatch.setattr(environment.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SetupError, match="ensurepip") as told:
        environment.ensure([GROUP], making)
    assert "python3-venv" in told.value.hint and not making.exists()


@pytest.mark.parametrize(
    ("line", "code", "hint"),
    [
        ("/x/python: No module named pip", 1, "Delete"),
        ("ReadTimeoutError: HTTPSConnectionPool(...): Read timed out.", 2, "network"),
        ("SSLError(SSLCertVerificationError(... CERTIFICATE_VERIFY_FAILED", 1, "certificate"),
        ("ERROR: Could not install packages due to an OSError: [Errno 13] Permission denied: '/x'", 1, "who owns"),
        ("ERROR: THESE PACKAGES DO NOT MATCH THE HASHES FROM THE REQUIREMENTS FILE.", 1, "another network"),
        ("Installing collected packages: torch", -9, "memory"),
        ("ERROR: something else", 1, "Run this again"),
    ],
)
def test_pips_hint_fits_its_error(tmp_path, line, code, hint):
    assert hint in environment.explain_pip([line], tmp_path / "pip.log", code)[1]


def test_a_python_that_is_served_is_not_told_to_take_another(tmp_path, monkeypatch):
    lines = ["ERROR: No matching distribution found for torch==2.13.0"]
    monkeypatch.setattr(environment, "_minor", lambda: "3.12")
    assert "pip config list" in environment.explain_pip(lines, tmp_path)[1]
    monkeypatch.setattr(environment, "_minor", lambda: "3.9")
    assert "3.10, 3.11, 3.12 or 3.13" in environment.explain_pip(lines, tmp_path)[1]


def test_a_pip_that_cannot_be_run_is_told(tmp_path, monkeypatch):
    monkeypatch.setattr(environment, "CACHE", tmp_path)
    with pytest.raises(SetupError, match="could not be run"):
        environment.pip(tmp_path / "no-python", ["--version"], environment.Stage("pip"))


@pytest.mark.skipif(os.name == "nt", reason="Windows has no signal that a program can tidy up after")
@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit])
def test_an_interrupted_pip_may_tidy_up_and_is_gone(tmp_path, monkeypatch, error):
    """A stand-in for pip that takes its time after a Ctrl-C; only a KeyboardInterrupt of ours reached it too."""
    code = """if True:
        import os, pathlib, signal, sys, time
        signal.signal(signal.SIGINT, signal.default_int_handler)
        try:
            print("Collecting things", os.getpid(), flush=True)
            time.sleep(60)
        except KeyboardInterrupt:
            pathlib.Path(sys.argv[1], "tidied").write_text("")
    """
    started = []

    def note(text):
        started.append(int(text.split()[-1]))
        if error is KeyboardInterrupt:
            os.kill(started[0], signal.SIGINT)
        raise error

    current = environment.Stage("pip")
    monkeypatch.setattr(current, "note", note)
    with pytest.raises(error):
        environment._follow([sys.executable, "-c", code, str(tmp_path)], tmp_path / "log", current)
    assert (tmp_path / "tidied").exists()
    with pytest.raises(ProcessLookupError):
        os.kill(started[0], 0)


def test_a_busy_machine_is_no_reason_to_make_anew(monkeypatch):
    def late(*_, **__):
        raise subprocess.TimeoutExpired("python", 60)

    monkeypatch.setattr(subprocess, "run", late)
    assert environment._version_of(Path("python")) == environment._minor()


@pytest.mark.slow
@pytest.mark.skipif(os.name == "nt", reason="sends a Ctrl-C to one process, as POSIX can")
def test_a_real_environment_cut_short_by_ctrl_c_is_repaired(tmp_path):
    """ensurepip is under way when the signal comes; pip itself finds no registry, so that nothing is fetched."""
    clone = tmp_path / "clone"
    shutil.copytree(ROOT / "installer", clone / "installer", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copytree(ROOT / "requirements", clone / "requirements")
    shutil.copy(ROOT / "install.py", clone)
    command = [sys.executable, str(clone / "install.py"), "demo", "--out", str(tmp_path / "out")]
    variables = {key: value for key, value in os.environ.items() if key != "COMFYUI_DIR"} | {"PIP_NO_INDEX": "1"}
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True, "env": variables}
    first = subprocess.Popen(command, start_new_session=True, preexec_fn=stand_ins.hear_signals, **options)
    python = environment.python_in(clone / ".venv")
    until = time.monotonic() + 60
    while not python.exists() and time.monotonic() < until:
        time.sleep(0.02)
    os.killpg(first.pid, signal.SIGINT)
    assert "Stopped." in first.communicate(timeout=60)[0] and first.returncode == 130
    assert environment.UNFINISHED in environment.read_stamp(clone / ".venv")
    second = subprocess.run(command, timeout=250, check=False, **options)
    assert second.returncode == 1 and "No matching distribution" in second.stdout, second.stdout
    assert "Traceback" not in second.stdout
    asked = subprocess.run([python, "-m", "pip", "--version"], capture_output=True, text=True, timeout=60, check=False)
    assert asked.returncode == 0 and str(clone) in asked.stdout
    assert environment.read_stamp(clone / ".venv") == {environment.MADE: environment._minor()}
    assert not (tmp_path / "out").exists()
