"""What the code itself says: its options and presets as tables, the node's controls as a list for its help pages
(ComfyUI shows them in a panel too narrow for a table), and the models that the node serves.

Ranges, defaults and choices come from ToMeConfig. So do the texts in English; those of the other languages are the
ones that the interface shows (locales/LANGUAGE/nodeDefs.json), and the few words between them are in
locales/words.json. The rows of models are the code's own (comfy_tome/dit_models.py, dit_refused.py); which of ComfyUI's
`supported_models` has which diffusion model is in comfyui-models.csv, which tests/comfyui/listed.py makes from a real
ComfyUI.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

from installer.inprocess import pack_module
from shared_tome import ToMeConfig
from shared_tome.methods import CUSTOM, PRESETS

from ..store import RESULTS, markdown, read
from .fidelity_tables import of_model, preset_variant, results
from .speed_tables import FOLDER as SPEED

LOCALES = Path(__file__).resolve().parents[2] / "locales"
LANGUAGES = tuple(sorted(folder.name for folder in LOCALES.iterdir() if folder.is_dir()))
"""Those other than English that there are texts in."""
_ANY = 2**32  # a number that may be larger than this may be any, for a person


def texts(language: str) -> dict[str, Any]:
    """What ComfyUI's page says in a language: nodes by id, with their `inputs` and `outputs`."""
    return json.loads((LOCALES / language / "nodeDefs.json").read_text(encoding="utf-8"))


def words(language: str) -> dict[str, str]:
    """What stands between a control's name and its values."""
    return json.loads((LOCALES / "words.json").read_text(encoding="utf-8"))[language]


def head(
    language: str,
    labels: Sequence[str],
    default: Any,
    minimum: float | None = None,
    maximum: float | None = None,
    choices: Sequence[str] = (),
    advanced: bool = False,
) -> str:
    """What the paragraph of a control begins with: its name, what it can be set to and what it is set to."""
    say = words(language)
    parts = [say["advanced"] if advanced else "", values_of(say, choices, minimum, maximum)]
    if isinstance(default, bool):
        shown = say["on"] if default else say["off"]
    else:
        shown = f"`{default}`" if isinstance(default, str) else number_text(default)
        shown = say["empty"] if default == "" else shown
    parts.append(say["default"].format(value=shown))
    values = say["comma"].join(filter(None, parts))
    return say["control"].format(name=", ".join(f"**{label}**" for label in labels), values=values)


def values_of(
    say: Mapping[str, str], choices: Sequence[str] | None, minimum: float | None, maximum: float | None
) -> str:
    """What a control can be set to; empty for switches and texts."""
    if choices:
        return ", ".join(f"`{choice}`" for choice in choices)
    if maximum is None:
        return ""
    return say["any"] if maximum > _ANY else say["range"].format(low=number_text(minimum), high=number_text(maximum))


def controls(language: str = "en") -> str:
    """The node's controls, one paragraph each, and what each choice does below it."""
    found = [_presets(language)]
    inputs = {} if language == "en" else texts(language)["ToMe"]["inputs"]
    shown = []
    for widget in ToMeConfig.widgets():
        option, text = widget.option, inputs.get(widget.name, {})
        help = text.get("tooltip", option.help)
        lines = _lines(help, option.choices or ())
        spelt = all(f"- `{choice}`" in lines for choice in option.choices or ())
        values = (option.minimum, option.maximum, () if spelt else option.choices, option.advanced)
        shown.append((text.get("name", option.label), (lines, widget.default, *values)))
    for (lines, *values), same in groupby(shown, key=lambda entry: entry[1]):
        found.append(_glued(head(language, [label for label, _ in same], *values), lines))
    return "\n\n".join(found) + "\n"


def sets(options: dict[str, Any]) -> str:
    """What a preset sets, for people."""
    shown = {True: "on", False: "off"}
    return ", ".join(f"{option} {shown.get(x, x) if isinstance(x, bool) else x}" for option, x in options.items())


