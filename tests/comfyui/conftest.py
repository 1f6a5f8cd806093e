"""Fixtures: one real ComfyUI for the session, small models of its classes, one server."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Iterator

import pytest

from . import host
from .versions import LACKS, version_of

sys.path.insert(0, str(host.REPO))
from installer.client import ComfyClient
from installer.server import ComfyServer, put_pack


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What an older ComfyUI lacks must fail there (versions.py)."""
    comfyui = host.comfyui_dir()
    version = None if comfyui is None else version_of(comfyui)
    for item in items if version is not None else ():
        for lack in LACKS:
            if "comfyui/" in item.nodeid and lack.concerns(version, item.nodeid):
                reason = f"ComfyUI before {lack.since}: {lack.why}"
                item.add_marker(pytest.mark.xfail(reason=reason, strict=True))


@pytest.fixture(scope="session")
def comfy_nodes() -> dict:
    """Every node class by id, ours among them."""
    if host.comfyui_dir() is None:
        pytest.skip("COMFYUI_DIR does not name a ComfyUI (`python install.py test` brings one)")
    return host.start()


@pytest.fixture(scope="session")
def caches(comfy_nodes):
    """Every node class by id, ComfyUI's own EasyCache and LazyCache among them."""
    import nodes

    file = host.comfyui_dir() / "comfy_extras" / "nodes_easycache.py"
    asyncio.run(nodes.load_custom_node(str(file), module_parent="comfy_extras"))
    return nodes.NODE_CLASS_MAPPINGS


@pytest.fixture(scope="session")
def sd15(comfy_nodes):
    return host.small_unet("SD15")


@pytest.fixture(scope="session")
def short(comfy_nodes):
    """Of sd15's kind, for what three layers show as well as ten."""
    return host.short_unet()


@pytest.fixture(scope="session")
def sdxl(comfy_nodes):
    return host.small_unet("SDXL")


@pytest.fixture(scope="session")
def tome(comfy_nodes):
    """tome(model, ratio=..., **options) -> the merged clone, through the node itself."""
    defaults = {
        "ratio": 0.5, "stride_x": 2, "stride_y": 2, "method": "sample", "seed": 0, "min_tokens": 0,
        "version": host.pack_module("nodes").version(),
    }  # fmt: skip

    def apply(model, **options):
        return host.run_node(comfy_nodes["ToMe"], model=model, **{**defaults, **options})

    return apply


@pytest.fixture
def merged_layers(monkeypatch):
    """What each merged layer was given and gave: (plan, call, q, k, v, start, out)."""
    real, found = host.pack_module("dit").DiTCall.serve, []

    def spy(self, call, plan, kind):
        out = real(self, call, plan, kind)
        found.append((plan, call, call.q, call.k, call.v, kind.start, out))
        return out

    monkeypatch.setattr(host.pack_module("dit").DiTCall, "serve", spy)
    return found


@pytest.fixture(scope="session")
def server(tmp_path_factory) -> Iterator[tuple[ComfyServer, ComfyClient]]:
    """A real server with this pack, the demo's model and the nodes of `install.py compare`, and its client."""
    if host.comfyui_dir() is None:
        pytest.skip("COMFYUI_DIR does not name a ComfyUI (`python install.py test` brings one)")
    base = tmp_path_factory.mktemp("comfyui")
    put_pack(base / "custom_nodes", host.REPO / "installer" / "compare" / "nodes", "tome-compare")
    started = ComfyServer(host.comfyui_dir(), base, environment={"TOME_DEMO": "1"})
    with started as client:
        yield started, client


@pytest.fixture(scope="session")
def client(server) -> ComfyClient:
    """Of the server, which is a process of its own."""
    return server[1]
