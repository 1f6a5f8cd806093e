"""Writes the tables of the pages from where the facts are: `python -m benchmarks.tables`.

Between `<!-- NAME -->` and `<!-- end -->` stands what the function of that name makes from the committed CSVs or from
ToMeConfig. A test compares, so that no page goes stale.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

from installer.inprocess import pack_module
from shared_tome import ToMeConfig

from .speed_tables import MAKERS as SPEED
from .speed_tables import table

ROOT = Path(__file__).resolve().parent.parent
PAGES = ("README.md", "web/docs/ToMe.md", "docs/speed.md")
_BLOCK = re.compile(r"(<!-- (\w+) -->\n)(.*?)(<!-- end -->)", re.DOTALL)


def options() -> str:
    """The node's controls."""
    rows = []
    for widget in ToMeConfig.widgets():
        option = widget.option
        if option.choices:
            values = ", ".join(f"`{choice}`" for choice in option.choices)
        elif isinstance(widget.default, bool):
            values = "on or off"
        elif option.maximum is not None and option.maximum > 2**32:
            values = "any"
        else:
            values = f"{option.minimum:g} to {option.maximum:g}"
        shown = {True: "on", False: "off"}.get(widget.default) if isinstance(widget.default, bool) else widget.default
        text = option.help.replace("\n", "<br>")
        name = f"{option.label}{' (advanced)' if option.advanced else ''}"
        rows.append([name, values, str(shown), text])
    return table(["control", "values", "default", "what it does"], rows)


def served() -> str:
    """The transformers that ComfyUI's node serves."""
    rows = pack_module("comfy_tome.dit_models").DIT_MODELS
    return f"{', '.join(row.name for row in rows)}.\n"


MAKERS: dict[str, Callable[[], str]] = {"options": options, "served": served, **SPEED}


def filled(text: str) -> str:
    """A page with its tables made anew. Raises KeyError for a table that nobody makes."""
    return _BLOCK.sub(lambda found: f"{found[1]}{MAKERS[found[2]]()}{found[4]}", text)


def main() -> None:
    for page in PAGES:
        path = ROOT / page
        path.write_text(filled(path.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    main()
