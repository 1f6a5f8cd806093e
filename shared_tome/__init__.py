"""Token Merging: the core. Imports torch alone and knows no host."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .attention.bias import attend
from .config import ToMeConfig
from .merging.call import ModelCall
from .merging.match import match_tokens
from .merging.plan import Plan
from .methods import METHODS

if TYPE_CHECKING:
    from .scripts import apply_patch, decisions_of, remove_patch

__all__ = [
    "METHODS", "ModelCall", "Plan", "ToMeConfig", "apply_patch", "attend", "decisions_of", "match_tokens",
    "remove_patch",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    """The face for scripts, loaded when it is asked for: hosts do without."""
    if name in ("apply_patch", "decisions_of", "remove_patch"):
        from . import scripts

        return getattr(scripts, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
