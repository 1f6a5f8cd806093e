"""The repository's root on the path, and one way to run a benchmark's command line in this process."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]
sys.path.insert(0, str(ROOT))


@pytest.fixture
def run(monkeypatch, capsys):
    """run(module, *arguments) -> its rows; progress goes to stderr, one JSON list to stdout."""

    def main(module, *arguments):
        monkeypatch.setattr(sys, "argv", [module.__name__, "--device", "cpu", "--json", *map(str, arguments)])
        module.main()
        said = capsys.readouterr()
        assert "it/s" in said.err or "s/it" in said.err
        return json.loads(said.out)

    return main