def _presets(language: str) -> str:
    """The control that web/tome.js adds, with what each preset sets."""
    if language == "en":
        label, help = (
            "Preset",
            f"Sets {', '.join(next(iter(PRESETS.values())).options)}.\n"
            + "\n".join(f"{name}: {preset.summary}." for name, preset in PRESETS.items()),
        )
    else:
        label, help = (texts(language)["ToMe"]["inputs"]["preset"][part] for part in ("name", "tooltip"))
    lines = _lines(help, tuple(PRESETS))
    for name, preset in PRESETS.items():
        lines = lines.replace(f"- `{name}`", f"- `{name}` ({sets(preset.options)})")
    chosen = ToMeConfig().preset
    return _glued(head(language, [label], chosen, choices=(*PRESETS, CUSTOM)), lines)


def _lines(help: str, choices: Sequence[str]) -> str:
    """Lines that begin with a choice become a list."""
    found = ""
    for line in help.split("\n"):
        named = re.match(r"(\S+?)(:|：)", line)
        if named and named[1] in choices:
            found += f"\n- `{named[1]}`{line[named.end(1) :]}"
        else:
            found += f" {line}"
    return found.removeprefix(" ")


def _glued(head: str, lines: str) -> str:
    return f"{head.rstrip()}{lines}" if lines.startswith("\n") else f"{head}{lines}"


def number_text(value: float) -> str:
    return str(int(value)) if value == int(value) else f"{value:g}"


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
    rows, steps, pictures = [], read(SPEED / "steps.csv"), set()
    at = {"model": "sd15", "mode": "graph", "backend": "cudnn"}.items()
    for name, preset in PRESETS.items():
        config, start = ToMeConfig(**preset.options).resolved(multires=False), preset.options["start"]
        cells = [name, sets(preset.options), preset.summary]
        for model in ("demo", "lab"):
            found = {row["variant"]: row for row in measured(model) if row["sampler"] == "ddim30"}[preset_variant(name)]
            pictures.add(int(found["images"]))
            cells.append(f"{float(found['psnr']):.1f} dB")
        merged = f"{config.method} {config.ratio:g}" + ", own token" * config.own_token
        for pixels in ("1024", "2048"):
            # By speedups, each turn against turn with the unmerged step: rows may be of two runs.
            here = [row for row in steps if at <= row.items() and row["pixels"] == pixels]
            speedup = {row["variant"]: float(row["speedup"]) for row in here if row["speedup"]}
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


LISTED = RESULTS / "comfyui-models.csv"
UNET = "modules.diffusionmodules.openaimodel.UNetModel"
_NAMES = "SD 1.x, SD 2.x, SDXL, SVD's spatial layers and what is built on them"


def served() -> str:
    """The transformers that ComfyUI's node serves."""
    return f"{', '.join(row.name for row in pack_module('comfy_tome.dit_models').DIT_MODELS)}.\n"


def comfyui_models() -> str:
    """Every model of ComfyUI's supported_models: served, or left alone and why."""
    rows = read(LISTED)
    listed: dict[str, list[str]] = {}
    for row in rows:
        listed.setdefault(row["diffusion"], []).append(row["supported"])

    def names(classes: Iterable[str]) -> str:
        return ", ".join(f"`{kind.rpartition('.')[2]}`" for kind in classes)

    def line(name: str, classes: Iterable[str], outcome: str, forge: Iterable[str] = ()) -> list[str]:
        of_comfyui = [supported for kind in classes for supported in listed.get(kind, ())]
        return [name, ", ".join(of_comfyui), names(classes), names(forge), outcome]

    body = [line(_NAMES, [UNET], "served", ["IntegratedUNet2DConditionModel"])]
    for row in pack_module("comfy_tome.dit_models").DIT_MODELS:
        body.append(line(row.name, row.classes, "served", row.forge))
    left_alone = pack_module("comfy_tome.dit_refused")
    for row in (*left_alone.REFUSED, *left_alone.OF_NODES):
        body.append(line(row.name, row.classes, f"not served: {row.reason}"))
    body += [line(row.name, (), f"not served: {row.reason}", row.classes) for row in left_alone.OF_FORGE]
    head = ["model", "in ComfyUI's `supported_models`", "diffusion model", "in Forge and Forge Neo", "ToMe"]
    return markdown(head, body) + f"\nComfyUI {rows[0]['comfyui']}.\n"
