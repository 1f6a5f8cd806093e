"""A function of a host's module, answered by ToMe for the time of one call.

Modules of Forge take their attention function by name, each its own. While a call runs that name is a Swapped, which
asks the calling thread's answer, if it has one, and the host's function otherwise. With the last call it is put back.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from types import ModuleType
from typing import Any

_lock = threading.Lock()  # around each change of a name, never around a call


class Swapped:
    """Stands for a function while calls have an answer for it. Without one it does what the function does, so it does
    no harm where somebody else holds it longer."""

    def __init__(self, original: Callable[..., Any]):
        self.original = original
        self._answers: dict[int, list[Callable[..., Any]]] = {}  # by thread, the innermost last

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        answers = self._answers.get(threading.get_ident())
        return self.original(*args, **kwargs) if not answers else answers[-1](self.original, *args, **kwargs)

    def begin(self, answer: Callable[..., Any]) -> None:
        self._answers.setdefault(threading.get_ident(), []).append(answer)

    def end(self) -> bool:
        """Whether no call has an answer any more."""
        here = threading.get_ident()
        self._answers[here].pop()
        if not self._answers[here]:
            del self._answers[here]
        return not self._answers


@contextmanager
def swapped(places: Iterable[tuple[ModuleType, str]], answer: Callable[..., Any]) -> Iterator[None]:
    """This thread's calls of functions go to answer(function, *args, **kwargs) until the block ends, in whatever way.

    places: modules and the names of functions in them.
    """
    with ExitStack() as stack:
        for module, name in places:
            stack.enter_context(_swapped(module, name, answer))
        yield


@contextmanager
def _swapped(module: ModuleType, name: str, answer: Callable[..., Any]) -> Iterator[None]:
    with _lock:
        found = getattr(module, name)
        stands = found if isinstance(found, Swapped) else Swapped(found)
        stands.begin(answer)
        setattr(module, name, stands)
    try:
        yield
    finally:
        with _lock:
            if stands.end() and getattr(module, name, None) is stands:  # else somebody has put another there meanwhile
                setattr(module, name, stands.original)
