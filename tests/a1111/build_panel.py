"""Builds the panel with the real gradio, which PYTHONPATH names before the tests' own packages."""

from __future__ import annotations

import json
import sys
import warnings
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import gradio as gr

from tests.a1111 import host as program


class InputAccordion:
    """As the host's: a hidden checkbox with an accordion that follows it. The host's is a gr.Checkbox itself; here
    it has one, because gradio 4 writes a .pyi file beside each new component class.
    """

    def __init__(self, value, label, elem_id):
        self.checkbox = gr.Checkbox(value, label=label, elem_id=f"{elem_id}-checkbox", visible=False)
        self.accordion = gr.Accordion(label=label, elem_id=elem_id, open=value)

    def __enter__(self):
        self.accordion.__enter__()
        return self.checkbox

    def __exit__(self, *exc):
        self.accordion.__exit__(*exc)


def preset_events(config) -> list:
    """(who, event, what it sets, whether it waits) of each event that has to do with txt2img's presets, by name."""
    prefix = "script_txt2img_tome_"
    names = {part["id"]: str(part["props"].get("elem_id", "")).removeprefix(prefix) for part in config["components"]}
    ours = next(part["id"] for part in config["components"] if part["props"].get("elem_id") == f"{prefix}preset")
    found = []
    for event in config["dependencies"]:
        if ours not in event["outputs"]:
            continue
        for target in event["targets"]:  # gradio 3: ids and one trigger; gradio 4: pairs
            who, when = target if isinstance(target, (list, tuple)) else (target, event["trigger"])
            found.append([names[who], when, [names[one] for one in event["outputs"]], bool(event["queue"])])
    return found


def marks(config, panel) -> dict:
    """What is grey at the start on txt2img, by name; what the method's event sets; and what it would, by method."""
    prefix = "script_txt2img_tome_"
    names = {part["id"]: str(part["props"].get("elem_id", "")).removeprefix(prefix) for part in config["components"]}
    grey = [
        names[part["id"]]
        for part in config["components"]
        if str(part["props"].get("elem_id", "")).startswith(prefix) and part["props"].get("interactive") is False
    ]
    events = [[names[one] for one in event["outputs"]] for event in config["dependencies"]]
    sets = next((list(outputs) for outputs in events if "stride_x" in outputs and "preset" not in outputs), [])
    off = {"seed_rule": "image", **dict.fromkeys(panel._SWITCHES, False)}
    grey_with = {
        method: [name for name in panel._MARKED if panel._is_idle(name, {**off, "method": method})]
        for method in ("auto", "sample", "merge")
    }
    return {"grey": grey, "sets": sets, "with": grey_with}


def main() -> None:
    """Build, ask again as the API does, and print what came of it as JSON."""

    host = program.Host()
    host.modules["modules.ui_components"].InputAccordion = InputAccordion
    host.modules.pop("gradio")
    sys.modules.update(host.modules)
    warnings.simplefilter("error", UserWarning)
    with gr.Blocks() as page:
        host.start()
        runner = host.tabs["txt2img"]
        for info in host.opts.data_labels.values():
            info.component(label=info.label, value=info.default, **info.component_args)
    with gr.Blocks():
        again = [control.value for control in runner.scripts[0].ui(False)]
    config = page.get_config_file()
    described = config["components"]
    controls = runner.inputs[1:]
    older, told = runner.scripts[0].infotext_fields[-1]
    paste = dict(zip(("enabled", "ratio"), runner.scripts[0].infotext_fields, strict=False))
    print(
        json.dumps(
            {
                "values": [control.value for control in controls],
                "again": again,
                "kinds": [part["type"] for part in described],
                "ids": [control.elem_id for control in controls],
                "settings": len(host.opts.data_labels),
                "preset": preset_events(config),
                "marks": marks(
                    config,
                    next(module for name, module in sys.modules.items() if name.endswith("a1111_extension.panel")),
                ),
                "texts": json.dumps(described),
                "older": type(older.value)(told({"ToMe ratio": "0.5", "ToMe version": "0.1.0"})),
                "newer": type(older.value)(told({"ToMe ratio": "0.5", "ToMe version": program.VERSION})),
                "pasted": type(paste["ratio"][0].value)(paste["ratio"][1]({"ToMe ratio": "0.35"})),
            }
        )
    )


if __name__ == "__main__":
    main()
