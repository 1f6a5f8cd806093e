"""A real ComfyUI inside this Python process, for tests and benchmarks: no server, no folders of the user's."""

from __future__ import annotations

import importlib
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

from . import shims
from .paths import ROOT

PACK = "tome_pack"


def start(folder: Path, arguments: Sequence[str] = (), absent: Sequence[str] = ()) -> None:
    """Make `import comfy` work as if ComfyUI in `folder` ran with `arguments`.

    Call it once, before the first import of comfy. absent: further packages that may be missing and are not needed.
    """
    shims.install((*shims.PACKAGES, *absent))
    sys.path.insert(0, str(folder))
    base = tempfile.mkdtemp(prefix="tome-comfyui-")
    sys.argv, kept = [
        str(folder / "main.py"), "--use-pytorch-cross-attention", "--disable-api-nodes",
        "--base-directory", base, "--database-url", "sqlite:///:memory:", *arguments,
    ], sys.argv  # fmt: skip
    try:
        import comfy.options

        comfy.options.enable_args_parsing()
        import comfy.cli_args
        import utils  # noqa: F401  ComfyUI's folder, as in its main.py: older ones put comfy/ before it, with a utils.py
    finally:
        sys.argv = kept
    assert comfy.cli_args.args.base_directory == base


def pack_module(name: str) -> ModuleType:
    """A module of this repository as hosts load it: below one package, without that package's registration."""
    if PACK not in sys.modules:
        pack = ModuleType(PACK)
        pack.__path__ = [str(ROOT)]
        sys.modules[PACK] = pack
    return importlib.import_module(f"{PACK}.{name}")
