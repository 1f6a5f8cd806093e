"""Which English each translation was made of. After a text and its translations were changed:

    COMFYUI_DIR=... python tests/docs/translations.py

writes down fingerprints of every English text and of its translation, in locales/LANGUAGE/source.json. A text whose
English changed while its translation did not is named and refused, unless `--same` says that all those still hold.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from installer.server import ComfyServer
from lab.pages.option_tables import LANGUAGES, LOCALES, texts

HELP = ROOT / "web" / "docs"
COMMAND = "python tests/docs/translations.py"


def english_texts(known: dict[str, Any]) -> dict[str, str]:
    """What the server says of each node, its inputs and outputs, by the keys of nodeDefs.json with dots between.

    known: /object_info. A node's display_name is the same in all languages, and so is the name of an output that has
    none but its type.
    """
    found = {}
    for node, info in known.items():
        if not node.startswith("ToMe") or node == "ToMeDemoModel":
            continue
        found[f"{node}.description"] = info["description"]
        for name, options in inputs(info).items():
            found[f"{node}.inputs.{name}.name"] = options.get("display_name", name)
            found[f"{node}.inputs.{name}.tooltip"] = options.get("tooltip", "")
        for number, (type, name, tooltip) in enumerate(
            zip(info["output"], info["output_name"], info["output_tooltips"], strict=True)
        ):
            found[f"{node}.outputs.{number}.name"] = "" if name == type else name
            found[f"{node}.outputs.{number}.tooltip"] = tooltip or ""
    presets = known["ToMe"]["input"]["required"]["ratio"][1]["tome_presets"]
    found["ToMe.inputs.preset.name"], found["ToMe.inputs.preset.tooltip"] = presets["label"], presets["help"]
    folded = known["ToMe"]["input"]["required"]["ratio"][1]["tome_folded"]
    found["ToMe.inputs.more.name"], found["ToMe.inputs.more.tooltip"] = folded["more"], folded["help"]
    found["ToMe.inputs.fewer.name"] = folded["fewer"]
    return {key: text for key, text in found.items() if text}


def inputs(info: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """A node's inputs that a person sees, with what the server says of them; `choices` are those of a combo."""
    found = {}
    for part in ("required", "optional"):
        for name, (type, *rest) in (info["input"].get(part) or {}).items():
            options = rest[0] if rest else {}
            if options.get("hidden"):  # what the page itself keeps
                continue
            choices = type if isinstance(type, list) else options.get("options", ())
            found[name] = {**options, "choices": tuple(choices)}
    return found


def own_texts(language: str) -> dict[str, str]:
    """What locales/ has, by the keys of `english_texts`."""
    found = {}

    def walk(entry: Any, key: str) -> None:
        if isinstance(entry, dict):
            for name, part in entry.items():
                walk(part, f"{key}.{name}" if key else name)
        else:
            found[key] = entry

    walk(texts(language), "")
    return found


def help_page(node: str, language: str) -> Path:
    return HELP / f"{node}.md" if language == "en" else HELP / node / f"{language}.md"


def prose(node: str, language: str) -> dict[str, str]:
    """The paragraphs of a help page, without what `python -m lab.pages` writes, by page and number."""
    page = re.sub(
        r"(<!-- [^\n]* -->\n).*?<!-- end -->", r"\1", help_page(node, language).read_text("utf-8"), flags=re.S
    )
    blocks = [" ".join(block.split()) for block in page.split("\n\n") if not block.startswith("<!--")]
    return {f"web/docs/{node}, paragraph {number}": block for number, block in enumerate(blocks, 1)}


def pairs(language: str, known: dict[str, Any]) -> dict[str, tuple[str, str]]:
    """Every English text and what stands for it in the language ("" where nothing does)."""
    nodes = [page.stem for page in sorted(HELP.glob("*.md"))]
    source, own = english_texts(known), own_texts(language)
    for node in nodes:
        source |= prose(node, "en")
        own |= prose(node, language)
    return {key: (text, own.get(key, "")) for key, text in source.items()}


def fingerprints(pair: tuple[str, str]) -> list[str]:
    return [hashlib.sha256(text.encode()).hexdigest()[:10] for text in pair]


def stored(language: str) -> dict[str, list[str]]:
    file = LOCALES / language / "source.json"
    return json.loads(file.read_text("utf-8")) if file.exists() else {}


def stale(language: str, known: dict[str, Any]) -> list[str]:
    """What to do about each text that is no longer as it was written down."""
    now, before = pairs(language, known), stored(language)
    found = [f"{language}: {key} is no more: {COMMAND}" for key in before if key not in now]
    for key, pair in now.items():
        (source, own), (old_source, old_own) = fingerprints(pair), before.get(key, (None, None))
        if source != old_source and own == old_own:
            found.append(f"{language}: {key}: translate anew, its English is now {pair[0]!r}")
        elif (source, own) != (old_source, old_own):
            found.append(f"{language}: {key}: its translation was changed: {COMMAND}")
    return found


def write_down(language: str, known: dict[str, Any]) -> None:
    lines = [f"{json.dumps(key)}: {json.dumps(fingerprints(pair))}" for key, pair in pairs(language, known).items()]
    (LOCALES / language / "source.json").write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--same", action="store_true", help="the translations hold for the English as it is now")
    same = parser.parse_args().same
    if not os.environ.get("COMFYUI_DIR"):
        parser.error("COMFYUI_DIR must name a ComfyUI")
    with tempfile.TemporaryDirectory() as base:
        with ComfyServer(Path(os.environ["COMFYUI_DIR"]), Path(base)) as client:
            known = client.get("/object_info")
    old = [line for language in LANGUAGES for line in stale(language, known) if "translate anew" in line]
    if old and not same:
        parser.exit(1, "\n".join(old) + "\n")
    for language in LANGUAGES:
        write_down(language, known)


if __name__ == "__main__":
    main()
