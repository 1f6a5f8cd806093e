"""One filler for all pages: between `<!-- NAME -->` or `<!-- NAME ARGUMENT -->` and `<!-- end -->` stands the table of
that name, made from the committed CSVs or from ToMeConfig. A test compares, so that no page goes stale.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path

from ..store import Row
from . import (
    fidelity_tables,
    frontier_recipe,
    frontier_tables,
    model_tables,
    multires_tables,
    option_tables,
    real_tables,
    speed_tables,
)
from .help_lists import LANGUAGES, controls
from .rows import results

ROOT = Path(__file__).resolve().parents[2]
HELP = ("web/docs/ToMe.md", *(f"web/docs/ToMe/{language}.md" for language in LANGUAGES))
PAGES = (
    "README.md",
    *HELP,
    *(f"docs/{page}.md" for page in ("settings", "models", "speed", "quality", "vit", "kernels")),
)
NOTHING = "Not measured yet.\n"
_BLOCK = re.compile(r"(<!-- (\w+)(?: ([\w-]+))? -->\n)(.*?)(<!-- end -->)", re.DOTALL)
# Of an argument, where the marker has one: a language, a file of lab/results/fidelity, or a model of the lab.
Maker = Callable[..., str]


def of_fidelity(rows: Sequence[Row]) -> dict[str, Maker]:
    """The makers of docs/quality.md's tables from these rows; their argument is the file whose model is meant."""
    return {name: lambda file="", name=name: fidelity_tables.made(name, file, rows) for name in fidelity_tables.TABLES}


def of_speed(folder: Path = speed_tables.FOLDER) -> dict[str, Maker]:
    """The makers of the tables of docs/speed.md and docs/vit.md from the CSVs in a folder."""
    return {name: partial(speed_tables.made, name, folder) for name in speed_tables.MAKERS}


MAKERS: dict[str, Maker] = {
    "options": option_tables.options,
    "presets": option_tables.presets,
    **multires_tables.MAKERS,
    "rivals": frontier_tables.rivals,
    "held": frontier_tables.held,
    "tiles": frontier_tables.tiles,
    "steps": frontier_tables.steps,
    "recipe": frontier_recipe.recipe,
    "when": frontier_recipe.when,
    "real_models": real_tables.real_models,
    "served": model_tables.served,
    "comfyui_models": model_tables.models,
    "controls": controls,
    **of_speed(),
    **of_fidelity(results()),
}


def filled(text: str, makers: Mapping[str, Maker] = MAKERS) -> str:
    """A page with its tables made anew. Raises KeyError for a table that nobody makes."""

    def made(found: re.Match) -> str:
        table = makers[found[2]](*([found[3]] if found[3] else []))
        return f"{found[1]}{table.rstrip() or NOTHING.rstrip()}\n{found[5]}"

    return _BLOCK.sub(made, text)
