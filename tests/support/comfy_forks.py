"""Programs in a real ComfyUI that is imported once: `run("-m", module, ...)` runs each in a fork of that process.

ComfyUI can be started once in a process, and to import it takes longer than most of what the tests run in it. A fork
has it imported and shares nothing with the others. Where there are no forks (Windows), each run imports it anew.

This file is the process too: `comfy_forks.py COMFYUI` takes a JSON list of a command and two files for what the
command says, a line each, and answers with the exit status.
"""

from __future__ import annotations

import atexit
import json
import os
import runpy
import subprocess
import sys
import tempfile
import traceback
from functools import lru_cache
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]


def run(*command: str) -> subprocess.CompletedProcess[str]:
    """A program as Python's command line names it ("-m", "-c" or a file), in the ComfyUI of COMFYUI_DIR on the CPU."""
    if not hasattr(os, "fork"):
        return subprocess.run([sys.executable, *command], cwd=ROOT, capture_output=True, text=True)
    server = _server(os.environ["COMFYUI_DIR"])
    with tempfile.TemporaryDirectory() as folder:
        said = [Path(folder, "out"), Path(folder, "err")]
        server.stdin.write(json.dumps([*command, *map(str, said)]) + "\n")
        server.stdin.flush()
        status = server.stdout.readline()
        if not status:  # not to be waited for again
            _server.cache_clear()
            raise RuntimeError(f"the process of ComfyUI ended with {server.wait()}")
        return subprocess.CompletedProcess(command, int(status), *(file.read_text("utf-8") for file in said))


@lru_cache(1)
def _server(comfyui: str) -> subprocess.Popen[str]:
    command = [sys.executable, str(Path(__file__).resolve()), comfyui]
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    started = subprocess.Popen(command, cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}, **pipes)
    atexit.register(started.stdin.close)  # which ends it
    return started


def serve(comfyui: Path) -> None:
    """Import ComfyUI, then answer until stdin ends."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what ComfyUI says is no answer
    sys.path.insert(0, str(ROOT))
    from installer import inprocess

    inprocess.start(comfyui, ["--cpu"], absent=["av"])
    import comfy.sample  # noqa: F401
    import nodes  # noqa: F401

    def again(folder: Path, arguments: Any = (), absent: Any = ()) -> None:
        assert (Path(folder), list(arguments)) == (comfyui, ["--cpu"]), "it runs already, with other arguments"

    inprocess.start = again
    for line in sys.stdin:
        *command, out, err = json.loads(line)
        sys.stdout.flush()  # or the fork would say it again
        child = os.fork()
        if not child:
            sys.stdin.close()
            os._exit(_as_main(command, out, err))
        answers.write(f"{os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])}\n")
        answers.flush()


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
    serve(Path(sys.argv[1]))
