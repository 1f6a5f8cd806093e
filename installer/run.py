"""The commands that need the environment: they make it ready, then go on in its own Python."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path

from . import comfyui, environment
from .console import say
from .paths import ROOT


def demo(host: str | None, checkpoint: str | None, out: str) -> int:
    """Make pictures without and with ToMe. Returns the exit status; raises SetupError."""
    # Looked at first: a wrong path should not cost a person the minutes of the installation.
    if checkpoint and not Path(checkpoint).expanduser().is_file():
        raise comfyui.SetupError(f"there is no file {checkpoint}", "Name a .safetensors or .ckpt file.")
    if host or os.environ.get("COMFYUI_DIR"):
        comfyui.locate(host, environment.python_in(environment.VENV))
    say("ToMe demo")
    python = environment.ensure([environment.DEMO])
    folder = comfyui.locate(host, python)
    results = str(Path(out).expanduser().absolute())
    command = ["-m", "installer.demo", "--comfyui", str(folder), "--out", results]
    if checkpoint:
        command += ["--checkpoint", str(Path(checkpoint).expanduser().absolute())]
    return _become(python, command)


def test(arguments: Sequence[str]) -> int:
    """Lint, then run the tests. Returns the first exit status that is not 0; raises SetupError."""
    say("ToMe tests")
    python = environment.ensure([environment.DEMO, environment.TEST])
    folder = comfyui.locate(None, python)
    linted = _run(python, ["-m", "ruff", "check", "."])
    where = [] if any(Path(argument.partition("::")[0]).exists() for argument in arguments) else ["tests"]
    # A process for each core, a file's tests in one process: each starts a ComfyUI of its own once.
    # In their order: sorted by their number of tests, the long ones of few would come last, alone.
    workers = ["-n", str(min(4, os.cpu_count() or 1)), "--dist", "loadfile", "--no-loadscope-reorder"]
    command = ["-m", "pytest", "-c", "tests/pytest.ini", *workers, *where, *arguments]
    tested = _run(python, command, {"COMFYUI_DIR": str(folder), "OMP_NUM_THREADS": "1"})
    return linted or tested


def _run(python: Path, arguments: Sequence[str], extra: Mapping[str, str] | None = None) -> int:
    process = subprocess.Popen([str(python), *arguments], cwd=ROOT, env=_variables(extra))
    before = signal.signal(signal.SIGTERM, lambda *_: process.terminate())
    try:
        while True:
            try:
                return process.wait()
            except KeyboardInterrupt:
                pass  # it got the same Ctrl-C; let it stop its server and come to its own end
    finally:
        signal.signal(signal.SIGTERM, before)


def _become(python: Path, arguments: Sequence[str]) -> int:
    """Go on as that program: whoever ends this process ends that one. Windows can only start it beside us."""
    if os.name == "nt":
        return _run(python, arguments)
    os.chdir(ROOT)
    os.execve(str(python), [str(python), *arguments], _variables())


def _variables(extra: Mapping[str, str] | None = None) -> dict[str, str]:
    return {**os.environ, "PYTHONUTF8": "1", **(extra or {})}
