"""A browser and open pages for these tests; a picture of the page and what its console said where a test fails."""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from . import chromium as browsers
from . import shots
from .comfy_page import SETTINGS, ComfyPage

SIZE = (1480, 760)  # of ComfyUI's page, in pixels
FAILED = pytest.StashKey[bool]()


def failed(test: pytest.Item) -> bool:
    """Whether it has."""
    return test.stash.get(FAILED, False)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    report = yield
    if report.when == "call":
        item.stash[FAILED] = report.failed
    return report


@pytest.fixture(scope="package")  # and no longer: while playwright runs no other test can start an event loop
def chromium() -> Iterator[Any]:
    """The browser; skipped, with what to install, where there is none."""
    if importlib.util.find_spec("playwright") is None:
        pytest.skip("no playwright (`python install.py test` brings it, else `pip install playwright`)")
    executable = browsers.find()
    if executable is None:
        pytest.skip("no Chromium: install it (Debian: apt install chromium) or name one in TOME_CHROMIUM")
    with browsers.started(executable) as browser:
        yield browser


@pytest.fixture
def watch(request, tmp_path) -> Iterator[Callable[..., Any]]:
    """watch(page) -> page. Where the test fails it is shown, with what it said. It is closed then, or if not kept."""
    pages: list[tuple[Any, bool, list[str]]] = []

    def add(page: Any, keep: bool = False) -> Any:
        said: list[str] = []
        page.on("console", lambda message: said.append(message.text) if message.type == "error" else None)
        page.on("pageerror", lambda error: said.append(str(error)))
        pages.append((page, keep, said))
        return page

    yield add
    for number, (page, keep, said) in enumerate(pages):
        if failed(request.node):
            picture = tmp_path / f"failed-{number}.png"
            page.screenshot(path=picture)
            print(f"the page when the test failed: {picture}", *said[-10:], sep="\n")
        if not keep or failed(request.node):
            page.context.close()


@pytest.fixture(scope="package")
def base(pages_server: tuple[Path, Any]) -> Path:
    """The server's own folder."""
    return pages_server[0]


@pytest.fixture(scope="package")
def client(chromium, request) -> Any:
    """Of a real server (support/pages_server.py)."""
    pytest.importorskip("comfyui_frontend_package", reason="no comfyui-frontend-package, which is ComfyUI's page")
    return request.getfixturevalue("pages_server")[1]


@pytest.fixture(scope="package")
def opened(chromium) -> dict[Any, ComfyPage]:
    """The pages that `visit` keeps, by what they were opened with."""
    return {}


@pytest.fixture
def visit(client, chromium, opened, watch, request) -> Iterator[Callable[..., ComfyPage]]:
    """visit(settings, locale=...) opens the page with an empty workflow.

    That takes a processor 8 s, so a page is kept for other tests: of English each, of other languages the last one.
    """
    used = set()

    def visit(settings: dict[str, Any] | None = None, locale: str = "en-US") -> ComfyPage:
        settings = {**SETTINGS, **(settings or {})}
        key = locale, tuple(settings.items())
        if key not in opened:
            for other in [other for other in opened if other[0] != "en-US"]:
                opened.pop(other).page.context.close()
            opened[key] = ComfyPage(browsers.new_page(chromium, SIZE, locale), client, settings)
        if key not in used:
            watch(opened[key].page, keep=True)
            used.add(key)
        opened[key].renew()
        return opened[key]

    yield visit
    for key in used if failed(request.node) else ():
        del opened[key]  # which is closed


@pytest.fixture
def new_page(chromium, watch) -> Callable[..., Any]:
    """new_page(size=..., locale=...) opens one; all are closed after the test."""
    return lambda **options: watch(browsers.new_page(chromium, **options))


@pytest.fixture
def shoot() -> Callable[..., None]:
    """shoot(page or locator, name, clip=...) keeps a picture where TOME_SCREENSHOTS names a folder for it."""
    folder = os.environ.get("TOME_SCREENSHOTS")

    def take(page: Any, name: str, **options: Any) -> None:
        if folder:
            shots.save(page.screenshot(animations="disabled", **options), Path(folder) / f"screen-{name}.png")

    return take
