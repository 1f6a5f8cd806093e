"""The commands that need the environment: they make it ready, then go on in its own Python."""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path

from . import comfyui, environment, files, workflow
from .compare import graph, journal, plan
from .console import SetupError, failed, or_failed, say
from .paths import COMPARED, RESULTS, ROOT, TABLE_HEAD

FAST = "tests/fast.txt"  # what `test --fast` runs: a file, or a test of one, a line
HOSTS_TESTS = "tests/comfyui"  # what `test --comfyui` runs
CHECKPOINTS = (".safetensors", ".ckpt", ".sft", ".pt", ".pt2", ".pth", ".bin", ".pkl")  # that ComfyUI lists


def demo(host: str | None, checkpoint: str | None, out: str) -> int:
    """Make pictures without and with ToMe. Returns the exit status; raises SetupError."""
    # Looked at first: a wrong path should not cost a person the minutes of the installation.
    weights = _checkpoint(checkpoint) if checkpoint else None
    results = files.user_path(out)
    _try_to_write(results, RESULTS, _is_from_demo, "this demo")
    return _go_on("demo", host, results, checkpoint=weights)


def compare(options: argparse.Namespace) -> int:
    """Compare ToMe with what people use instead, on their model. Returns the exit status; raises SetupError.

    options: the command line's checkpoint, comfyui, workflow, sizes, prompts and out.
    """
    checkpoint = _checkpoint(options.checkpoint) if options.checkpoint else None
    flow, prompts = (files.user_path(name) if name else None for name in (options.workflow, options.prompts))
    out = files.user_path(options.out)
    # All that can be wrong is looked at before the minutes of the installation and the hour of the pictures.
    if flow:
        graph.load(flow)
    request = plan.make_request(checkpoint, flow, options.sizes, prompts)
    settings = request.settings()
    _try_to_write(out, COMPARED, lambda out: journal.Journal(out, settings).begun, "a comparison")
    sizes = ["--sizes", *options.sizes] if options.sizes else []
    return _go_on("compare", options.comfyui, out, *sizes, checkpoint=checkpoint, workflow=flow, prompts=prompts)


def _go_on(name: str, host: str | None, out: Path, *more: str, **named: Path | None) -> int:
    """Go on as the module installer.NAME, in the environment. host: the ComfyUI that was asked for."""
    if host or os.environ.get("COMFYUI_DIR"):
        comfyui.locate(host, environment.python_in(environment.VENV))
    say(f"ToMe {name}")
    python = environment.ensure([environment.DEMO])
    command = ["-m", f"installer.{name}", "--comfyui", str(comfyui.locate(host, python)), "--out", str(out)]
    for option, value in named.items():
        command += [f"--{option}", str(value)] if value else []
    return _become(python, [*command, *more])


def _checkpoint(name: str) -> Path:
    """The file of a person's model. Raises SetupError when ComfyUI could not read it."""
    file, name_one = files.user_path(name), f"Name a file that ends in {' or '.join(CHECKPOINTS[:2])}."
    with or_failed(f"{file} could not be read"):
        if not files.exists(file):
            raise SetupError(f"there is no file {file}", name_one)
        if file.is_dir():
            raise SetupError(f"{file} is a folder, not a file", name_one)
        if file.suffix.lower() not in CHECKPOINTS:
            raise SetupError(f"ComfyUI loads no checkpoint from {file.name}", name_one)
        file.open("rb").close()
        try:
            if file.suffix.lower() in (".safetensors", ".sft"):
                workflow.read_header(file)
        except ValueError as error:
            raise SetupError(f"{file} is damaged: {error}", "Fetch that file again.") from error
    return file


def _try_to_write(out: Path, names: Sequence[str], ours: Callable[[Path], object], what: str) -> None:
    """Find out whether the results can be written, and leave nothing. Raises SetupError.

    names: the files that are written. ours: whether those that are there are from an earlier run. what: of the command.
    """
    made = [folder for folder in (out, *out.parents) if not os.path.lexists(folder)]
    try:
        files.make_folder(out)
        there = [out / name for name in names if (out / name).exists()]
        for file in there:
            file.open("r+b").close()
        if there and not ours(out):
            raise SetupError(
                f"{there[0]} is there already and is not from {what}",
                "Name another folder with --out, or move that file away.",
            )
        tempfile.TemporaryFile(dir=out).close()
    except OSError as error:
        raise failed(f"the results cannot be written to {out}", error) from error
    finally:
        for folder in made:
            with suppress(OSError):
                folder.rmdir()


def _is_from_demo(out: Path) -> bool:
    try:
        with (out / RESULTS[1]).open(encoding="utf-8") as text:
            return TABLE_HEAD[1] in text.readline(500)
    except (FileNotFoundError, ValueError):
        return False


def test(arguments: Sequence[str], *, fast: bool = False, host: str | None = None) -> int:
    """Lint, then run the tests; `fast`: those of some files; `host`: those of ComfyUI's nodes, on the one that lies
    there. Returns the first exit status that is not 0; raises SetupError.
    """
    say("ToMe tests")
    python = environment.ensure([environment.DEMO, environment.TEST])
    folder = comfyui.locate(host, python)
    linted = _run(python, ["-m", "ruff", "check", "."])
    named = any(Path(argument.partition("::")[0]).exists() for argument in arguments)
    where = [] if named else [f"@{FAST}"] if fast else [HOSTS_TESTS if host else "tests"]
    where += ["-m", "not slow and not network"] if fast else []
    # A process for each core, a file's tests in one process: each starts a ComfyUI of its own once.
    # In their order: sorted by their number of tests, the long ones of few would come last, alone.
    workers = ["-n", str(min(4, os.cpu_count() or 1)), "--dist", "loadfile", "--no-loadscope-reorder"]
    command = ["-m", "pytest", "-c", "tests/pytest.ini", *workers, *where, *arguments]
    # Many processes import ComfyUI: the first leaves the others its bytecode, whatever a container's image says.
    extra = {"COMFYUI_DIR": str(folder), "OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": ""}
    tested = _run(python, command, extra)
    return linted or tested


def _run(python: Path, arguments: Sequence[str], extra: Mapping[str, str] | None = None) -> int:
    with or_failed(f"{python} could not be run"):
        process = subprocess.Popen([str(python), *arguments], cwd=ROOT, env=_variables(extra))
    before = signal.signal(signal.SIGTERM, lambda *_: process.terminate())
    try:
        while True:
            with suppress(KeyboardInterrupt):  # it got the same Ctrl-C; let it stop its server and come to its own end
                return process.wait()
    finally:
        signal.signal(signal.SIGTERM, before)


def _become(python: Path, arguments: Sequence[str]) -> int:
    """Go on as that program: whoever ends this process ends that one. Windows can only start it beside us."""
    if os.name == "nt":
        return _run(python, arguments)
    os.chdir(ROOT)
    with or_failed(f"{python} could not be run"):
        os.execve(str(python), [str(python), *arguments], _variables())


def _variables(extra: Mapping[str, str] | None = None) -> dict[str, str]:
    return {**os.environ, "PYTHONUTF8": "1", **(extra or {})}
