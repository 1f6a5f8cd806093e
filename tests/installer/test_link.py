"""Linking into hosts: what is put in, what is refused, what is never touched."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import stand_ins

from installer import copies, link
from installer.console import SetupError

HOSTS = [link.COMFYUI, link.A1111]


@pytest.fixture(params=HOSTS, ids=lambda host: host.name)
def host(request):
    return request.param


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    return stand_ins.repository(tmp_path / "repository")


@pytest.fixture
def place(tmp_path: Path, host: link.Host) -> Path:
    return stand_ins.host_folder(tmp_path / "host", host) / host.extensions / host.name


def test_links(place, host, repository):
    said = link.add(place.parent.parent, host, root=repository)
    assert place.samefile(repository) and (place / "comfy_tome" / "nodes.py").exists()
    assert str(place) in said and "estart" in said
    assert "." not in place.name


def test_twice_is_harmless(place, host, repository):
    link.add(place.parent.parent, host, root=repository)
    assert "already" in link.add(place.parent.parent, host, root=repository)
    assert place.samefile(repository)
    assert [entry.name for entry in place.parent.iterdir()] == [host.name]


def test_copy_leaves_out_what_the_host_does_not_need(place, host, repository):
    link.add(place.parent.parent, host, copy=True, root=repository)
    assert not place.is_symlink()
    found = {path.relative_to(place).as_posix() for path in place.rglob("*") if path.is_file()}
    assert found == {"comfy_tome/nodes.py", "shared_tome/merging/plan.py", "docs/a.md", copies.MARKER}


def test_a_second_copy_brings_news_and_drops_what_is_gone(place, host, repository):
    link.add(place.parent.parent, host, copy=True, root=repository)
    (repository / "docs/a.md").unlink()
    (repository / "comfy_tome/nodes.py").write_text("new")
    link.add(place.parent.parent, host, copy=True, root=repository)
    assert (place / "comfy_tome/nodes.py").read_text() == "new"
    assert not (place / "docs/a.md").exists()
    assert [entry.name for entry in place.parent.iterdir()] == [host.name]


def test_a_copy_replaces_our_link_without_following_it(place, host, repository):
    link.add(place.parent.parent, host, root=repository)
    link.add(place.parent.parent, host, copy=True, root=repository)
    assert not place.is_symlink() and (repository / ".git/config").exists()


def test_an_existing_copy_is_renewed_without_the_option(place, host, repository):
    link.add(place.parent.parent, host, copy=True, root=repository)
    (repository / "comfy_tome/nodes.py").write_text("new")
    link.add(place.parent.parent, host, root=repository)
    assert (place / "comfy_tome/nodes.py").read_text() == "new"


def test_where_links_need_rights_a_copy_is_made(place, host, repository, monkeypatch):
    def refuse(*_args, **_kwargs):
        raise OSError(1314, "A required privilege is not held by the client")

    monkeypatch.setattr(Path, "symlink_to", refuse)
    monkeypatch.setattr(sys, "platform", "linux")
    assert "Copied" in link.add(place.parent.parent, host, root=repository)
    assert (place / copies.MARKER).exists()


@pytest.mark.parametrize("copy", [False, True])
def test_remove_takes_out_what_was_put_in(place, host, repository, copy):
    link.add(place.parent.parent, host, copy=copy, root=repository)
    link.remove(place.parent.parent, host, root=repository)
    assert not place.exists() and not place.is_symlink()
    assert (repository / "comfy_tome/nodes.py").exists()
    assert "nothing" in link.remove(place.parent.parent, host, root=repository)


def test_never_touches_a_folder_of_the_users(place, host, repository):
    place.mkdir()
    (place / "mine.txt").write_text("mine")
    for attempt, why in ((link.add, "is not from ToMe"), (link.remove, "was not put there by ToMe")):
        with pytest.raises(SetupError, match=why):
            attempt(place.parent.parent, host, root=repository)
    with pytest.raises(SetupError, match="is not from ToMe"):
        link.add(place.parent.parent, host, copy=True, root=repository)
    assert (place / "mine.txt").read_text() == "mine"


def test_never_touches_a_link_to_elsewhere(place, host, repository, tmp_path):
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    place.symlink_to(elsewhere, target_is_directory=True)
    for attempt in (link.add, link.remove):
        with pytest.raises(SetupError, match="elsewhere"):
            attempt(place.parent.parent, host, root=repository)
    assert place.samefile(elsewhere)


def test_a_link_whose_target_is_gone_is_an_error_with_words(place, host, repository, tmp_path):
    place.symlink_to(tmp_path / "gone", target_is_directory=True)
    with pytest.raises(SetupError, match="gone"):
        link.add(place.parent.parent, host, root=repository)


def test_refuses_a_folder_that_is_no_host(tmp_path, host, repository):
    folder = tmp_path / "pictures"
    folder.mkdir()
    (folder / host.needs[0]).write_text("")
    with pytest.raises(SetupError) as refused:
        link.add(folder, host, root=repository)
    text = str(refused.value)
    assert all(name in text for name in host.needs)
    assert host.needs[0] not in text.partition("missing:")[2]
    assert [entry.name for entry in folder.iterdir()] == [host.needs[0]]
    with pytest.raises(SetupError, match="no folder"):
        link.add(tmp_path / "nowhere", host, root=repository)


def test_finds_the_host_inside_a_bundle(tmp_path, host, repository):
    inner = stand_ins.host_folder(tmp_path / "bundle" / host.nested[0], host)
    link.add(tmp_path / "bundle", host, root=repository)
    assert (inner / host.extensions / host.name).samefile(repository)


def test_a_clone_that_lies_there_already_needs_nothing(place, host, repository):
    own = place.parent / "my-clone"
    repository.rename(own)
    assert "already" in link.add(place.parent.parent, host, root=own)
    assert "delete" in link.remove(place.parent.parent, host, root=own)
    assert own.exists() and not place.exists()


def test_refuses_beside_another_clone(place, host, repository):
    for name in ("comfy_tome", "shared_tome"):
        (place.parent / "clone" / name).mkdir(parents=True)
    with pytest.raises(SetupError, match="clone"):
        link.add(place.parent.parent, host, root=repository)
    assert not place.exists()


def test_a_clone_of_our_name_is_told_from_a_copy(place, host, repository):
    repository.rename(place)
    assert "delete" in link.remove(place.parent.parent, host, root=place)
    assert (place / ".git/config").exists()


WRONG: dict[str, tuple[Callable[[Path], None], str, str]] = {
    "a file": (lambda extensions: extensions.write_text(""), "is a file, not a folder", "Move that file"),
    "a link to nowhere": (lambda extensions: extensions.symlink_to("/nowhere"), "/nowhere, which is not", "Remove"),
}


@pytest.mark.parametrize("how", ["--copy", ""])
@pytest.mark.parametrize("case", WRONG)
def test_extensions_that_are_no_folder_are_told(case, how, place, host, repository):
    make, words, hint = WRONG[case]
    place.parent.rmdir()
    make(place.parent)
    with pytest.raises(SetupError, match=words) as told:
        link.add(place.parent.parent, host, how == "--copy", repository)
    assert hint in told.value.hint


@pytest.mark.skipif(os.name == "nt", reason="Windows has no such rights on files")
@pytest.mark.parametrize(
    ("shut", "mode", "how", "words"),
    [
        (".", 0o000, "add", "could not be read"),
        (".", 0o555, "add", "could not be made"),
        ("extensions", 0o000, "add", "could not be read"),
        ("extensions", 0o555, "add", "could not be written|is at work|could not be made"),
        ("extensions", 0o555, "remove", "could not be removed"),
        ("extensions/secret", 0o000, "add", ""),
    ],
)
def test_missing_rights_are_told_in_a_line(shut, mode, how, words, host):
    with stand_ins.open_folder() as top:
        root, folder = stand_ins.repository(top / "repository"), stand_ins.host_folder(top / "host", host)
        extensions = folder / host.extensions
        if how == "remove":
            link.add(folder, host, root=root)
        if "secret" in shut:
            (extensions / "secret").mkdir()
            extensions.chmod(0o777)
        elif shut == "." and mode == 0o555:
            extensions.rmdir()
        folder.joinpath(shut.replace("extensions", host.extensions)).chmod(mode)
        with stand_ins.plain_user():
            if not words:
                assert "Linked" in link.add(folder, host, root=root)
            else:
                with pytest.raises(SetupError, match=words) as told:
                    getattr(link, how)(folder, host, root=root)
                assert "rights" in told.value.hint and "\n" not in str(told.value)
