"""Runs a suite that needs Triton's interpreter in a process where triton is not imported yet.

Each suite has a test file of its own: the runner gives whole files to its workers.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path

import pytest
from support import forks

HERE = Path(__file__).resolve().parent


def suite(file: str) -> Callable[[], None]:
    """The test that runs this file (interpreted*.py)."""

    @pytest.mark.skipif(
        importlib.util.find_spec("triton") is None, reason="triton is not installed (Linux on x86-64 alone)"
    )
    @pytest.mark.slow
    @pytest.mark.timeout(1200)  # a minute on an idle core
    def test_kernels_in_the_interpreter():
        done = forks.with_torch(
            *("-m", "pytest", "-c", str(HERE.parent / "pytest.ini"), "-q", "-x"),
            *("-p", "no:cacheprovider", "-p", "no:hypothesispytest", str(HERE / file)),
            TRITON_INTERPRET="1",
            TOME_KERNELS="1",
        )
        assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]
        assert " passed" in done.stdout

    return test_kernels_in_the_interpreter
