"""A browser for each file of tests; a picture of the page and what its console said where a test fails."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from . import chromium as browsers
from . import shots

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


@pytest.fixture(scope="module")  # and no longer: tests/workflows starts one too, and playwright runs once in a process
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
