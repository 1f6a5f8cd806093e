"""Models that are served, by the names of their classes.

A model that looks alike may attend linearly, turn its keys by their place or run over frames. Accepted by likeness,
such a model fails in mid-sampling or stays unmerged. So an adapter lists classes, and refuses all others by name.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator

from torch import nn


def served_as(module: nn.Module, names: Collection[str]) -> str | None:
    """The name under which a module is served, or None.

    A subclass counts as the listed class as long as it keeps that class's forward. names: "Class" or "module.Class",
    module the last part of the class's module path.
    """
    forward = type(module).forward
    for cls in type(module).__mro__:
        if getattr(cls, "forward", None) is not forward:
            return None
        path = f"{cls.__module__.rpartition('.')[2]}.{cls.__name__}"
        for name in (cls.__name__, path):
            if name in names:
                return name
    return None


def find_served(model: nn.Module, names: Collection[str]) -> nn.Module | None:
    """The model itself, or the one model inside a wrapper (PEFT, DataParallel); None where there is none or several."""
    if served_as(model, names) is not None:
        return model
    found = list(_inside(model, names))
    return found[0] if len(found) == 1 else None


def is_tomesds(model: nn.Module) -> bool:
    """Whether tomesd has patched a model: it puts a class of its own in the place of each transformer block's."""
    return any(type(module).__name__ == "ToMeBlock" for module in model.modules())


def _inside(model: nn.Module, names: Collection[str]) -> Iterator[nn.Module]:
    return (module for module in model.modules() if served_as(module, names) is not None)
