"""What the demo looks at before it costs anybody minutes, and what it does when the end fails; which tests run."""

from __future__ import annotations

import json
import os
from types import SimpleNamespace

import numpy as np
import pytest
import stand_ins

from installer import comfyui, demo, environment, report, run, server, workflow
from installer.console import SetupError
from installer.paths import RESULTS, ROOT

KEPT = np.ones((2, 2), bool)
posix = pytest.mark.skipif(os.name == "nt", reason="Windows has no such rights on files")


@pytest.fixture(autouse=True)
def nothing_is_installed(monkeypatch):
    def never(*_):
        raise AssertionError("this comes before anything is installed")

    monkeypatch.delenv("COMFYUI_DIR", raising=False)
    monkeypatch.setattr(environment, "ensure", never)


def test_out_is_tried_and_nothing_is_left(tmp_path):
    run._try_to_write(tmp_path / "a/b/out", RESULTS, run._is_from_demo, "this demo")
    assert list(tmp_path.iterdir()) == []
    summary = report.Summary("m", workflow.Settings(1, 1.0), {"method": "sample", "ratio": 1}, 1, 1, 1, KEPT, KEPT, 1)
    texts = {"compare.png": "before", "compare.md": report.table(summary), "mine.txt": "mine"}
    mine = stand_ins.write(tmp_path / "out", texts)
    run._try_to_write(mine, RESULTS, run._is_from_demo, "this demo")
    assert stand_ins.tree(mine) == {name: text.encode() for name, text in texts.items()}


@pytest.mark.parametrize("there", [["compare.png"], ["compare.md"], ["compare.png", "compare.md"]])
def test_pictures_of_the_users_are_not_written_over(there, tmp_path):
    stand_ins.write(tmp_path, {name: "mine" for name in there})
    with pytest.raises(SetupError, match="is not from this demo") as told:
        run.demo(None, None, str(tmp_path))
    assert "--out" in told.value.hint


@pytest.mark.parametrize("out", ["file", "file/below", "link", "folder"])
def test_an_out_that_is_no_folder_is_told_first(out, tmp_path):
    (tmp_path / "file").write_text("mine")
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    (tmp_path / "folder/compare.md").mkdir(parents=True)
    before = sorted(path.name for path in tmp_path.rglob("*"))
    with pytest.raises(SetupError, match="is a file|is a link|cannot be written"):
        run.demo(None, None, str(tmp_path / out))
    assert sorted(path.name for path in tmp_path.rglob("*")) == before


@posix
def test_an_out_without_rights_is_told_first():
    with stand_ins.open_folder() as top:
        shut = stand_ins.write(top / "shut", {"compare.png": ""})
        shut.chmod(0o555)
        own = stand_ins.write(top / "own", {"compare.png": ""})
        own.chmod(0o777)
        (own / "compare.png").chmod(0o444)
        for out in (shut, shut / "out", own):
            with stand_ins.plain_user(), pytest.raises(SetupError) as told:
                run.demo(None, None, str(out))
            assert "rights" in told.value.hint


def test_a_checkpoint_that_cannot_be_loaded_is_told_first(tmp_path):
    stand_ins.write(tmp_path, {"model.gguf": "", "folder.safetensors/a": ""})
    cases = {"none.ckpt": "no file", "folder.safetensors": "is a folder", "model.gguf": "no checkpoint from model.gguf"}
    for name, words in cases.items():
        with pytest.raises(SetupError, match=words) as told:
            run.demo(None, str(tmp_path / name), str(tmp_path / "out"))
        assert ".safetensors" in told.value.hint
    with pytest.raises(SetupError, match="home folder"):
        run.demo(None, "~nosuchuser/model.ckpt", str(tmp_path / "out"))


def safetensors(header: bytes, data: bytes = b"") -> bytes:
    return len(header).to_bytes(8, "little") + header + data


ONE_TENSOR = json.dumps({"__metadata__": {"format": "pt"}, "x": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}})


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"", "does not begin"),
        (b"<!DOCTYPE html><title>Sign in</title>", "does not begin"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0", "does not begin"),
        (safetensors(b"{}")[:9], "cut off"),
        (safetensors(ONE_TENSOR.encode(), b"1234"), "cut off: 1[0-9]{2} bytes of 1[0-9]{2}"),
        *(
            (safetensors(text), "list of tensors")
            for text in (b"null", b"[1]", b'{"x":', b'{"x": {"data_offsets": 3}}')
        ),
        (safetensors(b"[" * 100_000), "list of tensors"),
    ],
)
def test_a_damaged_checkpoint_is_told_first(data, words, tmp_path):
    """It costs a person the minutes of the installation otherwise."""
    (tmp_path / "model.Safetensors").write_bytes(data)
    with pytest.raises(SetupError, match=words):
        run.demo(None, str(tmp_path / "model.Safetensors"), str(tmp_path / "out"))
    assert workflow.native_size(tmp_path / "model.Safetensors") == 512


def test_a_whole_checkpoint_is_taken(tmp_path):
    (tmp_path / "model.safetensors").write_bytes(safetensors(ONE_TENSOR.encode(), b"12345678"))
    (tmp_path / "model.ckpt").write_bytes(b"")  # torch's own, which only ComfyUI opens
    for name in ("model.safetensors", "model.ckpt"):
        assert run._checkpoint(str(tmp_path / name)) == tmp_path / name


