"""The pack on a ComfyUI whose node schema knows less: the oldest that it serves, and older ones."""

from __future__ import annotations

import asyncio
import importlib.util
import inspect
import sys
import types

import pytest

from . import host

FACES = ("nodes", "record_nodes", "clip_vision", "compare")


@pytest.fixture
def pack(comfy_nodes):
    """The loaded pack's modules by name."""
    root = comfy_nodes["ToMe"].__module__.rpartition(".")[0]
    return {name: sys.modules[f"{root}.{name}"] for name in (*FACES, "schema")}


def without(kind, dropped):
    """kind with a signature that lacks some keywords: giving them is a TypeError, as on an older ComfyUI."""

    def made(*args, **options):
        unknown = dropped & options.keys()
        if unknown:
            raise TypeError(f"unexpected keyword argument {min(unknown)!r}")
        return kind(*args, **options)

    known = inspect.signature(kind)
    made.__signature__ = known.replace(parameters=[p for p in known.parameters.values() if p.name not in dropped])
    return made


@pytest.fixture
def older(pack, monkeypatch):
    """ComfyUI 0.3.60's schema: none of the keywords in schema.NEWER."""
    io, dropped = pack["nodes"].io, pack["schema"].NEWER
    old = types.SimpleNamespace(**vars(io))
    old.Schema = without(io.Schema, dropped)
    for name in ("Int", "Float", "Boolean", "Combo", "Model", "Image", "ClipVision", "AnyType", "String"):
        kind = getattr(io, name)
        old_kind = types.SimpleNamespace(Input=without(kind.Input, dropped))
        old_kind.Output = getattr(kind, "Output", None)
        setattr(old, name, old_kind)
    for name in FACES:
        monkeypatch.setattr(pack[name], "io", old)
    return old


def test_every_node_has_its_schema_there(older, comfy_nodes):
    ours = [node for node in comfy_nodes.values() if (getattr(node, "__module__", None) or "").find("comfy_tome") >= 0]
    assert {node.define_schema().node_id for node in ours} >= {
        "ToMe", "ToMeRecord", "ToMeMap", "ToMeReport", "ToMeCompare",
    }  # fmt: skip
    for node in ours:
        made, newest = node.define_schema(), node.GET_SCHEMA()
        assert [one.id for one in made.inputs] == [one.id for one in newest.inputs]
        assert [one.optional for one in made.inputs] == [one.optional for one in newest.inputs]
        # A real one of that age has no such attributes at all.
        assert not any(getattr(one, "advanced", None) for one in made.inputs)
        assert not getattr(made, "search_aliases", None)


def test_only_what_is_known_to_be_newer_is_dropped(pack):
    def kind(name, default=None):
        return name, default

    make = pack["schema"].make
    assert make(kind, "seed", default=1, advanced=True, extra_dict={}) == ("seed", 1)
    with pytest.raises(TypeError, match="defualt"):
        make(kind, "seed", defualt=1)


@pytest.mark.parametrize("missing", ["the module", "a class"])
def test_an_older_one_gets_one_line_and_no_nodes(missing, monkeypatch, caplog):
    latest = types.ModuleType("comfy_api.latest")
    if missing == "a class":
        latest.ComfyExtension, latest.io, latest.ui = object, types.SimpleNamespace(ComfyNode=object), None
    monkeypatch.setitem(sys.modules, "comfy_api.latest", latest)
    name = "tome_on_an_old_comfyui"
    spec = importlib.util.spec_from_file_location(
        name, host.REPO / "__init__.py", submodule_search_locations=[str(host.REPO)]
    )
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, name, module)
    with caplog.at_level("WARNING", logger="ToMe"):
        spec.loader.exec_module(module)
    assert module.NODE_CLASS_MAPPINGS == {} and not hasattr(module, "comfy_entrypoint")
    assert caplog.messages == [
        "[ToMe] this ComfyUI is too old for ToMe: update it to 0.3.60 or newer. The nodes are not loaded."
    ]
    for loaded in [key for key in sys.modules if key.startswith(f"{name}.")]:
        monkeypatch.delitem(sys.modules, loaded)


def test_this_one_is_new_enough(pack):
    assert not pack["schema"].is_too_old()
    root = sys.modules[pack["schema"].__name__.rpartition(".comfy_tome")[0]]
    assert asyncio.iscoroutinefunction(root.comfy_entrypoint)
