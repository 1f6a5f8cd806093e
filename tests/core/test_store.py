"""Where verdicts are kept: whatever becomes of the file, a picture goes on, and all processes decide alike."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch

from shared_tome.autotune import store
from shared_tome.autotune.paying import Decision
from shared_tome.autotune.store import DecisionStore, NotNow

PAYS, COSTS = Decision(100.0, 60.0, 10.0), Decision(100.0, 98.0, 10.0)
ROOT = Path(__file__).resolve().parents[2]
OUT_OF_MEMORY = [
    torch.cuda.OutOfMemoryError("CUDA out of memory"),
    RuntimeError("CUDA error: out of memory"),
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    RuntimeError("[enforce fail at alloc_cpu.cpp:118] DefaultCPUAllocator: can't allocate memory"),
    MemoryError(),
]


def layers(path):
    return json.loads(path.read_text(encoding="utf-8"))["layers"]


def raises(error):
    def measured():
        raise error

    return measured


@pytest.mark.parametrize(
    "text",
    [
        "[" * 100000,
        '{"form": FORM, "layers": ' + '{"a": ' * 50000,
        '{"form": FORM, "layers": {"k": {"full_us": %s, "merged_us": 1, "cpu_us": 1}}}' % ("9" * 400),
        '{"form": FORM, "layers": {"k": {"full_us": %s, "merged_us": 1, "cpu_us": 1}}}' % ("9" * 5000),
        '{"form": FORM, "layers": {"k": {"full_us": Infinity, "merged_us": 1, "cpu_us": 1}}}',
        '{"form": FORM, "layers": {"k": {"full_us": 1, "merged_us": 1, "cpu_us": 1, "more": 1}}}',
        "\0" * 100,
        " " * (store._LARGEST + 1),
    ],
    ids=["deep", "deep layers", "int", "longer int", "infinite", "more", "zeros", "large"],
)
def test_a_damaged_file_counts_as_none(tmp_path, caplog, text):
    path = tmp_path / "gpu.json"
    path.write_text(text.replace("FORM", str(store.FORM)), encoding="utf-8")
    kept = DecisionStore(path)
    assert kept.known("k") is None and kept.get("k", lambda: PAYS) == PAYS
    assert caplog.text.count("is damaged") == 1
    assert layers(path).keys() == {"k"} and DecisionStore(path).known("k") == PAYS


def test_bytes_that_are_no_text(tmp_path, caplog):
    path = tmp_path / "gpu.json"
    path.write_bytes(b"\xff\xfe\x00{")
    assert DecisionStore(path).get("k", lambda: PAYS) == PAYS and "is damaged" in caplog.text


@pytest.mark.parametrize("what", ["folder", "file is a folder", "nothing may be opened"])
def test_a_store_that_cannot_be_used_costs_no_picture(tmp_path, monkeypatch, caplog, what):
    path = tmp_path / "gpu.json"
    if what == "folder":
        (tmp_path / "file").write_text("")
        path = tmp_path / "file" / "gpu.json"
    elif what == "file is a folder":
        path.mkdir()
    else:  # another user's: permissions do not bind the tests' superuser
        path.write_text("{}")

        def denied(*_, **__):
            raise PermissionError(13, "Permission denied")

        for owner, name in ((Path, "is_file"), (os, "open")):
            monkeypatch.setattr(owner, name, denied)
    kept = DecisionStore(path)
    for _ in range(2):
        assert kept.get("a", lambda: PAYS) == PAYS and kept.get("b", lambda: COSTS) == COSTS
    assert caplog.text.count("cannot be kept") == 1
    assert caplog.text.count("cannot be read") == (what == "nothing may be opened")


@pytest.mark.parametrize("step", ["write_text", "replace"])
def test_nothing_stays_where_writing_fails(tmp_path, monkeypatch, caplog, step):
    kept = DecisionStore(tmp_path / "gpu.json")
    kept.get("a", lambda: PAYS)
    before = kept.path.read_bytes()

    def full(self, *_, **__):
        if step == "write_text":
            with open(self, "wb") as file:
                file.write(b"{")  # as much as there was room for
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path if step == "write_text" else os, step, full)
    assert kept.get("b", lambda: PAYS) == PAYS and kept.get("c", lambda: COSTS) == COSTS
    assert "No space left" in caplog.text
    assert sorted(file.name for file in tmp_path.iterdir()) == ["gpu.json", "gpu.lock"]
    assert (tmp_path / "gpu.json").read_bytes() == before


PROCESS = """
import sys, time
from pathlib import Path
from shared_tome.autotune.store import DecisionStore
from shared_tome.autotune.paying import Decision
name, path, go = sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3])
kept = DecisionStore(path)
kept.known("x")
print("ready", flush=True)
while not go.exists():
    time.sleep(0.001)
