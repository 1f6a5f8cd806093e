"""Copies in a host: a user's files are never deleted, and nothing half is left where a host loads it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pytest
import stand_ins

from installer import copies, files, link
from installer.console import SetupError
from installer.paths import ROOT

posix = pytest.mark.skipif(os.name == "nt", reason="Windows has no such rights on files")
THEIRS = {"my_notes.txt": "notes", "out/compare.png": "picture", ".git/HEAD": "history", "docs/__pycache__/a.txt": "a"}


@pytest.fixture(params=[link.COMFYUI, link.A1111], ids=lambda host: host.name)
def host(request):
    return request.param


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    return stand_ins.repository(tmp_path / "repository")


@pytest.fixture
def folder(tmp_path: Path, host: link.Host) -> Path:
    return stand_ins.host_folder(tmp_path / "host", host)


@pytest.fixture
def place(folder: Path, host: link.Host) -> Path:
    return folder / host.extensions / host.name


def run(how: str, folder: Path, host: link.Host, root: Path) -> str:
    """install.py's commands: "--copy", "" (a link) and "--remove"."""
    return link.remove(folder, host, root) if how == "--remove" else link.add(folder, host, how == "--copy", root)


def loaded(extensions: Path, host: link.Host) -> list[str]:
    """What the host would take for an extension of ours, by its own rule."""
    names = [entry.name for entry in extensions.iterdir() if entry.is_dir()]
    if host is link.COMFYUI:
        return [name for name in names if not name.endswith(".disabled")]
    return [name for name in names if {"comfy_tome", "scripts", "install.py"} & set(os.listdir(extensions / name))]


ways = pytest.mark.parametrize("how", ["--copy", "", "--remove"])


@ways
def test_what_is_the_users_is_kept_and_its_place_is_said(how, place, folder, host, repository):
    link.add(folder, host, copy=True, root=repository)
    stand_ins.write(place, THEIRS)
    (place / "shared_tome/merging/plan.py").write_text("# my change")
    before = stand_ins.tree(place)
    said = run(how, folder, host, repository)
    (kept,) = place.with_name(f"{host.name}.kept.disabled").iterdir()
    assert stand_ins.tree(kept) == before and str(kept) in said
    assert all(name in said for name in (".git", "my_notes.txt", "out", "docs/__pycache__", "and 1 more"))
    assert loaded(place.parent, host) == ([] if how == "--remove" else [host.name])
    if how != "--remove":
        assert (place / "shared_tome/merging/plan.py").read_text() == "shared_tome/merging/plan.py"
        assert not (place / "my_notes.txt").exists()


@ways
@pytest.mark.parametrize("theirs", ["changed", "added", "linked"])
def test_each_difference_alone_is_seen(how, theirs, place, folder, host, repository, tmp_path):
    link.add(folder, host, copy=True, root=repository)
    outside = stand_ins.write(tmp_path / "outside", {"a.txt": "a"})
    if theirs == "changed":
        (place / "docs/a.md").write_text("docs/A.md")
    elif theirs == "added":
        (place / "docs/b.md").write_text("")
    else:
        (place / "models").symlink_to(outside, target_is_directory=True)
    assert "Kept" in run(how, folder, host, repository)
    assert stand_ins.tree(outside) == {"a.txt": b"a"}


@ways
def test_what_comes_by_itself_is_not_the_users(how, place, folder, host, repository):
    link.add(folder, host, copy=True, root=repository)
    by_itself = {"comfy_tome/__pycache__/nodes.cpython-311.pyc": "", ".DS_Store": "", "docs/Thumbs.db": ""}
    stand_ins.write(place, by_itself)
    (place / "docs/a.md").unlink()
    assert "Kept" not in run(how, folder, host, repository)
    assert [entry.name for entry in place.parent.iterdir()] == ([] if how == "--remove" else [host.name])


def test_every_kept_copy_has_a_name_of_its_own(place, folder, host, repository):
    for text in "ab":
        link.add(folder, host, copy=True, root=repository)
        (place / "notes.txt").write_text(text)
    link.add(folder, host, copy=True, root=repository)
    kept = sorted(place.with_name(f"{host.name}.kept.disabled").iterdir())
    assert [(copy / "notes.txt").read_text() for copy in kept] == ["a", "b"]


