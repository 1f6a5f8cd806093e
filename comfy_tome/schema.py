"""The nodes' schema on older ComfyUI versions."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, TypeVar

T = TypeVar("T")

TOO_OLD = "this ComfyUI is too old for ToMe: update it to 0.3.60 or newer. The nodes are not loaded."
# Keywords that ComfyUI 0.3.60 does not know. Nodes work without them; the page then shows all options at once.
NEWER = frozenset({"advanced", "extra_dict", "search_aliases"})


def is_too_old() -> bool:
    """Whether this ComfyUI lacks the node API that the nodes are written for."""
    try:
        from comfy_api.latest import ComfyExtension, io, ui  # noqa: F401
    except ImportError:
        return True
    needed = ((io, ("Schema", "ComfyNode", "NodeOutput", "Custom", "Hidden", "NumberDisplay")), (ui, ("PreviewText",)))
    return not all(hasattr(module, name) for module, names in needed for name in names)


def make(kind: Callable[..., T], *args: Any, **options: Any) -> T:
    """kind(*args, **options), without the NEWER options that this ComfyUI's `kind` does not take."""
    known = inspect.signature(kind).parameters
    return kind(*args, **{name: value for name, value in options.items() if name in known or name not in NEWER})
