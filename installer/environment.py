"""The virtual environment in .venv: made once, filled with pinned requirements, then left alone.

A stamp says that the environment is ToMe's and whether it is whole, and remembers a hash of the requirement
files and of the Python that made it. While that matches, nothing is installed and no network is needed.
A folder without a stamp is the user's: nothing is put into it.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import venv
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from . import files
from .console import SetupError, Stage, failed, or_failed, say, stage
from .paths import CACHE, REQUIREMENTS, VENV

STAMP = "tome-stamp.json"
FRESH = f"{STAMP}.new"
UNFINISHED, MADE = "unfinished", "made"  # keys of the stamp; their value is the Python's minor version
LOCK = "install.lock"
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
    names = [CONSTRAINTS, *(name for name, _ in group.files)]
    for name in names:  # which grows on the way
        text = (requirements / name).read_text(encoding="utf-8")
        digest.update(f"\n{name}\n{text}".encode())
        included = dict.fromkeys(re.findall(r"^-r\s+(\S+)", text, flags=re.MULTILINE))
        names += [one for one in included if one not in names]
    for name, options in group.files:
        digest.update(" ".join((name, *options)).encode())
    return digest.hexdigest()


def read_stamp(folder: Path) -> dict[str, str]:
    """What is installed in `folder`, by the name of its group; empty when unknown."""
    return files.told(folder / STAMP)


def write_stamp(folder: Path, stamp: dict[str, str]) -> None:
    place = files.make_folder(folder) / STAMP
    with or_failed(f"{place} could not be written"):
        files.put(place, json.dumps(stamp, indent=1))


def ensure(groups: Sequence[Group] = (DEMO,), folder: Path = VENV) -> Path:
    """Make the environment ready for `groups` and return its interpreter.

    Raises SetupError when the environment is the user's or cannot be made, when a package cannot be installed,
    or while another install.py does this.
    """
    python = python_in(folder)
    wanted = {group.name: fingerprint(group) for group in groups}

    def missing() -> list[Group]:
        stamp = read_stamp(folder)
        ready = os.path.exists(python) and UNFINISHED not in stamp
        return [group for group in groups if not ready or stamp.get(group.name) != wanted[group.name]]

    if not missing():
        return python
    _refuse_foreign(folder)
    with files.alone(CACHE / LOCK):
        if not missing():
            return python
        _make(folder)
        if shutil.disk_usage(folder).free < 3 * 2**30:
            say(f"  Less than 3 GB are free at {folder}: the packages may not fit.")
        todo = missing()
        # Forgotten first: an installation cut short leaves neither the old set of packages nor the new one.
        kept = {MADE, *(group.name for group in groups if group not in todo)}
        stamp = {key: value for key, value in read_stamp(folder).items() if key in kept}
        write_stamp(folder, stamp)
        for group in todo:
            for name, options in group.files:
                _install(python, name, options, group.title)
            stamp[group.name] = wanted[group.name]
            write_stamp(folder, stamp)
    return python


def _make(folder: Path) -> None:
    """Make `folder` an environment of this Python's minor version, unless it is one. Raises SetupError."""
    python = python_in(folder)
    stamp = read_stamp(folder)
    if os.path.exists(python) and UNFINISHED not in stamp and _version_of(python) == _minor():
        return
    if not importlib.util.find_spec("ensurepip"):
        raise SetupError("this Python cannot make virtual environments: it has no ensurepip", VENV_PACKAGE)
    _make_room(folder, stamp)
    with stage(f"Making the environment {folder.name}"):
        try:
            # Marked from the beginning: whatever ends this, the next run knows it for ours and makes it anew.
            write_stamp(folder, {UNFINISHED: _minor()})
            venv.create(folder, with_pip=True, symlinks=os.name != "nt")
            write_stamp(folder, {MADE: _minor()})
        except subprocess.CalledProcessError as error:
            raise _explain_venv(folder, error) from error
        except OSError as error:
            raise failed(f"the virtual environment {folder} could not be made", error) from error


def _refuse_foreign(folder: Path) -> None:
    """Raise SetupError where `folder` holds something and has no stamp of ToMe's."""
    if not os.path.lexists(folder):
        return
    files.make_folder(folder)  # says so where a file or a link to nowhere stands there
    with or_failed(f"{folder} could not be read"):
        there = set(os.listdir(folder))
    if there and not there & {STAMP, FRESH}:
        raise SetupError(
            f"{folder} has no stamp of ToMe's, so nothing is put into it",
            "Is it yours? Move it away, then run this again. Was ToMe stopped while making it? Delete it.",
        )


