"""Writes the tables of the pages from where the facts are: `python -m lab.pages.tables`.

Between `<!-- NAME -->` (or `<!-- NAME LANGUAGE -->`) and `<!-- end -->` stands what the function of that name makes
from the committed CSVs or from ToMeConfig. A test compares, so that no page goes stale.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

from installer.inprocess import pack_module
from lab.pages.fidelity_tables import WITHOUT_OWN, preset_measured
from lab.pages.rows import of_model, results
from shared_tome import ToMeConfig
from shared_tome.config import PRESETS

from .help_lists import LANGUAGES, controls, number_text, sets
from .speed_tables import MAKERS as SPEED
from .speed_tables import read, table

ROOT = Path(__file__).resolve().parents[2]
HELP = ("web/docs/ToMe.md", *(f"web/docs/ToMe/{language}.md" for language in LANGUAGES))
PAGES = ("README.md", *HELP, "docs/speed.md", "docs/settings.md")
_BLOCK = re.compile(r"(<!-- (\w+)(?: ([\w-]+))? -->\n)(.*?)(<!-- end -->)", re.DOTALL)


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
            values = f"{number_text(option.minimum)} to {number_text(option.maximum)}"
        shown = {True: "on", False: "off"}.get(widget.default) if isinstance(widget.default, bool) else widget.default
        text = option.help.replace("\n", "<br>")
        name = f"{option.label}{' (advanced)' if option.advanced else ''}"
        rows.append([name, values, str(shown), text])
    return table(["control", "values", "default", "what it does"], rows)


def served() -> str:
    """The transformers that ComfyUI's node serves."""
    rows = pack_module("comfy_tome.dit_models").DIT_MODELS
    return f"{', '.join(row.name for row in rows)}.\n"


def presets() -> str:
    """The presets, what they do to the pictures of the quality lab's models and to the time of a run on the GPU."""
    rows, steps, marked = [], read("steps"), False
    for name, preset in PRESETS.items():
        start = preset.options["start"]
        cells = [name, sets(preset.options), preset.summary]
        for model in ("demo", "lab"):
            psnr = {row["variant"]: row["psnr"] for row in measured(model) if row["sampler"] == "ddim30"}
            variant, mark = preset_measured(name, psnr)
            marked = marked or bool(mark)
            cells.append(f"{float(psnr[variant]):.1f} dB{mark}")
        for pixels in ("1024", "2048"):
            own = ", own token" if preset.options["own_token"] else ""
            merged = f"{preset.options['method']} {preset.options['ratio']:g}{own}"
            # By speedups, each turn against turn with the unmerged step: rows may be of two runs.
            speedup = {row["variant"]: float(row["speedup"]) for row in steps if row["pixels"] == pixels
                       and (row["model"], row["mode"], row["backend"]) == ("sd15", "graph", "cudnn")}  # fmt: skip
            cells.append(f"{1 / (start + (1 - start) / speedup[merged]):.2f}x")
        rows.append(cells)
    head = ["preset", "sets", "", "PSNR, demo", "PSNR, lab", "SD 1.5 at 1024²", "at 2048²"]
    note = (
        "PSNR to the unmerged picture on the two models of docs/quality.md; the mean step of a run on an "
        f"{steps[0]['machine']}, as a CUDA graph, with the first steps that are left alone (docs/speed.md)."
    )
    return f"{table(head, rows)}\n{note}{f' {WITHOUT_OWN}' if marked else ''}\n"


def measured(model: str) -> list[dict[str, str]]:
    """The rows of the model that lab/results/fidelity/MODEL.csv measured, of whatever file."""
    return of_model(results(), model)


MAKERS: dict[str, Callable[..., str]] = {
    "options": options, "controls": controls, "presets": presets, "served": served, **SPEED
}  # fmt: skip


def filled(text: str) -> str:
    """A page with its tables made anew. Raises KeyError for a table that nobody makes."""

    def made(found: re.Match) -> str:
        language = [found[3]] if found[3] else []
        return f"{found[1]}{MAKERS[found[2]](*language)}{found[5]}"

    return _BLOCK.sub(made, text)


def main() -> None:
    for page in PAGES:
        path = ROOT / page
        path.write_text(filled(path.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    main()
