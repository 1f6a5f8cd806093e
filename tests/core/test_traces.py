"""torch.compile in the tests: it writes no trace of itself for pytest's log (tests/conftest.py)."""

from __future__ import annotations

import logging

import torch


def test_compiling_leaves_no_trace():
    log, seen = logging.getLogger("torch.__trace"), []
    handlers = [type(handler).__module__ for handler in log.handlers]
    assert not any(module.startswith("_pytest") for module in handlers)
    compiled = torch.compile(lambda x: x + 1, backend=lambda graph, _: seen.append(list(log.handlers)) or graph)
    assert torch.equal(compiled(torch.zeros(2)), torch.ones(2)) and seen == [[]]
