"""Runs what needs Triton's interpreter in processes of their own."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent


@pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="triton is not installed (Linux on x86-64 alone)"
)
@pytest.mark.slow
@pytest.mark.timeout(1200)  # interpreted.py takes one to three minutes on two cores
@pytest.mark.parametrize("name", [f"interpreted{of}.py" for of in ("", "_own", "_attend", "_drawn", "_multires")])
def test_kernels_in_the_interpreter(name):
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-c",
        str(HERE.parent / "pytest.ini"),
        "-q",
        "-x",
        "-p",
        "no:cacheprovider",
    ]
    done = subprocess.run(
        [*command, str(HERE / name)],
        env={**os.environ, "TRITON_INTERPRET": "1", "TOME_KERNELS": "1", "PYTHONPATH": str(HERE.parents[1])},
        cwd=HERE.parents[1],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]
    assert " passed" in done.stdout
