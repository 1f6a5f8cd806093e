"""Which of a model's modules runs."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import nn


@contextmanager
def follow_modules(values: Mapping[nn.Module, Any], running: list[Any]) -> Iterator[None]:
    """While one of the modules runs in this thread, its value is the last of `running`.

    By hooks, which are gone when the block ends in whatever way. An exception in a module leaves its value there.
    """
    handles, here = [], threading.get_ident()  # another thread's call of the same modules has hooks of its own

    def begin(module: nn.Module, *_: Any) -> None:
        if threading.get_ident() == here:
            running.append(values[module])

    def end(*_: Any) -> None:
        if threading.get_ident() == here:
            running.pop()

    try:
        for module in values:
            handles += [module.register_forward_pre_hook(begin), module.register_forward_hook(end)]
        yield
    finally:
        for handle in handles:
            handle.remove()
