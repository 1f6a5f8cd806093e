"""Fixtures: one real ComfyUI for all workflows."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

REPO = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(REPO))


@pytest.fixture(scope="session")
def client(pages_server: tuple[Path, Any]) -> Any:
    """Of a real server (support/pages_server.py)."""
    return pages_server[1]


@pytest.fixture(scope="session")
def info(client: Any) -> dict[str, Any]:
    """What it tells of its nodes."""
    return client.get("/object_info")
