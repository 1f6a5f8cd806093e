"""Other nodes that merge a U-Net's tokens, by what they put into a model's transformer_options."""

from __future__ import annotations

import re
from typing import Any

# Whole words in the name of a patch's own module: "nodes_tomesd" is one, "nodes_customedits" is none.
_WORDS = {"tome", "tomesd"}


def merger_in(options: dict[str, Any]) -> str | None:
    """The name of a node whose attention patch merges tokens, or None. options: a model's transformer_options."""
    for patch in options.get("patches", {}).get("attn1_patch", ()):
        module = getattr(patch, "__module__", None) or type(patch).__module__
        words = re.split(r"[^a-z0-9]+", module.rpartition(".")[2].lower())
        if not _WORDS.isdisjoint(words):
            return "ComfyUI's own node TomePatchModel" if module.endswith("nodes_tomesd") else f"a node of {module}"
    return None
