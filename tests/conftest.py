"""In what order the tests run, and what pytest's log and the garbage collector leave alone."""

from __future__ import annotations

import gc
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

HERE = Path(__file__).parent
# Files whose tests ask one server of ComfyUI, which takes seconds to start: they run in one process.
SERVERS = {
    "the demo's server": ("comfyui/test_http.py", "comfyui/test_record_http.py", "comfyui/test_compare_http.py"),
    "the pages' server": ("web/test_comfyui.py", "web/test_workflows.py", "workflows/test_queue.py"),
}
# The longest first, 15 s of one core or more each. None is in fast.txt.
LONGEST = (
    *SERVERS["the pages' server"],
    "kernels/test_compiles.py",
    *SERVERS["the demo's server"],
    "comfyui/test_dit_compile.py",
    "web/test_a1111.py",
    "core/test_compile.py",
    "comfyui/test_combined.py",
    "a1111/test_whole_step.py",
    "a1111/test_gradio.py",
    "comfyui/test_compile.py",
    "a1111/test_generation.py",
    "comfyui/test_two_devices.py",
    "a1111/test_gallery.py",
    "comfyui/test_neighbours.py",
    "comfyui/test_decisions.py",
    "lab/fidelity/test_latents.py",
)


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Those of LONGEST in its order, then all others in theirs: no process is left alone with a long one at the end."""
    place = {HERE / file: number for number, file in enumerate(LONGEST)}
    items.sort(key=lambda item: place.get(item.path, len(LONGEST)))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Whole files to a process each (`--dist loadfile`), and those of one server to one."""
    if config.getvalue("dist") != "loadfile":
        return None
    from xdist.scheduler import LoadFileScheduling

    class ByServer(LoadFileScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file = super()._split_scope(nodeid)
            return next((server for server, files in SERVERS.items() if file.endswith(files)), file)

    return ByServer(config, log)


def pytest_collection_finish() -> None:
    """Let torch.compile write no trace of itself.

    torch makes one as soon as its logger "torch.__trace" has a handler, and pytest gives its own to each logger that
    hands nothing on to the root's: compiling then takes much longer.
    """
    logging.getLogger("torch.__trace").propagate = True
    keep()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item, nextitem: pytest.Item | None) -> Iterator[None]:
    """Keep, after the last test of a file, what has outlived it."""
    done = yield
    if nextitem is not None and nextitem.path != item.path:
        keep()
    return done


def keep() -> None:
    """Let the garbage collector walk no more through what is there now.

    ComfyUI collects garbage at each sampling; to walk through torch and 7,000 tests takes half a second.
    """
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def pages_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, Any]]:
    """The own folder and the client of a real ComfyUI server (support/pages_server.py)."""
    from support import pages_server

    base = tmp_path_factory.mktemp("comfyui")
    with pages_server.started(base) as client:
        yield base, client
