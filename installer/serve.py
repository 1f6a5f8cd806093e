"""Runs ComfyUI's main.py for server.py: `python serve.py MAIN_PY ARGUMENTS`.

It adds what main.py itself does not do: stand-ins for missing packages, --cpu where torch sees no
GPU, and an end when the program that started it is gone.
"""

from __future__ import annotations

import importlib.util
import os
import re
import runpy
import subprocess
import sys
import threading
from contextlib import suppress
from pathlib import Path


def end_with_parent() -> None:
    """Exit when standard input closes: the parent holds the other end for as long as it lives."""

    def watch() -> None:
        with suppress(OSError):
            while os.read(0, 1024):
                pass
        os._exit(0)

    threading.Thread(target=watch, name="end_with_parent", daemon=True).start()


def sees_gpu() -> bool:
    """Whether this Python's torch can use a GPU, asked without importing torch into this process."""
    spec = importlib.util.find_spec("torch")
    if spec is None or not spec.submodule_search_locations:
        return False
    version = Path(next(iter(spec.submodule_search_locations))) / "version.py"
    if sys.platform != "darwin" and version.exists():
        text = version.read_text(encoding="utf-8", errors="replace")
        if not re.search(r"^(cuda|hip|xpu)\b[^=]*=\s*['\"]", text, flags=re.MULTILINE):
            return False  # a build for the CPU alone: no need to ask
    code = (
        "import torch; x = getattr(torch, 'xpu', None); m = torch.backends.mps; "
        "print(torch.cuda.is_available() or m.is_available() or bool(x and x.is_available()))"
    )
    ask = [sys.executable, "-c", code]
    asked = subprocess.run(ask, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    return asked.stdout.strip().endswith("True")


def main() -> None:
    end_with_parent()
    here = str(Path(__file__).resolve().parent)
    sys.path[:] = [entry for entry in sys.path if os.path.abspath(entry or ".") != here]
    script = Path(sys.argv[1]).resolve()
    sys.argv = [str(script), *sys.argv[2:]]
    if "--cpu" not in sys.argv and not sees_gpu():
        sys.argv.append("--cpu")
    # By its path: our repository must not be on the host's import path.
    runpy.run_path(str(Path(__file__).with_name("shims.py")))["install"]()
    sys.path.insert(0, str(script.parent))
    os.chdir(script.parent)
    runpy.run_path(str(script), run_name="__main__")


if __name__ == "__main__":
    main()
