"""ComfyUI's web page, handled as a person does: mouse, keys and files, with `window.app` to look and to find places."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from installer.client import ComfyClient
from installer.link import COMFYUI

from . import chromium

# A new user is shown templates first; the rest is out of the way of the graph.
SETTINGS = {
    "Comfy.TutorialCompleted": True,
    "Comfy.Minimap.Visible": False,
    "Comfy.Graph.CanvasInfo": False,
    "Comfy.RightSidePanel.IsOpen": False,
    "Comfy.VueNodes.Enabled": False,
    "Comfy.Node.AlwaysShowAdvancedWidgets": False,
}
CLOSE_OTHERS = """(async ({ openWorkflows, activeWorkflow, closeWorkflow }) => {
    for (const one of [...openWorkflows]) if (one.path !== activeWorkflow.path) await closeWorkflow(one);
})(app.extensionManager.workflow)"""
NODE = "const node = app.graph.nodes.find((node) => node.type === type); if (!node) throw Error(`no node ${type}`);"


class ComfyPage:
    """One open page of the server behind `client`."""

    def __init__(self, page: Any, client: ComfyClient, settings: Mapping[str, Any] = SETTINGS) -> None:
        self.page, self.client = page, client
        client.request("/settings", dict(settings))
        page.goto(client.url)
        page.wait_for_function("window.app?.vueAppReady && app.extensionManager && !app.extensionManager.spinner")
        self.clear()

    def renew(self) -> None:
        """As it was opened: one empty workflow, and no node under the mouse."""
        self.page.mouse.move(*self.empty_place())
        self.clear()
        self.page.evaluate(CLOSE_OTHERS)

    def wait(self, condition: str, argument: Any = None) -> None:
        """Until the JavaScript `condition` (an expression, or a function of `argument`) is true."""
        self.page.wait_for_function(condition, arg=argument)

    def ask(self, code: str, type: str, **values: Any) -> Any:
        """What the JavaScript `code` returns; it has `node`, the first of `type`, and `values` by their names."""
        names = ", ".join(["type", *values])
        return self.page.evaluate(f"({{{names}}}) => {{ {NODE} {code} }}", {"type": type, **values})

    # the graph

    def types(self) -> list[str]:
        return sorted(self.page.evaluate("app.graph.nodes.map((node) => node.type)"))

    def links(self) -> list[list[Any]]:
        """Every link as [from type, from slot, to type, to slot]."""
        return sorted(
            self.page.evaluate(
                "[...app.graph.links.values()].map((link) => [app.graph.getNodeById(link.origin_id).type, "
                "link.origin_slot, app.graph.getNodeById(link.target_id).type, link.target_slot])"
            )
        )

    def values(self, type: str) -> dict[str, Any]:
        """A node's widgets by name, without buttons, the hidden version and what the page shows below them."""
        shown = "node.widgets.filter((w) => w.type !== 'button' && !w.name.startsWith('$$') && w.name !== 'version')"
        return self.ask(f"return Object.fromEntries({shown}.map((w) => [w.name, w.value]))", type)

    def in_sight(self, type: str) -> list[str]:
        """The names of the widgets that the classic renderer draws."""
        return self.ask("return node.widgets.filter((w) => node.isWidgetVisible(w)).map((w) => w.name)", type)

    def all_values(self) -> dict[str, dict[str, Any]]:
        """The widgets of all nodes that have some, by the node's type."""
        found = self.page.evaluate("app.graph.nodes.filter((n) => n.widgets?.length).map((n) => n.type)")
        return {type: self.values(type) for type in found}

    def set_value(self, type: str, widget: str, value: Any) -> None:
        code = "const w = node.widgets.find((w) => w.name === widget); w.value = value; w.callback?.(value)"
        self.ask(code, type, widget=widget, value=value)

    def add(self, type: str, x: float, y: float) -> None:
        """A node at x, y of an empty canvas, without a search."""
        code = "const node = LiteGraph.createNode(type); node.pos = [x, y]; app.graph.add(node); "
        self.page.evaluate(f"({{type, x, y}}) => {{ {code} }}", {"type": type, "x": x, "y": y})

    # places, in pixels of the page

    def place(self, type: str, x: float, y: float) -> list[float]:
        """Where the point x, y of a node is seen; 0, 0 is its upper left corner, below the title."""
        return self._resting("[node.pos[0] + x, node.pos[1] + y]", type, x=x, y=y)

    def on_slider(self, type: str, widget: str, share: float) -> list[float]:
        """Where a slider of the classic renderer stands at `share` (0 to 1) of its range."""
        bar = "node.widgets.find((w) => w.name === widget)"
        point = f"[node.pos[0] + 15 + share * (node.size[0] - 30), node.pos[1] + {bar}.y + 10]"
        return self._resting(point, type, widget=widget, share=share)

    def _resting(self, point: str, type: str, **values: Any) -> list[float]:
        """Where a point of the canvas is seen, once it has been there for three frames."""
        code = f"""
            const place = () => app.canvasPosToClientPos({point}), frame = () => new Promise(requestAnimationFrame);
            return (async () => {{
                for (let last = place(), same = 0; ; ) {{
                    await frame();
                    const now = place();
                    same = String(now) === String(last) ? same + 1 : 0;
                    last = now;
                    if (same === 3) return now;
                }}
            }})();"""
        return self.ask(code, type, **values)

    def empty_place(self) -> tuple[float, float]:
        """Near the lower left corner of the canvas, where these tests put no node."""
        box = self.page.locator("#graph-canvas").bounding_box()
        return box["x"] + 0.15 * box["width"], box["y"] + 0.85 * box["height"]

    # what a person does

    def drag(self, start: list[float], end: list[float]) -> None:
        mouse = self.page.mouse
        mouse.move(*start)
        mouse.down()
        mouse.move((start[0] + end[0]) / 2, end[1], steps=4)
        mouse.move(*end, steps=4)
        mouse.up()

    def load(self, file: Path, types: list[str]) -> None:
        """Drop a file and wait for its nodes."""
        chromium.drop(self.page, file, *self.empty_place())
        self._wait_for_types(types)

    def open_by_menu(self, file: Path, types: list[str]) -> None:
        item = self._file_menu()
        with self.page.expect_file_chooser() as chooser:
            item("Open").click()
        chooser.value.set_files(file)
        self._wait_for_types(types)

    def export(self, file: Path) -> None:
        """Menu, File, Export: the workflow as JSON."""
        self._file_menu()("Export").click()
        asked = self.page.get_by_role("dialog").get_by_role("textbox")
        asked.fill(file.stem)
        with self.page.expect_download() as download:
            asked.press("Enter")
        download.value.save_as(file)

    def clear(self) -> None:
        """A new, empty workflow."""
        # Kept by the page while it is waited for: a browser may collect a promise that a test alone waits for.
        new = "window.blank = app.extensionManager.command.execute('Comfy.NewBlankWorkflow')"
        self.page.evaluate(f"{new}.then(() => {{ window.isBlank = true }}); window.isBlank = false")
        self.wait("window.isBlank")
        self._wait_for_types([])

    def run(self, shown_in: str) -> None:
        """Press Run and wait until the node of type `shown_in` shows a picture."""
        self.page.get_by_test_id("queue-button").click()
        code = "(type) => app.graph.nodes.find((n) => n.type === type)?.imgs?.some((i) => i.complete && i.naturalWidth)"
        self.wait(code, shown_in)

    def search(self, words: str, name: str) -> Any:
        """Double-click the empty canvas and type: what is found of our pack by that name, as a Locator."""
        box = self.page.get_by_role("search").get_by_role("combobox")
        self._until(lambda: self.page.mouse.dblclick(*self.empty_place(), delay=30), box)
        box.fill(words)
        return self.page.get_by_role("search").get_by_role("option", name=re.compile(f"^{name} {COMFYUI.name} "))

    def close_search(self) -> None:
        self.page.keyboard.press("Escape")
        self.page.get_by_role("search").wait_for(state="hidden")

    def help(self, type: str) -> Any:
        """Select a node and press "Node Info": what the panel shows, as a Locator."""
        button = self.page.get_by_test_id("info-button")
        self._until(lambda: self.page.mouse.click(*self.place(type, 60, -12)), button)
        button.click()
        return self.page.locator(".node-help-content")

    def _file_menu(self) -> Callable[[str], Any]:
        self.page.locator(".comfy-menu-button-wrapper").click()
        items = self.page.get_by_role("menuitem")
        items.get_by_text("File", exact=True).hover()
        return lambda name: items.get_by_text(name, exact=True)

    def _wait_for_types(self, types: list[str]) -> None:
        self.wait("(types) => String(app.graph.nodes.map((node) => node.type).sort()) === String(types)", sorted(types))
        # While it loads, and a moment longer, a veil takes all clicks.
        self.wait("!app.extensionManager.spinner && !document.querySelector('.p-blockui-mask')")

    @staticmethod
    def _until(act: Callable[[], None], appears: Any, tries: int = 10) -> None:
        """Act again where the page was too busy to take a fast double-click for one."""
        for left in reversed(range(tries)):
            act()
            try:
                appears.wait_for(timeout=5_000)
                return
            except Exception:
                if not left:
                    raise
