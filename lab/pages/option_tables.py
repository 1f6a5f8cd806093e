"""Tables made from ToMeConfig: controls, presets."""

from __future__ import annotations

from shared_tome import ToMeConfig
from shared_tome.methods import PRESETS

from ..store import markdown, read
from .fidelity_tables import WITHOUT_OWN, preset_measured
from .help_lists import number_text, sets
from .rows import of_model, results
from .speed_tables import FOLDER


def options() -> str:
    """The node's controls."""
    rows = []
    for widget in ToMeConfig.widgets():
        option = widget.option
        if option.choices:
            values = ", ".join(f"`{choice}`" for choice in option.choices)
        elif isinstance(widget.default, bool):
            values = "on or off"
        elif isinstance(widget.default, str):
            values = "a text"
        elif option.maximum is not None and option.maximum > 2**32:
            values = "any"
        else:
            values = f"{number_text(option.minimum)} to {number_text(option.maximum)}"
        shown = {True: "on", False: "off"}.get(widget.default) if isinstance(widget.default, bool) else widget.default
        shown = "empty" if shown == "" else shown
        text = option.help.replace("\n", "<br>")
        name = f"{option.label}{' (advanced)' if option.advanced else ''}"
        rows.append([name, values, str(shown), text])
    return markdown(["control", "values", "default", "what it does"], rows)


def presets() -> str:
    """The presets, what they do to the pictures of the quality lab's models and to the time of a run on the GPU."""
    rows, steps, marked, pictures = [], read(FOLDER / "steps.csv"), False, set()
    for name, preset in PRESETS.items():
        start = preset.options["start"]
        cells = [name, sets(preset.options), preset.summary]
        for model in ("demo", "lab"):
            found = {row["variant"]: row for row in measured(model) if row["sampler"] == "ddim30"}
            variant, mark = preset_measured(name, found)
            marked = marked or bool(mark)
            pictures.add(int(found[variant]["images"]))
            cells.append(f"{float(found[variant]['psnr']):.1f} dB{mark}")
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
    return f"{markdown(head, rows)}\n{note}{f' {WITHOUT_OWN}' if marked else ''}\n"


def measured(model: str) -> list[dict[str, str]]:
    """The rows of the model that lab/results/fidelity/MODEL.csv measured, of whatever file."""
    return of_model(results(), model)
