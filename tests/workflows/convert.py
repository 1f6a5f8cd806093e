"""From a workflow as the page saves it to a prompt as the server takes it, every value and link checked on the way.

`info` is what GET /object_info answers. The page does the same without checking.
"""

from __future__ import annotations

from typing import Any

NOTES = ("MarkdownNote", "Note")  # of the page alone
VALUES = {"INT": int, "FLOAT": (int, float), "FLOAT,INT": (int, float), "STRING": str, "BOOLEAN": bool}
CONTROLS = ("fixed", "increment", "decrement", "randomize")


class Mismatch(ValueError):
    """A workflow that this server would not open as it is meant."""


def to_prompt(workflow: dict[str, Any], info: dict[str, Any]) -> dict[str, Any]:
    """The prompt. Raises Mismatch for an unknown node, a value out of its range, a link of the wrong type."""
    nodes = {node["id"]: node for node in workflow["nodes"]}
    _check_links(workflow, nodes)
    prompt = {}
    for id, node in nodes.items():
        if node["type"] in NOTES:
            continue
        if node["type"] not in info:
            raise Mismatch(f"there is no node {node['type']}")
        known = info[node["type"]]
        _check_outputs(node, known)
        inputs = _widgets(node, known) | _sockets(node, known, workflow["links"])
        missing = [name for name in known["input"].get("required", {}) if name not in inputs]
        if missing:
            raise Mismatch(f"{node['type']} {id} lacks {', '.join(missing)}")
        prompt[str(id)] = {"class_type": node["type"], "inputs": inputs}
    return prompt


def specs(known: dict[str, Any]) -> dict[str, tuple[str, dict[str, Any], bool]]:
    """A node's inputs in order: type, options (with the choices of a list), whether required."""
    found = {}
    for part in ("required", "optional"):
        for name in known["input_order"].get(part, ()):
            kind, *rest = known["input"][part][name]
            options = rest[0] if rest else {}
            if isinstance(kind, list):
                kind, options = "COMBO", {**options, "options": kind}
            elif kind == "COMFY_DYNAMICCOMBO_V3":
                kind, options = "COMBO", {"options": [option["key"] for option in options["options"]]}
            found[name] = kind, options, part == "required"
    return found


def is_widget(kind: str, options: dict[str, Any]) -> bool:
    """Whether the page shows an input as a control rather than as a socket."""
    return not options.get("forceInput") and (kind in VALUES or kind == "COMBO")


def widget_names(known: dict[str, Any]) -> list[tuple[str, bool]]:
    """The entries of widgets_values that the page makes for a node, and whether an older file may lack them."""
    names = []
    for name, (kind, options, required) in specs(known).items():
        if not is_widget(kind, options) or options.get("hidden"):
            continue
        names.append((name, not required))
        if options.get("control_after_generate", kind == "INT" and name in ("seed", "noise_seed")):
            names.append(("control_after_generate", not required))
        if options.get("image_upload"):
            names.append(("upload", not required))
    return names


def _widgets(node: dict[str, Any], known: dict[str, Any]) -> dict[str, Any]:
    names, values = widget_names(known), node["widgets_values"]
    lacking = names[len(values) :]
    if len(values) > len(names) or not all(optional for _, optional in lacking):
        raise Mismatch(f"{node['type']} has widgets {[name for name, _ in names]}, the file {len(values)} values")
    all_specs = specs(known)
    inputs = {name: all_specs[name][1]["default"] for name, _ in lacking if name in all_specs}
    if node["type"] == "ToMe":  # web/tome.js keeps it there
        inputs["version"] = node["properties"].get("tome_version", "")
    for (name, _), value in zip(names, values, strict=False):
        if name == "control_after_generate" and value not in CONTROLS:
            raise Mismatch(f"{node['type']}: control_after_generate {value!r}")
        if name in all_specs:
            kind, options, _ = all_specs[name]
            _check_value(f"{node['type']}.{name}", kind, options, value)
            inputs[name] = value
    return inputs


def _check_value(where: str, kind: str, options: dict[str, Any], value: Any) -> None:
    if kind == "COMBO":
        if value not in options["options"]:
            raise Mismatch(f"{where}: {value!r} is none of {options['options']}")
        return
    if not isinstance(value, VALUES[kind]) or (kind != "BOOLEAN" and isinstance(value, bool)):
        raise Mismatch(f"{where}: {value!r} is no {kind}")
    if kind in ("INT", "FLOAT", "FLOAT,INT") and not options.get("min", value) <= value <= options.get("max", value):
        raise Mismatch(f"{where}: {value!r} is not in {options.get('min')} to {options.get('max')}")


def _sockets(node: dict[str, Any], known: dict[str, Any], links: list[list[Any]]) -> dict[str, Any]:
    wanted = {name: kind for name, (kind, options, _) in specs(known).items() if not is_widget(kind, options)}
    by_id, inputs = {link[0]: link for link in links}, {}
    for socket in node["inputs"]:
        if socket["name"] not in wanted:
            raise Mismatch(f"{node['type']} has no socket {socket['name']}")
        if socket["type"] != wanted[socket["name"]]:
            raise Mismatch(
                f"{node['type']}.{socket['name']} is {wanted[socket['name']]}, the file has {socket['type']}"
            )
        if socket["link"] is not None:
            _, source, slot, *_ = by_id[socket["link"]]
            inputs[socket["name"]] = [str(source), slot]
    return inputs


def _check_outputs(node: dict[str, Any], known: dict[str, Any]) -> None:
    told = list(zip(known["output_name"], known["output"], strict=True))
    given = [(output["name"], output["type"]) for output in node["outputs"]]
    if told != given:
        raise Mismatch(f"{node['type']} has outputs {told}, the file {given}")


def _check_links(workflow: dict[str, Any], nodes: dict[int, dict[str, Any]]) -> None:
    """The table of links, the sockets and the outputs tell the same."""
    for id, source, slot, target, socket, kind in workflow["links"]:
        output, into = nodes[source]["outputs"][slot], nodes[target]["inputs"][socket]
        if output["type"] != kind or into["type"] not in (kind, "*"):
            raise Mismatch(f"link {id} of {kind} goes from {output['type']} to {into['type']}")
        if id not in output["links"] or into["link"] != id:
            raise Mismatch(f"link {id} is not known at both of its ends")
    ids = [link[0] for link in workflow["links"]]
    used = [socket["link"] for node in nodes.values() for socket in node["inputs"] if socket["link"] is not None]
    if sorted(ids) != sorted(used) or len(set(ids)) != len(ids):
        raise Mismatch(f"links {sorted(ids)}, but sockets name {sorted(used)}")
