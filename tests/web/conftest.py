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
def new_page(chromium, request, tmp_path) -> Iterator[Callable[..., Any]]:
    """new_page(size=..., locale=...) opens one; all are closed after the test."""
    pages: list[tuple[Any, list[str]]] = []

    def make(**options: Any) -> Any:
        page, said = browsers.new_page(chromium, **options), []
        page.on("console", lambda message: said.append(message.text) if message.type == "error" else None)
        page.on("pageerror", lambda error: said.append(str(error)))
        pages.append((page, said))
        return page

    yield make
    for number, (page, said) in enumerate(pages):
        if request.node.stash.get(FAILED, False):
            picture = tmp_path / f"failed-{number}.png"
            page.screenshot(path=picture)
            print(f"the page when the test failed: {picture}", *said[-10:], sep="\n")
        page.context.close()


@pytest.fixture
def shoot() -> Callable[..., None]:
    """shoot(page or locator, name, clip=...) keeps a picture where TOME_SCREENSHOTS names a folder for it."""
    folder = os.environ.get("TOME_SCREENSHOTS")

    def take(page: Any, name: str, **options: Any) -> None:
        if folder:
            shots.save(page.screenshot(animations="disabled", **options), Path(folder) / f"screen-{name}.png")

    return take
