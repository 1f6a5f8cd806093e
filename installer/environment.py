"""The virtual environment in .venv: made once, filled with pinned requirements, then left alone.

A stamp remembers a hash of the requirement files and of the Python that made the environment.
While it matches, nothing is installed and no network is needed.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import venv
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from .console import SetupError, Stage, say, stage
from .paths import CACHE, REQUIREMENTS, VENV

STAMP = "tome-stamp.json"
CONSTRAINTS = "constraints.txt"


@dataclass(frozen=True)
class Group:
    """A set of requirement files installed together, each with pip options of its own."""

    name: str
    title: str
    files: tuple[tuple[str, tuple[str, ...]], ...]


DEMO = Group("demo", "torch and what ComfyUI needs", (("demo.txt", ()),))
# Those of test-nodeps.txt name old or heavy packages that the tests never touch.
TEST = Group("test", "what the tests need", (("test.txt", ()), ("test-nodeps.txt", ("--no-deps",))))


def python_in(folder: Path) -> Path:
    """The interpreter of the virtual environment `folder`."""
    return folder / ("Scripts/python.exe" if os.name == "nt" else "bin/python")


def fingerprint(group: Group, requirements: Path = REQUIREMENTS) -> str:
    """A hash over the group's requirement files, those they include, and this Python and machine."""
    digest = hashlib.sha256()
    digest.update(f"{_minor()} {platform.machine()} {sys.platform}".encode())
    pending = deque([CONSTRAINTS, *(name for name, _ in group.files)])
    seen: set[str] = set()
    while pending:
        name = pending.popleft()
        if name in seen:
            continue
        seen.add(name)
        text = (requirements / name).read_text(encoding="utf-8")
        digest.update(f"\n{name}\n{text}".encode())
        pending.extend(re.findall(r"^-r\s+(\S+)", text, flags=re.MULTILINE))
    for name, options in group.files:
        digest.update(" ".join((name, *options)).encode())
    return digest.hexdigest()


def read_stamp(folder: Path) -> dict[str, str]:
    """What is installed in `folder`, by the name of its group; empty when unknown."""
    try:
        stamp = json.loads((folder / STAMP).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return stamp if isinstance(stamp, dict) else {}


def write_stamp(folder: Path, group: Group, print_of_group: str) -> None:
    """Remember that `group` is installed in `folder`."""
    stamp = read_stamp(folder)
    stamp[group.name] = print_of_group
    (folder / STAMP).write_text(json.dumps(stamp, indent=1), encoding="utf-8")


def ensure(groups: Sequence[Group] = (DEMO,), folder: Path = VENV) -> Path:
    """Make the environment ready for `groups` and return its interpreter.

    Raises SetupError when the environment cannot be made or a package cannot be installed.
    """
    python = python_in(folder)
    wanted = {group.name: fingerprint(group) for group in groups}
    stamp = read_stamp(folder)
    missing = [group for group in groups if stamp.get(group.name) != wanted[group.name]]
    if python.exists() and not missing:
        return python
    _make(folder)
    if shutil.disk_usage(folder).free < 3 * 2**30:
        say(f"  Less than 3 GB are free at {folder}: the packages may not fit.")
    for group in missing or groups:
        for name, options in group.files:
            _install(python, name, options, group.title)
        write_stamp(folder, group, wanted[group.name])
    return python


def _make(folder: Path) -> None:
    python = python_in(folder)
    if python.exists() and _version_of(python) == _minor():
        return
    with stage(f"Making the environment {folder.name}"):
        try:
            # A new minor version of Python needs new packages. Only an environment of ours is thrown away.
            ours = (folder / STAMP).exists()
            venv.create(folder, with_pip=True, clear=ours, symlinks=os.name != "nt")
        except (OSError, subprocess.CalledProcessError) as error:
            raise SetupError(
                f"the virtual environment {folder} could not be made: {error}",
                "On Debian and Ubuntu it needs a package of its own: sudo apt install python3-venv",
            ) from error


def _minor() -> str:
    return ".".join(platform.python_version_tuple()[:2])


def _version_of(python: Path) -> str:
    code = "import sys; print('%d.%d' % sys.version_info[:2])"
    try:
        done = subprocess.run([python, "-c", code], capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip()


def _install(python: Path, name: str, options: Sequence[str], title: str) -> None:
    command = ["install", *options, "-r", str(REQUIREMENTS / name), "-c", str(REQUIREMENTS / CONSTRAINTS)]
    if not sys.stdout.isatty() and "--no-deps" not in options:
        say(f"  Installing {title}. The first time this takes a few minutes.")
    with stage(f"Installed {title} [{name}]") as current:
        pip(python, command, current)


def pip(python: Path, arguments: Sequence[str], current: Stage) -> None:
    """Run pip, show what it is at, and keep the whole of what it said in .cache/pip.log.

    Raises SetupError with pip's own error lines and what to do.
    """
    command = [str(python), "-m", "pip", *arguments, "--progress-bar", "off", "--disable-pip-version-check"]
    CACHE.mkdir(parents=True, exist_ok=True)
    log = CACHE / "pip.log"
    lines: list[str] = []
    with log.open("w", encoding="utf-8") as file:
        process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace"
        )
        assert process.stdout is not None
        try:
            for line in process.stdout:
                file.write(line)
                lines.append(line.rstrip())
                doing = re.match(r"\s*(Collecting|Downloading|Building|Installing)\b.*", line)
                if doing:
                    current.note(doing.group(0).strip())
        except BaseException:
            process.kill()
            raise
        finally:
            process.stdout.close()
            code = process.wait()
    if code:
        raise SetupError(*explain_pip(lines, log))


def explain_pip(lines: Sequence[str], log: Path) -> tuple[str, str]:
    """What pip's output means to a person: (what failed, what to do)."""
    text = "\n".join(lines)
    errors = [line for line in lines if line.startswith("ERROR")] or list(lines[-5:])
    said = "\n  ".join(errors[-5:])
    missing = re.search(r"No matching distribution found for (\S+)", text)
    if re.search(r"NewConnectionError|Temporary failure in name|ConnectTimeout|ProxyError|getaddrinfo", text):
        hint = "The package registry was not reached. Check the network, then run this again."
    elif "No space left" in text:
        hint = "The disk is full. The packages need about 2 GB, with CUDA about 7 GB."
    elif missing:
        hint = (
            f"There seems to be no package {missing.group(1)} for Python {_minor()} on this {sys.platform} "
            f"{platform.machine()} machine. Run install.py with Python 3.10, 3.11, 3.12 or 3.13."
        )
    else:
        hint = "Run this again; what is there already is kept."
    return f"pip could not install a package:\n  {said}", f"{hint}\nThe whole of what pip said: {log}"
