"""Files and folders: links are never followed, errors are one line with a hint that fits."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from installer import files
from installer.console import SetupError, failed
from installer.paths import ROOT


def test_a_deletion_ends_at_links(tmp_path):
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "a.txt").write_text("a")
    folder = tmp_path / "folder"
    (folder / "deep").mkdir(parents=True)
    (folder / "deep/link").symlink_to(outside, target_is_directory=True)
    (folder / "file").symlink_to(outside / "a.txt")
    (folder / "deep").chmod(0o555)
    files.delete(folder)
    assert not folder.exists() and (outside / "a.txt").read_text() == "a"
    (tmp_path / "link").symlink_to(outside, target_is_directory=True)
    files.delete(tmp_path / "link")
    assert (outside / "a.txt").exists() and not os.path.lexists(tmp_path / "link")


def test_a_junction_is_a_link(tmp_path, monkeypatch):
    real = os.lstat
    tags = {"junction": 0xA0000003, "cloud": 0x9000001A}
    monkeypatch.setattr(sys, "platform", "win32")
    monkeypatch.setattr(
        os, "lstat", lambda path: SimpleNamespace(st_reparse_tag=tags[path.name]) if path.name in tags else real(path)
    )
    assert files._is_junction(tmp_path / "junction")
    assert not files._is_junction(tmp_path / "cloud") and not files._is_junction(tmp_path)


def test_a_junction_is_removed_and_not_entered(tmp_path, monkeypatch):
    inside = tmp_path / "folder/junction"
    inside.mkdir(parents=True)
    (inside / "a.txt").write_text("a")
    removed = []
    real = os.rmdir
    monkeypatch.setattr(files, "_is_junction", lambda path: Path(path).name == "junction")
    monkeypatch.setattr(os, "rmdir", lambda path, **_: removed.append(path) if path == inside else real(path))
    assert list(files.walk(tmp_path)) == [inside]
    with pytest.raises(OSError):
        files.delete(tmp_path / "folder")  # the stand-in stays, so its folder is not empty
    assert removed == [inside] and (inside / "a.txt").exists()


@pytest.mark.parametrize(
    ("number", "hint"),
    [
        (errno.ENOSPC, "Free some space"),
        (errno.EACCES, "rights"),
        (errno.EROFS, "read-only"),
        (errno.ENAMETOOLONG, "shorter"),
        (errno.EISDIR, "Move the folder"),
        (errno.EBUSY, "Close that program"),
        (errno.EIO, "Check that place"),
    ],
)
def test_the_hint_fits_the_error(number, hint):
    error = failed("the copy could not be written", OSError(number, os.strerror(number), "/a/b"))
    assert hint in error.hint and "\n" not in f"{error}{error.hint}"
    assert str(error) == f"the copy could not be written: {os.strerror(number)}: /a/b"


def test_a_file_that_windows_has_open_is_told():
    error = PermissionError(errno.EACCES, "used by another process")
    error.winerror = 32
    assert "Close that program" in failed("x", error).hint


def test_what_stands_in_a_folders_way_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    for name, words in {"file": "is a file", "file/b": "is a file", "link": "nowhere", "link/b": "nowhere"}.items():
        with pytest.raises(SetupError, match=words):
            files.make_folder(tmp_path / name)
    assert files.make_folder(tmp_path / "a/b").is_dir()


HOLD = """
import sys
sys.path.insert(0, sys.argv[1])
from pathlib import Path
from installer import files
with files.alone(Path(sys.argv[2])):
    print("held", flush=True)
    sys.stdin.read()
"""


def test_a_lock_is_one_processs_and_ends_with_it(tmp_path):
    lock = tmp_path / "cache/lock"
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(ROOT), str(lock)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert holder.stdout.readline() == "held\n"
    with pytest.raises(SetupError, match="another install.py is at work"), files.alone(lock):
        pass
    holder.kill()
    holder.communicate()
    assert lock.exists()
    with files.alone(lock):
        pass
    assert not lock.exists()
    with pytest.raises(ValueError), files.alone(lock):
        raise ValueError
    assert not lock.exists()


def test_a_disk_without_locks_is_used_all_the_same(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "_lock", lambda handle: (_ for _ in ()).throw(OSError(errno.ENOLCK, "no locks")))
    with files.alone(tmp_path / "lock"):
        pass
