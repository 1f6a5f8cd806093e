"""A headless Chromium of the system's, driven by playwright. Nothing is downloaded, and no page reaches outside."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome", "microsoft-edge")
PLACES = (
    "/Applications/Chromium.app/Contents/MacOS/Chromium",
    "/Applications/Google Chrome.app/Contents/MacOS/Google Chrome",
    "C:/Program Files/Google/Chrome/Application/chrome.exe",
)
ARGUMENTS = (
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--no-proxy-server",
    "--force-color-profile=srgb",
    # Names and addresses alike, so that no page reaches outside. Asked about each request the browser would cache none.
    "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1, EXCLUDE localhost",
)
PATIENCE = 60_000  # ms: for a machine with many tests at once


def find() -> str | None:
    """The browser to use: TOME_CHROMIUM, else one of the usual names on PATH, else one of the usual places.

    Raises FileNotFoundError when TOME_CHROMIUM names a file that is not there.
    """
    named = os.environ.get("TOME_CHROMIUM")
    if named:
        if not Path(named).is_file():
            raise FileNotFoundError(f"TOME_CHROMIUM is {named}: there is no such file")
        return named
    found = filter(None, map(shutil.which, NAMES))
    return next(found, None) or next((place for place in PLACES if Path(place).is_file()), None)


@contextmanager
def started(executable: str) -> Iterator[Any]:
    """A playwright Browser with an empty profile of its own; gone after."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=executable, headless=True, args=list(ARGUMENTS))
        try:
            yield browser
        finally:
            browser.close()


def new_page(browser: Any, size: tuple[int, int] = (1400, 800), locale: str = "en-US") -> Any:
    """A page in a context of its own (no cookies, no storage), `size` in pixels."""
    context = browser.new_context(viewport={"width": size[0], "height": size[1]}, locale=locale, accept_downloads=True)
    page = context.new_page()
    page.set_default_timeout(PATIENCE)
    return page


def drop(page: Any, file: Path, x: float, y: float) -> None:
    """Drag `file` from outside the browser over the page and let go at x, y, as the desktop does it."""
    session = page.context.new_cdp_session(page)
    data = {"items": [], "files": [str(file)], "dragOperationsMask": 1}
    for kind in ("dragEnter", "dragOver", "drop"):
        session.send("Input.dispatchDragEvent", {"type": kind, "x": x, "y": y, "data": data})
    session.detach()