def _make_room(folder: Path, stamp: Mapping[str, str]) -> None:
    """Take an environment of ToMe's away, which is unfinished, broken or of another Python."""
    if not os.path.lexists(folder) or set(os.listdir(folder)) <= {STAMP, FRESH}:
        return
    if files.is_link(folder):
        raise SetupError(
            f"{folder} has to be made anew, but it is a link to {files.target(folder)}",
            "ToMe deletes nothing through a link: remove the link, or empty the folder that it leads to.",
        )
    if os.path.exists(folder) and os.path.exists(sys.prefix) and os.path.samefile(folder, sys.prefix):
        raise SetupError(f"{folder} has to be made anew, but this Python runs from it", "Use another Python.")
    with or_failed(f"the old environment {folder} could not be taken away"):
        if UNFINISHED in stamp or MADE in stamp:
            for entry in sorted(folder.iterdir(), key=lambda entry: entry.name == STAMP):
                files.delete(entry)  # the stamp last: what a deletion cut short leaves is ours still
        else:  # earlier versions stamped environments of the user's too
            kept = files.free_name(files.make_folder(CACHE) / "venv-kept")
            files.move(folder, kept)
            say(f"  Kept the environment of an earlier ToMe as {kept}. Delete it when you do not need it.")


VENV_PACKAGE = "On Debian and Ubuntu it is a package of its own: sudo apt install python3-venv"


def _explain_venv(folder: Path, error: subprocess.CalledProcessError) -> SetupError:
    output = error.output or b""
    text = output if isinstance(output, str) else output.decode(errors="replace")
    last = next((line for line in reversed(text.splitlines()) if line.strip()), str(error))
    hint = "Run this again; if it fails again, use another Python."
    if "No space left" in text:
        hint = FULL
    elif "ensurepip" in text and "No module named" in text:
        hint = VENV_PACKAGE
    return SetupError(f"the virtual environment {folder} could not be made: {last.strip()}", hint)


def _minor() -> str:
    return ".".join(platform.python_version_tuple()[:2])


def _version_of(python: Path) -> str:
    code = "import sys; print('%d.%d' % sys.version_info[:2])"
    try:
        done = subprocess.run([python, "-c", code], capture_output=True, text=True, timeout=60)
    except subprocess.TimeoutExpired:
        return _minor()  # a busy machine is no reason to throw gigabytes away
    except OSError:
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
    log = files.make_folder(CACHE) / "pip.log"
    with or_failed(f"pip could not be run, or {log} not be written"):
        code, lines = _follow(command, log, current)
    if code:
        raise SetupError(*explain_pip(lines, log, code))


def _follow(command: Sequence[str], log: Path, current: Stage) -> tuple[int, list[str]]:
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
        except BaseException as error:
            _end(process, told=isinstance(error, KeyboardInterrupt))
            raise
        finally:
            process.stdout.close()
            code = process.wait()
    return code, lines


def _end(process: subprocess.Popen, told: bool) -> None:
    """End pip, with a moment to remove its temporary files. told: it got the Ctrl-C that we got."""
    if not told and os.name != "nt":
        process.send_signal(signal.SIGINT)
    if told or os.name != "nt":
        with suppress(subprocess.TimeoutExpired, KeyboardInterrupt):
            process.wait(5)
    process.kill()


FULL = "The disk is full. The packages need about 2 GB, with CUDA about 7 GB."
SERVED = ("3.10", "3.11", "3.12", "3.13")  # Pythons that the pinned packages are made for
HINTS = {  # what pip says, and what to do then; the first that fits
    "SSLError|CERTIFICATE_VERIFY_FAILED":
        "The registry's certificate was refused. Check this machine's clock, and the proxy or virus scanner.",
    "NewConnectionError|Temporary failure in name|Name or service not known|ConnectTimeout|ReadTimeout|"
    "Read timed out|ProxyError|getaddrinfo|Connection reset|Connection aborted|IncompleteRead":
        "The package registry was not reached. Check the network, then run this again.",
    "No space left|Errno 28|WinError 112|Disk quota exceeded": FULL,
    "No module named pip": f"The environment is damaged. Delete {VENV}, then run this again.",
    r"Permission denied|WinError (5|32)\b|Read-only file system":
        f"A file cannot be written. Check who owns {VENV}, and close the programs that use it.",
    "DO NOT MATCH THE HASHES":
        "A package was changed on its way. Run this again; if it fails again, try another network.",
}  # fmt: skip


def explain_pip(lines: Sequence[str], log: Path, code: int = 1) -> tuple[str, str]:
    """What pip's output and exit status mean to a person: (what failed, what to do)."""
    text = "\n".join(lines)
    errors = [line for line in lines if line.startswith("ERROR")] or list(lines[-5:])
    said = "\n  ".join(errors[-5:])
    missing = re.search(r"No matching distribution found for (\S+)", text)
    known = next((hint for pattern, hint in HINTS.items() if re.search(pattern, text)), None)
    here = f"for Python {_minor()} on this {sys.platform} {platform.machine()} machine"
    if known is not None:
        hint = known
    elif missing and _minor() in SERVED:
        hint = f"The package registry that pip uses has no {missing[1]} {here}. "
        hint += "Check pip's own settings: python -m pip config list"
    elif missing:
        hint = f"There seems to be no package {missing[1]} {here}. "
        hint += f"Run install.py with Python {', '.join(SERVED[:-1])} or {SERVED[-1]}."
    elif code in (-9, 137):
        hint = "The system ended pip, which it does when memory runs out. Close other programs, then run this again."
    else:
        hint = "Run this again; what is there already is kept."
    return f"pip could not install a package:\n  {said}", f"{hint}\nThe whole of what pip said: {log}"