@posix
def test_a_checkpoint_without_rights_is_told_first():
    with stand_ins.open_folder() as top:
        stand_ins.write(top, {"model.CKPT": ""})
        (top / "model.CKPT").chmod(0)
        with stand_ins.plain_user(), pytest.raises(SetupError, match="could not be read"):
            run.demo(None, str(top / "model.CKPT"), str(top / "out"))


def test_a_python_that_cannot_be_run_is_told(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for start in (run._run, run._become):
        with pytest.raises(SetupError, match="could not be run"):
            start(tmp_path / "no-python", ["-V"])


def test_a_full_disk_at_the_end_does_not_cost_the_numbers(tmp_path, monkeypatch, capsys):
    stats = {"system": {}, "devices": [{"type": "cpu"}]}
    client = SimpleNamespace(get=lambda _: stats, node=lambda _: {"input": {}})
    up = type("Up", (), {"__init__": lambda *_, **__: None, "__enter__": lambda _: client, "__exit__": lambda *_: None})

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(demo, "ComfyServer", up)
    monkeypatch.setattr(demo, "_plan", lambda *_, **__: SimpleNamespace(settings=None, model="m", pixels_a_token=1))
    monkeypatch.setattr(demo, "_make", lambda *_: [])
    monkeypatch.setattr(demo.report, "summarise", lambda *_: SimpleNamespace())
    monkeypatch.setattr(demo.report, "table", lambda _: "| the numbers |")
    monkeypatch.setattr(demo.report, "write", full)
    with pytest.raises(SetupError, match="No space left") as told:
        demo.run(tmp_path, tmp_path / "out", None)
    assert "Free some space" in told.value.hint and "| the numbers |" in capsys.readouterr().out


def test_the_demos_pack_follows_a_repository_that_was_moved(tmp_path):
    root = stand_ins.repository(tmp_path / "before")
    custom_nodes = tmp_path / "custom_nodes"
    server.put_pack(custom_nodes, root)
    moved = root.rename(tmp_path / "after")
    server.put_pack(custom_nodes, moved)
    (place,) = custom_nodes.iterdir()
    assert place.samefile(moved)


def test_the_cache_being_a_file_is_told(tmp_path):
    (tmp_path / "base").write_text("")
    with pytest.raises(SetupError, match="is a file"):
        server.ComfyServer(tmp_path, tmp_path / "base").start()


def test_the_users_comfyui_is_looked_at_first(tmp_path):
    with pytest.raises(SetupError, match="missing: main.py"):
        run.demo(str(tmp_path), None, str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "options", "chosen"),
    [
        ([], {}, ["tests"]),
        (["-x"], {}, ["tests", "-x"]),
        (["tests/core"], {}, ["tests/core"]),
        ([], {"fast": True}, ["@tests/fast.txt", "-m", "not slow and not network"]),
        (["tests/core::a"], {"fast": True}, ["-m", "not slow and not network", "tests/core::a"]),
        (["-x"], {"host": "there"}, ["tests/comfyui", "-x"]),
        (["tests/core"], {"host": "there"}, ["tests/core"]),
    ],
)
def test_which_tests_run(monkeypatch, arguments, options, chosen):
    """ruff and pytest; the first status that is not 0 is the command's."""
    commands, found = [], []
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(environment, "ensure", lambda _: ROOT / "python")
    monkeypatch.setattr(comfyui, "locate", lambda named, python: found.append(named) or ROOT)
    monkeypatch.setattr(run, "_run", lambda python, command, extra=None: commands.append(command) or len(commands))
    assert run.test(arguments, **options) == 1 and found == [options.get("host")]
    lint, command = commands
    assert lint[1] == "ruff" and command[1] == "pytest" and command[-len(chosen) :] == chosen
    assert command[-len(chosen) - 1] == "--no-loadscope-reorder"


def test_the_fast_tests_are_of_every_room():
    listed = (ROOT / run.FAST).read_text(encoding="utf-8").splitlines()
    assert len(set(listed)) == len(listed)
    for file, _, name in (line.partition("::") for line in listed):
        assert f"def {name}(" in (ROOT / file).read_text(encoding="utf-8") if name else (ROOT / file).is_file()
    rooms = {path.relative_to(ROOT / "tests").parts[0] for path in ROOT.glob("tests/**/test_*.py")}
    assert {file.split("/")[1] for file in listed} == rooms - {"gpu", "web"}  # these need a GPU, a browser


def test_the_longest_files_start_first(request):
    """The others stay as they are, and so do all of the fast tests."""
    order = request.config.pluginmanager.get_plugin(str(ROOT / "tests/conftest.py"))
    files = ["core/test_grid.py", *reversed(order.LONGEST), "a1111/test_hooks.py", "core/test_grid.py"]
    items = [SimpleNamespace(path=ROOT / "tests" / file, number=number) for number, file in enumerate(files)]
    order.pytest_collection_modifyitems(items)
    last = len(files) - 1
    assert [item.number for item in items] == [*range(last - 2, 0, -1), 0, last - 1, last]
    assert all((ROOT / "tests" / file).is_file() for file in order.LONGEST)
    fast = {line.partition("::")[0] for line in (ROOT / run.FAST).read_text(encoding="utf-8").splitlines()}
    assert not fast & {f"tests/{file}" for file in order.LONGEST}
