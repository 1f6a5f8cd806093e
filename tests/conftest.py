"""In what order the tests run, and what pytest's log leaves alone."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

HERE = Path(__file__).parent
# The longest first, 20 s of one core or more each. None is in fast.txt.
LONGEST = (
    "comfyui/test_compile.py",
    "kernels/test_interpreted_attend.py",
    "kernels/test_interpreted_match.py",
    "web/test_a1111.py",
    "workflows/test_page.py",
    "workflows/test_queue.py",
    "web/test_comfyui.py",
    "comfyui/test_dit_compile.py",
    "kernels/test_compiles.py",
    "kernels/test_interpreted_multires.py",
    "kernels/test_interpreted_drawn.py",
    "kernels/test_interpreted_own.py",
    "kernels/test_interpreted.py",
)


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Those of LONGEST in its order, then all others in theirs: no process is left alone with a long one at the end."""
    place = {HERE / file: number for number, file in enumerate(LONGEST)}
    items.sort(key=lambda item: place.get(item.path, len(LONGEST)))


def pytest_collection_finish() -> None:
    """Let torch.compile write no trace of itself.

    torch makes one as soon as its logger "torch.__trace" has a handler, and pytest gives its own to each logger that
    hands nothing on to the root's: compiling then takes much longer.
    """
    logging.getLogger("torch.__trace").propagate = True
