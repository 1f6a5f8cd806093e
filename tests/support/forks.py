"""Programs in a process where torch, or a real ComfyUI too, is imported already: each runs in a fork of that process.

ComfyUI can be started once in a process, and to import it or torch takes longer than most of what the tests run. A fork
has it imported and shares nothing with the others. Where there are no forks (Windows), each run imports it anew.

This file is the process too: `forks.py [COMFYUI]` takes a JSON list of a command, its environment and two files for
what the command says, a line each, and answers with the exit status.
"""

from __future__ import annotations

import atexit
import json
import os
import runpy
import signal
import subprocess
import sys
import tempfile
import traceback
from functools import lru_cache
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]


def in_comfyui(*command: str) -> subprocess.CompletedProcess[str]:
    """A program as Python's command line names it ("-m", "-c" or a file), in the ComfyUI of COMFYUI_DIR on the CPU."""
    return _run(os.environ["COMFYUI_DIR"], command, {})


def with_torch(*command: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """The same where nothing but torch is imported. environment: what is added to this process's."""
    return _run("", command, environment)


def _run(comfyui: str, command: tuple[str, ...], environment: dict[str, str]) -> subprocess.CompletedProcess[str]:
    if not hasattr(os, "fork"):
        given: dict[str, Any] = {"cwd": ROOT, "env": {**os.environ, **environment}, "text": True}
        return subprocess.run([sys.executable, *command], capture_output=True, **given)
    server = _server(comfyui)
    with tempfile.TemporaryDirectory() as folder:
        said = [Path(folder, "out"), Path(folder, "err")]
        try:
            server.stdin.write(json.dumps([list(command), environment, *map(str, said)]) + "\n")
            server.stdin.flush()
            status = server.stdout.readline()
        except BaseException:  # its answer would be taken for the next one's, and the fork would go on
            os.killpg(server.pid, signal.SIGKILL)
            status = ""
            raise
        finally:
            if not status:  # not to be waited for again
                _server.cache_clear()
        if not status:
            raise RuntimeError(f"the process that is forked ended with {server.wait()}")
        return subprocess.CompletedProcess(command, int(status), *(file.read_text("utf-8") for file in said))


@lru_cache
def _server(comfyui: str) -> subprocess.Popen[str]:
    command = [sys.executable, str(Path(__file__).resolve()), *([comfyui] if comfyui else [])]
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    started = subprocess.Popen(command, cwd=ROOT, env=env, start_new_session=True, **pipes)  # a group of its own
    atexit.register(started.stdin.close)  # which ends it
    return started


def serve(comfyui: Path | None) -> None:
    """Import torch, and ComfyUI where one is named, then answer until stdin ends."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what ComfyUI says is no answer
    sys.path[:1] = [str(ROOT)]  # in place of this folder
    if comfyui:
        _start(comfyui)
    else:
        import torch  # noqa: F401
    for line in sys.stdin:
        command, environment, out, err = json.loads(line)
        sys.stdout.flush()  # or the fork would say it again
        child = os.fork()
        if not child:
            sys.stdin.close()
            os.environ.update(environment)
            os._exit(_as_main(command, out, err))
        answers.write(f"{os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])}\n")
        answers.flush()


def _start(comfyui: Path) -> None:
    from installer import inprocess

    inprocess.start(comfyui, ["--cpu"], absent=["av"])
    import comfy.sample  # noqa: F401
    import nodes  # noqa: F401

    def again(folder: Path, arguments: Any = (), absent: Any = ()) -> None:
        assert (Path(folder), list(arguments)) == (comfyui, ["--cpu"]), "it runs already, with other arguments"

    inprocess.start = again


def _as_main(command: list[str], out: str, err: str) -> int:
    """Run it in this process. Returns the exit status."""
    for descriptor, file in ((1, out), (2, err)):
        os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT), descriptor)
    kind, *rest = command
    sys.argv = command if kind not in ("-m", "-c") else [kind, *rest[1:]]
    try:
        if kind == "-m":
            runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
        elif kind == "-c":
            exec(compile(rest[0], "<string>", "exec"), {"__name__": "__main__"})
        else:
            sys.path.insert(0, str(Path(kind).parent))
            runpy.run_path(kind, run_name="__main__")
        status = 0
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else int(end.code is not None)
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
    except BaseException:
        traceback.print_exc()
        status = 1
    sys.stdout.flush()
    sys.stderr.flush()
    return status


if __name__ == "__main__":
    serve(Path(sys.argv[1]) if sys.argv[1:] else None)