def earlier(place: Path, root: Path) -> None:
    """A copy as earlier versions made it: a marker without a list."""
    copies.install(place, root)
    (place / copies.MARKER).write_text(json.dumps({"copied from": str(root)}))


@ways
def test_an_earlier_versions_copy_goes_only_where_all_is_known(how, place, folder, host, repository):
    earlier(place, repository)
    assert "Kept" not in run(how, folder, host, repository)
    with suppress(SetupError):
        link.remove(folder, host, repository)
    earlier(place, repository)
    (repository / "docs/a.md").write_text("new in this version")
    assert "earlier" in run(how, folder, host, repository)
    (kept,) = place.with_name(f"{host.name}.kept.disabled").iterdir()
    assert (kept / "docs/a.md").read_text() == "docs/a.md"


@pytest.mark.parametrize("text", ["[oops", "[1]", '{"files": 3}', "[" * 100_000, ""])
def test_a_damaged_list_counts_as_none(text, place, folder, host, repository):
    link.add(folder, host, copy=True, root=repository)
    (place / copies.MARKER).write_text(text)
    (place / "notes.txt").write_text("notes")
    assert "Kept" in link.add(folder, host, copy=True, root=repository)


@pytest.mark.parametrize("inside", ["", "docs"])
def test_the_folder_that_a_command_runs_from_stays(inside, place, folder, host, repository, monkeypatch):
    link.add(folder, host, copy=True, root=repository)
    before = stand_ins.tree(place)
    monkeypatch.chdir(place / inside)
    for how in ("--copy", "", "--remove"):
        with pytest.raises(SetupError, match="runs from"):
            run(how, folder, host, repository)
    monkeypatch.chdir(folder)
    for how in ("--copy", "", "--remove"):  # install.py of the copy itself
        assert str(place) in run(how, folder, host, place)
    assert stand_ins.tree(place) == before


class Stopped(BaseException):
    pass


STAGES = {
    "a file": ("digest", 2),
    "the list": ("marker", 1),
    "the old one moved": ("move", 1),
    "the new one moved": ("move", 2),
}


@pytest.mark.parametrize("error", [KeyboardInterrupt, Stopped, OSError(28, "No space left on device")], ids=repr)
@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
def test_whatever_ends_a_copy_the_host_has_the_old_one(
    stage, error, after, place, folder, host, repository, monkeypatch
):
    link.add(folder, host, copy=True, root=repository)
    before = stand_ins.tree(place)
    (repository / "docs/a.md").write_text("new")
    where, number = STAGES[stage]
    calls = []

    def stopping(real, counts=lambda *_: True):
        def call(*arguments, **options):
            calls.append(1) if counts(*arguments) else None
            stop = counts(*arguments) and len(calls) == number
            if stop and not after:
                raise error
            result = real(*arguments, **options)
            if stop:
                raise error
            return result

        return call

    with monkeypatch.context() as patch:
        if where == "marker":
            is_marker = lambda path, *_: path.name == copies.MARKER  # noqa: E731
            patch.setattr(Path, "write_text", stopping(Path.write_text, is_marker))
        else:
            patch.setattr(files, where, stopping(getattr(files, where)))
        with pytest.raises(BaseException) as raised:
            link.add(folder, host, copy=True, root=repository)
    assert len(calls) >= number
    if isinstance(error, OSError):
        assert isinstance(raised.value, SetupError) and "disk is full" in raised.value.hint
    assert [entry.name for entry in place.parent.iterdir()] == [host.name]
    if not (stage == "the new one moved" and after):
        assert stand_ins.tree(place) == before
    assert "Copied" in link.add(folder, host, copy=True, root=repository)
    assert (place / "docs/a.md").read_text() == "new"


@pytest.mark.parametrize("linked", [False, True])
def test_a_copy_that_fails_leaves_the_link(linked, place, folder, host, repository, monkeypatch):
    if linked:
        link.add(folder, host, root=repository)
    monkeypatch.setattr(files, "digest", lambda *_, **__: (_ for _ in ()).throw(OSError(28, "No space left")))
    with pytest.raises(SetupError, match="No space left"):
        link.add(folder, host, copy=True, root=repository)
    assert place.is_symlink() is linked
    assert [entry.name for entry in place.parent.iterdir()] == ([host.name] if linked else [])


