"""Writes the tables of README.md and of the node's help from where the facts are: `python -m benchmarks.tables`.

Between `<!-- NAME -->` and `<!-- end -->` stands what the function of that name makes from the committed CSVs or from
ToMeConfig. A test compares, so that no page goes stale.
"""

from __future__ import annotations

import csv
import re
from collections.abc import Callable
from pathlib import Path

from installer.inprocess import pack_module
from shared_tome import ToMeConfig

ROOT = Path(__file__).resolve().parent.parent
RESULTS = Path(__file__).with_name("results")
PAGES = ("README.md", "web/docs/ToMe.md")
_BLOCK = re.compile(r"(<!-- (\w+) -->\n)(.*?)(<!-- end -->)", re.DOTALL)


def _read(name: str) -> list[dict[str, str]]:
    with (RESULTS / f"{name}.csv").open(encoding="utf-8") as file:
        return list(csv.DictReader(file))


def _table(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def speed() -> str:
    """Steps of a real ComfyUI, unmerged and with each variant: both runs there are."""
    rows = _read("comfyui-h200") + _read("comfyui-h200-2")
    variants = list(dict.fromkeys(row["variant"] for row in rows if row["variant"] != "unmerged"))
    jobs = sorted({(row["model"], int(row["pixels"]), row["commit"]) for row in rows})
    by_key = {(row["model"], int(row["pixels"]), row["commit"], row["variant"]): row for row in rows}
    names = {"sd15": "SD 1.5", "sdxl": "SDXL"}
    body = []
    for model, pixels, commit in jobs:
        base = by_key[model, pixels, commit, "unmerged"]
        spread = f"{float(base['step_p20']):.0f} to {float(base['step_p80']):.0f}"
        cells = [f"{names[model]} {pixels}²", commit, f"{float(base['step_ms']):.0f} ms ({spread})"]
        cells += [f"{float(by_key[model, pixels, commit, variant]['speedup']):.2f}x" for variant in variants]
        body.append(cells)
    about = rows[0]
    return (
        _table(["model, pixels", "commit", "unmerged step (p20 to p80)", *variants], body)
        + f"\n{about['machine']}, driver {about['driver']}, torch {about['torch']}, {about['date']}; median steps.\n"
    )


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
    return _table(["control", "values", "default", "what it does"], rows)


def served() -> str:
    """The transformers that ComfyUI's node serves."""
    rows = pack_module("comfy_tome.dit_models").DIT_MODELS
    return f"{', '.join(row.name for row in rows)}.\n"


MAKERS: dict[str, Callable[[], str]] = {"speed": speed, "options": options, "served": served}


def filled(text: str) -> str:
    """A page with its tables made anew. Raises KeyError for a table that nobody makes."""
    return _BLOCK.sub(lambda found: f"{found[1]}{MAKERS[found[2]]()}{found[4]}", text)


def main() -> None:
    for page in PAGES:
        path = ROOT / page
        path.write_text(filled(path.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    main()
