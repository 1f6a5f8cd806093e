"""Small stand-ins for this repository and for the hosts that it is put into."""

from __future__ import annotations

import os
import signal
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from installer import link

NOBODY = 65534


def write(root: Path, names: dict[str, str]) -> Path:
    for name, text in names.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


def repository(root: Path) -> Path:
    """A repository with what is copied and what is not."""
    kept = ("comfy_tome/nodes.py", "shared_tome/merging/plan.py", "docs/a.md")
    left_out = ("tests/test_a.py", ".git/config", ".venv/bin/python", ".cache/x", "out/compare.png")
    return write(root, {name: name for name in (*kept, *left_out, "comfy_tome/__pycache__/nodes.pyc")})


def host_folder(folder: Path, host: link.Host) -> Path:
    """A host without extensions."""
    for name in (*host.needs, host.extensions):
        (folder / name).mkdir(parents=True, exist_ok=True) if "." not in name else write(folder, {name: ""})
    return folder


def tree(folder: Path) -> dict[str, bytes]:
    """Every file below a folder with what is in it."""
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def hear_signals() -> None:
    """For Popen's preexec_fn: a shell's background jobs begin with Ctrl-C ignored, and nohup's with SIGHUP."""
    for name in ("SIGINT", "SIGTERM", "SIGHUP"):
        signal.signal(getattr(signal, name), signal.SIG_DFL)


@contextmanager
def plain_user() -> Iterator[None]:
    """Run the block as a user for whom a file's rights count. Root becomes nobody, others stay who they are."""
    if os.geteuid() != 0:
        yield
        return
    group = os.getegid()
    os.setegid(NOBODY)
    os.seteuid(NOBODY)
    try:
        yield
    finally:
        os.seteuid(0)
        os.setegid(group)


@contextmanager
def open_folder() -> Iterator[Path]:
    """A temporary folder that every user may enter; pytest's own are private."""
    with tempfile.TemporaryDirectory() as name:
        os.chmod(name, 0o755)
        try:
            yield Path(name)
        finally:
            for folder, _, _ in os.walk(name):
                os.chmod(folder, 0o755)
