"""The controls of the node ToMe as a list, for its help pages: ComfyUI shows them in a panel too narrow for a table.

Ranges, defaults and choices come from ToMeConfig. So do the texts in English; those of the other languages are the
ones that the interface shows (locales/LANGUAGE/nodeDefs.json), and the few words between them are in
locales/words.json.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

from shared_tome import ToMeConfig
from shared_tome.methods import CUSTOM, PRESETS

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
