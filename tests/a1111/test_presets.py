"""The presets: in the panel, where a control sets other controls and shows what they are, and through the API."""

from __future__ import annotations

import pytest

from . import variants
from .host import FIRST, VERSION


@pytest.fixture
def keeps_self(monkeypatch):
    """An attention that keeps own tokens, as the presets want: else a picture's text tells that they were not kept."""
    from ldm.modules.attention import CrossAttention

    monkeypatch.setattr(CrossAttention, "forward", variants.sdp)


@pytest.fixture
def panel(host, tome):
    """(the preset's control, the other controls by name) of txt2img."""
    controls = dict(zip(tome.options.NAMES, host.tabs["txt2img"].inputs[1:], strict=True))
    preset = controls["ratio"].listeners["change"][0][2][0]
    assert preset.label == "Preset"
    return preset, controls


def _presets(tome):
    return {name: preset.options for name, preset in tome.core.methods.PRESETS.items()}


def test_the_control_is_none_of_the_scripts_arguments(host, panel, tome):
    preset, controls = panel
    assert preset not in controls.values() and preset not in [field[0] for field in _script(host).infotext_fields]
    assert "preset" not in tome.options.NAMES
    assert tuple(preset.choices) == (*_presets(tome), "Custom") and preset.value == "Balanced"
    assert preset.do_not_save_to_config and preset.elem_id not in [control.elem_id for control in controls.values()]


def _script(host):
    return host.tabs["txt2img"].scripts[0]


def test_choosing_one_sets_its_options_and_no_others(panel, tome):
    preset, controls = panel
    for name, options in [*_presets(tome).items()] * 2:
        before = {name: control.value for name, control in controls.items() if name not in options}
        preset.choose(name)
        assert {option: controls[option].value for option in options} == options and preset.value == name
        assert {name: controls[name].value for name in before} == before


def test_moving_an_option_shows_what_it_is(panel):
    preset, controls = panel
    controls["ratio"].choose(0.5)
    assert preset.value == "Custom" and controls["ratio"].value == 0.5
    controls["ratio"].choose(0.75)
    assert preset.value == "Balanced"
    controls["own_token"].choose(False)
    assert preset.value == "Custom"
    controls["start"].choose(0.2)
    assert preset.value == "Custom"
    controls["own_token"].choose(True)
    assert preset.value == "Quality"
    controls["method"].choose("merge")
    assert preset.value == "Custom"


@pytest.mark.parametrize("value", [None, "", 7, "x"])
def test_a_value_that_is_not_possible_is_custom(panel, value):
    preset, controls = panel
    controls["ratio"].choose(value)
    assert preset.value == "Custom" and controls["ratio"].value == value


def test_choosing_custom_changes_no_option(panel):
    preset, controls = panel
    before = {name: control.value for name, control in controls.items()}
    preset.choose("Custom")
    assert {name: control.value for name, control in controls.items()} == before and preset.value == "Balanced"


def test_events_end(panel):
    """The function of the choice, and one for each of two options that changed: no more."""
    preset, controls = panel
    assert preset.choose("Fast") == 3
    assert controls["ratio"].choose(0.5) == 1


def test_a_pasted_text_shows_its_preset(host, panel, tome, keeps_self):
    preset, controls = panel
    *fields, _ = _script(host).infotext_fields
    read = dict(zip(("enabled", *tome.infotext.LABELS), fields, strict=True))
    for name, options in _presets(tome).items():
        controls["ratio"].paste(0.1)
        assert preset.value == "Custom"
        _, p = host.generate([{"preset": name, "min_tokens": 0}], steps=8)
        for option in options:
            text = {label: str(value) for label, value in p.extra_generation_params.items()}
            controls[option].paste(read[option][1](text))
        assert preset.value == name


def test_the_panel_starts_with_the_settings_preset(host):
    host.opts.data.update(tome_ratio=0.9375, tome_start=0.1)
    host.start()
    assert host.tabs["img2img"].inputs[2].listeners["change"][0][2][0].value == "Fast"
    host.opts.data.update(tome_img2img_ratio=0.5)
    host.start()
    assert host.tabs["img2img"].inputs[2].listeners["change"][0][2][0].value == "Custom"


@pytest.mark.parametrize("name", ["Quality", "Balanced", "Fast"])
def test_a_request_may_name_a_preset(host, tome, name, keeps_self):
    _, p = host.generate([{"preset": name, "min_tokens": 0}], steps=8)
    chosen = tome.options.settings_from(tome.infotext.read(p.extra_generation_params))
    assert chosen.config.preset == name


def test_what_is_named_beside_a_preset_wins(host, keeps_self):
    _, p = host.generate([{"preset": "Fast", "ratio": 0.5, "min_tokens": 0}], steps=8)
    assert p.extra_generation_params == {
        "ToMe ratio": 0.5, "ToMe method": "sample", "ToMe start": 0.1, "ToMe min tokens": 0,
        "ToMe decisions": FIRST, "ToMe version": VERSION,
    }  # fmt: skip


def test_a_preset_wins_over_the_settings(host, keeps_self):
    host.opts.data.update(tome_ratio=0.25, tome_method="merge", tome_min_tokens=256)
    host.start()
    _, p = host.generate([{"preset": "Balanced"}])
    assert p.extra_generation_params == {
        "ToMe ratio": 0.75, "ToMe method": "sample", "ToMe min tokens": 256,
        "ToMe decisions": " ".join(FIRST.split()[:2]), "ToMe version": VERSION,
    }  # fmt: skip


# --- what is grey -----------------------------------------------------------------------------------------------------


def _grey(controls):
    return {name for name, control in controls.items() if not getattr(control, "interactive", True)}


def test_a_switch_that_would_be_refused_stays_until_it_is_off(panel, tome):
    """Grey and on it could not be switched off, and each picture would be made without ToMe."""
    preset, controls = panel
    assert {"cross_attention", "mlp"} <= _grey(controls)
    controls["method"].choose("merge")
    assert not _grey(controls) & {"cross_attention", "mlp"} and "own_token" in _grey(controls)
    controls["mlp"].choose(True)
    preset.choose("Balanced")
    assert "cross_attention" in _grey(controls) and "mlp" not in _grey(controls)
    controls["mlp"].choose(False)
    assert "mlp" in _grey(controls)


def test_the_number_is_grey_while_each_image_has_its_own(panel):
    _, controls = panel
    assert "seed" in _grey(controls)
    controls["seed_rule"].choose("fixed")
    assert "seed" not in _grey(controls)
    controls["seed_rule"].choose("image")
    assert "seed" in _grey(controls)


@pytest.mark.parametrize("saved", [{}, {"method": "merge", "mlp": True, "seed_rule": "fixed"}])
def test_the_panel_starts_as_its_values_are(host, saved):
    for name, value in saved.items():
        host.opts.data[f"tome_{name}"] = value
    host.start()
    tome_names = ("seed", "mlp", "stride_x")
    controls = {control.elem_id.rpartition("tome_")[2]: control for control in host.tabs["txt2img"].inputs[1:]}
    assert _grey({name: controls[name] for name in tome_names}) == (set() if saved else set(tome_names))