for number in range(40):
    kept.get(f"{name} {number}", lambda: Decision(number, number, 0.0))
mine = kept.get("shared", lambda: time.sleep(0.3) or Decision(100.0, float(ord(name)), 0.0))
print(mine.merged_us, flush=True)
"""


def test_processes_that_write_at_once_lose_nothing_and_agree(tmp_path):
    path, go = tmp_path / "gpu.json", tmp_path / "go"
    command = [sys.executable, "-c", PROCESS]
    made = [subprocess.Popen([*command, name, path, go], stdout=subprocess.PIPE, text=True, cwd=ROOT) for name in "abc"]
    try:
        assert [one.stdout.readline() for one in made] == ["ready\n"] * 3
        go.write_text("")
        said = [one.communicate(timeout=120)[0].strip() for one in made]
    finally:
        for one in made:
            one.kill()
    held = layers(path)
    assert {f"{name} {number}" for name in "abc" for number in range(40)} | {"shared"} == held.keys()
    assert said == [str(held["shared"]["merged_us"])] * 3


def test_the_first_of_two_processes_is_right(tmp_path):
    """Both measured at the same time, and what they found scatters."""
    one, other = (DecisionStore(tmp_path / "gpu.json") for _ in range(2))
    assert one.get("a", lambda: other.get("a", lambda: COSTS) and PAYS) == COSTS
    assert one.known("a") == other.known("a") == COSTS


def test_what_another_process_has_measured_by_now_is_not_measured_again(tmp_path):
    one, other = (DecisionStore(tmp_path / "gpu.json") for _ in range(2))
    assert one.known("a") is None
    other.get("a", lambda: COSTS)
    assert one.get("a", raises(AssertionError("measured again"))) == COSTS


def test_a_process_decides_by_what_it_wrote(tmp_path):
    """To the digit: it would decide otherwise than those that read."""
    kept = DecisionStore(tmp_path / "gpu.json")
    assert kept.get("a", lambda: Decision(100.0, 96.999, 1 / 3)) == Decision(100.0, 97.0, 0.33)
    assert DecisionStore(kept.path).known("a") == kept.known("a")


def test_nobody_waits_for_a_measurement_who_does_not_need_it(tmp_path):
    """Neither threads that ask for what is known nor processes that write."""
    kept, other = (DecisionStore(tmp_path / "gpu.json") for _ in range(2))
    kept.get("known", lambda: PAYS)
    found = []

    def measured():
        thread = threading.Thread(target=lambda: found.append((kept.get("known", lambda: COSTS), kept.known("new"))))
        thread.start()
        thread.join(20)
        assert other.get("others", lambda: COSTS) == COSTS
        return COSTS

    assert kept.get("new", measured) == COSTS
    assert found == [(PAYS, None)] and layers(kept.path).keys() == {"known", "others", "new"}


def test_another_process_that_never_lets_go(tmp_path, monkeypatch):
    """Stopped in the midst of writing: the picture goes on, and what was measured is written the next time."""
    monkeypatch.setattr(store, "PATIENCE", 0.05)
    kept = DecisionStore(tmp_path / "gpu.json")
    with store._alone(kept.path) as alone:
        assert alone and kept.get("a", lambda: PAYS) == PAYS
        assert not kept.path.exists()
    kept.get("b", lambda: COSTS)
    assert layers(kept.path).keys() == {"a", "b"}


def test_a_file_system_without_locks(tmp_path, monkeypatch):
    def none(*_):
        raise OSError(37, "No locks available")

    monkeypatch.setattr(store.fcntl or store.msvcrt, "flock" if store.fcntl else "locking", none)
    kept = DecisionStore(tmp_path / "gpu.json")
    kept.get("a", lambda: PAYS)
    assert layers(kept.path).keys() == {"a"}


def test_it_does_not_grow_for_ever(tmp_path, monkeypatch):
    monkeypatch.setattr(store, "MOST", 5)
    for number in range(9):
        DecisionStore(tmp_path / "gpu.json").get(str(number), lambda: PAYS)
    assert list(layers(tmp_path / "gpu.json")) == ["4", "5", "6", "7", "8"]


@pytest.mark.parametrize("error", OUT_OF_MEMORY, ids=repr)
def test_short_of_memory_is_no_verdict(tmp_path, monkeypatch, caplog, error):
    kept, now = DecisionStore(tmp_path / "gpu.json"), [100.0]
    monkeypatch.setattr(store.time, "monotonic", lambda: now[0])
    assert kept.get("a | with Triton", raises(error)) is None
    assert "a: not measured" in caplog.text and "tried again later" in caplog.text and "Triton" not in caplog.text
    assert kept.get("a | with Triton", raises(AssertionError("at once"))) is None  # each layer and step would try
    now[0] += store.RETRY
    assert kept.get("a | with Triton", lambda: COSTS) == COSTS


def test_a_model_that_cannot_be_run_now_may_be_later(monkeypatch):
    kept, now = DecisionStore(None), [100.0]
    monkeypatch.setattr(store.time, "monotonic", lambda: now[0])
    assert kept.get("a", raises(NotNow("another node works on it"))) is None
    now[0] += store.RETRY
    assert kept.get("a", lambda: COSTS) == COSTS


def test_a_failure_of_its_own_is_remembered(tmp_path, monkeypatch, caplog):
    kept, now, tries, read = DecisionStore(tmp_path / "gpu.json"), [100.0], [], DecisionStore._read
    monkeypatch.setattr(DecisionStore, "_read", lambda self: tries.append("read") or read(self))
    monkeypatch.setattr(store.time, "monotonic", lambda: now[0])

    def fails():
        tries.append(1)
        raise RuntimeError("heads of 8 channels")

    for _ in range(3):
        assert kept.get("a", fails) is None
        now[0] += 10 * store.RETRY
    assert tries == ["read", "read", 1]  # a step has no time to read the file each time
    assert "heads of 8 channels), so merged\n" in caplog.text + "\n"


def test_a_users_home(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    monkeypatch.setenv(store.FOLDER, os.path.join("~", "times"))
    assert store.folder() == tmp_path / "times"
    monkeypatch.delenv(store.FOLDER)
    for name in ("XDG_CACHE_HOME", "LOCALAPPDATA"):
        monkeypatch.delenv(name, raising=False)
    assert store.folder().name == "tome" and tmp_path in store.folder().parents


@pytest.mark.parametrize("named", [None, "~/times", "~nobody-of-that-name/times"])
def test_a_user_without_a_home(monkeypatch, caplog, named):
    """As in containers and services: nothing is kept, and that is said once."""
    monkeypatch.setattr(os.path, "expanduser", lambda name: name)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: "GPU")
    monkeypatch.setattr(store, "_decided", {})
    for name in (store.FOLDER, "XDG_CACHE_HOME", "LOCALAPPDATA"):
        monkeypatch.delenv(name, raising=False)
    if named is not None:
        monkeypatch.setenv(store.FOLDER, named)
    with caplog.at_level(logging.WARNING, "ToMe"):
        for _ in range(2):
            assert store.store_of(torch.device("cuda")).path is None
    assert caplog.text.count("has no home folder") == 1
    monkeypatch.setattr(store, "_decided", {})
    monkeypatch.setenv(store.FOLDER, "")  # asked for
    assert store.store_of(torch.device("cuda")).path is None and caplog.text.count("has no home folder") == 1
