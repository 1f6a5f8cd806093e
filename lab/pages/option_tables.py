"""Tables made from ToMeConfig: controls, presets."""

from __future__ import annotations

from shared_tome import ToMeConfig
from shared_tome.methods import PRESETS

from ..store import markdown, read
from .fidelity_tables import preset_variant
from .help_lists import sets, values_of
from .rows import of_model, results
from .speed_tables import FOLDER


def options() -> str:
    rows = []
    for widget in ToMeConfig.widgets():
        option, is_switch = widget.option, isinstance(widget.default, bool)
        values = values_of({"any": "any", "range": "{low} to {high}"}, option.choices, option.minimum, option.maximum)
        values = values or ("on or off" if is_switch else "a text")
        shown = ("off", "on")[widget.default] if is_switch else widget.default
        shown = "empty" if shown == "" else shown
        text = option.help.replace("\n", "<br>")
        name = f"{option.label}{' (advanced)' if option.advanced else ''}"
        rows.append([name, values, str(shown), text])
    return markdown(["control", "values", "default", "what it does"], rows)


def presets() -> str:
    """The presets, what they do to the pictures of the quality lab's models and to the time of a run on the GPU."""
    rows, steps, pictures = [], read(FOLDER / "steps.csv"), set()
    for name, preset in PRESETS.items():
        start = preset.options["start"]
        cells = [name, sets(preset.options), preset.summary]
        for model in ("demo", "lab"):
            found = {row["variant"]: row for row in measured(model) if row["sampler"] == "ddim30"}[preset_variant(name)]
            pictures.add(int(found["images"]))
            cells.append(f"{float(found['psnr']):.1f} dB")
        for pixels in ("1024", "2048"):
            own = ", own token" if preset.options["own_token"] else ""
            method = ToMeConfig(**preset.options).resolved(multires=False).method
            merged = f"{method} {preset.options['ratio']:g}{own}"
            # By speedups, each turn against turn with the unmerged step: rows may be of two runs.
            speedup = {row["variant"]: float(row["speedup"]) for row in steps if row["pixels"] == pixels
                       and (row["model"], row["mode"], row["backend"]) == ("sd15", "graph", "cudnn")}  # fmt: skip
            cells.append(f"{1 / (start + (1 - start) / speedup[merged]):.2f}x")
        rows.append(cells)
    head = ["preset", "sets", "for", "PSNR, demo", "PSNR, lab", "speed, SD 1.5 1024²", "speed, 2048²"]
    count = " or ".join(map(str, sorted(pictures)))
    note = (
        f"PSNR: to the unmerged picture, the mean of {count} pictures, on two models (docs/quality.md; tables with "
        f"EasyCache are of fewer). Speed: the mean step of a run on an {steps[0]['machine']}, as a CUDA graph, "
        "unmerged first steps included (docs/speed.md)."
    )
    return f"{markdown(head, rows)}\n{note}\n"


def measured(model: str) -> list[dict[str, str]]:
    """The rows of the model that lab/results/fidelity/MODEL.csv measured, of whatever file."""
    return of_model(results(), model)