@ways
def test_what_a_killed_copy_left_is_not_loaded_and_goes(how, place, folder, host, repository):
    code = """
        import os, sys
        sys.path.insert(0, sys.argv[1])
        from pathlib import Path
        from installer import copies
        copies.json.dumps = lambda *_, **__: os._exit(9)
        copies.install(Path(sys.argv[2]), Path(sys.argv[3]))
    """
    code = "\n".join(line.strip() for line in code.splitlines())
    done = subprocess.run([sys.executable, "-c", code, str(ROOT), str(place), str(repository)], check=False)
    assert done.returncode == 9
    (left,) = place.parent.iterdir()
    assert (left / "new/comfy_tome").is_dir() and loaded(place.parent, host) == []
    assert str(left) in run(how, folder, host, repository)
    assert [entry.name for entry in place.parent.iterdir()] == ([] if how == "--remove" else [host.name])


@ways
@pytest.mark.parametrize("theirs", [False, True])
def test_what_an_earlier_versions_copy_left_goes_or_is_kept(how, theirs, place, folder, host, repository):
    left = place.with_name(f".{host.name}.partial")
    stand_ins.write(left, {name: name for name in ("comfy_tome/nodes.py", "shared_tome/merging/plan.py")})
    if theirs:
        (left / "comfy_tome/nodes.py").write_text("mine")
    left.chmod(0o555)
    said = run(how, folder, host, repository)
    assert not left.exists() and ("Kept" if theirs else str(left)) in said
    assert loaded(place.parent, host) == ([] if how == "--remove" else [host.name])
    kept = place.with_name(f"{host.name}.kept.disabled")
    assert kept.exists() is theirs
    if theirs:
        assert (kept / "copy-1/comfy_tome/nodes.py").read_text() == "mine" and str(kept) in said


def test_two_copies_at_once_do_not_meet(place, folder, host, repository):
    with copies._aside(place) as bench:
        (bench / "new").mkdir()
        for how in ("--copy", "", "--remove"):
            with pytest.raises(SetupError, match="another install.py is at work"):
                run(how, folder, host, repository)
        assert (bench / "new").is_dir()
    assert not bench.exists()


def test_nothing_is_removed_through_a_link(place, folder, host, repository, tmp_path):
    outside = stand_ins.write(tmp_path / "outside", {"a.txt": "a"})
    place.with_name(f"{host.name}.partial.disabled").symlink_to(outside, target_is_directory=True)
    with pytest.raises(SetupError, match="is a link"):
        link.add(folder, host, copy=True, root=repository)
    assert stand_ins.tree(outside) == {"a.txt": b"a"}


@posix
def test_a_read_only_checkout_can_be_copied_renewed_and_removed(host):
    with stand_ins.open_folder() as top:
        root, folder = stand_ins.repository(top / "repository"), stand_ins.host_folder(top / "host", host)
        for path in [root, *root.rglob("*")]:
            path.chmod(0o555 if path.is_dir() or path.name == "nodes.py" else 0o444)
        (folder / host.extensions).chmod(0o777)
        with stand_ins.plain_user():
            for how in ("--copy", "--copy", "--remove"):
                run(how, folder, host, root)
                place = folder / host.extensions / host.name
                assert place.exists() is (how == "--copy")
                assert all(path.stat().st_mode & 0o200 for path in place.rglob("*"))
                for path in [place, *place.rglob("*")] if place.exists() else ():
                    path.chmod(0o555 if path.is_dir() else 0o444)  # as a copy of another tool would be
        assert not os.listdir(folder / host.extensions)


def test_a_host_inside_the_repository_is_not_copied_into_itself(host, repository):
    folder = stand_ins.host_folder(repository / "tools", host)
    link.add(folder, host, copy=True, root=repository)
    assert not (folder / host.extensions / host.name / "tools").exists()


def test_links_in_the_repository_are_followed_once(place, folder, host, repository, tmp_path):
    outside = stand_ins.write(tmp_path / "outside", {"a.txt": "a"})
    (repository / "more").symlink_to(outside, target_is_directory=True)
    (repository / "circle").symlink_to(repository, target_is_directory=True)
    (repository / "nowhere").symlink_to(tmp_path / "nowhere")
    link.add(folder, host, copy=True, root=repository)
    assert (place / "more/a.txt").read_text() == "a" and not (place / "more").is_symlink()
    assert not (place / "circle").exists() and not os.path.lexists(place / "nowhere")
