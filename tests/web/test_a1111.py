"""AUTOMATIC1111's page with the panel, in a real browser. By hand, or where A1111_DIR names a checkout that starts.

A1111_ARGS are the host's own arguments: on a CPU "--use-cpu all --no-half --skip-torch-cuda-test". The repository is
linked into its extensions for the test and taken out again. TOME_SCREENSHOTS=docs/images keeps a picture of the panel.
"""

from __future__ import annotations

import importlib.util
import os
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

REPO = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(REPO))
from installer import link

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]

# Small enough for a CPU, so that the panel's own floor of tokens must go.
SETTINGS = {"Sampling steps": "4", "Width": "256", "Height": "256", "Seed": "1"}
PROMPT = "a lighthouse on a rock"


def host_script() -> ModuleType:
    """tests/hosts/a1111.py, which knows how such a host is started."""
    spec = importlib.util.spec_from_file_location("tome_host_script", REPO / "tests" / "hosts" / "a1111.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # its dataclasses ask for their module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def address(chromium, tmp_path_factory) -> Iterator[str]:
    """Of the running host, this repository among its extensions."""
    named = os.environ.get("A1111_DIR")
    if not named:
        pytest.skip("A1111_DIR does not name an AUTOMATIC1111 that starts by itself")
    folder = link.find_host(Path(named), link.A1111)
    arguments = shlex.split(os.environ.get("A1111_ARGS", ""))
    before = (folder / link.A1111.extensions / link.A1111.name).exists()
    link.add(folder, link.A1111)
    try:
        server = host_script().Server(folder, arguments, tmp_path_factory.mktemp("a1111") / "host.log")
        try:
            yield f"http://127.0.0.1:{server.port}"
        finally:
            server.stop()
    finally:
        if not before:
            link.remove(folder, link.A1111)


@pytest.fixture
def page(address, new_page) -> Any:
    """The txt2img tab, ready, with a small picture asked for."""
    page = new_page(size=(1400, 1000))
    page.goto(address)
    page.locator("#txt2img_generate").wait_for()
    page.locator("#txt2img_prompt textarea").fill(PROMPT)
    for label, value in SETTINGS.items():
        field = page.locator("#tab_txt2img").get_by_label(label, exact=True).first
        field.fill(value)
        field.press("Tab")
    return page


def control(page: Any, name: str) -> Any:
    return page.locator(f"#script_txt2img_tome_{name}")


def slide(page: Any, name: str, share: float) -> None:
    """Take a slider's thumb where it is and let it go at `share` (0 to 1) of its range."""
    bar = control(page, name).locator("input[type=range]")
    bar.scroll_into_view_if_needed()
    box, thumb = bar.bounding_box(), 16
    low, high, now = (float(bar.evaluate(f"(bar) => bar.{part}")) for part in ("min", "max", "value"))

    def place(share: float) -> tuple[float, float]:
        return box["x"] + thumb / 2 + share * (box["width"] - thumb), box["y"] + box["height"] / 2

    page.mouse.move(*place((now - low) / (high - low)))
    page.mouse.down()
    page.mouse.move(*place(share), steps=6)
    page.mouse.up()


def value(page: Any, name: str) -> float:
    return float(control(page, name).locator("input[type=number]").input_value())


def generate(page: Any) -> tuple[str, str]:
    """Press Generate: the picture's address and the text under it."""
    picture = page.locator("#txt2img_gallery img").first
    before = picture.get_attribute("src") if picture.count() else ""
    page.locator("#txt2img_generate").click()
    shown = "[...document.querySelectorAll('#txt2img_gallery img')].some((i) => i.naturalWidth && i.src !== before)"
    page.wait_for_function(f"(before) => {shown}", arg=before, timeout=300_000)
    page.locator("#txt2img_interrupt").wait_for(state="hidden")
    return picture.get_attribute("src"), page.locator("#html_info_txt2img").first.inner_text()


def gallery(page: Any) -> int:
    """How many pictures the gallery holds."""
    return page.locator("#txt2img_gallery .thumbnail-item:not(.thumbnail-small)").count()


def shown_preset(page: Any) -> str:
    return control(page, "preset").locator("input:checked").evaluate("(radio) => radio.value")


def wait_for_preset(page: Any, name: str) -> None:
    checked = f"document.querySelector('#script_txt2img_tome_preset input:checked')?.value === '{name}'"
    page.wait_for_function(checked, timeout=20_000)


def test_presets_set_the_options_and_follow_them(page, shoot):
    control(page, "enabled").locator(".label-wrap").first.click()
    control(page, "ratio").wait_for()
    assert shown_preset(page) == "Balanced"
    for name, ratio, start in (("Fast", 0.9375, 0.1), ("Quality", 0.75, 0.2), ("Balanced", 0.75, 0.0)):
        control(page, "preset").get_by_label(name, exact=True).check()
        place = "#script_txt2img_tome_{} input[type=number]"
        for option, number in (("ratio", ratio), ("start", start)):
            page.wait_for_function(
                f"Number(document.querySelector('{place.format(option)}').value) === {number}", timeout=20_000
            )
        page.wait_for_timeout(1000)  # what the options' own events answer must not move it
        assert shown_preset(page) == name and value(page, "ratio") == ratio
    slide(page, "ratio", 0.5)
    wait_for_preset(page, "Custom")
    ratio = value(page, "ratio")
    assert ratio == pytest.approx(0.5, abs=0.03)
    page.wait_for_timeout(1000)
    assert value(page, "ratio") == ratio
    field = control(page, "ratio").locator("input[type=number]")
    field.fill("0.75")
    field.press("Tab")
    wait_for_preset(page, "Balanced")


def test_a_map_stands_beside_the_picture(page, shoot):
    control(page, "enabled").locator(".label-wrap").first.click()
    control(page, "advanced").locator(".label-wrap").click()
    field = control(page, "min_tokens").locator("input[type=number]")
    field.fill("0")
    field.press("Tab")
    control(page, "map").locator("input").check()
    for label in ("Width", "Height"):
        field = page.locator("#tab_txt2img").get_by_label(label, exact=True).first
        field.fill("512")
        field.press("Tab")
    generate(page)
    assert gallery(page) == 2
    page.locator("#txt2img_gallery .thumbnail-small").nth(1).click()
    page.wait_for_timeout(1000)
    assert "ToMe ratio: 0.75" in page.locator("#html_info_txt2img").first.inner_text()
    shoot(page.locator("#txt2img_gallery"), "a1111-map")


def test_panel_makes_a_picture_and_tells_it(page, shoot):
    panel = control(page, "enabled")
    panel.scroll_into_view_if_needed()
    assert not control(page, "ratio").is_visible()
    _, text = generate(page)
    assert PROMPT in text and "ToMe" not in text

    panel.locator(".label-wrap").first.click()  # opens it and switches it on
    control(page, "ratio").wait_for()
    slide(page, "ratio", 0.5)
    ratio = value(page, "ratio")
    assert ratio == pytest.approx(0.5, abs=0.03)
    control(page, "advanced").locator(".label-wrap").click()
    field = control(page, "min_tokens").locator("input[type=number]")
    field.fill("0")
    field.press("Tab")
    _, text = generate(page)
    assert f"ToMe ratio: {ratio:g}" in text and "ToMe min tokens: 0" in text
    assert gallery(page) == 1
    control(page, "advanced").locator(".label-wrap").click()
    field.wait_for(state="hidden")
    shoot(panel, "a1111")


def test_a_switch_that_would_be_refused_stays_until_it_is_off(page):
    control(page, "enabled").locator(".label-wrap").first.click()
    control(page, "advanced").locator(".label-wrap").click()
    switch = control(page, "mlp").locator("input")
    grey = "document.querySelector('#script_txt2img_tome_mlp input').disabled"
    page.wait_for_function(grey, timeout=20_000)
    field = control(page, "method").locator("input")
    field.fill("merge")
    field.press("Enter")
    page.wait_for_function(f"!{grey}", timeout=20_000)
    switch.check()
    control(page, "preset").get_by_label("Balanced", exact=True).check()
    page.wait_for_timeout(1500)
    assert switch.is_enabled() and switch.is_checked()
    switch.uncheck()
    page.wait_for_function(grey, timeout=20_000)
