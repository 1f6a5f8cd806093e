"""One filler for all pages: between `<!-- NAME -->` or `<!-- NAME ARGUMENT -->` and `<!-- end -->` stands the table of
that name, made from the committed CSVs or from ToMeConfig. A test compares, so that no page goes stale.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path

from ..store import Row
from . import fidelity_tables, frontier_tables, multires_tables, option_tables, speed_tables

ROOT = Path(__file__).resolve().parents[2]
PAGES = (
    *("README.md", "web/docs/ToMe.md"),
    *(f"web/docs/ToMe/{language}.md" for language in option_tables.LANGUAGES),
    *(f"docs/{page}.md" for page in ("settings", "models", "speed", "quality", "vit", "kernels")),
)
NOTHING = "Not measured yet.\n"
_BLOCK = re.compile(r"(<!-- (\w+)(?: ([\w-]+))? -->\n)(.*?)(<!-- end -->)", re.DOTALL)
# Of an argument, where the marker has one: a language, a file of lab/results/fidelity, or a model of the lab.
Maker = Callable[..., str]


def of_fidelity(rows: Sequence[Row]) -> dict[str, Maker]:
    """The makers of docs/quality.md's tables from these rows; their argument is the file whose model is meant."""
    return {name: partial(fidelity_tables.made, name, rows) for name in fidelity_tables.TABLES}


def of_speed(folder: Path = speed_tables.FOLDER) -> dict[str, Maker]:
    """The makers of the tables of docs/speed.md and docs/vit.md from the CSVs in a folder."""
    return {name: partial(speed_tables.made, name, folder) for name in speed_tables.MAKERS}


def _named(module: object, names: str) -> dict[str, Maker]:
    return {name: getattr(module, name) for name in names.split()}


MAKERS: dict[str, Maker] = {
    **_named(option_tables, "options presets controls served comfyui_models"),
    **_named(multires_tables, "resolutions other_samplers on_unets videos"),
    "real_models": fidelity_tables.real_models,
    **_named(frontier_tables, "rivals held tiles steps recipe when"),
    **of_speed(),
    **of_fidelity(fidelity_tables.results()),
}


def filled(text: str, makers: Mapping[str, Maker] = MAKERS) -> str:
    """A page with its tables made anew. Raises KeyError for a table that nobody makes."""

    def made(found: re.Match) -> str:
        table = makers[found[2]](*([found[3]] if found[3] else []))
        return f"{found[1]}{table.rstrip() or NOTHING.rstrip()}\n{found[5]}"

    return _BLOCK.sub(made, text)
